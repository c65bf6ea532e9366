"""Where two lines meet: the set of widths at which the test of "they meet here" does not refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.linear import LEVEL
from lightning_spectral.analysis.strata import SeedFit

FloatArray = NDArray[np.float64]
NAN: Final = float("nan")
_FAR: Final = 4.0  # a crossover further outside the measured widths than this factor is no number
_GRID: Final = 25
_NEAR: Final = 2.0 ** -np.arange(10)  # the test is sharpest in the middle, and may refuse a narrow stretch there only


@dataclass(frozen=True)
class Crossover:
    """Where two lines meet: width, ends of its 95 % set (0 and infinity for an open end, NaN for no set), a remark."""

    width: float
    low: float
    high: float
    note: str


def crossover(fit: SeedFit) -> Crossover:
    """All widths at which the test of "the lines meet here" does not refuse: Fieller's set, for any error model.

    Args:
        fit: ln(a / b) at its widths and seeds.
    """
    design = fit.design
    slope, center, at = float(design.slope @ fit.y), float(design.level @ fit.y), design.x_mean
    reach = (float(design.x.min()) - at, float(design.x.max()) - at)
    low, high = reach[0] - math.log(_FAR), reach[1] + math.log(_FAR)
    best = -center / slope if slope else math.inf
    near = low <= best <= high
    width = math.exp(at + best) if near else NAN
    grid = np.concatenate([np.linspace(low, high, _GRID), [0.0], low * _NEAR, high * _NEAR])
    grid = np.unique(np.append(grid, best) if near else grid)
    kept = _p_at(fit, grid) >= 1 - LEVEL
    if kept.all():
        return Crossover(width, 0.0, math.inf, "any width may be the crossover")
    if not kept.any():
        return Crossover(width, NAN, NAN, f"the lines do not meet within {_FAR:g} times the measured widths")
    begins, ends = (_edge(fit, grid, kept, step) for step in (1, -1))
    if kept[0] and kept[-1]:
        text = f"below {math.exp(at + ends):.4g} or above {math.exp(at + begins):.4g}, if anywhere"
        return Crossover(width, NAN, NAN, text)
    notes = ["open below"] * bool(kept[0]) + ["open above"] * bool(kept[-1])
    if not near or not reach[0] <= best <= reach[1]:
        notes.append("outside the measured widths")
    first = 0.0 if kept[0] else math.exp(at + begins)
    return Crossover(width, first, math.inf if kept[-1] else math.exp(at + ends), "; ".join(notes))


def _p_at(fit: SeedFit, distances: FloatArray) -> FloatArray:
    """P of "the lines meet at this ln distance from ``x_mean``"."""
    coefficients = fit.design.at(distances)
    return fit.uncertainty(coefficients).p_value(coefficients @ fit.y)


def _edge(fit: SeedFit, grid: FloatArray, kept: NDArray[np.bool_], step: int) -> float:
    """Where the set begins (step 1, its first begin) or ends (-1, its last end), between two points of the grid."""
    steps = np.flatnonzero(np.diff(kept.astype(int)) == step)
    if not len(steps):
        return NAN
    k = int(steps[0] if step == 1 else steps[-1])
    low, high = float(grid[k]), float(grid[k + 1])
    for _ in range(4):  # a sixteenth of the interval each
        fine = np.linspace(low, high, 17)
        inside = _p_at(fit, fine) >= 1 - LEVEL
        j = int(np.flatnonzero(np.diff(inside.astype(int)) == step)[0])
        low, high = float(fine[j]), float(fine[j + 1])
    return 0.5 * (low + high)
