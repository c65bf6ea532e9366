"""Power laws ``value = A * x ** beta`` with the source of variation named for each interval.

Which interval is right depends on what repeats:

* ``ols``: every point counts as independent; t interval with n - 2 degrees of freedom. Right when there is one run a
  width. Over widths, NOT over seeds: with one seed the variation between seeds is unknown.
* ``mixed``: a random level and slope a seed, a random effect a width, a residual (``strata``). The interval is over
  widths AND seeds, for complete and for half-finished designs. The slope equals ``ols`` when every width has the same
  seeds.
* ``ols_seed_means``: runs at one width are averaged (in ln) first, then t with (widths - 2). Too narrow where seeds
  differ in slope (83 % and less).
* ``seed_slopes``: one slope a seed, t with (seeds - 1). What another seed at these same widths would give.
* ``bootstrap``: resamples seeds, then layers; percentile spread widened by t(seeds - 1) and sqrt(S / (S - 1)).
* ``weighted``: weights (value / spread)^2, the spread being over layers. ``theil_sen``: median of pairwise slopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.linear import Line, least_squares, seed_means, t_quantile, theil_sen
from lightning_spectral.analysis.points import Point
from lightning_spectral.analysis.strata import seed_design

FloatArray = NDArray[np.float64]
NAN: Final = float("nan")
BOOTSTRAP_SAMPLES: Final = 1000


def logs(points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
    """Ln x and ln value."""
    return np.log([point.x for point in points]), np.log([point.value for point in points])


@dataclass(frozen=True)
class Estimate:
    """A line with its interval, as one method draws it. Fields: ``PowerLawFit``."""

    beta: float
    ln_a: float
    low: float
    high: float
    r2: float
    n: int
    std_err: float
    df: float
    ln_x_mean: float = NAN
    level: float = NAN
    level_se: float = NAN


def _of_line(line: Line, n: int) -> Estimate:
    half = float(t_quantile(line.df)) * float(line.slope_se)
    beta, ln_a = float(line.slope), float(line.intercept)
    level_se = math.sqrt(float(line.residual_var) / line.weight_sum)
    level = ln_a + beta * line.x_mean
    r2, std_err = float(line.r2), float(line.slope_se)
    return Estimate(beta, ln_a, beta - half, beta + half, r2, n, std_err, line.df, line.x_mean, level, level_se)


def _ols(points: Sequence[Point]) -> Estimate:
    x, y = logs(points)
    found = _of_line(least_squares(x, y), len(x))
    errors = errors_of(points)
    if errors is None:
        return found
    # residuals that happen to be smaller than the errors of measurement do not make the points better
    centered = x - x.mean()
    floor = math.sqrt(float(((centered * errors) ** 2).sum())) / float(centered @ centered)
    if floor <= found.std_err or not found.df > 0:
        return found
    half = float(t_quantile(found.df)) * floor
    return replace(found, std_err=floor, low=found.beta - half, high=found.beta + half)


def _ols_seed_means(points: Sequence[Point]) -> Estimate:
    x, y = seed_means(*logs(points))
    return _of_line(least_squares(x, y), len(x))


def _mixed(points: Sequence[Point]) -> Estimate:
    x, y = logs(points)
    design = seed_design(x, [point.seed for point in points])
    if design is None:
        raise ValueError("`mixed` needs two seeds that cover several widths each")
    fit = design.fit(y, errors_of(points))
    slope, height = fit.uncertainty(design.slope), fit.uncertainty(design.level)
    beta, level = float(design.slope @ y), float(design.level @ y)
    half, se = float(slope.half_width()), float(slope.variance) ** 0.5
    reach = half / se if se > 0 else 1.0
    r2 = float(least_squares(*seed_means(x, y)).r2)
    ln_a, level_se = level - beta * design.x_mean, float(height.half_width()) / reach
    df = float(slope.satterthwaite_df)
    return Estimate(beta, ln_a, beta - half, beta + half, r2, len(x), se, df, design.x_mean, level, level_se)


def errors_of(points: Sequence[Point]) -> FloatArray | None:
    """Standard error of measurement of every ln(value), if all points have one."""
    errors = np.array([point.error for point in points])
    return errors if np.isfinite(errors).all() else None


def _weighted(points: Sequence[Point]) -> Estimate:
    x, y = logs(points)
    relative = np.array([point.spread / point.value for point in points])
    if not (np.isfinite(relative) & (relative > 1e-100)).all():
        raise ValueError("every point needs a positive spread for `weighted`")
    return _of_line(least_squares(x, y, 1.0 / relative**2), len(x))


def _theil_sen(points: Sequence[Point]) -> Estimate:
    x, y = logs(points)
    slope, intercept, low, high = theil_sen(x, y)
    residual, total = y - intercept - slope * x, float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float(residual @ residual) / total if total > 0 else NAN
    return Estimate(slope, intercept, low, high, r2, len(x), NAN, NAN)


def slopes_by_seed(points: Sequence[Point]) -> FloatArray:
    """OLS slope of each seed that covers every width; empty unless at least two do."""
    widths = {point.x for point in points}
    by_seed: dict[str, list[Point]] = {}
    for point in points:
        by_seed.setdefault(point.seed, []).append(point)
    whole = [own for own in by_seed.values() if {point.x for point in own} == widths]
    if len(whole) < 2 or len(widths) < 2:
        return np.empty(0)
    return np.array([float(least_squares(*logs(own)).slope) for own in whole])


def _seed_slopes(points: Sequence[Point]) -> Estimate:
    slopes = slopes_by_seed(points)
    if not len(slopes):
        raise ValueError("`seed_slopes` needs at least two seeds that cover every width")
    pooled = _ols_seed_means(points)
    se = float(slopes.std(ddof=1)) / math.sqrt(len(slopes))
    half = float(t_quantile(len(slopes) - 1)) * se
    beta = float(slopes.mean())
    return replace(pooled, beta=beta, low=beta - half, high=beta + half, std_err=se, df=len(slopes) - 1)


def _bootstrap(points: Sequence[Point]) -> Estimate:
    pooled = _ols_seed_means(points)
    draws, seeds = bootstrap_slopes(points)
    if not len(draws):
        raise ValueError("`bootstrap` needs at least two seeds that cover every width, and values per layer")
    se = float(draws.std(ddof=1)) * math.sqrt(seeds / (seeds - 1))
    half = float(t_quantile(seeds - 1)) * se
    return replace(pooled, low=pooled.beta - half, high=pooled.beta + half, std_err=se, df=seeds - 1)


def bootstrap_slopes(
    points: Sequence[Point], samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[FloatArray, int]:
    """Slopes under resampled seeds and layers: (samples,) and the number of seeds; empty when that cannot be done.

    A drawn seed brings its runs of all widths along, a drawn layer is the same layer in every run: what they share
    across widths stays shared.
    """
    widths = sorted({point.x for point in points})
    table = {(point.x, point.seed): point.layers for point in points}
    seeds = [s for s in sorted({point.seed for point in points}) if all((x, s) in table for x in widths)]
    counts = {len(table[x, s]) for x in widths for s in seeds}
    if len(seeds) < 2 or len(counts) != 1 or 0 in counts or len(widths) < 2:
        return np.empty(0), len(seeds)
    values = np.array([[table[x, s] for s in seeds] for x in widths])  # (widths, seeds, layers)
    if not (values > 0).all():
        return np.empty(0), len(seeds)
    generator = np.random.default_rng(seed)
    drawn_seeds = generator.integers(len(seeds), size=(samples, len(seeds)))
    drawn_layers = generator.integers(values.shape[2], size=(samples, values.shape[2]))
    ln_y = np.log(np.median(values[:, drawn_seeds[:, :, None], drawn_layers[:, None, :]], axis=-1)).mean(axis=-1)
    return least_squares(np.log(np.array(widths)), ln_y.T).slope, len(seeds)


# method name -> estimate of one series; `auto` picks between the first two
METHODS: Final[dict[str, Callable[[Sequence[Point]], Estimate]]] = {
    "ols": _ols,
    "mixed": _mixed,
    "ols_seed_means": _ols_seed_means,
    "weighted": _weighted,
    "theil_sen": _theil_sen,
    "seed_slopes": _seed_slopes,
    "bootstrap": _bootstrap,
}


def choose_method(points: Sequence[Point]) -> str:
    """``mixed`` when seeds cover several widths each, else ``ols``, of means where widths repeat."""
    usable = all(point.x > 0 for point in points)
    seeds, x = [point.seed for point in points], [point.x for point in points]
    if len(set(seeds)) < 2:
        return "ols"
    if usable and seed_design(np.log(x), seeds):
        return "mixed"
    return "ols_seed_means" if len(set(x)) < len(x) else "ols"
