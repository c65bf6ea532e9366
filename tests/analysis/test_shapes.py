"""Laws whose shape is known are told apart and recovered."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_spectral.analysis.shapes import floor, more_needed, polynomial, shapes_of

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


def test_what_cannot_be_fitted() -> None:
    assert floor([X[:3]], X[:3]) is None
    assert floor([X], 3 * X**0.5) is None  # it grows
    assert polynomial(X[:2], X[:2], 1) is None


def test_runs_needed_for_a_separation() -> None:
    """t(.975, 10) + t(.8, 10) standard errors are a power of 80 %."""
    needed = more_needed(0.2, 10, 0.3)
    assert needed == pytest.approx(((stats.t.ppf(0.975, 10) + stats.t.ppf(0.8, 10)) * 0.2 / 0.3) ** 2, rel=1e-9)
    assert more_needed(0.01, 10, 0.3) == 1.0
    with pytest.raises(ValueError, match=r"`amount` must be > 0"):
        more_needed(0.2, 10, 0.0)
    assert math.isfinite(needed)
