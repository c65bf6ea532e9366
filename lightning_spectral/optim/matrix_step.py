"""Bring whole matrices together, update them once, and apply the update to what this rank holds.

Three ways, chosen per matrix: whole here (one device, or work repeated on every rank), whole on every rank of a DDP
group (``over_replicas``), cut over ranks (``over_shards``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_spectral.optim.matrices import Matrix, Observer, States, apply_update, runs_of, update_run
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.over_replicas import Share, run_shared
from lightning_spectral.optim.over_shards import run_cut
from lightning_spectral.optim.shards import (
    Exchange,
    fsdp1_pieces,
    local,
    orthogonalization_cost,
    piece_of,
    replica_group,
)


class MatrixStep:
    """The plan for one set of matrices; made on the first step, a few collectives, and kept.

    Args:
        matrices: Trainable matrix parameters with their groups, in the same order on every rank.
        rules: Algorithm name -> rule.
        share: Spread the work over the ranks of a DDP group.
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, Group]], rules: dict[str, MatrixRule], share: bool) -> None:
        flat_views = fsdp1_pieces()
        everything = [
            Matrix(param, group, rules[group["algorithm"]], piece_of(param, flat_views)) for param, group in matrices
        ]
        self._key = [id(param) for param, _ in matrices]
        self._cut: list[tuple[Exchange, list[Matrix]]] = []
        by_group: dict[int, list[Matrix]] = {}
        for matrix in everything:
            if matrix.piece.group is not None:
                by_group.setdefault(id(matrix.piece.group), []).append(matrix)
        for members in by_group.values():
            costs = [orthogonalization_cost(m.shape) for m in members]
            self._cut.append((Exchange.plan([m.piece for m in members], costs, members[0].piece.group), members))
        whole = [m for m in everything if m.piece.group is None]
        replicas = replica_group([m.param for m in whole]) if share and whole else None
        self._replicas = replicas
        self._runs_of: tuple[tuple[int, ...], list[list[Matrix]]] = ((), [])
        self._shared = [m for m in whole if replicas is not None and m.rule.shares_over_replicas]
        self._share = Share.plan(self._shared, replicas) if self._shared else None
        self._whole = [m for m in whole if replicas is None or not m.rule.shares_over_replicas]

    def _remembered_runs(self, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
        """``runs_of`` a subset: it is the same one on nearly every step."""
        key = tuple(id(matrix) for matrix in matrices)
        if self._runs_of[0] != key:
            self._runs_of = (key, runs_of(matrices))
        return self._runs_of[1]

    def covers(self, matrices: Sequence[tuple[Tensor, Group]]) -> bool:
        """Whether this plan was made for exactly these parameters."""
        return len(matrices) == len(self._key) and all(
            id(p) == k for (p, _), k in zip(matrices, self._key, strict=True)
        )

    def run(self, grads: dict[int, Tensor], states: States, observe: Observer | None) -> None:
        """Update in place every matrix that has a local gradient in ``grads`` (by ``id(param)``)."""
        for matrix in (*self._whole, *self._shared, *(m for _, members in self._cut for m in members)):
            if id(matrix.param) in grads:
                state = states[matrix.param]
                state["step"] += 1
                matrix.rule.advance(local(state["momentum_buffer"]), grads[id(matrix.param)], matrix.group)
        self._run_whole([m for m in self._whole if id(m.param) in grads], grads, states, observe)
        if self._share is not None:
            run_shared(self._share, self._shared, grads, states, observe)
        for exchange, members in self._cut:
            run_cut(exchange, members, grads, states, observe)

    def _run_whole(
        self, matrices: Sequence[Matrix], grads: dict[int, Tensor], states: States, observe: Observer | None
    ) -> None:
        for run in self._remembered_runs(matrices):
            updates = update_run(run, grads, states, observe)
            for matrix, update in zip(run, updates.unbind(0), strict=True):
                apply_update(matrix, local(matrix.param), update)
            del updates, update  # the next batch needs the room
