"""AdamW through the same class, so that a comparison of optimizers changes one thing only."""

from __future__ import annotations

from typing import Any

from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.settings import CommonArguments, CommonSettings, Unpack, refuse_unknown


class AdamW(SpectralOptimizer):
    """Decoupled AdamW (arXiv:1711.05101) for all parameters, by torch's fused kernel.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate.
        shared: Settings described in ``CommonSettings``.
    """

    settings_class = CommonSettings

    def __init__(self, params: Any, lr: float = 1e-3, **shared: Unpack[CommonArguments]) -> None:
        refuse_unknown(type(self), CommonSettings, shared)
        super().__init__(params, lr, "adamw", CommonSettings(**shared))

    @classmethod
    def paper(cls, params: Any, **changes: Any) -> AdamW:
        """Settings of arXiv:2605.21803: lr 3e-3, betas (0.9, 0.95), decay 0.01 on hidden matrices only."""
        settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.01, "fallback_weight_decay": 0.0}
        return cls(params, **{**settings, **changes})
