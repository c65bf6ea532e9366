"""Bring whole matrices together, update them once, and apply the update to what this rank holds.

Matrices that are this rank's alone are updated here; those that several ranks hold parts or copies of go through an
``Exchange``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.placement import local
from lightning_spectral.optim.exchange import Exchange
from lightning_spectral.optim.low_rank import LowRankExchange, plan_low_rank
from lightning_spectral.optim.low_rank_trip import LowRankTrip
from lightning_spectral.optim.matrices import (
    Matrix,
    Observer,
    States,
    WeightUpdate,
    empty_stack,
    extra_here,
    fill_stack,
    flat,
    keep_momentum,
    matrices_of_member,
    parts_of,
    pieces_of,
    run_rule,
    runs_of,
    standing,
    write_inputs,
)
from lightning_spectral.optim.matrix_rule import MatrixRule
from lightning_spectral.optim.members import Member
from lightning_spectral.optim.presence import Presence
from lightning_spectral.optim.trip import Trip


class MatrixStep:
    """The plan for one set of matrices; made on the first step, with a collective per process group, and kept.

    Args:
        members: Trainable matrix parameters, in the same order on every rank.
        rules: Algorithm name -> rule.
        share: Divide the work on copies among the ranks that hold them.
        bucket_bytes: Largest size of what travels together.
        bf16_weights: See ``weights``.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rules: dict[str, MatrixRule],
        share: bool,
        bucket_bytes: float,
        bf16_weights: str,
    ) -> None:
        self._members = list(members)
        self._rules = rules
        self._bf16_weights = bf16_weights
        self._own: list[Matrix] = []
        self._runs_of: tuple[tuple[int, ...], list[list[Matrix]]] = ((), [])
        travelling: dict[int, tuple[Any, list[Matrix]]] = {}
        for member in members:
            rule = rules[member.algorithm]
            matrices = matrices_of_member(member, rule)
            group = member.shard.group
            copies = member.shard.is_whole and not member.shard.cut_over
            if group is None or (copies and not (share and rule.shares_over_replicas)):
                self._own += matrices
            else:
                travelling.setdefault(id(group), (group, []))[1].extend(matrices)
        self._exchanges: list[Exchange] = []
        self._low_rank: list[LowRankExchange] = []
        for group, matrices in travelling.values():
            factored, whole = plan_low_rank(matrices, group, bucket_bytes)
            self._low_rank += factored
            if whole:
                self._exchanges.append(Exchange.plan(whole, group, bucket_bytes))

    def forget(self, member: Member) -> None:
        """Ask anew what lies in the state of a parameter: it is another one now."""
        for matrix in [*self._own, *(m for exchange in self._exchanges for m in exchange.matrices)]:
            if matrix.member is member:
                matrix.count.known = None

    def ask(self, grads: dict[int, Tensor]) -> Presence:
        """Begin to ask which matrices have a gradient, on all ranks that hold them."""
        return Presence([*self._low_rank, *self._exchanges], grads)

    def run(self, presence: Presence, grads: dict[int, Tensor], states: States, observe: Observer | None) -> None:
        """Update in place every matrix that has a local gradient in ``grads`` (by ``id(param)``)."""
        self._move_momenta(grads, states)
        update = WeightUpdate(states, self._bf16_weights)
        self._run_own([m for m in self._own if id(m.param) in grads], grads, states, update, observe)
        for factored in self._low_rank:
            LowRankTrip(factored, presence, grads, states, update).run()
        for exchange in self._exchanges:
            Trip(exchange, presence, grads, states, update, observe).run()

    def _move_momenta(self, grads: dict[int, Tensor], states: States) -> None:
        alike: dict[tuple[int, str], list[Member]] = {}
        for member in self._members:
            if id(member.param) in grads:
                alike.setdefault((id(member.group), member.algorithm), []).append(member)
        for (_, algorithm), members in alike.items():
            torch._foreach_add_([states[m.param]["step"] for m in members], 1)
            momenta = [local(states[m.param]["momentum_buffer"]) for m in members]
            gradients = [grads[id(m.param)] for m in members]
            self._rules[algorithm].update_momentum(momenta, gradients, members[0].group)

    def _run_own(
        self,
        matrices: Sequence[Matrix],
        grads: dict[int, Tensor],
        states: States,
        update: WeightUpdate,
        observe: Observer | None,
    ) -> None:
        key = tuple(id(matrix) for matrix in matrices)
        if self._runs_of[0] != key:
            self._runs_of = (key, runs_of(matrices))
        for run in self._runs_of[1]:
            stacked = empty_stack(run, local(run[0].param).device)
            fill_stack(run, stacked, grads, states)
            extra = {name: [extra_here(m, name, states) for m in run] for name in run[0].extra}
            for name in run[0].rule.also_sees:
                extra[name] = list(torch.empty_like(stacked, dtype=run[0].dtype_of(name)).unbind(0))
                write_inputs(run, extra[name], grads, states, name)
            if run[0].rule.rewrites_momentum:
                extra["momentum_buffer"] = [
                    _whole_momentum(m, states, one) for m, one in zip(run, stacked.unbind(0), strict=True)
                ]
            updates = run_rule(run, stacked, extra, observe)
            update.apply(pieces_of(run), parts_of(run, standing(run, updates)))
            if run[0].rule.rewrites_momentum:
                for matrix, momentum in zip(run, extra["momentum_buffer"], strict=True):
                    keep_momentum(matrix, states, momentum)
            update.store()
            del updates, stacked, extra  # the next batch needs the room


def _whole_momentum(matrix: Matrix, states: States, direction: Tensor) -> Tensor:
    """The momentum as M x N: itself where it lies so, else a copy (it equals the direction of such a rule)."""
    if len(matrix.blocks) == 1 and local(states[matrix.param]["momentum_buffer"]).is_contiguous():
        return matrix.blocks[0].of(flat(local(states[matrix.param]["momentum_buffer"])))
    return direction.clone()
