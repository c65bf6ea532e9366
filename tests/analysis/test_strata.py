"""Mean squares and intervals of designs with seeds, against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from lightning_spectral.analysis.compare import ratio_of
from lightning_spectral.analysis.fits import fit_series
from lightning_spectral.analysis.points import Point
from lightning_spectral.analysis.strata import Uncertainty, seed_design, width_design

X = np.log(np.array([128, 256, 384, 512, 768, 1024.0]))


def complete(seeds: int) -> tuple[np.ndarray, list[str]]:
    return np.tile(X, seeds), np.repeat([str(k) for k in range(seeds)], len(X)).tolist()


def test_one_part_is_students_t() -> None:
    one = Uncertainty(np.array([0.04]), np.array([4.0]), np.zeros(()))
    assert one.half_width() == pytest.approx(0.2 * stats.t.ppf(0.975, 4), rel=1e-12)
    assert float(one.p_value(0.5)) == pytest.approx(2 * stats.t.sf(2.5, 4), rel=1e-12)


@pytest.mark.parametrize("df", [1, 2, 4, 12])
def test_a_part_that_is_nothing_changes_nothing(df: int) -> None:
    two = Uncertainty(np.array([1.0, 0.0]), np.array([df, 8.0]), np.zeros(()))
    assert two.half_width() == pytest.approx(stats.t.ppf(0.975, df), rel=1e-12)


def test_a_part_of_few_degrees_of_freedom_is_not_argued_away_by_one_of_many() -> None:
    two = Uncertainty(np.array([1.0, 1.0]), np.array([1.0, 100.0]), np.zeros(()))
    assert two.half_width() == pytest.approx(0.6 * stats.t.ppf(0.975, 1), rel=1e-12)
    # an interval's ends have p = .05, for several estimates at once
    at = np.array([1.0, -1.0]) * two.half_width()
    np.testing.assert_allclose(two.p_value(at), 0.05, rtol=1e-9)


def test_parts_of_a_complete_design_are_the_two_way_analysis() -> None:
    design = seed_design(*complete(3))
    assert design is not None
    y = np.random.default_rng(0).normal(size=(3, 6)) + np.array([2.0, -2, 1, 0, 1, -2])
    fit = design.fit(y.ravel())
    u = X - X.mean()
    slopes, widths = y @ u / (u @ u), y.mean(0)
    left = widths - widths.mean() - slopes.mean() * u
    own = y - y.mean(1, keepdims=True) - slopes[:, None] * u
    own = own - own.mean(0)
    beyond = left @ left / 4 / (u @ u) - (own**2).sum() / 8 / (3 * (u @ u))
    found = fit.uncertainty(design.slope)
    assert beyond > 0
    # of the four degrees of freedom of the widths' mean square, the cube root of the share that is no residual
    assert_allclose(found.df, [2, 4 * np.cbrt(beyond / (left @ left / 4 / (u @ u)))], rtol=1e-9)
    assert_allclose(found.terms, [slopes.var(ddof=1) / 3, beyond], rtol=1e-9)
    assert_allclose(fit.uncertainty(design.level).terms[0], y.mean(1).var(ddof=1) / 3, rtol=1e-9)
    assert_allclose(design.slope @ fit.y, slopes.mean(), rtol=1e-9)
    assert_allclose(design.level @ fit.y, y.mean(), rtol=1e-9, atol=1e-12)


def half_finished() -> tuple[np.ndarray, list[str]]:
    return np.concatenate([X, X[:4], X[:3]]), ["0"] * 6 + ["1"] * 4 + ["2"] * 3


def test_the_variance_is_unbiased_in_a_half_finished_design() -> None:
    """E[y' A y] = tr(A Sigma), exactly: the sum over the columns r of a root of Sigma of r' A r."""
    x, seeds = half_finished()
    design = seed_design(x, seeds)
    assert design is not None
    by_seed = np.array([[s == name for name in "012"] for s in seeds], dtype=float)
    by_width = (x[:, None] == X).astype(float)
    sigma = 20 * by_seed @ by_seed.T + np.eye(len(x))
    for coefficients in (design.slope, design.level, design.at(0.7)):
        expected = sum(float(design.seeds_part(coefficients, r)[0]) for r in np.linalg.cholesky(sigma).T)
        assert expected == pytest.approx(coefficients @ sigma @ coefficients, rel=1e-9)
    # the mean square of widths: neither levels nor slopes of seeds, and `scale` of the widths' variance
    assert design.widths is not None
    square = design.widths.square.matrix
    assert np.trace(square @ by_width @ by_width.T) == pytest.approx(design.widths.scale, rel=1e-9)
    assert np.trace(square) == pytest.approx(1.0, rel=1e-9)
    assert_allclose(square @ np.column_stack([by_seed, by_seed * x[:, None]]), 0.0, atol=1e-9)
    assert design.slope @ x == pytest.approx(1.0)
    assert design.level @ np.ones(len(x)) == pytest.approx(1.0)
    assert design.level @ (x - design.x_mean) == pytest.approx(0.0, abs=1e-12)
    # levels of seeds do not tilt the line
    assert_allclose(design.slope @ by_seed, 0.0, atol=1e-12)


def test_degrees_of_freedom_of_a_half_finished_design_are_the_moments_of_what_is_drawn() -> None:
    """Satterthwaite: 2 E(Q)^2 / Var(Q), here from draws."""
    x, seeds = half_finished()
    design = seed_design(x, seeds)
    assert design is not None
    rng, n = np.random.default_rng(2), 4000
    drawn = rng.normal(size=(n, len(x)))
    q = np.array([float(design.seeds_part(design.slope, y)[0]) for y in drawn])
    df = float(design.seeds_part(design.slope, drawn[0])[1])
    assert 1 < df < 2
    assert 2 * q.mean() ** 2 / q.var() == pytest.approx(df, rel=0.15)  # three standard errors of the ratio


def test_two_slopes_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    design, u = seed_design(*complete(2)), X - X.mean()
    assert design is not None
    noise = np.random.default_rng(3).normal(0, 0.05, (2, 6))
    alike = design.fit(noise.ravel()).uncertainty(design.slope)
    apart = design.fit((noise + np.array([[0.2], [-0.2]]) * u).ravel()).uncertainty(design.slope)
    assert apart.half_width() > 3 * alike.half_width()
    assert apart.half_width() < 1.02 * np.sqrt(apart.terms[0]) * stats.t.ppf(0.975, 1)


def test_what_no_line_within_seeds_can_be_drawn_through() -> None:
    assert seed_design(X, ["0"] * 6) is None
    assert seed_design(X, [str(k) for k in range(6)]) is None  # a seed a width
    assert seed_design(np.array([1.0, 1.0, 2.0, 2.0]), ["0", "1", "0", "1"]) is None


def test_one_value_a_width_is_least_squares() -> None:
    y = np.random.default_rng(1).normal(size=6)
    fit, oracle = width_design(X).fit(y), stats.linregress(X, y)
    own = fit.uncertainty(fit.design.slope)
    assert float(own.variance) == pytest.approx(oracle.stderr**2, rel=1e-9)
    assert float(own.p_value(oracle.slope)) == pytest.approx(oracle.pvalue, rel=1e-9)


def test_equal_values_have_no_uncertainty() -> None:
    design = seed_design(*complete(3))
    assert design is not None
    assert design.fit(np.zeros(18)).uncertainty(design.slope).half_width() == 0.0


def share_covered(seeds: int, seed_slope: float, noise: float, width: float, rng: np.random.Generator) -> float:
    """Share of 4,000 draws of a complete design whose interval of the slope holds the true one, 0."""
    x, names = complete(seeds)
    design = seed_design(x, names)
    assert design is not None
    u, hits = X - X.mean(), 0
    for _ in range(4000):
        y = rng.normal(0, noise, (seeds, 6)) + rng.normal(0, seed_slope, (seeds, 1)) * u + rng.normal(0, width, 6)
        fit = design.fit(y.ravel())
        hits += abs(float(design.slope @ fit.y)) <= float(fit.uncertainty(design.slope).half_width())
    return hits / 4000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "seed_slope", "noise", "width"),
    [
        *((2, 0.1, 0.02, 0.0), (2, 0.1, 0.05, 0.0), (2, 0.0, 0.12, 0.0), (2, 0.1, 0.12, 0.12)),
        *((3, 0.1, 0.05, 0.0), (3, 0.0, 0.12, 0.12), (5, 0.0, 0.12, 0.12), (5, 0.1, 0.05, 0.0)),
    ],
)
def test_slopes_cover_between_93_and_97_percent(seeds: int, seed_slope: float, noise: float, width: float) -> None:
    """200,000 draws put each between 93.2 and 96.9; of 4,000 the share has a standard error of a third of a point."""
    found = share_covered(seeds, seed_slope, noise, width, np.random.default_rng(3))
    assert 0.93 - 3 * 0.0033 <= found <= 0.97 + 3 * 0.0033


def study(
    rng: np.random.Generator, cells: list[tuple[int, int]], *, seed_slope: float = 0.0, width: float = 0.0
) -> list[Point]:
    """Runs of slope .5 at some (width, seed); runs scatter by .1."""
    at = {d: width * rng.standard_normal() for d in sorted({d for d, _ in cells})}
    tilt = {s: seed_slope * rng.standard_normal() for s in sorted({s for _, s in cells})}
    ln = {(d, s): (0.5 + tilt[s]) * np.log(d / 512) + at[d] + 0.1 * rng.standard_normal() for d, s in cells}
    return [Point((), float(d), float(np.exp(y)), f"{d}_{s}", str(s)) for (d, s), y in ln.items()]


def covered(cells: list[tuple[int, int]], draws: int = 1500, method: str = "auto", **what: float) -> float:
    rng = np.random.default_rng(0)
    fits = [fit_series(study(rng, cells, **what), extras=False, method=method) for _ in range(draws)]
    return float(np.mean([fit.ci_low <= 0.5 <= fit.ci_high for fit in fits]))


@pytest.mark.parametrize("seeds", [4, 8])
def test_many_seeds_do_not_make_up_for_few_widths(seeds: int) -> None:
    cells = [(d, s) for d in (128, 512, 2048) for s in range(seeds)]
    # 95 % less four standard errors of 1,500 draws; 88 % where the widths' part alone says what is known of it
    assert covered(cells, width=0.1) >= 0.927


def test_seeds_that_share_no_width_are_seeds() -> None:
    cells = [(256 * k, k % 2) for k in range(1, 9)]
    assert fit_series(study(np.random.default_rng(0), cells)).method == "mixed"
    assert covered(cells, seed_slope=0.1) >= 0.927
    assert covered(cells, seed_slope=0.1, method="ols") < 0.9


def test_a_seed_for_each_width_is_no_seed() -> None:
    """Nor where one of them has two neighbours: a line within seeds would be drawn through these two."""
    for seeds in (range(8), (0, 0, 1, 2, 3, 4, 5, 6)):
        points = study(np.random.default_rng(0), [(256 * (k + 1), s) for k, s in enumerate(seeds)])
        fit, oracle = (
            fit_series(points),
            stats.linregress(np.log([p.x for p in points]), np.log([p.value for p in points])),
        )
        assert fit.method == "ols"
        assert fit.beta == pytest.approx(oracle.slope, rel=1e-9)
        assert fit.ci_high - fit.beta == pytest.approx(stats.t.ppf(0.975, 6) * oracle.stderr, rel=1e-9)
        ratio = ratio_of(points, [replace(p, value=1.0) for p in points])
        assert ratio is not None
        assert ratio.method == "ols_of_ln_ratio"
