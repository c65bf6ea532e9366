"""Dion: an orthonormal update of low rank, with error feedback through the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import unit_scale
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, faded, fading
from lightning_spectral.optim.settings import MATRIX_PAPER, MatrixArguments, MatrixSettings, Unpack

# B matrices of one shape, M rows, N columns, R rank of the update

_ALIGN_BYTES = 64  # the widest vector register, and torch's own alignment on a CPU


class DionRule(MatrixRule):
    """One power iteration on the momentum from last step's right factor (Dion, arXiv:2504.05295)."""

    rewrites_momentum = True
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

    def orthogonalizer_input(self, momentum: Tensor, grad: Tensor, group: Group) -> Tensor:
        """``B`` itself."""
        return momentum

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
        if group["orthogonal_right"]:
            new_BRN = orthonormal_columns(right_BRN.mT).mT
            # QR leaves the signs of its columns open; the update must point along B.
            new_BRN = new_BRN * torch.where((new_BRN * right_BRN).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        else:
            norm = right_BRN.norm(dim=-1, keepdim=True)
            new_BRN = right_BRN / norm.where(norm > 0, 1.0)
        empty = right_BRN.abs().amax(dim=-1, keepdim=True) == 0
        for stored, new_RN, old_RN, is_empty in zip(
            extra["right_factor"], new_BRN.unbind(0), old_BRN.unbind(0), empty.unbind(0), strict=True
        ):
            # A direction that saw nothing keeps its old row: a zero row could never come back.
            stored.copy_(torch.where(is_empty, old_RN, new_RN).reshape(-1))
        return faded(torch.bmm(left_BMR, torch.where(empty, 0.0, new_BRN), out=inputs_BMN), factors)


def _explain(momenta: Sequence[Tensor], left_BMR: Tensor, right_BRN: Tensor, feedback: float) -> None:
    """Take ``feedback`` of what the update explains out of the momentum, in place."""
    for momentum, left_MR, right_RN in zip(momenta, left_BMR.unbind(0), right_BRN.unbind(0), strict=True):
        if momentum.dtype == left_MR.dtype:
            momentum.addmm_(left_MR, right_RN, alpha=-feedback)  # no product of the size of the matrix
        else:
            # Rounded once, as where the momentum comes back from an owner.
            momentum.copy_(torch.addmm(momentum.to(left_MR.dtype), left_MR, right_RN, alpha=-feedback))


def orthonormal_columns(tall_BMR: Tensor) -> Tensor:
    """Q of the QR decomposition of each matrix, the same to the last bit whatever else is in the batch.

    LAPACK's rounding depends on how a matrix is aligned in memory: where the matrices of a batch are not a multiple of
    a vector register long, the second one gets other last bits than it gets alone. One process and the ranks of FSDP
    batch different matrices, and with bf16 weights training amplifies a last bit to 1e-2 of the update in 20 steps.
    Rows of zeros, which change nothing in exact arithmetic, align every column; common widths need none.

    Args:
        tall_BMR: (B, M, R) with M >= R.

    Returns:
        (B, M, R), orthonormal columns.
    """
    rows = tall_BMR.shape[-2]
    padding = -rows % (_ALIGN_BYTES // tall_BMR.element_size())
    padded = torch.nn.functional.pad(tall_BMR, (0, 0, 0, padding)) if padding else tall_BMR
    return torch.linalg.qr(padded)[0][:, :rows]


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
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"`rank_fraction` must be in (0, 1], got {rank_fraction!r}.")
        if power_iterations < 1:
            raise ValueError(f"`power_iterations` must be >= 1, got {power_iterations!r}.")
        own = {
            "rank_fraction": rank_fraction,
            "power_iterations": power_iterations,
            "orthogonal_right": orthogonal_right,
            "rank_rms_match": rank_rms_match,
        }
        super().__init__(params, lr, "dion", MatrixSettings(**shared), own)

    @classmethod
    def paper(cls, params: Any, rank_fraction: float = 0.5, **changes: Any) -> Dion:
        """Settings of arXiv:2605.21803; the paper ran rank fractions 1/2, 1/4, 1/8 and 1/16."""
        return cls(params, **{**MATRIX_PAPER, "rank_fraction": rank_fraction, **changes})
