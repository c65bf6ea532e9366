from __future__ import annotations

import math

import pytest
import torch

from lightning_spectral.functional.approximate import BLOCK, approximate_entropy
from lightning_spectral.functional.rank import soft_rank, spectral_entropy


def covariance_with(eigs: torch.Tensor, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Known eigenvalues in a basis that is no coordinate axis: three reflections."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.diag(eigs.double())
    for _ in range(3):
        v = torch.nn.functional.normalize(torch.randn(len(eigs), generator=generator, dtype=torch.float64), dim=0)
        matrix = matrix - 2 * torch.outer(v, v @ matrix)
        matrix = matrix - 2 * torch.outer(matrix @ v, v)
    return ((matrix + matrix.mT) / 2).to(dtype)


def power_law(width: int, alpha: float) -> torch.Tensor:
    return torch.arange(1, width + 1, dtype=torch.float64) ** -alpha


@pytest.mark.parametrize("alpha", [0.6, 0.8, 1.0, 1.2, 1.5, 2.0])
@pytest.mark.parametrize("width", [1024, 1536])
def test_within_half_a_percent_on_power_laws(alpha, width):
    eigs = power_law(width, alpha)
    matrix, exact = covariance_with(eigs), float(soft_rank(eigs))
    for seed in range(3):
        # the promise of issue 3; seen here: at most 0.2 %
        assert math.exp(approximate_entropy(matrix, seed=seed)) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("alpha", [0.6, 2.0])
def test_within_half_a_percent_at_the_width_it_is_for(alpha):
    eigs = power_law(3072, alpha)
    matrix = covariance_with(eigs)
    assert math.exp(approximate_entropy(matrix)) == pytest.approx(float(soft_rank(eigs)), rel=5e-3)


def hostile_spectra() -> dict[str, torch.Tensor]:
    width = 1024
    flat = torch.ones(width, dtype=torch.float64)
    return {
        "flat": flat,
        "a few spikes on a floor": torch.cat([flat[:5] * 1e4, flat[5:]]),
        "rank 200": torch.cat([power_law(200, 0.5), 0 * flat[200:]]),
        "rank 20, fewer than deflated": torch.cat([power_law(20, 0.5), 0 * flat[20:]]),
        "two plateaus": torch.cat([100 * flat[:300], flat[300:]]),
        "exponential": torch.exp(-torch.arange(width, dtype=torch.float64) / 60),
    }


@pytest.mark.parametrize("name", hostile_spectra())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_half_a_percent_on_other_shapes(name, dtype):
    eigs = hostile_spectra()[name]
    matrix = covariance_with(eigs, dtype)
    assert math.exp(approximate_entropy(matrix)) == pytest.approx(float(soft_rank(eigs)), rel=5e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale):
    matrix = covariance_with(power_law(512, 1.0), torch.float64)
    # fp64 throughout; probes are the same
    assert approximate_entropy(scale * matrix) == pytest.approx(approximate_entropy(matrix), rel=1e-9)


def test_equal_seeds_give_equal_numbers_and_the_global_state_is_left_alone():
    matrix = covariance_with(power_law(256, 1.0))
    before = torch.get_rng_state()
    first = approximate_entropy(matrix, seed=3)
    assert approximate_entropy(matrix, seed=3) == first
    assert approximate_entropy(matrix, seed=4) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_known_traces_replace_those_of_the_matrix():
    eigs = power_law(512, 1.0)
    entropy = approximate_entropy(covariance_with(eigs), float(eigs.sum()), float(eigs.square().sum()))
    assert entropy == pytest.approx(float(spectral_entropy(eigs)), abs=5e-3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(4, 5), "square matrix"),
        (torch.eye(2 * BLOCK - 1), "square matrix"),
        (torch.zeros(256, 256), "positive trace"),
        (torch.full((256, 256), math.nan), "finite"),
    ],
)
def test_what_is_no_covariance_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        approximate_entropy(matrix)
