"""What windows take of a training's time, and a word where that is much."""

from __future__ import annotations

import math
from time import perf_counter

MUCH, FAIR = 0.10, 0.02  # shares of the time between two windows
LEAST_S = 1.0  # of a window that is spoken of: tiny models have tiny steps


class Cost:
    """Compares each training window with the time since the one before it.

    Args:
        every_n_steps: Of the windows; the last step's may follow another one sooner.
    """

    def __init__(self, every_n_steps: int) -> None:
        self._every_n_steps = every_n_steps
        self._before: tuple[int, float] | None = None

    def of_window(self, step: int | None, window_s: float) -> str:
        """After a window, solved while the training waited: a sentence if it took much, else nothing.

        Args:
            step: The optimizer step that it measured, if it has one.
            window_s: What it took, seconds.
        """
        if step is None:
            return ""
        before, now = self._before, perf_counter()
        self._before = step, now
        if before is None or step - before[0] < self._every_n_steps or window_s < LEAST_S:
            return ""
        return said(window_s, now - before[1], step - before[0])


def said(window_s: float, elapsed_s: float, num_steps: int) -> str:
    """The sentence, with the interval that would make windows :data:`FAIR`; empty where they are below :data:`MUCH`.

    Args:
        window_s: Of one window, seconds.
        elapsed_s: Since the end of the window before, seconds, with this one.
        num_steps: Optimizer steps in it.
    """
    if window_s <= MUCH * elapsed_s:
        return ""
    step_s = max((elapsed_s - window_s) / num_steps, 1e-9)
    wanted = window_s * (1 - FAIR) / FAIR / step_s
    unit = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    return (
        f"a window took {window_s:.1f} s of the {elapsed_s:.1f} s since the last one ({window_s / elapsed_s:.0%}): "
        f"`every_n_steps={math.ceil(wanted / unit) * unit}` makes it {FAIR:.0%}; `soft='approx'` (from 1,024 features "
        "on) and `num_jackknife_groups=1` (no unbiased soft rank) make windows shorter."
    )
