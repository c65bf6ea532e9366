"""One power law with everything that qualifies it; the methods are in ``fit_methods``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.fit_methods import METHODS, choose_method, logs, slopes_by_seed
from lightning_spectral.analysis.linear import bend_of, least_squares, leave_one_out, seed_means, theil_sen
from lightning_spectral.analysis.points import Point

FloatArray = NDArray[np.float64]
NAN: Final = float("nan")
MIN_WIDTHS: Final = 3
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
        with np.errstate(over="ignore"):  # beyond the largest number the band is open
            return np.exp(center - half), np.exp(center + half)


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
    x, y = logs(points)
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
        out = replace(out, weighted=METHODS["weighted"](points).beta)
    return _with_seed_intervals(out, points)


def _with_seed_intervals(fit: PowerLawFit, points: Sequence[Point]) -> PowerLawFit:
    if not len(slopes_by_seed(points)):
        return fit
    by_seed = METHODS["seed_slopes"](points)
    out = replace(fit, seed_low=by_seed.low, seed_high=by_seed.high)
    if len({len(point.layers) for point in points}) > 1 or not all(v > 0 for point in points for v in point.layers):
        return out  # a layer that a run lacks cannot be drawn there
    if not points[0].layers:
        return out
    boot = METHODS["bootstrap"](points)
    return replace(out, boot_low=boot.low, boot_high=boot.high)
