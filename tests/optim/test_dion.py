"""A matrix's Dion update does not depend on which matrices share its batch, to the last bit."""

import pytest
import torch

from lightning_spectral.optim.dion import DionRule, orthonormal_columns

GROUP = {"momentum": 0.95, "power_iterations": 2, "orthogonal_right": True, "rank_fraction": 0.5}
# 17 columns of 34 rows: the second matrix of a batch starts at no multiple of 16 bytes
SHAPES = [(34, 34), (102, 34), (34, 102), (33, 50), (64, 128)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_qr_of_a_batch_equals_qr_of_each(rows, columns, dtype):
    tall = torch.randn(5, rows, min(rows, columns) // 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    batch = orthonormal_columns(tall)
    for i in range(5):
        assert torch.equal(orthonormal_columns(tall[i : i + 1].clone())[0], batch[i])
    expected = torch.linalg.qr(tall.double())[0]
    torch.testing.assert_close(batch.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_update_and_momentum_of_a_batch_equal_those_of_each(rows, columns, dtype):
    rule = DionRule()
    generator = torch.Generator().manual_seed(0)
    momenta = torch.randn(5, rows, columns, dtype=dtype, generator=generator)
    factors = [rule.initial_state("right_factor", (rows, columns), GROUP, i).view(-1) for i in range(5)]

    def updated(some: list[int]) -> list[torch.Tensor]:
        extra = {
            "momentum_buffer": [momenta[i].clone() for i in some],
            "right_factor": [factors[i].clone() for i in some],
        }
        update = rule.update_matrices(momenta[some].clone(), extra, GROUP)
        return [update, torch.stack(extra["momentum_buffer"]), torch.stack(extra["right_factor"])]

    together = updated([0, 1, 2, 3, 4])
    for i in range(5):
        for alone, batch in zip(updated([i]), together, strict=True):
            assert torch.equal(alone[0], batch[i])
