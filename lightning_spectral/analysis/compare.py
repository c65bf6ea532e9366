"""Is one exponent larger than another? Differences with intervals, never two point estimates side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from lightning_spectral.analysis.fits import NAN, PowerLawFit, choose_method, fit_series
from lightning_spectral.analysis.linear import least_squares, t_quantile, two_sided_p, welch
from lightning_spectral.analysis.points import Point, PointTable

MEASURES: Final = ("site", "bucket", "metric", "layer")
COMPARISON_COLUMNS: Final = ("kind", "a", "b", "estimate", "ci_low", "ci_high", "p", "df", "status", "method", "note")


@dataclass(frozen=True)
class Comparison:
    """One number that sets two series apart.

    Attributes:
        where: Column name -> value of what both sides share (site, bucket, metric, layer, ...).
        kind: ``slope_difference``, ``slope_difference_paired``, ``slope_difference_over_seeds`` (each also with
            ``_pre_decay``), ``level_difference``, ``crossover_width``, ``asymmetry``, ``decay_change``, ``effect``,
            ``matched_loss`` or ``matched_loss_slope``.
        a: First side.
        b: Second side; empty for a property of one side.
        estimate: ``a - b`` of slopes or of ln(value), or a width for the crossover.
        ci_low: Lower end of the 95 % interval; NaN if there is none.
        ci_high: Upper end.
        p: Two-sided p value of "no difference".
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
    df: float = NAN
    status: str = "ok"
    method: str = ""
    note: str = ""

    @property
    def separated(self) -> bool:
        """Whether the 95 % interval leaves zero out."""
        return self.ci_low > 0 or self.ci_high < 0


def compare_fits(table: PointTable, fits: Sequence[PowerLawFit]) -> list[Comparison]:
    """Every pair of series of one measurement that differ in one column.

    A column that only some series have (the rank fraction of Dion) does not count as a second difference.
    """
    groups = table.groups()
    out: list[Comparison] = []
    for one, two in itertools.combinations(fits, 2):
        differing = [(name, x, y) for name, x, y in zip(table.by, one.series, two.series, strict=True) if x != y]
        names = [name for name, _, _ in differing]
        whole = [name for name, x, y in differing if x and y]
        if len(whole) <= 1 and not set(names) & set(MEASURES):
            out += compare_pair(table.by, names, one, two, groups[one.series], groups[two.series])
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
    if one.refused or two.refused or not (one.df > 0 and two.df > 0):
        reason = base.status if base.status.startswith("refused") else "refused:no_interval"
        return [replace(base, status=reason)]
    difference, se, df = welch(
        np.float64(one.beta),
        np.float64(one.std_err),
        int(one.df),
        np.float64(two.beta),
        np.float64(two.std_err),
        int(two.df),
    )
    note = "" if (one.x_min, one.x_max) == (two.x_min, two.x_max) else "the fits cover different widths"
    slope = _with_t(replace(base, note=note), float(difference), float(se), float(df), f"welch({one.method})")
    return [slope, *_paired(base, points_a, points_b), *_over_seeds(base, points_a, points_b)]


def _over_seeds(base: Comparison, points_a: list[Point], points_b: list[Point]) -> list[Comparison]:
    """One slope difference a seed, at the widths that both have; what another seed would give."""
    widths = {point.x for point in points_a} & {point.x for point in points_b}
    one, two = (_slope_of_seeds(points, widths) for points in (points_a, points_b))
    seeds = sorted(set(one) & set(two))
    if len(seeds) < 2:
        return []
    gaps = np.array([one[seed] - two[seed] for seed in seeds])
    se = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    own = replace(base, kind="slope_difference_over_seeds", note=f"{len(seeds)} seeds; one difference a seed")
    return [_with_t(own, float(gaps.mean()), se, len(gaps) - 1, "t_over_seeds")]


def _slope_of_seeds(points: list[Point], widths: set[float]) -> dict[str, float]:
    out = {}
    for seed in {point.seed for point in points if point.seed}:
        own = [point for point in points if point.seed == seed and point.x in widths and point.value > 0]
        if len(widths) > 2 and {point.x for point in own} == widths:
            line = least_squares(np.log([point.x for point in own]), np.log([point.value for point in own]))
            out[seed] = float(line.slope)
    return out


def _paired(base: Comparison, points_a: list[Point], points_b: list[Point]) -> list[Comparison]:
    """Regress ln(a / b) on ln x at the widths that both have: what a width has in common cancels."""
    ratio = ratio_points(points_a, points_b)
    if len(ratio) < 3:
        return [replace(base, kind=kind, status="refused:fewer_than_3_common_widths") for kind in ("level_difference",)]
    x = np.log([at for at, _ in ratio])
    y = np.array([value for _, value in ratio])
    line = least_squares(x, y)
    slope, se = float(line.slope), float(line.slope_se)
    center = float(line.intercept + line.slope * line.x_mean)
    center_se = float(line.mean_se(line.x_mean))
    at = math.exp(line.x_mean)
    level = replace(base, kind="level_difference", note=f"ln(a/b) at width {at:.6g}")
    width, low, high, method, note = crossover(slope, se, center, center_se, line.df, line.x_mean)
    inside = math.exp(x.min()) <= width <= math.exp(x.max()) if math.isfinite(width) else False
    note = note or ("" if inside else "outside the measured widths")
    cross = replace(
        base, kind="crossover_width", estimate=width, ci_low=low, ci_high=high, df=line.df, method=method, note=note
    )
    return [
        _with_t(replace(base, kind="slope_difference_paired"), slope, se, line.df, "ols_of_ln_ratio"),
        _with_t(level, center, center_se, line.df, "ols_of_ln_ratio"),
        cross,
    ]


def crossover(
    slope: float, se: float, center: float, center_se: float, df: float, x_mean: float
) -> tuple[float, float, float, str, str]:
    """Width at which two fitted lines meet, with Fieller's interval.

    Returns:
        (width, low, high, method, note); the interval is NaN when the slopes are not separated, for then every width,
        or all but a stretch in the middle, is a possible crossover.
    """
    if slope == 0:
        return NAN, NAN, NAN, "fieller", "the lines are parallel"
    offset = -center / slope
    width = _exp(x_mean + offset)
    t = float(t_quantile(df))
    # (center + slope * d)^2 <= t^2 (center_se^2 + slope_se^2 d^2): a quadratic in d, open when g >= 1
    g = (t * se / slope) ** 2
    if not g < 1:
        return width, NAN, NAN, "fieller", "slopes not separated: the crossover is not bounded"
    root = (t / slope) * math.sqrt(max(0.0, (1 - g) * center_se**2 + (center / slope) ** 2 * se**2))
    ends = sorted(((offset - root) / (1 - g), (offset + root) / (1 - g)))
    return width, _exp(x_mean + ends[0]), _exp(x_mean + ends[1]), "fieller", ""


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
        fit = fit_series(ratio, method=choose_method(ratio), extras=False)
        status = _status(statuses.get(series, "ok"), statuses.get(twin, "ok"), fit.status)
        out.append(
            _with_t(replace(base, status=status), fit.beta, fit.std_err, fit.df, f"{fit.method}_of_ln_soft_over_hard")
        )
    return out


def decay_changes(table: PointTable, before: PointTable) -> list[Comparison]:
    """Beta at the end minus beta just before the learning rate decays, from ln(end / before) of the same runs."""
    earlier = before.groups()
    out = []
    for series, points in table.groups().items():
        ratio = _run_ratios(points, earlier.get(series, []))
        if not ratio:
            continue
        base = Comparison(dict(zip(table.by, series, strict=True)), "decay_change", "end", "before decay")
        fit = fit_series(ratio, method=choose_method(ratio), extras=False)
        if fit.refused:
            out.append(replace(base, status=fit.status))
            continue
        own = replace(base, status=fit.status, note=f"before: step {max(p.steps[-1] for p in earlier[series])}")
        out.append(_with_t(own, fit.beta, fit.std_err, fit.df, f"{fit.method}_of_ln_end_over_before"))
    return out


def _run_ratios(points_a: Sequence[Point], points_b: Sequence[Point]) -> list[Point]:
    """Value of a over that of b, for runs that have both."""
    by_run = {(p.x, p.seed, p.source): p.value for p in points_b}
    return [
        replace(p, value=p.value / by_run[key], spread=NAN, layers=())
        for p in points_a
        if (key := (p.x, p.seed, p.source)) in by_run and by_run[key] > 0
    ]


def ratio_points(points_a: Sequence[Point], points_b: Sequence[Point]) -> list[tuple[float, float]]:
    """(x, mean ln a - mean ln b) at the x that both have, ascending."""
    a, b = _mean_ln(points_a), _mean_ln(points_b)
    return [(x, a[x] - b[x]) for x in sorted(set(a) & set(b))]


def comparison_table(by: Sequence[str], comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``comparisons.csv``."""
    names = list(dict.fromkeys([*by, *(name for comparison in comparisons for name in comparison.where)]))
    rows = [
        [*(c.where.get(name, "") for name in names), *(getattr(c, name) for name in COMPARISON_COLUMNS)]
        for c in comparisons
    ]
    return [*names, *COMPARISON_COLUMNS], rows


def _mean_ln(points: Sequence[Point]) -> dict[float, float]:
    values: dict[float, list[float]] = {}
    for point in points:
        if point.value > 0:
            values.setdefault(point.x, []).append(math.log(point.value))
    return {x: sum(own) / len(own) for x, own in values.items()}


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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
