"""SOAP on the short side: Adam in the eigenbasis of the gradient's second moment. A comparison, not a default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.magnitude import unit_scale
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, faded, fading
from lightning_spectral.optim.settings import MatrixArguments, MatrixSettings, Unpack, refuse_unknown
from lightning_spectral.text.arguments import require_count, require_kinds

# B matrices of one shape, S short side, L long side


class SOAPRule(MatrixRule):
    """Adam on ``Q^T G``, with Q the eigenvectors of the running ``G G^T`` of the short side.

    Where ranks share a matrix the gradient and all of its state travel: costly on purpose of a comparison.
    """

    also_sees = ("gradient",)

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """Second moments of the short side and in its eigenbasis, the eigenbasis, steps, and the gradient's unit."""
        short = min(shape) ** 2
        own = {"gram": short, "basis": short, "second_moment": shape[0] * shape[1], "count": 1, "unit": 1}
        return {**super().extra_state(shape, group), **own}

    def dtype(self, group: Group, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """At least fp32: eigenvectors lose their point below it."""
        return torch.float64 if group["precision"] == "fp64" or param_dtype == torch.float64 else torch.float32

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """One: the update has the size of Adam's, so that Adam's learning rate fits."""
        return 1.0

    def orthogonalizer_inputs(
        self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group
    ) -> Sequence[Tensor]:
        """The momentum itself."""
        return momenta

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """One step of SOAP; the basis follows every ``basis_every`` steps, after the update."""
        factors = fading(inputs_BMN, extra, group)
        wide = inputs_BMN.shape[-2] <= inputs_BMN.shape[-1]
        torch._foreach_add_(extra["count"], 1)
        names = ("steps", "gradient", "gram", "basis", "second_moment", "unit")
        for one_MN, step, *state in zip(inputs_BMN.unbind(0), *(extra[name] for name in names), strict=True):
            self._update_one(one_MN if wide else one_MN.mT, wide, int(step), state, group)
        return faded(inputs_BMN, factors)

    def _update_one(self, direction_SL: Tensor, wide: bool, step: int, state: list[Tensor], group: Group) -> None:
        gradient, gram, basis, second, unit = state
        short, beta = direction_SL.shape[0], group["moment_beta"]
        grad_SL = gradient if wide else gradient.mT
        gram_SS, basis_SS, second_SL = gram.view(short, short), basis.view(short, short), second.view_as(direction_SL)
        # Squares of 1e-30 or 1e30 have no place in fp32: everything is kept in units of the first gradient.
        first = unit_scale(grad_SL).view(1).clamp(2.0**-126, 2.0**126).to(unit.dtype)  # of fp64 it may be beyond fp32
        unit.copy_(torch.where((gram == 0).all(), first, unit))
        grad_SL, direction = grad_SL * unit.to(grad_SL.dtype), direction_SL * unit.to(grad_SL.dtype)
        if step == 1:  # the first gradient makes the first basis
            gram_SS.copy_((1 - beta) * grad_SL @ grad_SL.mT)
            basis_SS.copy_(torch.linalg.eigh(gram_SS.nan_to_num(0.0))[1].flip(1))
        q_SS = basis_SS.to(direction_SL.dtype)
        second_SL.lerp_((q_SS.mT @ grad_SL).square().to(second.dtype), 1 - beta)
        size = math.sqrt(1 - beta**step) / (1 - group["momentum"] ** step)
        direction_SL.copy_(q_SS @ (q_SS.mT @ direction / second_SL.sqrt().add_(group["eps"])) * size)
        gram_SS.lerp_((grad_SL @ grad_SL.mT).to(gram.dtype), 1 - beta)
        if step % group["basis_every"] == 0:
            # one power iteration; rows of the second moment follow the order of their eigenvalues
            order_S = (basis_SS * (gram_SS @ basis_SS)).sum(0).argsort(descending=True)
            second_SL.copy_(second_SL[order_S])
            basis_SS.copy_(torch.linalg.qr(gram_SS @ basis_SS[:, order_S])[0])


class SOAP(SpectralOptimizer):
    """SOAP (arXiv:2409.11321) of the short side for hidden matrices, AdamW or Lion for the rest.

    Adam in the eigenbasis of Shampoo's preconditioner, one-sided: the reference's ``max_precond_dim`` between the two
    sides. For comparisons: a decomposition of the short side per matrix, and state of up to four times the matrix.
    From the checkpoint of another optimizer it begins anew, momentum included.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate, as of AdamW; ``lr_scale`` has no meaning here.
        moment_beta: Decay of both second moments, in [0, 1).
        basis_every: Steps between two renewals of the eigenbasis.
        shared: Settings described in ``MatrixSettings`` and ``CommonSettings``; ``momentum`` is the decay of the first
            moment, in [0, 1).

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"soap": SOAPRule()}  # noqa: RUF012
    settings_class = MatrixSettings

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        moment_beta: float = 0.95,
        basis_every: int = 10,
        **shared: Unpack[MatrixArguments],
    ) -> None:
        require_kinds(SOAP.__init__, locals())
        if not 0 <= moment_beta < 1:
            raise ValueError(f"`moment_beta` in [0, 1) needed, got {moment_beta!r}.")
        require_count("basis_every", basis_every)
        own = {"moment_beta": moment_beta, "basis_every": basis_every}
        refuse_unknown(type(self), MatrixSettings, shared)
        super().__init__(params, lr, "soap", MatrixSettings(**shared), own)
