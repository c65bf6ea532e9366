"""What a run costs: CPU and wall seconds of every process that worked on it, lost work included."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from functools import cache
from typing import Any


@cache
def started() -> float:
    """Monotonic time of this process's first call, with which a worker begins."""
    return time.monotonic()


def with_cost(old: Mapping[str, Any]) -> dict[str, Any]:
    """The cost fields of a progress file, with this process's entry made up to date.

    Args:
        old: What the file holds: earlier starts of the same run keep their entries.

    Returns:
        ``starts`` (one entry per process), ``cpu_s`` and ``wall_s`` (their sums). CPU is that of the process and of its
        ended children; other ranks of a run on several devices are not in it.
    """
    process = f"{os.getpid()}@{started():.3f}"
    mine = {"process": process, "cpu_s": round(cpu_seconds(), 2), "wall_s": round(time.monotonic() - started(), 2)}
    starts = [*(start for start in old.get("starts", []) if start.get("process") != process), mine]
    totals = {name: round(sum(float(start[name]) for start in starts), 2) for name in ("cpu_s", "wall_s")}
    return {"starts": starts, **totals}


def cpu_seconds() -> float:
    """User and system time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(own.ru_utime + own.ru_stime for own in used)
