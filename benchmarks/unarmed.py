"""The mode ``--unarmed`` of ``bench_overhead``: what a step costs between windows, and a window's proof of its layout.

Between windows a hook is one ``if``; the difference is far below the noise of a busy machine. So turns of a few steps,
with and without us, follow each other in one process in changing order, and the ratio of neighbours is what counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

UNARMED_LIMIT, PROOF_LIMIT = 1.005, 0.02


def paired_ratios(own: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median ratio of neighbouring turns, by CPU time, with a 95 % interval of the median (by ranks)."""
    ratios = sorted(mine / other for (mine, _), (other, _) in zip(own, base, strict=True))
    half = 0.98 * math.sqrt(len(ratios))
    low, high = max(int(len(ratios) / 2 - half), 0), min(math.ceil(len(ratios) / 2 + half), len(ratios) - 1)
    return {"ratio": statistics.median(ratios), "ci95": [ratios[low], ratios[high]], "pairs": len(ratios)}


class Clock:
    """CPU seconds of a thread inside functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, owner: Any, name: str) -> None:
        """Time a method of an object or class, nested calls once."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began, self._depth = time.thread_time(), self._depth + 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += (time.thread_time() - began) * (self._depth == 0)

        setattr(owner, name, timed)


def report(name: str, times: dict[str, list[tuple[float, float]]], base: str, proof: float, window: float) -> Any:
    """Findings, and a text of them."""
    found = {row: paired_ratios(values[1:], times[base][1:]) for row, values in times.items() if row != base}
    share = proof / window
    step_ms = 1e3 * statistics.median(cpu for cpu, _ in times[base][1:])
    lines = [f"# {name}", "", "| what | CPU, of none, median [95 %] | pairs | limit |", "|---|---:|---:|---:|"]
    for row, values in found.items():
        low, high = values["ci95"]
        lines.append(f"| {row} | {values['ratio']:.4f} [{low:.4f}, {high:.4f}] | {values['pairs']} | {UNARMED_LIMIT} |")
    lines += ["", f"- one turn without us: {step_ms:.1f} ms of CPU time"]
    lines.append(f"- proving the layout: {100 * share:.2f} % of a window's CPU time (limit {100 * PROOF_LIMIT:g} %)")
    return {"unarmed": found, "proof_share_of_window": share, "turn_cpu_ms": step_ms}, "\n".join(lines)
