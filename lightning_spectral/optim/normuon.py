"""NorMuon: Muon whose neurons (rows) get equal update norms, by a second moment per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, absolute_eps, faded, fading
from lightning_spectral.optim.settings import (
    ORTHOGONAL_PAPER,
    OrthogonalArguments,
    OrthogonalSettings,
    Unpack,
    refuse_unknown,
)
from lightning_spectral.text.arguments import require_kinds

# B matrices of one shape, M rows, N columns
NORMALIZERS = ("rows", "long_side", "none")
_TINY = 1e-30
_EPS = 1e-8  # added to the root of the second moment, as in the paper


class NorMuonRule(MatrixRule):
    """Divide every row of the orthogonalised direction by its running RMS; the Frobenius norm stays what it was."""

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """One second moment per row (or per column of a wide matrix, ``long_side``)."""
        found = super().extra_state(shape, group)
        if group["normalize"] != "none":
            found["neuron_moment"] = shape[0] if _over_columns(shape, group) else shape[1]
        return found

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Orthogonalise and normalise a stack; see ``MatrixRule``."""
        factors = fading(inputs_BMN, extra, group)
        method, steps = group["orthogonalize"], group["steps"]
        orthogonal_BMN = orthogonalize_stack(inputs_BMN, method, steps, eps=absolute_eps(group))
        if group["normalize"] != "none":
            over_columns = _over_columns(orthogonal_BMN.shape[-2:], group)
            normalize_neurons(orthogonal_BMN, extra["neuron_moment"], group["moment_beta"], over_columns)
        return faded(orthogonal_BMN, factors)


def normalize_neurons(orthogonal_BMN: Tensor, moments: list[Tensor], beta: float, over_columns: bool = True) -> None:
    """Divide rows (or columns) by their running RMS in place; the Frobenius norm of every matrix stays.

    Args:
        orthogonal_BMN: Orthogonalised directions.
        moments: A second moment per row (column) of each, moved in place.
        beta: Decay of the second moments.
        over_columns: Rows are normalised, by means over columns; False normalises columns.
    """
    dim = -1 if over_columns else -2
    sides = orthogonal_BMN.shape[dim]
    # One matrix at a time in fp32: a wide copy of the whole stack would be the largest buffer of the step.
    wide_dtype = torch.promote_types(orthogonal_BMN.dtype, torch.float32)
    wide_MN = torch.empty_like(orthogonal_BMN[0], dtype=wide_dtype)
    norms = [
        torch.linalg.vector_norm(wide_MN.copy_(one_MN), dim=dim, keepdim=True) for one_MN in orthogonal_BMN.unbind(0)
    ]
    mean_square = torch.stack(norms).square_().div_(sides)
    for moment, now in zip(moments, mean_square.unbind(0), strict=True):
        moment.lerp_(now.reshape(-1).to(moment.dtype), 1 - beta)
    scale = torch.stack(moments).view_as(mean_square).to(wide_dtype).sqrt().add_(_EPS).reciprocal_()
    # ||scale * O||_F needs no second pass over the matrix: the row sums of squares are known already.
    before = mean_square.sum(dim=(-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    scale = scale * (before / after.clamp(min=_TINY)).sqrt()
    for one_MN, factor in zip(orthogonal_BMN.unbind(0), scale.unbind(0), strict=True):
        one_MN.copy_(wide_MN.copy_(one_MN).mul_(factor))


def _over_columns(shape: torch.Size | tuple[int, ...], group: Group) -> bool:
    return bool(group["normalize"] == "rows" or shape[0] >= shape[1])


class NorMuon(SpectralOptimizer):
    """NorMuon (arXiv:2510.05491) for hidden matrices, AdamW or Lion for the rest.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; with ``match_rms_adamw`` the update has RMS 0.2 lr, as in the NorMuon paper.
        moment_beta: Decay of the second moment per neuron, in [0, 1).
        normalize: ``rows`` (the paper), ``long_side`` (rows of tall, columns of wide matrices) or ``none`` (Muon).
        shared: Settings described in ``OrthogonalSettings``, ``MatrixSettings`` and ``CommonSettings``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"normuon": NorMuonRule()}  # noqa: RUF012
    settings_class = OrthogonalSettings

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        moment_beta: float = 0.95,
        normalize: str = "rows",
        **shared: Unpack[OrthogonalArguments],
    ) -> None:
        require_kinds(NorMuon.__init__, locals())
        if normalize not in NORMALIZERS:
            raise ValueError(f"`normalize` must be one of {list(NORMALIZERS)}, got {normalize!r}.")
        if not 0 <= moment_beta < 1:
            raise ValueError(f"`moment_beta` in [0, 1) needed, got {moment_beta!r}.")
        own = {"moment_beta": moment_beta, "normalize": normalize}
        refuse_unknown(type(self), OrthogonalSettings, shared)
        super().__init__(params, lr, "normuon", OrthogonalSettings(**shared), own)

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> NorMuon:
        """Settings of arXiv:2605.21803: as ``Muon.paper``, neuron-wise second moment with decay 0.95."""
        return cls(params, **{**ORTHOGONAL_PAPER, "moment_beta": 0.95, **changes})
