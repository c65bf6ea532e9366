"""Does the optimizer's Newton-Schulz iteration flatten this matrix, or only the top of its spectrum?

An iteration lifts small singular values by a constant factor a step: five steps of Muon's quintic reach values down to
``3.4445^-5 = 1/485`` of the Frobenius norm. What lies below is updated less than the rest, and it is there that rare
items live (arXiv:2603.26554).
"""

# R singular values

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import (
    apply_to_singular_values,
    flattened_share,
    normalize_singular_values,
    steps_to_flatten,
)

FLAT_BAND = (0.65, 1.35)  # as even as Muon's own oscillation; a stricter band would call every Muon update unflat
_SHARE = 0.99
_RELATIVE_ZERO = 1e-7  # of the largest: below it an fp32 matrix holds rounding noise, which no iteration should lift


@dataclass(frozen=True)
class Flattening:
    """What an iteration makes of one spectrum.

    Attributes:
        share: Share of the non-zero singular values that end inside the band.
        steps_needed: Steps that bring 99 % of them there, or ``None`` if 60 do not.
        energy_spread: Smallest over largest image: 1 for a flat update.
        num_nonzero: Singular values above 1e-7 of the largest.
        coefficients: Name of the set.
        steps: Steps judged.
    """

    share: float
    steps_needed: int | None
    energy_spread: float
    num_nonzero: int
    coefficients: str
    steps: int

    def as_dict(self) -> dict[str, object]:
        """Plain fields."""
        return asdict(self)


def flattening(
    matrix: Tensor, coefficients: str = "muon", steps: int = 5, band: tuple[float, float] = FLAT_BAND
) -> Flattening:
    """How much of ``matrix``'s spectrum ``steps`` steps of the iteration flatten, and how many steps it would take.

    Args:
        matrix: A gradient or momentum, shape (M, N), finite, not all zero.
        coefficients: Name of the set, as in ``functional.orthogonalize.COEFFICIENTS``.
        steps: Steps to judge, >= 1.
        band: Image that counts as flat.

    Raises:
        ValueError: Not a matrix, non-finite, all zero, or an unknown set.
    """
    if matrix.ndim != 2 or not torch.isfinite(matrix).all():
        raise ValueError(f"`matrix` must be a finite matrix, got shape {tuple(matrix.shape)}; look for NaN entries.")
    return spectrum_flattening(torch.linalg.svdvals(matrix.detach().double()), coefficients, steps, band)


def spectrum_flattening(
    singular_values: Tensor, coefficients: str = "muon", steps: int = 5, band: tuple[float, float] = FLAT_BAND
) -> Flattening:
    """As :func:`flattening`, from the singular values, shape (R,).

    Raises:
        ValueError: ``steps`` below 1, only zeros, or an unknown set.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be >= 1, got {steps}.")
    largest = float(singular_values.max())
    if largest == 0:
        raise ValueError("`matrix` is all zero: there is no spectrum to flatten.")
    kept_R = singular_values[singular_values > _RELATIVE_ZERO * largest].double()
    image_R = apply_to_singular_values(coefficients, steps, normalize_singular_values(kept_R, coefficients))
    return Flattening(
        share=float(flattened_share(kept_R, coefficients, steps, band)),
        steps_needed=steps_to_flatten(kept_R, coefficients, _SHARE, band),
        energy_spread=float(image_R.min() / image_R.max()),
        num_nonzero=len(kept_R),
        coefficients=coefficients,
        steps=steps,
    )
