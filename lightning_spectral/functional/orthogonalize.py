"""Turn a matrix into the nearest one with flat singular values, exactly or by matrix products alone.

``polar_svd`` is the oracle, ``newton_schulz`` one matrix or a batch, ``orthogonalize`` what an optimizer calls: many
matrices of mixed shapes. The named iterations and their bands are in ``coefficients``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_spectral.functional.coefficients import (
    COEFFICIENTS,
    CoefficientSet,
    Row,
    apply_to_singular_values,
    coefficient_rows,
    coefficient_set,
    flattened_share,
    normalize_singular_values,
    polar_express_rows,
    steps_to_flatten,
    turbo_rows,
)
from lightning_spectral.functional.iteration import TINY, iterate_rows
from lightning_spectral.functional.magnitude import answers_at_once, unit_scale
from lightning_spectral.functional.same_shape import same_shape_runs

__all__ = [
    "COEFFICIENTS",
    "METHODS",
    "CoefficientSet",
    "apply_to_singular_values",
    "check_method",
    "coefficient_rows",
    "coefficient_set",
    "flattened_share",
    "newton_schulz",
    "normalize_singular_values",
    "orthogonalize",
    "orthogonalize_stack",
    "polar_express",
    "polar_express_rows",
    "polar_svd",
    "smoothed_sign",
    "steps_to_flatten",
    "turbo",
    "turbo_rows",
]

# M rows, N columns, B matrices of one shape

METHODS = (*COEFFICIENTS, "turbo", "svd", "identity")
_SAFE_NORMS = (1e-15, 1e15)  # Frobenius norms whose square is far from both ends of fp32 and bf16


def polar_svd(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Exact polar factor ``U V^T`` of ``matrix = U S V^T``: every nonzero singular value becomes one.

    Directions whose singular value is rounding noise of the decomposition (<= ``eps * max(M, N) * s_max``) are left
    out, so that a zero matrix gives zero and the factor is unique.

    Args:
        matrix: (..., M, N), any floating dtype.
        dtype: Precision of the decomposition.

    Returns:
        (..., M, N) in the dtype of ``matrix``.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions.
    """
    left_MR, sigma_R, right_RN = _svd(matrix, dtype)
    floor = torch.finfo(dtype).eps * max(matrix.shape[-2:])
    keep_R = sigma_R > floor * sigma_R.amax(dim=-1, keepdim=True)
    return ((left_MR * keep_R.unsqueeze(-2)) @ right_RN).to(matrix.dtype)


def smoothed_sign(matrix: Tensor, lam: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``U h(S) V^T`` with ``h(z) = z / sqrt(z^2 + lam^2)``: flat above ``lam``, linear below it.

    ``lam = 0`` is the polar factor. Large ``lam`` tends to ``matrix / lam``.

    Args:
        matrix: (..., M, N), any floating dtype.
        lam: Singular value at which the map reaches ``1 / sqrt(2)``, >= 0.
        dtype: Precision of the decomposition.

    Raises:
        ValueError: If ``lam`` is negative or ``matrix`` has fewer than two dimensions.
    """
    if not lam >= 0:
        raise ValueError(f"`lam` must be >= 0, got {lam}.")
    if lam == 0:
        return polar_svd(matrix, dtype)
    left_MR, sigma_R, right_RN = _svd(matrix, dtype)
    smooth_R = sigma_R / torch.hypot(sigma_R, torch.full_like(sigma_R, lam))
    return ((left_MR * smooth_R.unsqueeze(-2)) @ right_RN).to(matrix.dtype)


def newton_schulz(
    matrix: Tensor,
    coefficients: str = "muon",
    steps: int | None = 5,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Approximate polar factor by ``steps`` polynomials in the matrix itself.

    Right for every scale of the input, from the smallest subnormal number to the largest: before its norm is taken the
    matrix is scaled by a power of two, which changes no digit of the result. A zero matrix stays zero.

    Args:
        matrix: (..., M, N), any floating dtype; leading dimensions are a batch.
        coefficients: A name in ``COEFFICIENTS``; its band says where the singular values end up.
        steps: Number of steps; the set's own number when None.
        dtype: Precision of the products; that of ``matrix`` when None. bf16 costs about 1e-2 of accuracy and is
            four times as fast where the hardware has it.
        overwrite: Use ``matrix`` as workspace, which saves two copies of it.
        eps: Frobenius norm below which the result fades to zero with the input, >= 0. A positive one also multiplies
            tall matrices as wide ones, matrices one by one and steps one by one: together, torch.optim.Muon's digits
            (its eps is 1e-7).

    Returns:
        (..., M, N) in ``dtype``.

    Raises:
        ValueError: If the set is unknown, ``steps`` is negative or ``matrix`` has fewer than two dimensions.
    """
    rows, normalizer = coefficient_rows(coefficients, steps), coefficient_set(coefficients).normalizer
    return _newton_schulz(matrix, rows, normalizer, dtype, overwrite, eps)


def turbo(
    matrix: Tensor,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Turbo-Muon: four quintic steps after an almost-orthogonal preconditioner (arXiv:2512.04632).

    Rows (of wide matrices; columns of tall ones) are divided by ``sqrt(sum_j |X X^T|_ij)``, which bounds the spectral
    norm by one far closer than the Frobenius norm does where rows are nearly orthogonal. The price: the singular
    vectors change with it, so that the result is the polar factor of the preconditioned matrix, not of ``matrix``.
    Rows are computed here, see ``coefficients.turbo_rows``. Arguments as ``newton_schulz``.
    """
    return _newton_schulz(matrix, turbo_rows(4 if steps is None else steps), "aol", dtype, overwrite, eps)


def _newton_schulz(
    matrix: Tensor, rows: Sequence[Row], normalizer: str, dtype: torch.dtype | None, overwrite: bool, eps: float
) -> Tensor:
    _require_matrix(matrix)
    iterate = matrix.to(matrix.dtype if dtype is None else dtype)
    if iterate.ndim > 3:
        iterate = iterate.flatten(0, -3)
    if eps > 0 and iterate.ndim == 3:  # bf16 units round a batch otherwise than its matrices alone
        alone = [_newton_schulz(one, rows, normalizer, None, overwrite, eps) for one in iterate]
        return torch.stack(alone).reshape(matrix.shape)
    iterate = _unit_norm(iterate, overwrite, eps)
    if eps > 0 and matrix.shape[-2] > matrix.shape[-1]:
        return iterate_rows(iterate.mT, rows, normalizer, overwrite=False, pair=False).mT.reshape(matrix.shape)
    return iterate_rows(iterate, rows, normalizer, overwrite, pair=eps == 0).reshape(matrix.shape)


def _unit_norm(iterate: Tensor, overwrite: bool, eps: float) -> Tensor:
    """Divide (..., M, N) by its Frobenius norm, or by ``eps`` if that is larger."""
    if eps == 0 and not answers_at_once(iterate) and iterate.device.type != "mps":
        norm = torch.linalg.vector_norm(iterate, dim=(-2, -1), keepdim=True, dtype=torch.float64)  # no square leaves it
        norm = norm.clamp(min=TINY**3)
        return iterate.div_(norm) if overwrite else (iterate / norm).to(iterate.dtype)
    norm = torch.linalg.vector_norm(iterate, dim=(-2, -1), keepdim=True)
    low, high = _SAFE_NORMS
    if answers_at_once(norm) and bool(((norm > low) & (norm < high)).all()):
        norm = norm.clamp(min=eps)
        return iterate.div_(norm) if overwrite else iterate / norm
    scale = unit_scale(iterate)
    iterate = iterate.mul_(scale) if overwrite else iterate * scale
    norm = torch.linalg.vector_norm(iterate, dim=(-2, -1), keepdim=True)
    norm = torch.maximum(norm, (scale * eps).clamp(min=TINY))
    return iterate.div_(norm)


def polar_express(matrix: Tensor, steps: int | None = 5, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`newton_schulz` with the Polar Express rows: the best composition of quintics (arXiv:2505.16932).

    Args:
        matrix: (..., M, N), any floating dtype.
        steps: Number of quintics; the set's own number when None.
        dtype: Precision of the products; that of ``matrix`` when None.

    Returns:
        (..., M, N) in ``dtype``.
    """
    return newton_schulz(matrix, "polar_express", steps, dtype)


def orthogonalize(
    matrices: Sequence[Tensor],
    method: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    batch: bool = True,
) -> list[Tensor]:
    """Orthogonalise matrices of mixed shapes; those of one shape go through one batched product while they are small.

    Args:
        matrices: Each (M, N), any floating dtype; never modified.
        method: A name in ``COEFFICIENTS``, ``"turbo"``, ``"svd"`` (exact, slow) or ``"identity"`` (momentum SGD).
        steps: Steps of the iteration; the set's own number when None.
        dtype: Precision of the products; that of each matrix when None. ``"svd"`` computes in fp64 always.
        batch: False takes one matrix at a time, whatever its size.

    Returns:
        One result per matrix, in its order.

    Raises:
        ValueError: If the method is unknown or an entry is not a matrix.
    """
    check_method(method)
    results: dict[int, Tensor] = {}
    for members in same_shape_runs(matrices, batch):
        stacked_BMN = torch.stack([matrices[i] for i in members])
        orthogonal_BMN = orthogonalize_stack(stacked_BMN, method, steps, dtype)
        results.update(zip(members, orthogonal_BMN.unbind(0), strict=True))
    return [results[i] for i in range(len(matrices))]


def orthogonalize_stack(
    stacked_BMN: Tensor,
    method: str,
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``orthogonalize`` for matrices that are stacked already, (B, M, N) -> (B, M, N); the input may be overwritten.

    Args:
        stacked_BMN: Matrices of one shape.
        method: A name in ``METHODS``.
        steps: Steps of the iteration; the set's own number when None.
        dtype: Precision of the products; that of the input when None.
        eps: See ``newton_schulz``; the other methods have none.
    """
    if method == "identity":
        return stacked_BMN
    if method == "svd":
        return polar_svd(stacked_BMN)
    if method == "turbo":
        return turbo(stacked_BMN, steps, dtype, overwrite=True, eps=eps)
    if stacked_BMN.shape[0] == 1:  # the 2-D product has less overhead than a batch of one
        return newton_schulz(stacked_BMN[0], method, steps, dtype, overwrite=True, eps=eps).unsqueeze(0)
    return newton_schulz(stacked_BMN, method, steps, dtype, overwrite=True, eps=eps)


def check_method(method: str) -> None:
    """Raise ValueError unless ``method`` is one of ``METHODS``."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")


def _svd(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    _require_matrix(matrix)
    left_MR, sigma_R, right_RN = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
    return left_MR, sigma_R, right_RN


def _require_matrix(matrix: Tensor) -> None:
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ValueError(
            f"a floating matrix (..., M, N) is needed, got shape {tuple(matrix.shape)} of {matrix.dtype}; "
            "reshape a vector, or leave it to the vector rule."
        )
