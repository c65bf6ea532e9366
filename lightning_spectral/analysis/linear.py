"""The regression kernels: straight lines through (ln x, ln y), for one sweep or for thousands at once.

Everything here is array in, array out, with the points on the last axis. ``fits`` gives the results their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

FloatArray = NDArray[np.float64]
LEVEL: Final = 0.95
MAX_PAIRED_POINTS: Final = 1000  # half a million pairs


@dataclass(frozen=True)
class Line:
    """Least-squares lines ``y = intercept + slope * x``.

    Attributes:
        slope: (...,).
        intercept: (...,).
        slope_se: Standard error of the slope; NaN without residual degrees of freedom.
        residual_var: Estimated variance of one residual.
        r2: Share of variance explained.
        df: Residual degrees of freedom.
        x_mean: Weighted mean of x.
        s_xx: Weighted sum of squares of x about its mean.
        weight_sum: Sum of the weights (n without weights).
    """

    slope: FloatArray
    intercept: FloatArray
    slope_se: FloatArray
    residual_var: FloatArray
    r2: FloatArray
    df: int
    x_mean: float
    s_xx: float
    weight_sum: float

    def mean_se(self, x: float | FloatArray) -> FloatArray:
        """Standard error of the line itself at ``x``."""
        return np.sqrt(self.residual_var * (1.0 / self.weight_sum + (x - self.x_mean) ** 2 / self.s_xx))


def least_squares(x: FloatArray, y: FloatArray, weights: FloatArray | None = None) -> Line:
    """Ordinary or weighted least squares of ``y`` (..., n) on ``x`` (n,).

    Raises:
        ValueError: If fewer than two distinct x values are given.
    """
    w = np.ones_like(x) if weights is None else weights
    total = float(w.sum())
    x_mean = float(w @ x) / total
    s_xx = float(w @ (x - x_mean) ** 2)
    if x.max() == x.min() or s_xx <= 0:
        raise ValueError(f"a line needs at least 2 distinct x values, got {np.unique(x).tolist()}.")
    y_mean = (y @ w) / total
    slope = ((y - y_mean[..., None]) @ (w * (x - x_mean))) / s_xx
    intercept = y_mean - slope * x_mean
    residual = y - intercept[..., None] - slope[..., None] * x
    rss = (residual**2) @ w
    tss = ((y - y_mean[..., None]) ** 2) @ w
    df = len(x) - 2
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = rss / df if df > 0 else np.full_like(rss, np.nan)
        r2 = np.where(tss > 0, 1.0 - rss / tss, np.nan)
    return Line(slope, intercept, np.sqrt(variance / s_xx), variance, r2, df, x_mean, s_xx, total)


def t_quantile(df: float | FloatArray, level: float = LEVEL) -> FloatArray:
    """Two-sided Student t quantile; NaN for ``df <= 0``."""
    df = np.asarray(df, dtype=np.float64)
    return np.where(df > 0, stdtrit(np.where(df > 0, df, 1.0), 0.5 + level / 2), np.nan)


def two_sided_p(t: float | FloatArray, df: float | FloatArray) -> FloatArray:
    """P value of a t statistic."""
    return np.asarray(2.0 * stdtr(df, -np.abs(t)), dtype=np.float64)


def welch(
    slope_a: FloatArray, se_a: FloatArray, df_a: float, slope_b: FloatArray, se_b: FloatArray, df_b: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Difference ``a - b`` of two independent slopes: (difference, standard error, Welch-Satterthwaite df)."""
    var_a, var_b = np.asarray(se_a) ** 2, np.asarray(se_b) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (var_a + var_b) ** 2 / (var_a**2 / df_a + var_b**2 / df_b)
    return np.asarray(slope_a - slope_b), np.sqrt(var_a + var_b), df


def theil_sen(x: FloatArray, y: FloatArray) -> tuple[float, float, float, float]:
    """Median slope of all pairs with different x, intercept through the medians, Sen's (1968) 95 % interval.

    Above :data:`MAX_PAIRED_POINTS` points the pairs are those of evenly spaced points in the order of x: all pairs of
    143,000 rows would be 80 GB.

    Returns:
        (slope, intercept, low, high).
    """
    if len(x) > MAX_PAIRED_POINTS:
        kept = np.argsort(x, kind="stable")[np.linspace(0, len(x) - 1, MAX_PAIRED_POINTS).round().astype(int)]
        x, y = x[kept], y[kept]
    i, j = np.triu_indices(len(x), k=1)
    apart = x[i] != x[j]
    slopes = np.sort((y[j] - y[i])[apart] / (x[j] - x[i])[apart])
    slope = float(np.median(slopes))
    # variance of Kendall's S with ties in x; ties in y only make it smaller
    n, ties = len(x), np.unique(x, return_counts=True)[1]
    sigma = np.sqrt((n * (n - 1) * (2 * n + 5) - np.sum(ties * (ties - 1) * (2 * ties + 5))) / 18.0)
    reach = float(ndtri(0.5 + LEVEL / 2)) * sigma
    low = max(round((len(slopes) - reach) / 2) - 1, 0)
    high = min(round((len(slopes) + reach) / 2), len(slopes) - 1)
    return slope, float(np.median(y) - slope * np.median(x)), float(slopes[low]), float(slopes[high])


def seed_means(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One point per distinct x: the mean of the y values there. ``y`` is (..., n)."""
    distinct, inverse = np.unique(x, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(distinct)))
    return distinct, np.add.reduceat(y[..., order], starts, axis=-1) / np.bincount(inverse)


@dataclass(frozen=True)
class Bend:
    """Whether a straight line in ln-ln is the right shape.

    Attributes:
        bend: Second-order term: how much the slope changes per unit of ln x, over two.
        p: Two-sided p of "no bend"; NaN with fewer than four distinct x.
        slope_low: Slope at the smallest x, along the fitted parabola.
        slope_high: Slope at the largest x.
    """

    bend: float
    p: float
    slope_low: float
    slope_high: float


def bend_of(x: FloatArray, y: FloatArray) -> Bend:
    """Parabola through the means of the widths, with its t test on (widths - 3) degrees of freedom."""
    distinct, means = seed_means(x, y)
    if len(distinct) < 4:
        return Bend(*[float("nan")] * 4)
    u = distinct - distinct.mean()
    columns = np.column_stack([np.ones_like(u), u, u * u])
    coefficients = np.linalg.lstsq(columns, means, rcond=None)[0]
    left, df = means - columns @ coefficients, len(u) - 3
    variance = float(left @ left) / df * np.linalg.inv(columns.T @ columns)[2, 2]
    slope, bend = float(coefficients[1]), float(coefficients[2])
    rounding = 1e-12 * max(1.0, float(np.abs(means).max())) / float(np.ptp(u)) ** 2
    p = float(two_sided_p(bend / np.sqrt(variance), df)) if variance > 0 else 0.0
    p = p if abs(bend) > rounding else 1.0
    return Bend(bend, p, slope + 2 * bend * float(u[0]), slope + 2 * bend * float(u[-1]))


def leave_one_out(x: FloatArray, y: FloatArray) -> tuple[float, float]:
    """Smallest and largest slope when one distinct x at a time is left out; NaN with fewer than 3 left."""
    distinct, inverse = np.unique(x, return_inverse=True)
    if len(distinct) < 4:
        return float("nan"), float("nan")
    u, v = x - x.mean(), y - y.mean()
    n, s_u, s_v, s_uu, s_uv = (
        column.sum() - np.bincount(inverse, weights=column) for column in (np.ones_like(u), u, v, u * u, u * v)
    )
    slopes = (s_uv - s_u * s_v / n) / (s_uu - s_u**2 / n)
    return float(slopes.min()), float(slopes.max())
