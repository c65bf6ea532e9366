"""What one step did to one matrix: spectra of the momentum and the update, and how flat the iteration made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import COEFFICIENTS, flattened_share


@dataclass(frozen=True)
class MatrixTelemetry:
    """Spectra of one matrix at one step.

    Attributes:
        momentum_spectrum: Singular values of the direction that entered the rule, descending, fp32 on the CPU.
        update_spectrum: Singular values of what left it, before the learning rate.
        flattened_share: Share of the spectrum inside the documented band of the iteration; None where no iteration ran.
        update_rms: Root mean square of the update, before the learning rate.
    """

    momentum_spectrum: Tensor
    update_spectrum: Tensor
    flattened_share: float | None
    update_rms: float

    @classmethod
    def measure(cls, direction: Tensor, update: Tensor, group: dict[str, Any]) -> MatrixTelemetry:
        """Two singular value decompositions of an (M, N) matrix in fp32."""
        entering = torch.linalg.svdvals(direction.float())
        leaving = torch.linalg.svdvals(update.float())
        share = None
        if group["orthogonalize"] in COEFFICIENTS and bool(torch.isfinite(entering).all()):
            share = float(flattened_share(entering, group["orthogonalize"], group["steps"]))
        rms = float(update.float().square().mean().sqrt())
        return cls(entering.cpu(), leaving.cpu(), share, rms)
