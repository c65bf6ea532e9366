"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from typing import Any

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


class MuonRule(MatrixRule):
    """Replace the direction by (nearly) its polar factor."""

    def is_transposable(self, group: Group) -> bool:
        """But for torch's digits, see ``newton_schulz``."""
        return absolute_eps(group) == 0

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Orthogonalise a stack; see ``MatrixRule``."""
        factors = fading(inputs_BMN, extra, group)
        method, steps = group["orthogonalize"], group["steps"]
        return faded(orthogonalize_stack(inputs_BMN, method, steps, eps=absolute_eps(group)), factors)


class Muon(SpectralOptimizer):
    """Muon for hidden matrices, AdamW or Lion for embeddings, head and vectors, in one optimizer.

    Keller Jordan et al. 2024; learning rate conventions: Moonshot, arXiv:2502.16982. See ``SpectralOptimizer`` for what
    ``params`` may be.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        shared: Settings described in ``OrthogonalSettings``, ``MatrixSettings`` and ``CommonSettings``.
    """

    matrix_rules = {"muon": MuonRule()}  # noqa: RUF012
    settings_class = OrthogonalSettings

    def __init__(self, params: Any, lr: float = 1e-3, **shared: Unpack[OrthogonalArguments]) -> None:
        refuse_unknown(type(self), OrthogonalSettings, shared)
        super().__init__(params, lr, "muon", OrthogonalSettings(**shared))

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> Muon:
        """Settings of arXiv:2605.21803: lr 0.02 spectral, Lion for embeddings and head, five Newton-Schulz steps."""
        return cls(params, **{**ORTHOGONAL_PAPER, **changes})

    @classmethod
    def scion(cls, params: Any, **changes: Any) -> Muon:
        """The norms of Scion (arXiv:2502.07529): spectral for hidden matrices, sign with 1 / fan_in for the head.

        Each layer moves by the steepest direction of its norm: sqrt(m/n) times the polar factor; signs elsewhere.
        """
        norms = {"lr_scale": "spectral", "fallback": "lion", "betas": (0.95, 0.95), "head_lr_scale": "inverse_width"}
        return cls(params, **{**norms, "nesterov": False, **changes})

    @classmethod
    def like_torch(cls, params: Any, **changes: Any) -> Muon:
        """The conventions of ``torch.optim.Muon``, bit for bit on one device for the hidden matrices."""
        same = {"orthogonalize": "muon", "steps": 5, "precision": "bf16", "lr_scale": "original"}
        return cls(params, **{**same, "norm_eps": 1e-7, "norm_eps_style": "absolute", **changes})
