"""How evenly a matrix uses its directions: spectral measures of weights, gradients and updates (arXiv:2509.26030).

All are functions of the singular values s through their energies ``q_i = s_i^2 / sum s^2``. More isotropic means larger
normalised entropy, effective rank and stable rank, smaller TopE_k and Q75/25.
"""

# R singular values, n of them non-zero

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOP_K = 10
_RELATIVE_ZERO = 1e-12  # of the largest singular value, for fp64; scaled up to the type's own rounding


@dataclass(frozen=True)
class MatrixSpectrum:
    """Spectral measures of one matrix; ``None`` where the matrix is zero.

    Attributes:
        normalized_entropy: ``-(1 / ln n) sum q ln q``, in [0, 1]; 0 for one direction.
        effective_rank: ``exp(-sum q ln q)``, in [1, n]; on energies s^2, not on s as Roy and Vetterli have it.
        top1_energy: Largest q.
        top10_energy: Sum of the ten largest q (TopE_10).
        quartile_ratio: ``Q3({s^2}) / Q1({s^2})`` over the non-zero ones.
        stable_rank: ``sum s^2 / s_1^2``.
        condition_number: ``s_1 / s_n`` over the non-zero ones.
        num_nonzero: n.
        largest: s_1.
        frobenius: ``sqrt(sum s^2)``.
    """

    normalized_entropy: float | None
    effective_rank: float | None
    top1_energy: float | None
    top10_energy: float | None
    quartile_ratio: float | None
    stable_rank: float | None
    condition_number: float | None
    num_nonzero: int
    largest: float
    frobenius: float

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain fields, for records."""
        return asdict(self)


def normalized_entropy(singular_values: Float[Tensor, " R"]) -> float:
    """``-(1 / ln n) sum q ln q``, in [0, 1]; 0 for a single direction.

    Args:
        singular_values: Shape (R,), >= 0, not all zero.

    Raises:
        ValueError: Another shape, a negative or non-finite entry, or only zeros.
    """
    energy_R = _energies(singular_values)
    return 0.0 if len(energy_R) == 1 else _entropy(energy_R) / math.log(len(energy_R))


def effective_rank(singular_values: Float[Tensor, " R"]) -> float:
    """``exp(-sum q ln q)`` of the energies, in [1, n]; arguments as in :func:`normalized_entropy`."""
    return math.exp(_entropy(_energies(singular_values)))


def top_energy(singular_values: Float[Tensor, " R"], k: int = TOP_K) -> float:
    """Share of the energy in the ``k`` largest directions (TopE_k), in (0, 1].

    Raises:
        ValueError: ``k`` below 1, or as :func:`normalized_entropy`.
    """
    if k < 1:
        raise ValueError(f"`k` must be >= 1, got {k}.")
    return float(_energies(singular_values)[:k].sum())


def quartile_ratio(singular_values: Float[Tensor, " R"]) -> float:
    """``Q3({s^2}) / Q1({s^2})`` over the non-zero ones, >= 1; linear interpolation between order statistics."""
    energy_R = _energies(singular_values)
    quartiles = torch.quantile(energy_R, torch.tensor([0.25, 0.75], dtype=torch.float64, device=energy_R.device))
    return float(quartiles[1] / quartiles[0])


def stable_rank(singular_values: Float[Tensor, " R"]) -> float:
    """``sum s^2 / s_1^2``, in [1, n]."""
    return float(1.0 / _energies(singular_values)[0])


def condition_number(singular_values: Float[Tensor, " R"]) -> float:
    """``s_1 / s_n`` over the non-zero ones, >= 1."""
    energy_R = _energies(singular_values)
    return float((energy_R[0] / energy_R[-1]).sqrt())


MATRIX_MEASURES: dict[str, Callable[[Tensor], float]] = {
    "normalized_entropy": normalized_entropy,
    "effective_rank": effective_rank,
    "top1_energy": lambda singular_values: top_energy(singular_values, 1),
    "top10_energy": lambda singular_values: top_energy(singular_values, TOP_K),
    "quartile_ratio": quartile_ratio,
    "stable_rank": stable_rank,
    "condition_number": condition_number,
}


def matrix_spectrum(matrix: Tensor) -> MatrixSpectrum:
    """All measures of one matrix, from one SVD in fp64 on its device.

    Args:
        matrix: Shape (M, N), or more axes, of which the first is kept and the others are flattened (convolutions).

    Raises:
        ValueError: Fewer than two axes, empty, or non-finite entries.
    """
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(f"`matrix` must have two axes and entries, got shape {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix).all():
        raise ValueError("`matrix` must be finite, got NaN or Inf entries.")
    return spectrum_measures(_singular_values(matrix.detach().flatten(1)), _epsilon(matrix.dtype))


def spectrum_measures(singular_values: Float[Tensor, " R"], relative_zero: float = _RELATIVE_ZERO) -> MatrixSpectrum:
    """All measures of one spectrum, shape (R,); values below ``relative_zero`` times the largest count as zero."""
    sigma_R = _checked(singular_values)
    largest = float(sigma_R.amax())
    frobenius = float(torch.linalg.vector_norm(sigma_R))
    if largest == 0:
        return MatrixSpectrum(None, None, None, None, None, None, None, 0, 0.0, 0.0)
    kept_R = sigma_R[sigma_R > relative_zero * largest]
    values = {name: measure(kept_R) for name, measure in MATRIX_MEASURES.items()}
    return MatrixSpectrum(**values, num_nonzero=len(kept_R), largest=largest, frobenius=frobenius)


def _singular_values(matrix_MN: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix_MN.double())


def _epsilon(dtype: torch.dtype) -> float:
    """What is rounding noise in a matrix of this type: its own epsilon, never less than fp64's floor."""
    return max(_RELATIVE_ZERO, float(torch.finfo(dtype).eps)) if dtype.is_floating_point else _RELATIVE_ZERO


def _checked(singular_values: Tensor) -> Tensor:
    if singular_values.ndim != 1 or len(singular_values) == 0:
        raise ValueError(f"`singular_values` must have shape (R,), R >= 1, got {tuple(singular_values.shape)}.")
    sigma_R = singular_values.double()
    if not torch.isfinite(sigma_R).all() or (sigma_R < 0).any():
        raise ValueError("`singular_values` must be finite and >= 0.")
    return sigma_R


def _energies(singular_values: Tensor) -> Tensor:
    """Descending ``s^2 / sum s^2`` of the non-zero singular values."""
    sigma_R = _checked(singular_values)
    largest = sigma_R.amax()
    if largest == 0:
        raise ValueError("`singular_values` are all zero: a zero matrix has no spectral shape.")
    square_R = (sigma_R[sigma_R > _RELATIVE_ZERO * largest] / largest).sort(descending=True).values.square()
    return square_R / square_R.sum()


def _entropy(energy_R: Tensor) -> float:
    return -float(torch.special.xlogy(energy_R, energy_R).sum())
