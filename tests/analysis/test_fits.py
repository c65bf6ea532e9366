from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from lightning_spectral.analysis.fits import METHODS, bootstrap_slopes, fit_series, slopes_by_seed
from lightning_spectral.analysis.points import Point
from tests.analysis.synthetic import power_law_points


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
    coefficients, rss, *_ = np.linalg.lstsq(design, y)
    covariance = rss[0] / 4 * np.linalg.inv(design.T @ design)
    at = np.array([1.0, math.log(200.0)])
    half = stats.t.ppf(0.975, 4) * math.sqrt(at @ covariance @ at)
    low, high = fit.band(np.array([200.0]))
    assert_allclose(np.log([low[0], high[0]]), [at @ coefficients - half, at @ coefficients + half], rtol=1e-8)


def test_seeds_change_the_method_and_the_columns() -> None:
    fit = fit_series(power_law_points(0.6, noise=0.2, seeds=3))
    assert fit.method == "ols_seed_means"
    assert (fit.n, fit.num_runs, fit.num_seeds) == (6, 18, 3)
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
