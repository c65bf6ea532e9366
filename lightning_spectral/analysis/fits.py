"""Power laws ``value = A * x ** beta`` with the source of variation named for each interval.

Which interval is right depends on what repeats:

* ``ols``: every point counts as independent; t interval with n - 2 degrees of freedom. Right when there is one run a
  width. Over widths, NOT over seeds: with one seed nobody can see that another seed would have another slope.
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

from lightning_spectral.analysis.linear import (
    Line,
    bend_of,
    least_squares,
    leave_one_out,
    seed_means,
    t_quantile,
    theil_sen,
)
from lightning_spectral.analysis.points import Point
from lightning_spectral.analysis.strata import seed_design

FloatArray = NDArray[np.float64]
NAN: Final = float("nan")
MIN_WIDTHS: Final = 3
BOOTSTRAP_SAMPLES: Final = 1000
BENT_P: Final = 0.05
WIDE_CI: Final = 0.3  # half-width of the interval of beta beyond which a slope says little


@dataclass(frozen=True)
class PowerLawFit:
    """One fitted exponent.

    Attributes:
        series: Values of the ``by`` columns.
        beta: Exponent; NaN if refused.
        ln_a: Intercept of ln(value) at ln(x) = 0; NaN if refused.
        ci_low: Lower end of the 95 % interval of beta; NaN if there is none.
        ci_high: Upper end.
        r2: Share of the variance of ln(value) explained.
        n: Points that the line was fitted to.
        status: ``ok``, ``refused:REASON`` or flags joined by ``+``.
        method: Name of a row of :data:`METHODS`.
        std_err: Standard error of beta.
        df: Degrees of freedom of the interval.
        num_widths: Distinct x values.
        num_runs: Distinct sources.
        num_seeds: Distinct seeds.
        x_min: Smallest x: a fit over 1-4x is another quantity than one over 1-8x.
        x_max: Largest x.
        bend: Second-order term of ln(value) in ln(x).
        bend_p: Its p value; below :data:`BENT_P` the fit has the flag ``bent``.
        slope_low: Local slope at ``x_min``, along a parabola.
        slope_high: Local slope at ``x_max``.
        raw_beta: Slope of the plain ranks of the finite sample, where ``beta`` is of unbiased ones.
        loo_low: Smallest beta with one width left out.
        loo_high: Largest.
        theil_sen: Median of pairwise slopes.
        weighted: Weighted least-squares beta.
        seed_low: ``seed_slopes`` interval, when at least two seeds cover every width.
        seed_high: Upper end.
        boot_low: ``bootstrap`` interval, likewise.
        boot_high: Upper end.
        null_beta: Slope of the untrained (or once updated) network, same series.
        null_step: Step of that null.
        before_beta: Slope of the same runs just before the learning rate decays, by the same method.
        before_low: Lower end of its interval.
        before_high: Upper end.
        before_step: Last step behind it (the largest over the runs).
        layer_low: Smallest slope among the layers.
        layer_high: Largest.
        ln_x_mean: Where the line is known best.
        level: Fitted ln(value) at ``ln_x_mean``.
        level_se: Standard error of ``level``.
    """

    series: tuple[str, ...]
    beta: float = NAN
    ln_a: float = NAN
    ci_low: float = NAN
    ci_high: float = NAN
    r2: float = NAN
    n: int = 0
    status: str = "ok"
    method: str = "ols"
    std_err: float = NAN
    df: float = NAN
    num_widths: int = 0
    num_runs: int = 0
    num_seeds: int = 0
    x_min: float = NAN
    x_max: float = NAN
    bend: float = NAN
    bend_p: float = NAN
    slope_low: float = NAN
    slope_high: float = NAN
    raw_beta: float = NAN
    loo_low: float = NAN
    loo_high: float = NAN
    theil_sen: float = NAN
    weighted: float = NAN
    seed_low: float = NAN
    seed_high: float = NAN
    boot_low: float = NAN
    boot_high: float = NAN
    null_beta: float = NAN
    null_step: float = NAN
    before_beta: float = NAN
    before_low: float = NAN
    before_high: float = NAN
    before_step: float = NAN
    layer_low: float = NAN
    layer_high: float = NAN
    ln_x_mean: float = NAN
    level: float = NAN
    level_se: float = NAN

    @property
    def refused(self) -> bool:
        """Whether no line was drawn; the status says why."""
        return self.status.startswith("refused")

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide for the slope to say much (or there is none)."""
        return not (self.ci_high - self.ci_low) / 2 <= WIDE_CI

    def line(self, x: FloatArray) -> FloatArray:
        """Fitted value at ``x``."""
        return np.exp(self.ln_a + self.beta * np.log(x))

    def band(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Pointwise 95 % band of the fitted line (not of a new point)."""
        at = np.log(x) - self.ln_x_mean
        reach = (self.ci_high - self.beta) / self.std_err if self.std_err > 0 else 0.0
        half = reach * np.sqrt(self.level_se**2 + (self.std_err * at) ** 2)
        center = self.level + self.beta * at
        return np.exp(center - half), np.exp(center + half)


@dataclass(frozen=True)
class _Estimate:
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


def _of_line(line: Line, n: int) -> _Estimate:
    half = float(t_quantile(line.df)) * float(line.slope_se)
    beta, ln_a = float(line.slope), float(line.intercept)
    level_se = math.sqrt(float(line.residual_var) / line.weight_sum)
    level = ln_a + beta * line.x_mean
    r2, std_err = float(line.r2), float(line.slope_se)
    return _Estimate(beta, ln_a, beta - half, beta + half, r2, n, std_err, line.df, line.x_mean, level, level_se)


def _ols(points: Sequence[Point]) -> _Estimate:
    x, y = _logs(points)
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


def _ols_seed_means(points: Sequence[Point]) -> _Estimate:
    x, y = seed_means(*_logs(points))
    return _of_line(least_squares(x, y), len(x))


def _mixed(points: Sequence[Point]) -> _Estimate:
    x, y = _logs(points)
    design = seed_design(x, [point.seed for point in points])
    if design is None:
        raise ValueError("`mixed` needs two seeds, one of which covers two widths")
    fit = design.fit(y, errors_of(points))
    slope, height = fit.uncertainty(design.slope), fit.uncertainty(design.level)
    beta, level, half, se = float(design.slope @ y), float(design.level @ y), slope.half_width(), slope.variance**0.5
    reach = half / float(se) if se > 0 else 1.0
    r2 = float(least_squares(*seed_means(x, y)).r2)
    ln_a, level_se = level - beta * design.x_mean, height.half_width() / reach
    df = slope.satterthwaite_df
    return _Estimate(beta, ln_a, beta - half, beta + half, r2, len(x), float(se), df, design.x_mean, level, level_se)


def errors_of(points: Sequence[Point]) -> FloatArray | None:
    """Standard error of measurement of every ln(value), if all points have one."""
    errors = np.array([point.error for point in points])
    return errors if np.isfinite(errors).all() else None


def _weighted(points: Sequence[Point]) -> _Estimate:
    x, y = _logs(points)
    relative = np.array([point.spread / point.value for point in points])
    if not (np.isfinite(relative) & (relative > 0)).all():
        raise ValueError("every point needs a positive spread for `weighted`")
    return _of_line(least_squares(x, y, 1.0 / relative**2), len(x))


def _theil_sen(points: Sequence[Point]) -> _Estimate:
    x, y = _logs(points)
    slope, intercept, low, high = theil_sen(x, y)
    residual, total = y - intercept - slope * x, float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float(residual @ residual) / total if total > 0 else NAN
    return _Estimate(slope, intercept, low, high, r2, len(x), NAN, NAN)


def slopes_by_seed(points: Sequence[Point]) -> FloatArray:
    """OLS slope of each seed that covers every width; empty unless at least two do."""
    widths = {point.x for point in points}
    by_seed: dict[str, list[Point]] = {}
    for point in points:
        by_seed.setdefault(point.seed, []).append(point)
    whole = [own for own in by_seed.values() if {point.x for point in own} == widths]
    if len(whole) < 2 or len(widths) < 2:
        return np.empty(0)
    return np.array([float(least_squares(*_logs(own)).slope) for own in whole])


def _seed_slopes(points: Sequence[Point]) -> _Estimate:
    slopes = slopes_by_seed(points)
    if not len(slopes):
        raise ValueError("`seed_slopes` needs at least two seeds that cover every width")
    pooled = _ols_seed_means(points)
    se = float(slopes.std(ddof=1)) / math.sqrt(len(slopes))
    half = float(t_quantile(len(slopes) - 1)) * se
    beta = float(slopes.mean())
    return replace(pooled, beta=beta, low=beta - half, high=beta + half, std_err=se, df=len(slopes) - 1)


def _bootstrap(points: Sequence[Point]) -> _Estimate:
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
METHODS: Final[dict[str, Callable[[Sequence[Point]], _Estimate]]] = {
    "ols": _ols,
    "mixed": _mixed,
    "ols_seed_means": _ols_seed_means,
    "weighted": _weighted,
    "theil_sen": _theil_sen,
    "seed_slopes": _seed_slopes,
    "bootstrap": _bootstrap,
}


def choose_method(points: Sequence[Point]) -> str:
    """``mixed`` when known seeds share widths, else ``ols``; ``ols_seed_means`` for what ``mixed`` cannot take."""
    repeats = len({point.x for point in points}) < len(points)
    if not repeats or len({point.seed for point in points}) < 2:
        return "ols"
    usable = all(point.x > 0 for point in points)
    x = np.log([point.x for point in points]) if usable else np.ones(1)
    return "mixed" if usable and seed_design(x, [point.seed for point in points]) else "ols_seed_means"


def fit_series(
    points: Sequence[Point], *, method: str = "auto", flags: Sequence[str] = (), extras: bool = True
) -> PowerLawFit:
    """Fit one series.

    Args:
        points: All points of the series.
        method: A name from :data:`METHODS`, or ``auto`` (:func:`choose_method`).
        flags: Warnings found by ``health``; they become the status.
        extras: Also compute the robust and resampled columns.

    Raises:
        ValueError: If the method is unknown.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"unknown fit method `{method}`; choose auto, {', '.join(METHODS)}.")
    measured = [point for point in points if not math.isnan(point.value)]
    if len(measured) < len(points) and "missing_values" not in flags:
        flags = (*flags, "missing_values")
    points = measured or points
    name = choose_method(points) if method == "auto" else method
    xs = sorted({point.x for point in points})
    blank = PowerLawFit(
        points[0].series if points else (),
        n=len(points),
        method=name,
        num_widths=len(xs),
        num_runs=len({point.source for point in points}),
        num_seeds=len({point.seed for point in points if point.seed}),
        x_min=xs[0] if xs else NAN,
        x_max=xs[-1] if xs else NAN,
    )
    reason = refusal(points)
    if reason:
        return replace(blank, status=f"refused:{reason}")
    try:
        estimate = METHODS[name](points)
    except ValueError as error:
        return replace(blank, status=f"refused:{error}")
    fit = replace(
        blank,
        beta=estimate.beta,
        ln_a=estimate.ln_a,
        ci_low=estimate.low,
        ci_high=estimate.high,
        r2=estimate.r2,
        n=estimate.n,
        status="+".join(flags) or "ok",
        std_err=estimate.std_err,
        df=estimate.df,
        ln_x_mean=estimate.ln_x_mean,
        level=estimate.level,
        level_se=estimate.level_se,
    )
    return _with_extras(fit, points) if extras else fit


def refusal(points: Sequence[Point]) -> str:
    """Why no line may be drawn through these points; empty if one may."""
    values = np.array([[point.x, point.value] for point in points]).reshape(-1, 2)
    if not np.isfinite(values).all():
        return "missing_values"
    if not (values > 0).all():
        return "non_positive_values"
    if len({point.x for point in points}) < MIN_WIDTHS:
        return f"fewer_than_{MIN_WIDTHS}_widths"
    return ""


def _with_extras(fit: PowerLawFit, points: Sequence[Point]) -> PowerLawFit:
    x, y = _logs(points)
    loo_low, loo_high = leave_one_out(x, y)
    bend = bend_of(x, y)
    out = replace(
        fit,
        loo_low=loo_low,
        loo_high=loo_high,
        theil_sen=theil_sen(x, y)[0],
        bend=bend.bend,
        bend_p=bend.p,
        slope_low=bend.slope_low,
        slope_high=bend.slope_high,
    )
    if all(point.raw > 0 for point in points):
        plain = np.log([point.raw for point in points])
        out = replace(out, raw_beta=float(least_squares(*seed_means(x, plain)).slope))
    if bend.p < BENT_P:
        out = replace(out, status="bent" if fit.status == "ok" else f"{fit.status}+bent")
    if all(point.spread > 0 for point in points):
        out = replace(out, weighted=_weighted(points).beta)
    return _with_seed_intervals(out, points)


def _with_seed_intervals(fit: PowerLawFit, points: Sequence[Point]) -> PowerLawFit:
    if not len(slopes_by_seed(points)):
        return fit
    by_seed = _seed_slopes(points)
    out = replace(fit, seed_low=by_seed.low, seed_high=by_seed.high)
    if not all(point.layers for point in points):
        return out
    boot = _bootstrap(points)
    return replace(out, boot_low=boot.low, boot_high=boot.high)


def _logs(points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
    return np.log([point.x for point in points]), np.log([point.value for point in points])
