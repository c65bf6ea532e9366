"""Dion: an orthonormal update of low rank, with error feedback through the momentum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.settings import MATRIX_PAPER, matrix_settings

# B matrices of one shape, M rows, N columns, R rank of the update

_ALIGN_BYTES = 64  # the widest vector register, and torch's own alignment on a CPU


class DionRule(MatrixRule):
    """One power iteration on the momentum from last step's right factor (Dion, arXiv:2504.05295)."""

    rewrites_momentum = True
    # An all_gather of update and momentum costs more than repeating the few low-rank products.
    shares_over_replicas = False

    def companions(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """The right factor, (R, N)."""
        return {"right_factor": update_rank(shape, group["rank_fraction"]) * shape[1]}

    def initial_companion(self, name: str, shape: tuple[int, int], group: Group, index: int) -> Tensor | None:
        """Random unit rows, the same on every rank: drawn from a generator of their own."""
        generator = torch.Generator().manual_seed(0x0D10 + index)
        factor_RN = torch.randn(update_rank(shape, group["rank_fraction"]), shape[1], generator=generator)
        return torch.nn.functional.normalize(factor_RN, dim=1)

    def dtype(self, group: Group, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """At least fp32: QR and the error feedback lose their point below it."""
        return torch.float64 if group["precision"] == "fp64" or param_dtype == torch.float64 else torch.float32

    def advance(self, momentum: Tensor, grad: Tensor, group: Group) -> None:
        """``B = M + G``; what the update explains is taken out of it in ``update_matrices``."""
        momentum.add_(grad)

    def direction(self, momentum: Tensor, grad: Tensor, group: Group) -> Tensor:
        """``B`` itself."""
        return momentum

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """With ``rank_rms_match`` the RMS of the update is that of a full-rank one."""
        factor = super().shape_factor(shape, group)
        if not group["rank_rms_match"]:
            return factor
        return factor * math.sqrt(min(shape) / update_rank(shape, group["rank_fraction"]))

    def update_matrices(self, directions_BMN: Tensor, companions: dict[str, list[Tensor]], group: Group) -> Tensor:
        """``P = orth(B Q)``, ``R = B^T P``, ``M = B - (1 - mu) P R^T``, update ``P Q'^T`` with ``Q' = colnorm(R)``."""
        batch, _, columns = directions_BMN.shape
        old_BRN = torch.stack(companions["right_factor"]).view(batch, -1, columns).to(directions_BMN.dtype)
        right_BRN = old_BRN
        for _ in range(group["power_iterations"]):
            left_BMR = orthonormal_columns(directions_BMN @ right_BRN.mT)
            right_BRN = left_BMR.mT @ directions_BMN
        feedback = 1 - group["momentum"]
        for momentum, left_MR, right_RN in zip(
            companions["momentum_buffer"], left_BMR.unbind(0), right_BRN.unbind(0), strict=True
        ):
            if momentum.dtype == left_MR.dtype:
                momentum.addmm_(left_MR, right_RN, alpha=-feedback)  # no product of the size of the matrix
            else:
                # Rounded once, as where the momentum comes back from an owner.
                momentum.copy_(torch.addmm(momentum.to(left_MR.dtype), left_MR, right_RN, alpha=-feedback))
        if group["orthogonal_right"]:
            new_BRN = orthonormal_columns(right_BRN.mT).mT
            # QR leaves the signs of its columns open; the update must point along B.
            new_BRN = new_BRN * torch.where((new_BRN * right_BRN).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        else:
            norm = right_BRN.norm(dim=-1, keepdim=True)
            new_BRN = right_BRN / norm.where(norm > 0, 1.0)
        empty = right_BRN.abs().amax(dim=-1, keepdim=True) == 0
        for stored, new_RN, old_RN, is_empty in zip(
            companions["right_factor"], new_BRN.unbind(0), old_BRN.unbind(0), empty.unbind(0), strict=True
        ):
            # A direction that saw nothing keeps its old row: a zero row could never come back.
            stored.copy_(torch.where(is_empty, old_RN, new_RN).reshape(-1))
        return torch.bmm(left_BMR, torch.where(empty, 0.0, new_BRN), out=directions_BMN)


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

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        rank_fraction: Rank of the update over min(m, n), in (0, 1].
        weight_decay: Decoupled weight decay of matrices (and of the rest, see ``fallback_weight_decay``).
        momentum: What stays of the explained part of the momentum.
        power_iterations: Power iterations per step, >= 1.
        orthogonal_right: QR of the right factor (arXiv:2605.16341) in place of unit columns.
        rank_rms_match: Scale the update by sqrt(min(m, n) / rank), so that its RMS does not fall with the rank.
        precision: ``fp64`` for double products; otherwise fp32, or the parameter's if that is wider.
        lr_scale: ``match_rms_adamw``, ``original``, ``spectral`` or ``none``.
        fallback: ``adamw`` or ``lion``.
        fallback_lr: Learning rate of the fallback; ``lr`` when None.
        fallback_weight_decay: Weight decay of the fallback; ``weight_decay`` when None.
        head_lr_scale: ``none`` or ``inverse_sqrt_width``.
        betas: Of the fallback.
        eps: Of AdamW.
        roles: Regular expression searched in parameter names -> role.
        max_grad_norm: Clip to this global norm.
        nonfinite: ``propagate``, ``raise`` or ``skip``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"dion": DionRule()}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank_fraction: float = 0.25,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        power_iterations: int = 1,
        orthogonal_right: bool = False,
        rank_rms_match: bool = False,
        precision: str = "auto",
        lr_scale: str = "match_rms_adamw",
        fallback: str = "adamw",
        fallback_lr: float | None = None,
        fallback_weight_decay: float | None = None,
        head_lr_scale: str = "none",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        roles: dict[str, str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"`rank_fraction` must be in (0, 1], got {rank_fraction!r}.")
        if power_iterations < 1:
            raise ValueError(f"`power_iterations` must be >= 1, got {power_iterations!r}.")
        super().__init__(params, algorithm="dion", **matrix_settings(locals()))

    @classmethod
    def paper(cls, params: Any, rank_fraction: float = 0.5, **changes: Any) -> Dion:
        """Settings of arXiv:2605.21803; the paper ran rank fractions 1/2, 1/4, 1/8 and 1/16."""
        settings = {name: value for name, value in MATRIX_PAPER.items() if name != "nesterov"}
        return cls(params, **{**settings, "rank_fraction": rank_fraction, **changes})
