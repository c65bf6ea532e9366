"""The exact polar factor without an SVD: scaled Newton, then Newton-Schulz, matrix products and inversions only.

For a full-rank G = Q H (H symmetric positive) the factor Q is the limit of ``X <- (c X + X^-T / c) / 2``. With the
scale c taken from bounds on the singular values, the condition number of X falls to about the square root of what it
was with every step (Higham, *Functions of Matrices*, chapter 8; Byers and Xu 2008), so that about five inversions
bring 1e6 down to 1.05; there the quintic Newton-Schulz step, three matrix products, takes over and triples the number
of correct digits each time; its last corrections are so small that fp32 is enough for them.
"""

# M rows, N columns, M >= N inside

from __future__ import annotations

import math

import torch
from torch import Tensor

_ITERATIONS_AT_MOST = 60
_SPREAD_FOR_SCHULZ = 1.15  # sigma_max / sigma_min below which Newton-Schulz converges faster than an inversion
_SIZE_FOR_FP32 = 256  # smaller matrices take milliseconds in fp64
_RMS_FOR_FP32 = 1e-3
_LAST_DISTANCE = 3e-5  # the quintic step leaves 5/16 of its cube: 1e-14
_SIZE_FOR_STRIPS = 512
_CONDITION_AT_MOST = 1e13  # above it a direction has no polar factor in fp64


class SingularMatrixError(ValueError):
    """The matrix has a (numerically) vanishing singular value: its polar factor is not unique."""


def polar_newton(matrix: Tensor) -> Tensor:
    """Orthogonal polar factor ``U V^T`` of a full-rank matrix ``U S V^T``, by matrix products and inversions.

    Returned in fp64; equal to the SVD's to about ``1e-16 * condition number`` and, from 256 columns on, where the
    smallest corrections are fp32 products, to about 2e-11 (each entry; orthogonality is that of fp64).

    Args:
        matrix: Shape (M, N), any shape, full rank, any float type.

    Raises:
        ValueError: Not a matrix, or non-finite.
        SingularMatrixError: Condition number above 1e13; use the SVD, which can drop null directions.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"`matrix` must be a non-empty matrix, got shape {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix).all():
        raise ValueError("`matrix` must be finite, got NaN or Inf entries.")
    if matrix.shape[0] < matrix.shape[1]:
        return polar_newton(matrix.mT).mT
    x_MN = matrix.double()
    if x_MN.shape[0] > x_MN.shape[1]:
        basis_MN, x_NN = torch.linalg.qr(x_MN)
        return basis_MN @ _polar_square(x_NN)
    return _polar_square(x_MN)


def smoothed_polar_newton(matrix: Tensor, lam: float) -> Tensor:
    """``U h(S) V^T`` with ``h(s) = s / sqrt(s^2 + lam^2)``, by matrix products, one QR and inversions, in fp64.

    The stacked matrix [G; lam I] = Q R has ``R^T R = G^T G + lam^2 I``; if R = P H is its polar decomposition then
    ``h(G) = G H^-1 = (top block of Q) P``: no square root of an ill-conditioned product is ever taken.

    Args:
        matrix: Shape (M, N), float; may be rank deficient when ``lam > 0``.
        lam: >= 0; 0 is the polar factor.

    Raises:
        ValueError: ``lam`` negative or non-finite.
    """
    if not math.isfinite(lam) or lam < 0:
        raise ValueError(f"`lam` must be finite and >= 0, got {lam}.")
    if lam == 0:
        return polar_newton(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        return smoothed_polar_newton(matrix.mT, lam).mT
    g_MN = matrix.double()
    num_tokens, num_columns = g_MN.shape
    stacked = torch.cat([g_MN, lam * torch.eye(num_columns, dtype=torch.float64, device=g_MN.device)])
    basis, r_NN = torch.linalg.qr(stacked)
    return basis[:num_tokens] @ polar_newton(r_NN)


def _polar_square(matrix_NN: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix_NN)
    if norm == 0:
        raise SingularMatrixError("The polar factor of a zero matrix does not exist.")
    x_NN = matrix_NN / norm
    smallest, largest = 0.0, 1.0
    for iteration in range(_ITERATIONS_AT_MOST):
        if smallest > 0 and largest / smallest < _SPREAD_FOR_SCHULZ:
            return _schulz(x_NN * (2.0 / (largest + smallest)))
        inverse_NN, info = torch.linalg.inv_ex(x_NN)
        if int(info) != 0:
            raise SingularMatrixError("The matrix is exactly singular; use the SVD, which drops null directions.")
        if iteration == 0:
            smallest, largest = 1.0 / _spectral_norm(inverse_NN), _spectral_norm(x_NN)
            if not smallest > 0 or largest / smallest > _CONDITION_AT_MOST:
                raise SingularMatrixError(
                    f"The condition number is about {largest / max(smallest, 1e-300):.1e}, above "
                    f"{_CONDITION_AT_MOST:.0e}; use the SVD, which drops null directions."
                )
        scale = (largest * smallest) ** -0.5
        x_NN = x_NN.mul_(0.5 * scale).add_(inverse_NN.mT, alpha=0.5 / scale)
        # every scaled singular value s lies in [1/r, r]; (s + 1/s) / 2 lies in [1, (r + 1/r) / 2]
        ratio = (largest / smallest) ** 0.5
        smallest, largest = 1.0, (ratio + 1.0 / ratio) / 2
    raise RuntimeError("polar_newton did not converge; please report the matrix.")


def _spectral_norm(matrix_NN: Tensor, steps: int = 6) -> float:
    """Largest singular value by power iteration, a few per cent low at worst: it only sets a scale."""
    size = matrix_NN.shape[1]
    vector_N = torch.cos(torch.arange(size, dtype=matrix_NN.dtype, device=matrix_NN.device) * 2.399963)
    value = 0.0
    for _ in range(steps):
        image_N = matrix_NN @ (vector_N / torch.linalg.vector_norm(vector_N))
        value = float(torch.linalg.vector_norm(image_N))
        vector_N = matrix_NN.mT @ image_N
    return value


def _schulz(x_NN: Tensor) -> Tensor:
    """Quintic Newton-Schulz to convergence: ``X + X (-E / 2 + 3 E^2 / 8)`` with ``E = X^T X - I``.

    E is always an fp64 product. Its square may be an fp32 one: symmetric as it is, its rounding moves the polar factor
    only by 6e-8 E^2 times the spread of the singular values. So may the correction, once it is small: then its rounding
    error is 6e-8 of something that is itself below 1e-3.
    """
    size = x_NN.shape[0]
    previous = math.inf
    for _ in range(_ITERATIONS_AT_MOST):
        error_NN = _symmetric_product(x_NN)
        error_NN.diagonal().sub_(1.0)
        distance = float(torch.linalg.matrix_norm(error_NN))
        if distance < 1e-13 * size**0.5 or (distance < 1e-9 and distance >= previous / 2):
            return x_NN
        if not distance < 1e3:
            raise RuntimeError("Newton-Schulz left its basin; please report the matrix.")
        previous = distance
        low = torch.float32 if size >= _SIZE_FOR_FP32 else torch.float64
        square_NN = _symmetric_product(error_NN.to(low)).mul_(3 / 8)
        polynomial_NN = square_NN.to(torch.float64).sub_(error_NN, alpha=0.5)
        if distance >= _RMS_FOR_FP32 * size**0.5:
            low = torch.float64
        x_NN = (x_NN.to(low) @ polynomial_NN.to(low)).to(torch.float64).add_(x_NN)
        if distance < _LAST_DISTANCE:
            return x_NN
    raise RuntimeError("Newton-Schulz did not converge; please report the matrix.")


def _symmetric_product(x_NN: Tensor) -> Tensor:
    """``X^T X`` by its lower strips, mirrored: 5/8 of the products."""
    size = x_NN.shape[0]
    if size < _SIZE_FOR_STRIPS:
        return x_NN.mT @ x_NN
    out_NN = torch.empty_like(x_NN)
    width = -(-size // 4)
    for first in range(0, size, width):
        last = min(first + width, size)
        torch.mm(x_NN[:, first:last].mT, x_NN[:, :last], out=out_NN[first:last, :last])
        out_NN[:first, first:last] = out_NN[first:last, :first].mT
    return out_NN
