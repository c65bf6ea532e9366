"""NorMuon: Muon whose neurons (rows) get equal update norms, by a second moment per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.settings import MATRIX_PAPER, matrix_settings

# B matrices of one shape, M rows, N columns
NORMALIZERS = ("rows", "long_side", "none")
_TINY = 1e-30


class NorMuonRule(MatrixRule):
    """Divide every row of the orthogonalised direction by its running RMS; the Frobenius norm stays what it was."""

    def companions(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """One second moment per row (or per column of a wide matrix, ``long_side``)."""
        if group["normalize"] == "none":
            return {}
        return {"neuron_moment": shape[0] if _over_columns(shape, group) else shape[1]}

    def update_matrices(self, directions_BMN: Tensor, companions: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Orthogonalise and normalise a stack; see ``MatrixRule``."""
        orthogonal_BMN = orthogonalize_stack(directions_BMN, group["orthogonalize"], group["steps"])
        if group["normalize"] == "none":
            return orthogonal_BMN
        dim = -1 if _over_columns(orthogonal_BMN.shape[-2:], group) else -2
        sides = orthogonal_BMN.shape[dim]
        # One matrix at a time in fp32: a wide copy of the whole stack would be the largest buffer of the step.
        wide_dtype = torch.promote_types(orthogonal_BMN.dtype, torch.float32)
        wide_MN = torch.empty_like(orthogonal_BMN[0], dtype=wide_dtype)
        norms = [
            torch.linalg.vector_norm(wide_MN.copy_(one_MN), dim=dim, keepdim=True)
            for one_MN in orthogonal_BMN.unbind(0)
        ]
        mean_square = torch.stack(norms).square_().div_(sides)
        moments = companions["neuron_moment"]
        for moment, now in zip(moments, mean_square.unbind(0), strict=True):
            moment.lerp_(now.reshape(-1).to(moment.dtype), 1 - group["moment_beta"])
        scale = torch.stack(moments).view_as(mean_square).to(wide_dtype).sqrt().add_(group["moment_eps"]).reciprocal_()
        # ||scale * O||_F needs no second pass over the matrix: the row sums of squares are known already.
        before = mean_square.sum(dim=(-2, -1), keepdim=True)
        after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
        scale = scale * (before / after.clamp(min=_TINY)).sqrt()
        for one_MN, factor in zip(orthogonal_BMN.unbind(0), scale.unbind(0), strict=True):
            one_MN.copy_(wide_MN.copy_(one_MN).mul_(factor))
        return orthogonal_BMN


def _over_columns(shape: torch.Size | tuple[int, ...], group: Group) -> bool:
    return bool(group["normalize"] == "rows" or shape[0] >= shape[1])


class NorMuon(SpectralOptimizer):
    """NorMuon (arXiv:2510.05491) for hidden matrices, AdamW or Lion for the rest.

    The arguments are those of ``Muon`` and:

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; with ``match_rms_adamw`` the update has RMS 0.2 lr, as in the NorMuon paper.
        weight_decay: Decoupled weight decay of matrices (and of the rest, see ``fallback_weight_decay``).
        momentum: Momentum of matrices.
        moment_beta: Decay of the second moment per neuron.
        moment_eps: Added to its root.
        normalize: ``rows`` (the paper), ``long_side`` (rows of tall, columns of wide matrices) or ``none`` (Muon).
        nesterov: Look one gradient ahead.
        momentum_style: ``ema`` or ``heavy_ball``.
        orthogonalize: A coefficient set, ``svd`` or ``identity``.
        steps: Number of iterations; the set's own (5) when None.
        precision: ``auto``, ``bf16``, ``fp32`` or ``fp64`` products.
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
        share_over_ranks: Under DDP, divide the orthogonalisation among the ranks.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"normuon": NorMuonRule()}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        moment_beta: float = 0.95,
        moment_eps: float = 1e-8,
        normalize: str = "rows",
        nesterov: bool = True,
        momentum_style: str = "ema",
        orthogonalize: str = "polar_express",
        steps: int | None = None,
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
        share_over_ranks: bool = True,
    ) -> None:
        if normalize not in NORMALIZERS:
            raise ValueError(f"`normalize` must be one of {list(NORMALIZERS)}, got {normalize!r}.")
        if not (0 <= moment_beta < 1 and moment_eps >= 0):
            raise ValueError(
                f"`moment_beta` in [0, 1) and `moment_eps` >= 0 needed, got {moment_beta!r}, {moment_eps!r}."
            )
        super().__init__(params, algorithm="normuon", **matrix_settings(locals()))

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> NorMuon:
        """Settings of arXiv:2605.21803: as ``Muon.paper``, neuron-wise second moment with decay 0.95."""
        return cls(params, **{**MATRIX_PAPER, "orthogonalize": "muon", "steps": 5, "moment_beta": 0.95, **changes})
