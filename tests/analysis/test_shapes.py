"""Laws whose shape is known are told apart and recovered."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_spectral.analysis.shapes import floor, polynomial, shapes_of, without_far

X = np.geomspace(1e8, 1e10, 12)
NOISE = np.exp(np.random.default_rng(0).normal(0, 0.002, 12))


def test_a_loss_with_a_floor_is_one() -> None:
    best, *others = shapes_of(X, (1.7 + 400 * X**-0.34) * NOISE)
    assert best.model == "floor"
    assert {shape.model for shape in others} == {"power", "bent"}
    for name, true in (("E", 1.7), ("A", 400.0), ("exponent", 0.34)):
        k = best.names.index(name)
        assert best.low[k] < true < best.high[k] or name == "A"  # the ends of A are at the fitted exponent
    assert best.values[best.names.index("E")] == pytest.approx(1.7, rel=0.05)


def test_a_power_law_is_one_and_a_parabola_is_bent() -> None:
    assert shapes_of(X, 3 * X**0.5 * NOISE)[0].model == "power"
    assert shapes_of(X, 2.5 * np.exp(0.02 * np.log(X / 1e9) ** 2) * NOISE)[0].model == "bent"


def test_a_straight_line_has_scipys_interval() -> None:
    y = 3 * X**0.5 * NOISE
    shape, oracle = polynomial(X, y, 1), stats.linregress(np.log(X), np.log(y))
    assert shape is not None
    half = stats.t.ppf(0.975, 10) * oracle.stderr
    assert shape.values[1] == pytest.approx(oracle.slope, rel=1e-9)
    assert shape.low[1] == pytest.approx(oracle.slope - half, rel=1e-9)


def test_a_law_of_two_variables_is_recovered() -> None:
    """The published form: L(N, D) = 1.69 + 406.4 N^-0.34 + 410.7 D^-0.28, without noise."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(1e8, 1e11, 7)))
    shape = floor([n, d], 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28)
    assert shape is not None
    assert shape.names == ("E", "A", "exponent", "A1", "exponent1")
    assert shape.values == pytest.approx((1.69, 406.4, 0.34, 410.7, 0.28), rel=1e-4)


def test_points_far_off_do_not_carry_a_law() -> None:
    """Three of 49 runs that diverged, at few tokens; the noise is .2 %."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(1e8, 1e11, 7)))
    loss = (1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28) * np.exp(np.random.default_rng(3).normal(0, 0.002, 49))
    whole = floor([n, d], loss)
    assert whole is not None
    same, far = without_far([n, d], loss, whole)
    assert same == whole
    assert not far.any()
    wrong = np.zeros(49, dtype=bool)
    wrong[[3, 5, 6]] = True
    carried = floor([n, d], np.where(wrong, 1.3 * loss, loss))
    assert carried is not None
    assert not carried.low[4] < 0.28 < carried.high[4]
    rest, far = without_far([n, d], np.where(wrong, 1.3 * loss, loss), carried)
    assert rest is not None
    assert (far == wrong).all()
    assert rest.low[4] < 0.28 < rest.high[4]


def test_what_cannot_be_fitted() -> None:
    assert floor([X[:3]], X[:3]) is None
    assert floor([X], 3 * X**0.5) is None  # it grows
    assert polynomial(X[:2], X[:2], 1) is None


@pytest.mark.slow
def test_intervals_of_a_law_in_two_variables_cover() -> None:
    """Those of A and B, too, which hang on the exponents: in units of the variables, not at the fitted exponent."""
    true = (1.69, 406.4, 0.34, 410.7, 0.28)
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e8, 1e11, 6)))
    loss = true[0] + true[1] * n ** -true[2] + true[3] * d ** -true[4]
    hits = np.zeros(5)
    for seed in range(60):
        found = floor([n, d], loss * np.exp(0.002 * np.random.default_rng(seed).standard_normal(len(n))))
        assert found is not None
        hits += [low <= value <= high for low, value, high in zip(found.low, true, found.high, strict=True)]
    # 60 draws: three standard errors below 95 %
    assert (hits / 60 >= 0.866).all(), hits
