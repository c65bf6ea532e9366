"""AdaMuon: Muon whose orthogonalised momentum is divided, entry by entry, by its running root mean square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, absolute_eps, faded, fading
from lightning_spectral.optim.settings import OrthogonalArguments, OrthogonalSettings, Unpack, refuse_unknown
from lightning_spectral.text.arguments import require_kinds

# B matrices of one shape, M rows, N columns
_EPS = 1e-8  # added to the root of the second moment


class AdaMuonRule(MatrixRule):
    """Sign of the momentum, orthogonalised, over its element-wise second moment; the Frobenius norm stays.

    Where ranks share a matrix its second moment travels with it: three times Muon's bytes.
    """

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """A second moment per entry."""
        return {**super().extra_state(shape, group), "element_moment": shape[0] * shape[1]}

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Orthogonalise and normalise a stack; see ``MatrixRule``."""
        factors = fading(inputs_BMN, extra, group)
        method, steps = group["orthogonalize"], group["steps"]
        orthogonal_BMN = orthogonalize_stack(inputs_BMN.sign_(), method, steps, eps=absolute_eps(group))
        for one_MN, moment in zip(orthogonal_BMN.unbind(0), extra["element_moment"], strict=True):
            wide_MN = one_MN.to(torch.promote_types(one_MN.dtype, torch.float32))
            before = wide_MN.norm()
            kept_MN = moment.view(one_MN.shape)
            kept_MN.lerp_(wide_MN.square().to(kept_MN.dtype), 1 - group["moment_beta"])
            normed_MN = wide_MN / kept_MN.sqrt().add_(_EPS)
            after = normed_MN.norm()
            one_MN.copy_(normed_MN * (before / after.where(after > 0, 1.0)))
        return faded(orthogonal_BMN, factors)


class AdaMuon(SpectralOptimizer):
    """AdaMuon (arXiv:2507.11005) for hidden matrices, AdamW or Lion for the rest.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        moment_beta: Decay of the second moment per entry, in [0, 1).
        shared: Settings described in ``OrthogonalSettings``, ``MatrixSettings`` and ``CommonSettings``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"adamuon": AdaMuonRule()}  # noqa: RUF012
    settings_class = OrthogonalSettings

    def __init__(
        self, params: Any, lr: float = 1e-3, *, moment_beta: float = 0.95, **shared: Unpack[OrthogonalArguments]
    ) -> None:
        require_kinds(AdaMuon.__init__, locals())
        if not 0 <= moment_beta < 1:
            raise ValueError(f"`moment_beta` in [0, 1) needed, got {moment_beta!r}.")
        refuse_unknown(type(self), OrthogonalSettings, shared)
        super().__init__(params, lr, "adamuon", OrthogonalSettings(**shared), {"moment_beta": moment_beta})
