"""Is one exponent larger than another? Differences with intervals, never two point estimates side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.crossovers import crossover
from lightning_spectral.analysis.fits import NAN, PowerLawFit, fit_series
from lightning_spectral.analysis.linear import LEVEL, t_quantile, two_sided_p, welch
from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.analysis.strata import SeedFit, seed_design, width_design

FloatArray = NDArray[np.float64]

MEASURES: Final = ("site", "bucket", "metric", "layer")
COMPARISON_COLUMNS: Final = (
    "kind",
    "a",
    "b",
    "estimate",
    "ci_low",
    "ci_high",
    "p",
    "p_holm",
    "df",
    "status",
    "method",
    "note",
)


@dataclass(frozen=True)
class Comparison:
    """One number that sets two series apart.

    Attributes:
        where: Column name -> value of what both sides share (site, bucket, metric, layer, ...).
        kind: ``slope_difference``, ``slope_difference_pre_decay``, ``level_difference``,
            ``crossover_width``, ``asymmetry``, ``decay_change``, ``effect``,
            ``matched_loss`` or ``matched_loss_slope``.
        a: First side.
        b: Second side; empty for a property of one side.
        estimate: ``a - b`` of slopes or of ln(value), or a width for the crossover.
        ci_low: Lower end of the 95 % interval; NaN if there is none.
        ci_high: Upper end.
        p: Two-sided p value of "no difference".
        p_holm: The same, corrected for the pairs of one kind and measurement (Holm 1979); NaN where p is.
        df: Degrees of freedom.
        status: ``ok``, flags of either fit joined by ``+``, or ``refused:REASON``.
        method: How the interval was made.
        note: What else must be read with it.
    """

    where: dict[str, str]
    kind: str
    a: str
    b: str
    estimate: float = NAN
    ci_low: float = NAN
    ci_high: float = NAN
    p: float = NAN
    p_holm: float = NAN
    df: float = NAN
    status: str = "ok"
    method: str = ""
    note: str = ""

    @property
    def separated(self) -> bool:
        """Whether the difference stands at 5 %, corrected for the number of pairs where there is a p value."""
        if not math.isnan(self.p_holm):
            return self.p_holm < 1 - LEVEL
        return self.ci_low > 0 or self.ci_high < 0


def compare_fits(table: PointTable, fits: Sequence[PowerLawFit]) -> list[Comparison]:
    """Every pair of series of one measurement that differ in one column.

    A column that only some series have (the rank fraction of Dion) does not count as a second difference.
    """
    groups = table.groups()
    out: list[Comparison] = []
    for one, two in itertools.combinations(fits, 2):
        names = pair_of(table.by, one.series, two.series)
        if names:
            out += compare_pair(table.by, names, one, two, groups[one.series], groups[two.series])
    return with_holm(out)


def pair_of(by: Sequence[str], one: Sequence[str], two: Sequence[str]) -> list[str]:
    """Columns in which two series differ if they can be compared: one of them, of what was varied; else empty."""
    differing = [(name, x, y) for name, x, y in zip(by, one, two, strict=True) if x != y]
    names = [name for name, _, _ in differing]
    whole = [name for name, x, y in differing if x and y]
    return names if len(whole) <= 1 and not set(names) & set(MEASURES) else []


def with_holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Give each comparison its p corrected for all pairs of the same kind, site, bucket, metric and layer.

    Pairs with a variation of another series (``AdamW lr/3`` beside ``AdamW``: another learning rate, an ablation) are
    corrected among themselves: they do not make a claim about the optimizers less certain, nor the other way round.
    """
    families: dict[tuple[Any, ...], list[int]] = {}
    names = {name for c in comparisons for name in (c.a, c.b) if name}
    varied = {name for name in names if any(name.startswith(f"{other} ") for other in names)}
    for k, c in enumerate(comparisons):
        if not math.isnan(c.p):
            measured = tuple(sorted((name, cell) for name, cell in c.where.items() if name in MEASURES))
            families.setdefault((c.kind, measured, bool({c.a, c.b} & varied)), []).append(k)
    out = list(comparisons)
    for members in families.values():
        worst = 0.0
        for rank, k in enumerate(sorted(members, key=lambda k: comparisons[k].p)):
            worst = max(worst, min(1.0, (len(members) - rank) * comparisons[k].p))
            out[k] = replace(comparisons[k], p_holm=worst)
    return out


def compare_pair(
    by: Sequence[str],
    names: Sequence[str],
    one: PowerLawFit,
    two: PowerLawFit,
    points_a: list[Point],
    points_b: list[Point],
) -> list[Comparison]:
    """Slope, level and crossover of two series that differ in ``names`` only."""
    cells_a, cells_b = dict(zip(by, one.series, strict=True)), dict(zip(by, two.series, strict=True))
    base = Comparison(
        {name: cell for name, cell in cells_a.items() if name not in names},
        "slope_difference",
        " ".join(filter(None, (cells_a[name] for name in names))),
        " ".join(filter(None, (cells_b[name] for name in names))),
        status=_status(one.status, two.status),
    )
    if one.refused or two.refused:
        return [replace(base, status=base.status)]
    ratio = ratio_of(points_a, points_b)
    if ratio is None:
        return [_welch(base, one, two)]
    covered = "" if (one.x_min, one.x_max) == (two.x_min, two.x_max) else "over the widths that both have"
    fit, design = ratio.fit, ratio.fit.design
    slope = ratio.estimate(replace(base, note=covered), design.slope)
    level = replace(base, kind="level_difference", note=f"ln(a/b) at width {math.exp(design.x_mean):.6g}")
    cross = crossover(fit)
    crossing = replace(
        base,
        kind="crossover_width",
        estimate=cross.width,
        ci_low=cross.low,
        ci_high=cross.high,
        df=slope.df,
        method="inverted_test",
        note=cross.note,
    )
    return [slope, ratio.estimate(level, design.level), crossing]


def _welch(base: Comparison, one: PowerLawFit, two: PowerLawFit) -> Comparison:
    """Independent fits: series without three widths in common."""
    if not (one.df > 0 and two.df > 0):
        return replace(base, status="refused:no_interval")
    difference, se, df = welch(
        np.float64(one.beta), np.float64(one.std_err), one.df, np.float64(two.beta), np.float64(two.std_err), two.df
    )
    note = "fewer than three widths in common: independent fits"
    return _with_t(replace(base, note=note), float(difference), float(se), float(df), f"welch({one.method})")


@dataclass(frozen=True)
class Ratio:
    """ln(a / b) of what two series have in common.

    Attributes:
        fit: The values ln a - ln b at their widths and seeds.
        method: ``mixed_of_ln_ratio`` (pairs of one width and seed) or ``ols_of_ln_ratio`` (one pair per width).
    """

    fit: SeedFit
    method: str

    def estimate(self, base: Comparison, coefficients: FloatArray) -> Comparison:
        """``coefficients @ y`` with interval and p."""
        own, value = self.fit.uncertainty(coefficients), float(coefficients @ self.fit.y)
        half, p = float(own.half_width()), float(own.p_value(value))
        low, high = value - half, value + half
        df = float(own.satterthwaite_df)
        return replace(base, estimate=value, ci_low=low, ci_high=high, p=p, df=df, method=self.method)


def ratio_of(points_a: Sequence[Point], points_b: Sequence[Point]) -> Ratio | None:
    """The ratio of two series at the widths and seeds (else at the widths) that both have; ``None`` with fewer than 3.

    Pairs of one width and seed share initialization, data and the text of the measurement as far as the study lets
    them; what they share cancels, and what they do not is in the scatter of the ratio.
    """
    a, b = _mean_ln(points_a, by_seed=True), _mean_ln(points_b, by_seed=True)
    common = sorted(set(a) & set(b))
    x, seeds = np.log([width for width, _ in common]), [seed for _, seed in common]
    design = seed_design(x, seeds) if len(common) > 2 else None
    method = "mixed_of_ln_ratio"
    if design is None:
        a, b = _mean_ln(points_a, by_seed=False), _mean_ln(points_b, by_seed=False)
        common = sorted(set(a) & set(b))
        if len(common) < 3:
            return None
        design, method = width_design(np.log([width for width, _ in common])), "ols_of_ln_ratio"
    y = np.array([a[cell][0] - b[cell][0] for cell in common])
    errors = np.array([math.hypot(a[cell][1], b[cell][1]) for cell in common])
    return Ratio(design.fit(y, errors if np.isfinite(errors).all() else None), method)


def asymmetries(table: PointTable, fits: Sequence[PowerLawFit]) -> list[Comparison]:
    """``beta_soft - beta_hard`` of every series that has both ranks, from ln(soft / hard) of the same runs."""
    if "metric" not in table.by:
        return []
    position = table.by.index("metric")
    groups = table.groups()
    statuses = {fit.series: fit.status for fit in fits}
    out = []
    for series, soft in groups.items():
        twin = (*series[:position], "hard_rank", *series[position + 1 :])
        hard = groups.get(twin)
        if series[position] != "soft_rank" or not hard:
            continue
        where = {name: cell for name, cell in zip(table.by, series, strict=True) if name != "metric"}
        ratio = _run_ratios(soft, hard)
        base = Comparison(where, "asymmetry", "soft_rank", "hard_rank")
        if not ratio:
            out.append(replace(base, status="refused:no_common_runs"))
            continue
        status = _status(statuses.get(series, "ok"), statuses.get(twin, "ok"))
        out.append(_slope_of(replace(base, status=status), ratio, "ln_soft_over_hard"))
    return out


def _slope_of(base: Comparison, points: Sequence[Point], what: str) -> Comparison:
    """The slope of a ratio of the same runs, by the method of any fit."""
    found = ratio_of(points, [replace(point, value=1.0, error=0.0) for point in points])
    fit = fit_series(points, extras=False)
    status = _status(base.status, fit.status)
    if fit.refused or found is None:
        return replace(base, status=status if status.startswith("refused") else "refused:fewer_than_3_widths")
    method = found.method.removesuffix("of_ln_ratio") + f"of_{what}"
    return replace(found.estimate(replace(base, status=status), found.fit.design.slope), method=method)


def decay_changes(table: PointTable, before: PointTable) -> list[Comparison]:
    """Beta at the end minus beta just before the learning rate decays, from ln(end / before) of the same runs."""
    earlier = before.groups()
    out = []
    for series, points in table.groups().items():
        ratio = _run_ratios(points, earlier.get(series, []))
        if not ratio:
            continue
        base = Comparison(dict(zip(table.by, series, strict=True)), "decay_change", "end", "before decay")
        own = replace(base, note=f"before: step {max(p.steps[-1] for p in earlier[series])}")
        out.append(_slope_of(own, ratio, "ln_end_over_before"))
    return out


def _run_ratios(points_a: Sequence[Point], points_b: Sequence[Point]) -> list[Point]:
    """Value of a over that of b, for runs that have both."""
    by_run = {(p.x, p.seed, p.source): p.value for p in points_b}
    return [
        replace(p, value=p.value / by_run[key], spread=NAN, layers=(), error=NAN)
        for p in points_a
        if (key := (p.x, p.seed, p.source)) in by_run and by_run[key] > 0
    ]


def comparison_table(by: Sequence[str], comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``comparisons.csv``."""
    names = list(dict.fromkeys([*by, *(name for comparison in comparisons for name in comparison.where)]))
    rows = [
        [*(c.where.get(name, "") for name in names), *(getattr(c, name) for name in COMPARISON_COLUMNS)]
        for c in comparisons
    ]
    return [*names, *COMPARISON_COLUMNS], rows


def _mean_ln(points: Sequence[Point], *, by_seed: bool) -> dict[tuple[float, str], tuple[float, float]]:
    """(width, seed) -> mean of ln(value) and its error of measurement; the seed is blank unless asked for."""
    values: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for point in points:
        if point.value > 0 and (point.seed or not by_seed):
            key = (point.x, point.seed if by_seed else "")
            values.setdefault(key, []).append((math.log(point.value), point.error))
    return {
        key: (sum(v for v, _ in own) / len(own), math.sqrt(sum(e * e for _, e in own)) / len(own))
        for key, own in values.items()
    }


def _with_t(base: Comparison, estimate: float, se: float, df: float, method: str) -> Comparison:
    if not (df > 0 and se >= 0):
        return replace(base, estimate=estimate, df=df, method=method, note=base.note or "no interval")
    half = float(t_quantile(df)) * se
    p = float(two_sided_p(estimate / se, df)) if se > 0 else (0.0 if estimate else 1.0)
    return replace(base, estimate=estimate, ci_low=estimate - half, ci_high=estimate + half, p=p, df=df, method=method)


def _status(*statuses: str) -> str:
    for status in statuses:
        if status.startswith("refused"):
            return status
    return "+".join(dict.fromkeys(flag for status in statuses for flag in status.split("+") if flag != "ok")) or "ok"
