"""Dion: an orthonormal update of low rank, with error feedback through the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.magnitude import unit_scale
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.factors import next_right_factor, orthonormal_columns
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, faded, fading
from lightning_spectral.optim.settings import MATRIX_PAPER, MatrixArguments, MatrixSettings, Unpack, refuse_unknown
from lightning_spectral.text.arguments import require_count, require_kinds

# B matrices of one shape, M rows, N columns, R rank of the update


class DionRule(MatrixRule):
    """One power iteration on the momentum from last step's right factor (Dion, arXiv:2504.05295)."""

    rewrites_momentum = True
    has_factors = True
    # Sending update and momentum costs more than repeating the few low-rank products.
    shares_over_replicas = False

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """The right factor, (R, N)."""
        length = update_rank(shape, group["rank_fraction"]) * shape[1]
        return {**super().extra_state(shape, group), "right_factor": length}

    def initial_state(self, name: str, shape: tuple[int, int], group: Group, index: int) -> Tensor | None:
        """Random unit rows, the same on every rank: drawn from a generator of their own."""
        if name != "right_factor":
            return None
        generator = torch.Generator().manual_seed(0x0D10 + index)
        factor_RN = torch.randn(update_rank(shape, group["rank_fraction"]), shape[1], generator=generator)
        return torch.nn.functional.normalize(factor_RN, dim=1)

    def dtype(self, group: Group, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """At least fp32: QR and the error feedback lose their point below it."""
        return torch.float64 if group["precision"] == "fp64" or param_dtype == torch.float64 else torch.float32

    def update_momentum(self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> None:
        """``B = M + G``; what the update explains is taken out of it in ``update_matrices``."""
        torch._foreach_add_(list(momenta), list(grads))

    def orthogonalizer_inputs(
        self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group
    ) -> Sequence[Tensor]:
        """``B`` itself."""
        return momenta

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """With ``rank_rms_match`` the RMS of the update is that of a full-rank one."""
        factor = super().shape_factor(shape, group)
        if not group["rank_rms_match"]:
            return factor
        return factor * math.sqrt(min(shape) / update_rank(shape, group["rank_fraction"]))

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """``P = orth(B Q)``, ``R = B^T P``, ``M = B - (1 - mu) P R^T``, update ``P Q'^T`` with ``Q' = colnorm(R)``."""
        factors = fading(inputs_BMN, extra, group)
        batch, _, columns = inputs_BMN.shape
        scale = unit_scale(inputs_BMN)
        inputs_BMN.mul_(scale)  # exact, and right for gradients of every size
        old_BRN = torch.stack(extra["right_factor"]).view(batch, -1, columns).to(inputs_BMN.dtype)
        right_BRN = old_BRN
        for _ in range(group["power_iterations"]):
            left_BMR = orthonormal_columns(inputs_BMN @ right_BRN.mT)
            right_BRN = left_BMR.mT @ inputs_BMN
        _explain(extra["momentum_buffer"], left_BMR, right_BRN / scale, 1 - group["momentum"])
        used_BRN, kept_BRN = next_right_factor(right_BRN, old_BRN, group)
        for stored, kept_RN in zip(extra["right_factor"], kept_BRN.unbind(0), strict=True):
            stored.copy_(kept_RN.reshape(-1))
        return faded(torch.bmm(left_BMR, used_BRN, out=inputs_BMN), factors)


def _explain(momenta: Sequence[Tensor], left_BMR: Tensor, right_BRN: Tensor, feedback: float) -> None:
    """Take ``feedback`` of what the update explains out of the momentum, in place."""
    for momentum, left_MR, right_RN in zip(momenta, left_BMR.unbind(0), right_BRN.unbind(0), strict=True):
        if momentum.dtype == left_MR.dtype:
            momentum.addmm_(left_MR, right_RN, alpha=-feedback)  # no product of the size of the matrix
        else:
            # Rounded once, as where the momentum comes back from an owner.
            momentum.copy_(torch.addmm(momentum.to(left_MR.dtype), left_MR, right_RN, alpha=-feedback))


def update_rank(shape: tuple[int, int], rank_fraction: float) -> int:
    """Rank of the update: ``rank_fraction * min(m, n)``, at least one."""
    return max(1, round(rank_fraction * min(shape)))


class Dion(SpectralOptimizer):
    """Dion (arXiv:2504.05295) for hidden matrices, AdamW or Lion for the rest.

    ``momentum`` is what stays of the explained part of the momentum. Products are at least fp32, whatever ``precision``
    says, since QR and the error feedback lose their point below it.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        rank_fraction: Rank of the update over min(m, n), in (0, 1].
        power_iterations: Power iterations per step, >= 1.
        orthogonal_right: QR of the right factor (arXiv:2605.16341) in place of unit columns.
        rank_rms_match: Scale the update by sqrt(min(m, n) / rank), so that its RMS does not fall with the rank.
        shared: Settings described in ``MatrixSettings`` and ``CommonSettings``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"dion": DionRule()}  # noqa: RUF012
    settings_class = MatrixSettings

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank_fraction: float = 0.25,
        power_iterations: int = 1,
        orthogonal_right: bool = False,
        rank_rms_match: bool = False,
        **shared: Unpack[MatrixArguments],
    ) -> None:
        require_kinds(Dion.__init__, locals())
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"`rank_fraction` must be in (0, 1], got {rank_fraction!r}.")
        require_count("power_iterations", power_iterations)
        own = {
            "rank_fraction": rank_fraction,
            "power_iterations": power_iterations,
            "orthogonal_right": orthogonal_right,
            "rank_rms_match": rank_rms_match,
        }
        refuse_unknown(type(self), MatrixSettings, shared)
        super().__init__(params, lr, "dion", MatrixSettings(**shared), own)

    @classmethod
    def paper(cls, params: Any, rank_fraction: float = 0.5, **changes: Any) -> Dion:
        """Settings of arXiv:2605.21803; the paper ran rank fractions 1/2, 1/4, 1/8 and 1/16."""
        return cls(params, **{**MATRIX_PAPER, "rank_fraction": rank_fraction, **changes})
