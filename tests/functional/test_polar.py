import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional.polar import SingularMatrixError, polar_newton, smoothed_polar_newton


def conditioned(rows, columns, decades, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))
    rank = min(rows, columns)
    sigma = torch.logspace(0, -decades, rank, dtype=torch.float64)
    return left[:, :rank], sigma, right[:, :rank].mT


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (40, 7), (7, 40), (200, 200)])
@pytest.mark.parametrize("decades", [0, 2, 6])
def test_equals_the_svd_to_1e_10(shape, decades):
    left, sigma, right = conditioned(*shape, decades)
    polar = polar_newton((left * sigma) @ right)
    assert float((polar - left @ right).abs().max()) < 1e-10  # 1e-16 x condition number 1e6


@pytest.mark.parametrize("size", [300, 530])
@pytest.mark.parametrize("decades", [1, 6])
def test_fp32_corrections_and_mirrored_strips_keep_1e_10(size, decades):
    left, sigma, right = conditioned(size, size, decades)
    polar = polar_newton((left * sigma) @ right)
    assert float((polar - left @ right).abs().max()) < 1e-10
    # the last correction is quadratic: orthogonal to fp64 rounding, sqrt(size) entries of 1e-15 each
    assert float(torch.linalg.matrix_norm(polar.mT @ polar - torch.eye(size, dtype=torch.float64))) < 1e-13


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(1e-12, 1e12))
def test_orthogonal_and_scale_free(seed, scale):
    matrix = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    polar = polar_newton(matrix)
    assert torch.allclose(polar.mT @ polar, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(polar_newton(matrix * scale), polar, rtol=0, atol=1e-9)  # condition numbers up to 1e5 occur


@pytest.mark.parametrize("lam", [1e-5, 1e-2, 1.0, 100.0])
def test_smoothed_map_equals_its_definition(lam):
    left, sigma, right = conditioned(30, 20, 5)
    expected = (left * (sigma / (sigma**2 + lam**2).sqrt())) @ right
    matrix = (left * sigma) @ right
    assert torch.allclose(smoothed_polar_newton(matrix, lam), expected, rtol=0, atol=1e-10)
    assert torch.allclose(smoothed_polar_newton(matrix.mT, lam), expected.mT, rtol=0, atol=1e-10)
    assert torch.equal(smoothed_polar_newton(matrix, 0.0), polar_newton(matrix))


def test_smoothed_map_takes_a_singular_matrix():
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[0, 0] = 3.0
    assert float(smoothed_polar_newton(matrix, 4.0)[0, 0]) == pytest.approx(0.6)


def test_refusals():
    with pytest.raises(SingularMatrixError):
        polar_newton(torch.zeros(4, 4))
    with pytest.raises(SingularMatrixError, match="SVD"):
        polar_newton(torch.ones(4, 4))
    with pytest.raises(ValueError, match="finite"):
        polar_newton(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        polar_newton(torch.zeros(3))
    with pytest.raises(ValueError, match="`lam`"):
        smoothed_polar_newton(torch.eye(2), -1.0)
