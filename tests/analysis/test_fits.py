from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from lightning_spectral.analysis.fit_methods import METHODS, bootstrap_slopes, slopes_by_seed
from lightning_spectral.analysis.fits import fit_series
from lightning_spectral.analysis.points import Point
from tests.analysis.synthetic import power_law_points


@settings(deadline=None)  # a busy machine is no fault of the law
@given(st.floats(-1.5, 2.0), st.floats(0.01, 100.0))
def test_an_exact_law_is_recovered_by_every_method(beta: float, a: float) -> None:
    points = power_law_points(beta, a, seeds=2)
    for method in METHODS:
        fit = fit_series(points, method=method, extras=False)
        assert fit.status == "ok"
        # exact data: what is left is rounding in ln and the normal equations
        assert_allclose([fit.beta, math.exp(fit.ln_a)], [beta, a], rtol=1e-8, atol=1e-9)


def test_default_is_ols_with_scipys_t_interval() -> None:
    rng = np.random.default_rng(3)
    points = power_law_points(0.5, noise=0.3, rng=rng, widths=(768, 1536, 2304, 3072, 3840, 4608, 5376, 6144))
    fit = fit_series(points)
    oracle = stats.linregress(np.log([p.x for p in points]), np.log([p.value for p in points]))
    half = stats.t.ppf(0.975, 6) * oracle.stderr
    assert (fit.method, fit.n, fit.num_widths) == ("ols", 8, 8)
    assert_allclose(
        [fit.beta, fit.ln_a, fit.ci_low, fit.ci_high, fit.r2],
        [oracle.slope, oracle.intercept, oracle.slope - half, oracle.slope + half, oracle.rvalue**2],
        rtol=1e-9,
    )
    assert fit.loo_low <= fit.beta <= fit.loo_high
    low, high = fit.band(np.array([768.0, 6144.0]))
    assert (low < fit.line(np.array([768.0, 6144.0]))).all()
    assert (high > low).all()


def test_band_is_the_textbook_interval_of_the_mean() -> None:
    points = power_law_points(0.5, noise=0.3)
    fit = fit_series(points)
    x, y = np.log([p.x for p in points]), np.log([p.value for p in points])
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = rss[0] / 4 * np.linalg.inv(design.T @ design)
    at = np.array([1.0, math.log(200.0)])
    half = stats.t.ppf(0.975, 4) * math.sqrt(at @ covariance @ at)
    low, high = fit.band(np.array([200.0]))
    assert_allclose(np.log([low[0], high[0]]), [at @ coefficients - half, at @ coefficients + half], rtol=1e-8)


def test_seeds_change_the_method_and_the_columns() -> None:
    points = power_law_points(0.6, noise=0.2, seeds=3)
    fit = fit_series(points)
    assert fit.method == "mixed"
    assert (fit.n, fit.num_runs, fit.num_seeds) == (18, 18, 3)
    # the line itself is that through the means of the widths
    assert fit.beta == pytest.approx(fit_series(points, method="ols_seed_means").beta, rel=1e-9)
    assert fit.seed_low < fit.beta < fit.seed_high
    assert fit.boot_low < fit.beta < fit.boot_high


def test_seed_slopes_are_one_line_a_seed() -> None:
    points = power_law_points(0.6, noise=0.2, seeds=3)
    for k, slope in enumerate(slopes_by_seed(points)):
        own = [p for p in points if p.seed == str(k)]
        assert_allclose(slope, stats.linregress(np.log([p.x for p in own]), np.log([p.value for p in own])).slope)
    assert not len(slopes_by_seed([p for p in points if p.seed == "0"]))


def test_bootstrap_is_seeded_and_needs_seeds() -> None:
    points = power_law_points(0.6, noise=0.2, seeds=3)
    assert_allclose(bootstrap_slopes(points)[0], bootstrap_slopes(points)[0])
    fit = fit_series([p for p in points if p.seed == "0"], method="bootstrap")
    assert fit.status.startswith("refused:`bootstrap` needs at least two seeds")


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (power_law_points(0.5, widths=(128, 256)), "refused:fewer_than_3_widths"),
        (power_law_points(0.5, widths=(128, 256), seeds=4), "refused:fewer_than_3_widths"),
        ([*power_law_points(0.5), Point((), 99.0, 0.0)], "refused:non_positive_values"),
        ([*power_law_points(0.5), Point((), 99.0, -2.0)], "refused:non_positive_values"),
        ([*power_law_points(0.5), Point((), 99.0, math.inf)], "refused:missing_values"),
        ([Point((), 99.0, math.nan)], "refused:missing_values"),
    ],
)
def test_fits_that_are_refused(points: list[Point], reason: str) -> None:
    fit = fit_series(points)
    assert fit.status == reason
    assert fit.refused
    assert math.isnan(fit.beta)


def test_a_missing_value_is_left_out_and_said() -> None:
    points = power_law_points(0.5)
    fit = fit_series([*points, Point((), 4096.0, math.nan)])
    assert (fit.n, fit.status) == (6, "missing_values")
    assert_allclose(fit.beta, 0.5, rtol=1e-9)


def test_wide_and_unknown_intervals_say_so() -> None:
    assert not fit_series(power_law_points(0.5, noise=0.01)).wide
    assert fit_series(power_law_points(0.5, noise=2.0)).wide
    assert replace(fit_series(power_law_points(0.5)), ci_low=math.nan).wide


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="unknown fit method `lasso`; choose auto, ols"):
        fit_series(power_law_points(0.5), method="lasso")


def test_a_bent_law_is_flagged_with_its_slopes_at_both_ends() -> None:
    x = np.geomspace(1e8, 1e10, 12)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.002, 12))
    floor = [Point((), float(a), float(b), str(a)) for a, b in zip(x, (1.7 + 400 * x**-0.34) * noise, strict=True)]
    fit = fit_series(floor)
    assert fit.status == "bent"
    # d ln(E + A x^-a) / d ln x at the ends; a parabola is not quite that curve
    true = [-0.34 * 400 * e**-0.34 / (1.7 + 400 * e**-0.34) for e in (x[0], x[-1])]
    assert_allclose([fit.slope_low, fit.slope_high], true, atol=0.02)
    u = np.log(x) - np.log(x).mean()
    oracle = np.polyfit(u, np.log([p.value for p in floor]), 2)
    assert_allclose([fit.bend, fit.slope_low], [oracle[0], oracle[1] + 2 * oracle[0] * u[0]], rtol=1e-8)


def test_a_straight_law_is_bent_in_one_fit_in_twenty() -> None:
    rng = np.random.default_rng(4)
    flagged = sum("bent" in fit_series(power_law_points(0.5, noise=0.2, rng=rng)).status for _ in range(400))
    assert 8 <= flagged <= 34  # binomial(400, .05): 99.8 % of draws


def test_errors_of_measurement_are_a_floor_under_the_interval() -> None:
    points = power_law_points(0.5, noise=0.001)
    plain, known = fit_series(points), fit_series([replace(p, error=0.1) for p in points])
    u = np.log([p.x for p in points]) - np.log([p.x for p in points]).mean()
    assert known.std_err == pytest.approx(0.1 / math.sqrt(float(u @ u)), rel=1e-9)
    assert known.beta == plain.beta
    assert plain.std_err < 0.1 * known.std_err


def test_a_logged_curve_of_143000_rows_is_fitted_in_seconds() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1, 143_001)
    values = np.exp(0.3 * np.log(steps) + rng.normal(0, 0.02, len(steps)))
    tracemalloc.start()
    fit = fit_series([Point((), float(a), float(b)) for a, b in zip(steps, values, strict=True)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fit.beta == pytest.approx(0.3, abs=0.001)
    assert fit.theil_sen == pytest.approx(0.3, abs=0.01)
    assert peak < 200e6


def test_a_band_beyond_the_largest_number_is_open() -> None:
    points = [Point((), float(w), v) for w, v in ((64, 1e-3), (128, 1e300), (256, 1e-3), (512, 1e300))]
    low, high = fit_series(points).band(np.array([64.0, 512.0]))
    assert np.isinf(high).any()
    assert (low >= 0).all()


@pytest.mark.parametrize("layers", [(3.0, 4.0), (3.0, 4.0, math.nan), (3.0, 4.0, 0.0), ()])
def test_a_layer_that_one_run_lacks_costs_the_bootstrap_and_nothing_else(layers: tuple[float, ...]) -> None:
    points = power_law_points(0.5, seeds=3, noise=0.05, layers=3)
    whole, fit = fit_series(points), fit_series([replace(points[0], layers=layers), *points[1:]])
    assert math.isfinite(whole.boot_low)
    assert math.isnan(fit.boot_low)
    assert (fit.beta, fit.ci_low, fit.seed_low) == (whole.beta, whole.ci_low, whole.seed_low)
