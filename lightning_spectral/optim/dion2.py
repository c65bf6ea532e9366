"""Dion2 and NorDion2: orthogonalise a part of the momentum's rows or columns, keep the others for later steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import METHODS, orthogonalize_stack
from lightning_spectral.optim.base import SpectralOptimizer
from lightning_spectral.optim.matrix_rule import Group, MatrixRule, absolute_eps, faded, fading
from lightning_spectral.optim.normuon import normalize_neurons
from lightning_spectral.optim.settings import MatrixArguments, MatrixSettings, Unpack, refuse_unknown
from lightning_spectral.text.arguments import require_choice, require_kinds

# B matrices of one shape, M rows, N columns, S slices (rows or columns, whichever are fewer), K of them selected


class Dion2Rule(MatrixRule):
    """Of the short side's slices those of the largest 1-norm; what they explain decays, the rest accumulates."""

    rewrites_momentum = True

    def update_momentum(self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> None:
        """``M = M + G``; the selected slices decay in ``update_matrices``."""
        torch._foreach_add_(list(momenta), list(grads))

    def orthogonalizer_inputs(
        self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group
    ) -> Sequence[Tensor]:
        """``M`` itself."""
        return momenta

    def selects_rows(self, shape: Sequence[int]) -> bool:
        """Whether slices are rows; else they are columns."""
        return shape[-2] <= shape[-1]

    def finish(self, orthogonal_BKL: Tensor, chosen_BK: Tensor, extra: dict[str, list[Tensor]], group: Group) -> None:
        """Change the orthogonalised slices in place."""

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """``O = orth(M[K])``, ``M[K] = mu M[K]``; the update is ``O`` at K and zero elsewhere."""
        factors = fading(inputs_BMN, extra, group)
        by_row = self.selects_rows(inputs_BMN.shape)
        slices_BSL = inputs_BMN if by_row else inputs_BMN.mT
        count = max(1, round(group["fraction"] * slices_BSL.shape[-2]))
        norms_BS = slices_BSL.abs().sum(dim=-1, dtype=torch.promote_types(inputs_BMN.dtype, torch.float32))
        chosen_BK = norms_BS.topk(count, dim=-1).indices.sort(dim=-1).values
        index_BKL = chosen_BK.unsqueeze(-1).expand(-1, -1, slices_BSL.shape[-1])
        selected_BKL = slices_BSL.gather(-2, index_BKL)
        method, steps = group["orthogonalize"], group["steps"]
        orthogonal_BKL = orthogonalize_stack(selected_BKL, method, steps, eps=absolute_eps(group))
        self.finish(orthogonal_BKL, chosen_BK, extra, group)
        for momentum, chosen_K in zip(extra["momentum_buffer"], chosen_BK.unbind(0), strict=True):
            side = momentum if by_row else momentum.mT
            side[chosen_K] = side[chosen_K] * group["momentum"]
        slices_BSL.zero_().scatter_(-2, index_BKL, orthogonal_BKL)
        return faded(inputs_BMN, factors)


class NorDion2Rule(Dion2Rule):
    """Dion2 over rows, and each selected row divided by its running RMS (NorMuon); the Frobenius norm stays."""

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """One second moment per row; it moves when its row is selected."""
        return {**super().extra_state(shape, group), "neuron_moment": shape[0]}

    def selects_rows(self, shape: Sequence[int]) -> bool:
        """Rows always: a neuron is normalised as a whole."""
        return True

    def finish(self, orthogonal_BKL: Tensor, chosen_BK: Tensor, extra: dict[str, list[Tensor]], group: Group) -> None:
        """NorMuon's normalisation of the selected rows."""
        pairs = list(zip(extra["neuron_moment"], chosen_BK.unbind(0), strict=True))
        moments = [moment_M[chosen_K] for moment_M, chosen_K in pairs]
        normalize_neurons(orthogonal_BKL, moments, group["moment_beta"])
        for (moment_M, chosen_K), moved_K in zip(pairs, moments, strict=True):
            moment_M[chosen_K] = moved_K


class Dion2(SpectralOptimizer):
    """Dion2 (arXiv:2512.16928) for hidden matrices, AdamW or Lion for the rest.

    ``momentum`` is what stays of a slice that was orthogonalised; the others keep all of theirs.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        fraction: Share of the rows (of wide matrices) or columns (of tall ones) that a step orthogonalises, in (0, 1].
        orthogonalize: A coefficient set of ``functional.orthogonalize``, ``svd`` or ``identity``.
        steps: Number of iterations; the set's own when None.
        shared: Settings described in ``MatrixSettings`` and ``CommonSettings``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"dion2": Dion2Rule()}  # noqa: RUF012
    settings_class = MatrixSettings

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        fraction: float = 0.25,
        orthogonalize: str = "polar_express",
        steps: int | None = None,
        **shared: Unpack[MatrixArguments],
    ) -> None:
        require_kinds(Dion2.__init__, locals())
        refuse_unknown(type(self), MatrixSettings, shared)
        super().__init__(params, lr, "dion2", MatrixSettings(**shared), _selection(fraction, orthogonalize, steps))


class NorDion2(SpectralOptimizer):
    """NorDion2 (microsoft/dion; also called Dion3) for hidden matrices, AdamW or Lion for the rest.

    Dion2's selection, of rows always, and NorMuon's equal norms for the rows that were selected. One selection over the
    whole matrix under every placement (``selection_scope="global"`` there).

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of group dicts.
        lr: Learning rate; what it means for a matrix is said by ``lr_scale``.
        fraction: Share of the rows that a step orthogonalises, in (0, 1].
        moment_beta: Decay of the second moment per row, in [0, 1).
        orthogonalize: A coefficient set of ``functional.orthogonalize``, ``svd`` or ``identity``.
        steps: Number of iterations; the set's own when None.
        shared: Settings described in ``MatrixSettings`` and ``CommonSettings``.

    Raises:
        ValueError: If a setting is out of range.
    """

    matrix_rules = {"nordion2": NorDion2Rule()}  # noqa: RUF012
    settings_class = MatrixSettings

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        fraction: float = 0.25,
        moment_beta: float = 0.95,
        orthogonalize: str = "polar_express",
        steps: int | None = None,
        **shared: Unpack[MatrixArguments],
    ) -> None:
        require_kinds(NorDion2.__init__, locals())
        if not 0 <= moment_beta < 1:
            raise ValueError(f"`moment_beta` in [0, 1) needed, got {moment_beta!r}.")
        own = {**_selection(fraction, orthogonalize, steps), "moment_beta": moment_beta}
        refuse_unknown(type(self), MatrixSettings, shared)
        super().__init__(params, lr, "nordion2", MatrixSettings(**shared), own)


def _selection(fraction: float, orthogonalize: str, steps: int | None) -> dict[str, Any]:
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction!r}.")
    require_choice("orthogonalize", orthogonalize, METHODS)
    return {"fraction": fraction, "orthogonalize": orthogonalize, "steps": steps}
