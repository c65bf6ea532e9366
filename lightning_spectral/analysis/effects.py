"""Which shifts the exponent more, the optimizer or the architecture?

The tempting answer takes the best of four optimizers and sets it against one change of architecture; the maximum of
four noisy numbers is large even when nothing is true. Here both factors are judged by the same yardstick, the mean
over ALL pairs of levels of the squared shift, minus what noise alone adds to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FloatArray = NDArray[np.float64]
SIMULATIONS: Final = 4000


@dataclass(frozen=True)
class EffectComparison:
    """Size of two factors' shifts of the exponent.

    Attributes:
        rows: Levels of the first factor (e.g. optimizers).
        columns: Levels of the second (e.g. head counts).
        row_shift: Root mean square shift of beta between two levels of the first factor, noise removed.
        column_shift: Same for the second.
        difference: Mean squared shift, rows minus columns; unbiased.
        ci_low: Lower end of its 95 % interval.
        ci_high: Upper end.
        p: Two-sided p of "equally large".
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_shift: float
    column_shift: float
    difference: float
    ci_low: float
    ci_high: float
    p: float


def mean_squared_shifts(beta: FloatArray, variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Unbiased mean squared shift between two rows and between two columns of ``beta`` (..., rows, columns)."""

    def shift(values: FloatArray, noise: FloatArray) -> FloatArray:
        pairs = list(itertools.combinations(range(values.shape[-2]), 2))
        a, b = np.array(pairs).T
        squared = (values[..., a, :] - values[..., b, :]) ** 2 - noise[a, :] - noise[b, :]
        return np.asarray(squared.mean(axis=(-2, -1)))

    return shift(beta, variance), shift(np.swapaxes(beta, -1, -2), variance.T)


def compare_effects(slopes: Mapping[tuple[str, str], tuple[float, float, float]], seed: int = 0) -> EffectComparison:
    """Compare the two factors of a grid of fits.

    Args:
        slopes: (first level, second level) -> (beta, standard error, degrees of freedom).
        seed: Seed of the simulated interval.

    Raises:
        ValueError: If a factor has fewer than two levels, a combination is missing, or a fit has fewer than 5 widths.
    """
    rows = tuple(dict.fromkeys(row for row, _ in slopes))
    columns = tuple(dict.fromkeys(column for _, column in slopes))
    if len(rows) < 2 or len(columns) < 2:
        raise ValueError(f"both factors need two levels, got {len(rows)} ({rows}) and {len(columns)} ({columns}).")
    missing = [(r, c) for r in rows for c in columns if (r, c) not in slopes]
    if missing:
        raise ValueError(f"no fit for {missing[0][0]} with {missing[0][1]}; run it, or leave that level out.")
    grid = np.array([[slopes[r, c] for c in columns] for r in rows])
    beta, se, df = grid[..., 0], grid[..., 1], grid[..., 2]
    by_row, by_column = mean_squared_shifts(beta, se**2)
    difference = float(by_row - by_column)
    if not (df > 2).all():
        raise ValueError(f"effects need fits with more than 2 degrees of freedom (5 widths), got {int(df.min())}.")
    # how the statistic scatters when every slope is redrawn from its own t: its spread, put around the estimate
    uniform = np.random.default_rng(seed).uniform(size=(SIMULATIONS, *beta.shape))
    drawn = beta + se * stdtrit(df, uniform)
    spread_row, spread_column = mean_squared_shifts(drawn, se**2 * (1 + df / (df - 2)))
    deviation = (spread_row - spread_column) - difference
    low, high = np.quantile(deviation, [0.025, 0.975])
    p = 2 * min(float((deviation >= difference).mean()), float((deviation <= difference).mean()))
    return EffectComparison(
        rows,
        columns,
        math.sqrt(max(0.0, float(by_row))),
        math.sqrt(max(0.0, float(by_column))),
        difference,
        difference - float(high),
        difference - float(low),
        min(1.0, max(p, 1.0 / SIMULATIONS)),
    )
