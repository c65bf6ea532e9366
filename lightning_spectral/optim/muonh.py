"""MuonH: Muon on a sphere. Every matrix keeps the Frobenius norm it began with; the learning rate is an angle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, absolute_eps, fading
from lightning_spectral.optim.settings import OrthogonalArguments, OrthogonalSettings, Unpack, refuse_unknown

# B matrices of one shape, M rows, N columns
_ROUNDING = 1e-6  # relative, of a squared norm in fp32


class MuonHRule(MatrixRule):
    """``W = R normalize(W - lr R normalize(O))`` with ``O`` Muon's update and ``R`` the norm that W began with."""

    also_sees = ("weight",)
    decays_weights = False  # a multiple of W changes no direction

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """The radius, taken from the weight at the first step."""
        return {**super().extra_state(shape, group), "radius": 1}

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """One: ``lr`` is the length of the step over the radius, for every shape."""
        return 1.0

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """The update whose lr-fold leads to the next point of the sphere; see ``MatrixRule``.

        With ``q = |W / R - lr O'|^2`` and ``O'`` of norm one the step ``W - R normalize(W / R - lr O')`` is lr times
        ``R q^-1/2 O' + ((1 - q^-1/2) / lr) W``; written without the difference of near-equal numbers, so that it is
        right for a small lr, and brings W back to the sphere where rounding led away from it.
        """
        factors = fading(inputs_BMN, extra, group)
        method, steps = group["orthogonalize"], group["steps"]
        update_BMN = orthogonalize_stack(inputs_BMN, method, steps, eps=absolute_eps(group))
        wide = torch.promote_types(update_BMN.dtype, torch.float32)
        lr = float(group["lr"]) * float(group["lr_ratio"])
        for i, (one_MN, weight_MN) in enumerate(zip(update_BMN.unbind(0), extra["weight"], strict=True)):
            weight_MN, unit_MN = weight_MN.to(wide), one_MN.to(wide)
            length, norm = unit_MN.norm(), weight_MN.norm()
            unit_MN = unit_MN / length.where(length > 0, 1.0)
            if factors is not None:
                unit_MN = unit_MN * factors[i].to(wide)
            radius = extra["radius"][i]
            radius.copy_(torch.where(radius > 0, radius, norm.to(radius.dtype)))
            r = radius.to(wide).where(radius > 0, 1.0)
            off = (norm / r) ** 2 - 1
            off = off.where(off.abs() > _ROUNDING, 0.0)  # a matrix at rest must not follow its last bits
            bend = lr * unit_MN.square().sum() - 2 * (weight_MN * unit_MN).sum() / r
            root = (1 + off + lr * bend).clamp(min=0.25).sqrt()
            pull = (bend + (off / lr if lr > 0 else 0.0)) / (root * (root + 1))
            one_MN.copy_(unit_MN * (r / root) + weight_MN * pull)
        return update_BMN


class MuonH(SpectralOptimizer):
    """MuonH, Muon under Hyperball (arXiv:2606.16899), for hidden matrices, AdamW or Lion for the rest.

    ``lr`` of a matrix is the length of its step over its norm, whatever its shape: 0.005 to 0.02 is usual, and
    ``fallback_lr`` says that of the rest. ``lr_scale`` and the ``weight_decay`` of matrices have no meaning here.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Relative length of a step.
        shared: Settings described in ``OrthogonalSettings``, ``MatrixSettings`` and ``CommonSettings``.
    """

    matrix_rules = {"muonh": MuonHRule()}  # noqa: RUF012
    settings_class = OrthogonalSettings

    def __init__(self, params: Any, lr: float = 1e-2, **shared: Unpack[OrthogonalArguments]) -> None:
        refuse_unknown(type(self), OrthogonalSettings, shared)
        super().__init__(params, lr, "muonh", OrthogonalSettings(**shared))
