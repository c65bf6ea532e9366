"""Do the intervals cover what they say? 2,000 synthetic sweeps with layer noise and seed noise."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_spectral.analysis.fits import fit_series
from lightning_spectral.analysis.linear import least_squares, seed_means, t_quantile, two_sided_p, welch
from lightning_spectral.analysis.points import Point
from lightning_spectral.analysis.strata import seed_design

SWEEPS, LAYERS, BETA = 2000, 6, 0.7
WIDTHS = np.array([128, 256, 384, 512, 768, 1024.0])


def sweeps(seed: int, seeds: int, shared: float = 0.0, beta: float = BETA) -> tuple[np.ndarray, np.ndarray]:
    """ln of the layer medians, (sweep, width * seed), and their ln widths.

    Noise: per layer and run 0.15, per run 0.08, per seed (all widths alike) 0.1, per width (all seeds alike)
    ``shared``; layers differ by fixed offsets.
    """
    rng = np.random.default_rng(seed)
    w = len(WIDTHS)
    offsets = np.linspace(-0.5, 0.5, LAYERS)
    ln = beta * np.log(WIDTHS)[:, None, None] + 1.0 + offsets + 0.15 * rng.standard_normal((SWEEPS, w, seeds, LAYERS))
    ln = ln + 0.08 * rng.standard_normal((SWEEPS, w, seeds, 1)) + 0.1 * rng.standard_normal((SWEEPS, 1, seeds, 1))
    ln = ln + shared * rng.standard_normal((SWEEPS, w, 1, 1))
    ranks = np.median(np.exp(ln), axis=-1)
    return np.log(np.repeat(WIDTHS, seeds)), np.log(ranks).reshape(SWEEPS, w * seeds)


def covered(x: np.ndarray, y: np.ndarray) -> float:
    line = least_squares(x, y)
    return float((np.abs(line.slope - BETA) <= t_quantile(line.df) * line.slope_se).mean())


# 2,000 draws: the share itself has a standard error of 0.5 %, so 93-97 % is four of them either side
def test_one_run_a_width_covers_95_percent() -> None:
    assert 0.93 <= covered(*sweeps(1, seeds=1)) <= 0.97


@pytest.mark.parametrize("shared", [0.0, 0.15])
def test_seed_means_cover_whatever_the_runs_of_a_width_share(shared: float) -> None:
    assert 0.93 <= covered(*seed_means(*sweeps(2, seeds=3, shared=shared))) <= 0.97


def test_counting_seeds_as_widths_does_not_cover() -> None:
    """Why `ols_seed_means` is the default with seeds: pooled OLS is far too sure of itself."""
    assert covered(*sweeps(2, seeds=3, shared=0.15)) < 0.85


def test_slope_difference_false_positives() -> None:
    a, b = sweeps(3, seeds=3, shared=0.1), sweeps(4, seeds=3, shared=0.05)
    one, two = least_squares(*seed_means(*a)), least_squares(*seed_means(*b))
    difference, se, df = welch(one.slope, one.slope_se, one.df, two.slope, two.slope_se, two.df)
    assert 0.03 <= float((two_sided_p(difference / se, df) < 0.05).mean()) <= 0.07


def test_paired_slope_difference_false_positives() -> None:
    """Two optimizers on the same data: width noise in common cancels, and the paired test keeps its level."""
    common = 0.2 * np.random.default_rng(5).standard_normal((SWEEPS, len(WIDTHS)))
    x, a = seed_means(*sweeps(6, seeds=3))
    b = seed_means(*sweeps(7, seeds=3))[1]
    line = least_squares(x, (a + common) - (b + common))
    assert 0.03 <= float((two_sided_p(line.slope / line.slope_se, line.df) < 0.05).mean()) <= 0.07


def test_a_true_difference_is_found() -> None:
    one, two = (least_squares(*seed_means(*sweeps(k, seeds=3, beta=beta))) for k, beta in ((8, 0.7), (9, 1.0)))
    difference, se, df = welch(one.slope, one.slope_se, one.df, two.slope, two.slope_se, two.df)
    assert float((two_sided_p(difference / se, df) < 0.05).mean()) > 0.9


# name -> standard deviations of (noise, level a seed, slope a seed, effect a width); 3 seeds, 6 widths
ROWS = {
    "independent": (0.12, 0.0, 0.0, 0.0),
    "seed levels": (0.12, 0.2, 0.0, 0.0),
    "seed slopes": (0.05, 0.0, 0.1, 0.0),
    "width effects": (0.12, 0.0, 0.0, 0.12),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_slopes_and_levels_of_seeds_cover(row: str) -> None:
    noise, level, slope, width = ROWS[row]
    rng, u = np.random.default_rng(7), np.log(WIDTHS) - np.log(WIDTHS).mean()
    design = seed_design(np.tile(np.log(WIDTHS), 3), np.repeat(["0", "1", "2"], 6).tolist())
    assert design is not None
    hits = np.zeros(2)
    for _ in range(400):
        y = rng.normal(0, noise, (3, 6)) + rng.normal(0, level, (3, 1)) + rng.normal(0, slope, (3, 1)) * u
        fit = design.fit((y + rng.normal(0, width, 6)).ravel())
        for k, coefficients in enumerate((design.slope, design.level)):
            hits[k] += abs(coefficients @ fit.y) <= fit.uncertainty(coefficients).half_width()
    # three standard errors of 400 draws below 94 %, which the committed study measures to a quarter of a point
    assert (hits / 400 >= 0.94 - 3 * 0.012).all()


def test_the_study_is_about_the_fit_that_users_get() -> None:
    x, y = sweeps(2, seeds=3)
    for row in y[:5]:
        points = [Point((), float(np.exp(x[k])), float(np.exp(row[k])), seed=str(k % 3)) for k in range(len(x))]
        fit, line = fit_series(points), least_squares(*seed_means(x, row))
        assert fit.method == "mixed"
        np.testing.assert_allclose(fit.beta, line.slope, rtol=1e-9)
