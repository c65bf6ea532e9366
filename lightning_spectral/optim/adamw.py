"""AdamW through the same class, so that a comparison of optimizers changes one thing only."""

from __future__ import annotations

from typing import Any

from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.settings import matrix_settings


class AdamW(SpectralOptimizer):
    """Decoupled AdamW (arXiv:1711.05101) for all parameters, by torch's fused kernel.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate.
        weight_decay: Of hidden matrices (and of the rest, see ``fallback_weight_decay``).
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        fallback_lr: Learning rate of what is not a hidden matrix; ``lr`` when None.
        fallback_weight_decay: Weight decay of what is not a hidden matrix; ``weight_decay`` when None.
        head_lr_scale: ``none`` or ``inverse_sqrt_width``.
        roles: Regular expression searched in parameter names -> role.
        max_grad_norm: Clip to this global norm.
        nonfinite: ``propagate``, ``raise`` or ``skip``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fallback_lr: float | None = None,
        fallback_weight_decay: float | None = None,
        head_lr_scale: str = "none",
        roles: dict[str, str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        fallback = "adamw"
        super().__init__(params, algorithm="adamw", **matrix_settings(locals()))

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> AdamW:
        """Settings of arXiv:2605.21803: lr 3e-3, betas (0.9, 0.95), decay 0.01 on hidden matrices only."""
        settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.01, "fallback_weight_decay": 0.0}
        return cls(params, **{**settings, **changes})
