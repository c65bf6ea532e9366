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


def paired_microseconds(
    own: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]], steps: int
) -> dict[str, Any]:
    """Median difference per step of neighbouring turns in CPU time, with a 95 % interval of the median (by ranks)."""
    apart = sorted(1e6 * (mine - other) / steps for (mine, _), (other, _) in zip(own, base, strict=True))
    half = 0.98 * math.sqrt(len(apart))
    low, high = max(int(len(apart) / 2 - half), 0), min(math.ceil(len(apart) / 2 + half), len(apart) - 1)
    return {"microseconds": statistics.median(apart), "ci95": [apart[low], apart[high]], "pairs": len(apart)}


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


def report(
    name: str,
    times: dict[str, list[tuple[float, float]]],
    tiny: tuple[dict[str, list[tuple[float, float]]], int],
    base: str,
    proof: float,
    window: float,
    steps: int,
) -> Any:
    """Findings, and a text of them.

    Args:
        name: Headline.
        times: (CPU, wall) seconds of turns of ``steps`` steps of the model.
        tiny: The same of a model with as many layers in which a step is all overhead, and the steps of its turns: what
            we add does not depend on the size of the layers, and there it is not lost in the noise.
        base: The row without us.
        proof: CPU seconds of proving the layout.
        window: CPU seconds of all that windows did meanwhile.
        steps: Of a turn.
    """
    step_ms = 1e3 * statistics.median(cpu for cpu, _ in times[base][1:]) / steps
    found = {}
    rows = [
        "| what | CPU, of none, median [95 %] | added, CPU us per step | of this step | limit |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (row for row in times if row != base):
        ratio = paired_ratios(times[row][1:], times[base][1:])
        added = paired_microseconds(tiny[0][row][1:], tiny[0][base][1:], tiny[1])
        share = added["microseconds"] / 1e3 / step_ms
        found[row] = {**ratio, "added": added, "share": share}
        rows.append(
            f"| {row} | {ratio['ratio']:.4f} [{ratio['ci95'][0]:.4f}, {ratio['ci95'][1]:.4f}] "
            f"| {added['microseconds']:.0f} [{added['ci95'][0]:.0f}, {added['ci95'][1]:.0f}] "
            f"| {1 + share:.5f} | {UNARMED_LIMIT} |"
        )
    share = proof / window
    lines = [f"# {name}", "", *rows, "", f"- one step without us: {step_ms:.1f} ms of CPU time"]
    lines.append(f"- proving the layout: {100 * share:.2f} % of a window's CPU time (limit {100 * PROOF_LIMIT:g} %)")
    return {"unarmed": found, "proof_share_of_window": share, "step_cpu_ms": step_ms}, "\n".join(lines)
