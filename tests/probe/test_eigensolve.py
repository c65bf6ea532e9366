"""fp32 solves where they are as good as fp64, and never where they are not."""

from __future__ import annotations

import pytest
import torch

from lightning_spectral.functional import rank as ranks
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.functional.sample import Sample, sample
from lightning_spectral.probe import eigensolve
from lightning_spectral.probe.eigensolve import Eigensolver
from lightning_spectral.probe.lapack import eigenvalues

WIDTH = eigensolve.MIN_WIDTH


def sample_of(
    alpha: float, num_tokens: int = 3 * WIDTH, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> Sample:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** (-alpha / 2)
    rows = (torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * scale) @ mixed
    moments = empty_moments(1, width, dtype=dtype)
    update_(moments, rows.to(dtype), [num_tokens])
    return sample(moments)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_flat_spectra_are_solved_in_fp32_and_keep_their_ranks(alpha):
    own, solve = sample_of(alpha), Eigensolver()
    fast, exact = solve(own), torch.linalg.eigvalsh(own.matrix_MM).flip(-1)
    assert solve.fp64_up_to == 0
    assert not torch.equal(fast, exact)
    for metric in (ranks.soft_rank, ranks.hard_rank, ranks.eigenvalue_early_enrichment):
        assert float(metric(fast)) == pytest.approx(float(metric(exact)), rel=1e-6)
    for order in (0.5, 1.5, 3.0, 5.0):
        assert float(ranks.renyi_rank(fast, order)) == pytest.approx(float(ranks.renyi_rank(exact, order)), rel=3e-6)


@pytest.mark.parametrize("width", [WIDTH, 2 * WIDTH])
@pytest.mark.parametrize("distinct", [20, 200])
def test_null_modes_cost_the_soft_rank_less_than_the_products_of_the_matrix_do_to_lower_orders(distinct, width):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.relu(torch.randn(distinct, width, generator=generator)).square()
    rows = tokens[torch.randint(0, distinct, (width + 256,), generator=generator)]
    moments = empty_moments(1, width)
    update_(moments, rows, [len(rows)])
    own, solve = sample(moments), Eigensolver()
    fast, exact = solve(own), torch.linalg.eigvalsh(own.matrix_MM).flip(-1).clamp(min=0)
    assert solve.fp64_up_to == 0
    for metric in (ranks.soft_rank, ranks.hard_rank):
        assert float(metric(fast)) == pytest.approx(float(metric(exact)), rel=1e-5)
    truth = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0)).clamp(min=0)
    half = [float(ranks.renyi_rank(eigs, 0.5)) for eigs in (fast, exact, truth)]
    assert abs(half[0] / half[1] - 1) < abs(half[1] / half[2] - 1)


def test_what_fp32_cannot_resolve_is_solved_in_fp64_and_so_is_what_has_as_few_tokens():
    num_tokens = 6 * WIDTH
    own = sample_of(5.0, num_tokens, width=2 * WIDTH)  # steep
    solve, exact = Eigensolver(), eigenvalues(own.matrix_MM).flip(-1).clamp(min=0)
    assert torch.equal(solve(own), exact)
    assert solve.fp64_up_to == num_tokens
    for rows_of_flat, same in ((num_tokens, True), (num_tokens + WIDTH, False)):
        flat = sample_of(0.0, rows_of_flat)
        exact = eigenvalues(flat.matrix_MM).flip(-1).clamp(min=0)
        assert torch.equal(solve(flat), exact) is same


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"width": 64}])
def test_fp64_rows_and_narrow_layers_never_meet_fp32(options):
    own = sample_of(0.5, **options)
    assert torch.equal(Eigensolver()(own), eigenvalues(own.matrix_MM).flip(-1))


def test_a_solve_that_went_wrong_is_noticed_by_its_trace():
    own = sample_of(0.5)
    eigs = torch.linalg.eigvalsh(own.matrix_MM)
    assert eigensolve.is_accurate(eigs, own)
    assert not eigensolve.is_accurate(eigs * (1 + 2e-4), own)


@pytest.mark.parametrize("rows", [40, 170, 512, 1_000])
@pytest.mark.parametrize("alpha", [0.0, 2.0, 5.0, 20.0])
def test_an_approximate_soft_rank_loses_little_to_fp32_however_steep_the_spectrum(rows, alpha):
    own = sample_of(alpha, num_tokens=rows, width=1_024)
    exact = float(ranks.soft_rank(torch.linalg.eigvalsh(own.matrix_MM).clamp(min=0)))
    # 1,000 null modes of eps / 8 of the largest, half of them positive: p ln p adds up to 1e-4
    assert float(ranks.soft_rank(Eigensolver(exact=False)(own))) == pytest.approx(exact, rel=3e-4)
