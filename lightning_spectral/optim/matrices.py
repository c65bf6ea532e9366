"""Matrices that are whole here: which go through one batched update, the update itself, and its way to the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import same_shape_runs
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.shards import Piece, local

States = Any  # Optimizer.state: parameter -> {name: tensor}
Observer = Callable[[Tensor, Tensor, Tensor, Group], None]


@dataclass(frozen=True)
class Matrix:
    """One matrix parameter with its settings and what is held of it here."""

    param: Tensor
    group: Group
    rule: MatrixRule
    piece: Piece

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        return self.piece.shape[0], self.piece.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the direction and of the update, also on the wire."""
        held = local(self.param)
        return self.rule.dtype(self.group, held.dtype, held.device)


def runs_of(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices that go through one ``update_matrices``: one group, one shape, as many as are worth one batch."""
    by_group: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_group.setdefault(id(matrix.group), []).append(matrix)
    runs: list[list[Matrix]] = []
    for members in by_group.values():
        device = local(members[0].param).device
        shells = [torch.empty(m.shape, dtype=m.dtype, device="meta") for m in members]
        runs.extend([members[i] for i in indices] for indices in same_shape_runs(shells, device=device))
    return runs


def update_run(run: Sequence[Matrix], grads: dict[int, Tensor], states: States, observe: Observer | None) -> Tensor:
    """Updates (B, M, N) of matrices that are whole here, companions changed in place."""
    first = run[0]
    held = local(first.param)
    directions = torch.empty((len(run), *first.shape), dtype=first.dtype, device=held.device)
    for matrix, target in zip(run, directions.unbind(0), strict=True):
        momentum = local(states[matrix.param]["momentum_buffer"])
        target.copy_(matrix.rule.direction(momentum, grads[id(matrix.param)], matrix.group).view(matrix.shape))
    companions = {
        name: [states[m.param][name] for m in run] for name in first.rule.companions(first.shape, first.group)
    }
    if first.rule.rewrites_momentum:
        companions["momentum_buffer"] = [local(states[m.param]["momentum_buffer"]) for m in run]
    entering = directions.clone() if observe is not None else directions
    # Rounded to the wire's dtype here too: otherwise an owner would apply another update than the ranks it sends it to.
    updates = first.rule.update_matrices(directions, companions, first.group).to(first.dtype)
    if observe is not None:
        for matrix, direction, update in zip(run, entering.unbind(0), updates.unbind(0), strict=True):
            observe(matrix.param, direction, update, matrix.group)
    return updates


def apply_update(matrix: Matrix, held: Tensor, update: Tensor) -> None:
    """Decay and move ``held``, the part of the weight that is here, by its part of the update."""
    group = matrix.group
    lr = float(group["lr"]) * group["lr_ratio"]
    if group["weight_decay"] != 0:
        held.mul_(1 - lr * group["weight_decay"])
    held.add_(update, alpha=-lr * matrix.rule.shape_factor(matrix.shape, group))
