from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from lightning_spectral.analysis.linear import (
    least_squares,
    leave_one_out,
    seed_means,
    t_quantile,
    theil_sen,
    two_sided_p,
    welch,
)


@given(st.integers(0, 10_000), st.integers(3, 12))
def test_least_squares_is_scipys_line(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(6, 1, n), rng.normal(4, 2, n)
    line, oracle = least_squares(x, y), stats.linregress(x, y)
    # fp64 on data of order 1-10 whose x are well apart
    assert_allclose(line.slope, oracle.slope, rtol=1e-9, atol=1e-10)
    assert_allclose(line.intercept, oracle.intercept, rtol=1e-9, atol=1e-9)
    assert_allclose(line.slope_se, oracle.stderr, rtol=1e-8)
    assert_allclose(line.r2, oracle.rvalue**2, rtol=1e-8, atol=1e-10)


def test_weighted_least_squares_is_repetition() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    weighted = least_squares(x, y, np.array([1.0, 3.0, 2.0]))
    repeated = least_squares(np.repeat(x, [1, 3, 2]), np.repeat(y, [1, 3, 2]))
    assert_allclose(weighted.slope, repeated.slope, rtol=1e-12)
    assert_allclose(weighted.intercept, repeated.intercept, rtol=1e-12)


def test_many_sweeps_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    x, y = np.linspace(5, 7, 6), rng.normal(size=(7, 6))
    together = least_squares(x, y)
    assert_allclose(together.slope, [least_squares(x, row).slope for row in y], rtol=1e-12)


def test_one_x_is_no_line() -> None:
    with pytest.raises(ValueError, match="2 distinct x"):
        least_squares(np.array([1.0, 1.0]), np.array([1.0, 2.0]))


def test_t_quantile_and_p_are_scipys() -> None:
    assert_allclose(t_quantile(6), stats.t.ppf(0.975, 6), rtol=1e-10)
    assert np.isnan(t_quantile(0))
    assert_allclose(two_sided_p(2.3, 5), 2 * stats.t.sf(2.3, 5), rtol=1e-10)


def test_theil_sen_is_scipys_and_shrugs_off_an_outlier() -> None:
    x = np.arange(8.0)
    y = 2 * x + 1
    y[3] = 100
    oracle = stats.theilslopes(y, x)
    assert_allclose(theil_sen(x, y), tuple(oracle), rtol=1e-12)
    assert theil_sen(x, y)[0] == pytest.approx(2.0)


def test_seed_means_and_leave_one_out() -> None:
    x, y = np.array([1.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 2.0, 3.0, 4.0])
    widths, means = seed_means(x, y)
    assert widths.tolist() == [1, 2, 3, 4]
    assert means.tolist() == [1, 2, 3, 4]
    bent = np.array([1.0, 2.0, 3.0, 10.0])
    low, high = leave_one_out(np.array([1.0, 2.0, 3.0, 4.0]), bent)
    slopes = [np.polyfit(np.delete([1, 2, 3, 4], k), np.delete(bent, k), 1)[0] for k in range(4)]
    assert_allclose((low, high), (min(slopes), max(slopes)), rtol=1e-10)
    assert np.isnan(leave_one_out(np.array([1.0, 2.0, 3.0]), np.ones(3))).all()


def test_welch_is_scipys_for_equal_sizes() -> None:
    # two means are slopes of a kind: scipy's unequal-variance t test is the oracle
    a, b = np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 3.5, 3.2])
    difference, se, df = welch(a.mean(), a.std(ddof=1) / 2, 3, b.mean(), b.std(ddof=1) / np.sqrt(3), 2)
    oracle = stats.ttest_ind(a, b, equal_var=False)
    assert_allclose(difference / se, oracle.statistic, rtol=1e-10)
    assert_allclose(df, oracle.df, rtol=1e-10)
