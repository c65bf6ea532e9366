from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from lightning_spectral.analysis.compare import Comparison, compare_fits, comparison_table, with_holm
from lightning_spectral.analysis.crossovers import crossover
from lightning_spectral.analysis.effects import compare_effects, mean_squared_shifts
from lightning_spectral.analysis.strata import seed_design
from lightning_spectral.analysis.study import Fitted, comparisons_of, fit_points
from tests.analysis.synthetic import power_law_points, table


def fitted(noise: float = 0.0, **slopes: tuple[float, float]) -> Fitted:
    rng = np.random.default_rng(1)
    points = [
        p for name, (beta, a) in slopes.items() for p in power_law_points(beta, a, noise=noise, series=(name,), rng=rng)
    ]
    return fit_points(table(points, ("optimizer",)))


def kinds(found: Fitted) -> dict[str, Comparison]:
    return {c.kind: c for c in compare_fits(found.table, found.fits)}


def test_differences_of_exact_laws() -> None:
    found = kinds(fitted(muon=(1.0, 1.0), adamw=(0.5, 20.0)))
    assert found["slope_difference"].estimate == pytest.approx(0.5, rel=1e-9)
    assert (found["slope_difference"].a, found["slope_difference"].b) == ("muon", "adamw")
    # D = 20 D^0.5 where D = 400
    assert found["crossover_width"].estimate == pytest.approx(400.0, rel=1e-6)
    middle = math.exp(np.mean(np.log([128, 256, 384, 512, 768, 1024])))
    assert found["level_difference"].estimate == pytest.approx(0.5 * math.log(middle / 400), rel=1e-6)


def test_with_one_run_a_width_the_difference_is_the_regression_of_the_ratio() -> None:
    sweep = fitted(0.4, muon=(1.0, 1.0), adamw=(0.5, 20.0))
    a, b = sweep.table.groups().values()
    x, y = np.log([p.x for p in a]), np.log([p.value / q.value for p, q in zip(a, b, strict=True)])
    oracle = stats.linregress(x, y)
    c = kinds(sweep)["slope_difference"]
    half = stats.t.ppf(0.975, 4) * oracle.stderr
    expected = [oracle.slope, oracle.slope - half, oracle.slope + half, oracle.pvalue, 4]
    assert_allclose([c.estimate, c.ci_low, c.ci_high, c.p, c.df], expected, rtol=1e-9)
    assert c.method == "ols_of_ln_ratio"
    assert c.p_holm == c.p  # one pair


def test_series_without_three_widths_in_common_are_two_regressions() -> None:
    wide = power_law_points(1.0, noise=0.3, series=("muon",))
    other = power_law_points(0.5, noise=0.3, series=("adamw",), widths=(100, 200, 300, 400))
    sweep = fit_points(table([*wide, *other], ("optimizer",)))
    lines = [
        stats.linregress(np.log([p.x for p in points]), np.log([p.value for p in points])) for points in (wide, other)
    ]
    se = math.hypot(lines[0].stderr, lines[1].stderr)
    df = se**4 / (lines[0].stderr ** 4 / 4 + lines[1].stderr ** 4 / 2)
    (c,) = compare_fits(sweep.table, sweep.fits)
    gap = lines[0].slope - lines[1].slope
    assert_allclose([c.estimate, c.p, c.df], [gap, 2 * stats.t.sf(abs(gap) / se, df), df], rtol=1e-9)
    assert c.method == "welch(ols)"


def test_the_crossover_set_is_fiellers_where_there_is_one_run_a_width() -> None:
    sweep = fitted(0.1, muon=(1.0, 1.0), adamw=(0.5, 20.0))
    a, b = sweep.table.groups().values()
    x, y = np.log([p.x for p in a]), np.log([p.value / q.value for p, q in zip(a, b, strict=True)])
    c = kinds(sweep)["crossover_width"]
    line, t, u = stats.linregress(x, y), stats.t.ppf(0.975, 4), x - x.mean()
    residual_var = float(((y - line.intercept - line.slope * x) ** 2).sum()) / 4
    for end in (c.ci_low, c.ci_high):
        d = math.log(end) - x.mean()
        variance = residual_var * (1 / 6 + d * d / float(u @ u))
        assert (y.mean() + line.slope * d) ** 2 == pytest.approx(t * t * variance, rel=1e-3)
    assert c.ci_low < c.estimate < c.ci_high


def test_a_crossover_that_is_not_bounded_says_so() -> None:
    apart = kinds(fitted(0.05, muon=(0.5, 1.0), adamw=(0.5, 20.0)))["crossover_width"]  # parallel, far apart
    assert math.isnan(apart.estimate)
    assert "do not meet" in apart.note
    noisy = kinds(fitted(0.8, muon=(0.6, 1.0), adamw=(0.5, 1.8)))["crossover_width"]
    assert (noisy.ci_low, noisy.ci_high) == (0.0, math.inf)
    assert noisy.note == "any width may be the crossover"


def test_holm_corrects_within_one_measurement() -> None:
    p_values = (0.01, 0.04, 0.03)
    found = with_holm([Comparison({"metric": "hard_rank"}, "slope_difference", "a", "b", p=p) for p in p_values])
    assert [c.p_holm for c in found] == [0.03, 0.06, 0.06]
    assert [c.separated for c in found] == [True, False, False]
    others = [Comparison({"metric": f"m{k}"}, "slope_difference", "a", "b", p=0.04) for k in range(3)]
    assert [c.p_holm for c in with_holm(others)] == [0.04] * 3


def test_refused_fits_are_not_compared() -> None:
    points = [*power_law_points(1.0, series=("muon",)), *power_law_points(0.5, series=("adamw",), widths=(128, 256))]
    (c,) = compare_fits(table(points, ("optimizer",)), fit_points(table(points, ("optimizer",))).fits)
    assert c.status == "refused:fewer_than_3_widths"
    assert math.isnan(c.estimate)
    assert math.isnan(c.p_holm)


def test_pairs_differ_in_one_column_or_in_one_that_only_one_side_has() -> None:
    names = [("adamw", "", "6"), ("adamw", "", "12"), ("dion", "1/2", "6"), ("dion", "1/16", "6")]
    points = [p for k, series in enumerate(names) for p in power_law_points(0.1 * k, noise=0.1, series=series)]
    sweep = fit_points(table(points, ("optimizer", "rank", "heads")))
    pairs = {(c.a, c.b) for c in compare_fits(sweep.table, sweep.fits)}
    assert pairs == {("6", "12"), ("adamw", "dion 1/2"), ("adamw", "dion 1/16"), ("1/2", "1/16")}
    header, rows = comparison_table(sweep.table.by, compare_fits(sweep.table, sweep.fits))
    assert header[:3] == ["optimizer", "rank", "heads"]
    assert {len(row) for row in rows} == {len(header)}


def test_asymmetry_comes_from_the_same_runs() -> None:
    hard = power_law_points(0.4, noise=0.5, series=("muon", "hard_rank"))
    soft = [replace(p, series=("muon", "soft_rank"), value=p.value * 2 * p.x**0.3) for p in hard]
    sweep = fit_points(table([*soft, *hard], ("optimizer", "metric")))
    (c,) = [c for c in comparisons_of(sweep) if c.kind == "asymmetry"]
    # the noise of soft and hard is one and the same here: it cancels
    assert c.estimate == pytest.approx(0.3, rel=1e-6)
    assert c.ci_high - c.ci_low < 1e-6
    by_metric = {fit.series[1]: fit for fit in sweep.fits}
    assert c.estimate == pytest.approx(by_metric["soft_rank"].beta - by_metric["hard_rank"].beta, rel=1e-6)
    missing = fit_points(table(soft, ("optimizer", "metric")))
    assert not [c for c in comparisons_of(missing) if c.kind == "asymmetry"]


def test_mean_squared_shift_is_unbiased_where_the_best_of_four_is_not() -> None:
    rng = np.random.default_rng(0)
    se = np.full((5, 2), 0.2)
    beta = 0.2 * rng.standard_normal((4000, 5, 2))  # nothing is true, all is noise
    rows, columns = mean_squared_shifts(beta, se**2)
    assert abs(float(rows.mean())) < 4 * float(rows.std()) / math.sqrt(4000)
    assert abs(float(columns.mean())) < 4 * float(columns.std()) / math.sqrt(4000)
    best_of_four = np.abs(beta[:, 1:, 0] - beta[:, :1, 0]).max(axis=1)
    one_architecture = np.abs(beta[:, 0, 0] - beta[:, 0, 1])
    assert float((best_of_four > one_architecture).mean()) > 0.75  # the tempting answer finds "optimizer" in noise


@pytest.mark.parametrize(("optimizer", "heads", "sign"), [(0.5, 0.0, 1), (0.0, 0.5, -1)])
def test_the_larger_effect_is_found(optimizer: float, heads: float, sign: int) -> None:
    slopes = {
        (o, h): (0.5 + optimizer * k + heads * j, 0.05, 6) for k, o in enumerate("abc") for j, h in enumerate("xy")
    }
    effect = compare_effects(slopes)
    assert math.copysign(1, effect.difference) == sign
    assert effect.ci_low * effect.ci_high > 0
    assert effect.p < 0.05


def test_equal_effects_are_not_told_apart_too_often() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        slopes = {
            (o, h): (0.3 * k + 0.3 * j + 0.1 * rng.standard_normal(), 0.1, 6)
            for k, o in enumerate("ab")
            for j, h in enumerate("xy")
        }
        effect = compare_effects(slopes)
        hits += not effect.ci_low <= 0 <= effect.ci_high
    assert hits <= 12  # 5 expected; 12 of 100 has probability 0.4 % at 5 %


@pytest.mark.parametrize(
    ("slopes", "message"),
    [
        ({("a", "x"): (1.0, 0.1, 6.0), ("a", "y"): (1.0, 0.1, 6.0)}, "both factors need two levels"),
        ({("a", "x"): (1.0, 0.1, 6.0), ("b", "y"): (1.0, 0.1, 6.0)}, "no fit for a with y"),
        ({(a, b): (1.0, 0.1, 2.0) for a in "ab" for b in "xy"}, "more than 2 degrees of freedom"),
    ],
)
def test_grids_that_cannot_be_compared(slopes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_effects(slopes)


def test_architecture_must_be_a_column() -> None:
    with pytest.raises(ValueError, match="needs the column `heads`"):
        comparisons_of(fitted(muon=(1.0, 1.0), adamw=(0.5, 1.0)), "heads")


def test_effects_over_a_table() -> None:
    rng = np.random.default_rng(3)
    points = [
        p
        for k, name in enumerate(("adamw", "muon"))
        for j, heads in enumerate(("6", "12"))
        for p in power_law_points(0.4 + 0.5 * k + 0.02 * j, noise=0.05, series=(name, heads), rng=rng)
    ]
    (c,) = [c for c in comparisons_of(fit_points(table(points, ("optimizer", "heads"))), "heads") if c.kind == "effect"]
    assert c.separated
    assert c.estimate == pytest.approx(0.25, abs=0.1)  # 0.5^2; the slopes' own noise is about 0.05


def test_a_narrow_stretch_where_lines_do_not_meet_is_seen() -> None:
    """Slopes that seeds scatter, levels that they do not: the lines are apart in the middle, and only there."""
    x = np.log([128.0, 256, 384, 512, 768, 1024])
    u = x - x.mean()
    rng = np.random.default_rng(1)
    y = 0.04 + np.outer([0.5, -0.5], u) + rng.normal(0, 0.002, (2, 6))
    design = seed_design(np.tile(x, 2), ["0"] * 6 + ["1"] * 6)
    assert design is not None
    fit = design.fit(y.ravel())
    assert abs(float(design.level @ fit.y)) > float(fit.uncertainty(design.level).half_width())
    low, high = (float(word) for word in crossover(fit).note.replace(",", "").split() if word[0].isdigit())
    assert low < math.exp(x.mean()) < high
