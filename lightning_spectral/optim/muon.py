"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_spectral.functional.orthogonalize import orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.settings import MATRIX_PAPER, matrix_settings


class MuonRule(MatrixRule):
    """Replace the direction by (nearly) its polar factor."""

    def update_matrices(self, directions_BMN: Tensor, companions: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Orthogonalise a stack; see ``MatrixRule``."""
        return orthogonalize_stack(directions_BMN, group["orthogonalize"], group["steps"])


class Muon(SpectralOptimizer):
    """Muon for hidden matrices, AdamW or Lion for embeddings, head and vectors, in one optimizer.

    Keller Jordan et al. 2024; learning rate conventions: Moonshot, arXiv:2502.16982. See ``SpectralOptimizer`` for what
    ``params`` may be.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        weight_decay: Decoupled weight decay of matrices (and of the rest, see ``fallback_weight_decay``).
        momentum: Momentum of matrices.
        nesterov: Look one gradient ahead.
        momentum_style: ``ema`` (``m += (1 - momentum) (g - m)``, torch) or ``heavy_ball`` (``m = momentum m + g``).
        orthogonalize: A coefficient set of ``functional.orthogonalize`` (``polar_express``, ``muon``, ...), ``svd`` or
            ``identity``.
        steps: Number of iterations; the set's own (5) when None.
        precision: ``auto`` (bf16 where the hardware multiplies it), ``bf16``, ``fp32`` or ``fp64`` products.
        lr_scale: ``match_rms_adamw`` (0.2 sqrt(max(m, n)): an AdamW learning rate fits), ``original``
            (sqrt(max(1, m/n))), ``spectral`` (sqrt(m/n), as in the paper) or ``none``.
        fallback: ``adamw`` or ``lion`` for everything that is not a hidden matrix.
        fallback_lr: Learning rate of the fallback; ``lr`` when None.
        fallback_weight_decay: Weight decay of the fallback; ``weight_decay`` when None.
        head_lr_scale: ``none``, or ``inverse_sqrt_width`` to divide the head's learning rate by sqrt(fan_in).
        betas: Of the fallback.
        eps: Of AdamW.
        roles: Regular expression searched in parameter names -> ``matrix``, ``embedding``, ``head`` or ``vector``.
        max_grad_norm: Clip to this global norm, under every strategy; ``p.grad`` stays as it is.
        nonfinite: ``propagate`` NaN and Inf like AdamW, ``raise``, or ``skip`` the step.
        share_over_ranks: Under DDP, divide the orthogonalisation among the ranks.
    """

    matrix_rules = {"muon": MuonRule()}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
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
        super().__init__(params, algorithm="muon", **matrix_settings(locals()))

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> Muon:
        """Settings of arXiv:2605.21803: lr 0.02 spectral, Lion for embeddings and head, five Newton-Schulz steps."""
        return cls(params, **{**MATRIX_PAPER, "orthogonalize": "muon", "steps": 5, **changes})

    @classmethod
    def like_torch(cls, params: Any, **changes: Any) -> Muon:
        """The conventions of ``torch.optim.Muon``, bit for bit on one device for the hidden matrices."""
        same = {"orthogonalize": "muon", "steps": 5, "precision": "bf16", "lr_scale": "original"}
        return cls(params, **{**same, **changes})
