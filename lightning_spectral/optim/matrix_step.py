"""Bring whole matrices together, update them once, and apply the update to what this rank holds.

Three ways, chosen per matrix: whole here (one device, or work repeated on every rank), whole on every rank of a DDP
group (each rank orthogonalises its share and sends it to all), cut over ranks (one all_to_all in, one out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.orthogonalize import same_shape_runs
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.shards import (
    Exchange,
    Parcel,
    Piece,
    choose_owners,
    fsdp1_pieces,
    local,
    orthogonalization_cost,
    padded,
    piece_of,
    replica_group,
    require_same_gradients,
)

States = Any  # Optimizer.state: parameter -> {name: tensor}
# Renamed in torch 2.13, where the old name warns.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
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

    def _runs(self, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
        """``_runs`` of a subset, remembered: it is the same one on nearly every step."""
        key = tuple(id(matrix) for matrix in matrices)
        if self._runs_of[0] != key:
            self._runs_of = (key, _runs(matrices))
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
            _run_shared(self._share, self._shared, grads, states, observe)
        for exchange, members in self._cut:
            _run_cut(exchange, members, grads, states, observe)

    def _run_whole(
        self, matrices: Sequence[Matrix], grads: dict[int, Tensor], states: States, observe: Observer | None
    ) -> None:
        for run in self._runs(matrices):
            updates = _update_run(run, grads, states, observe)
            for matrix, update in zip(run, updates.unbind(0), strict=True):
                _apply(matrix, local(matrix.param), update)
            del updates, update  # the next batch needs the room


@dataclass(frozen=True)
class Share:
    """Who orthogonalises which matrix of a DDP group, and where its results lie in that rank's part of one buffer."""

    group: Any
    rank: int
    size: int
    owners: list[int]
    offsets: list[int]
    length: int

    @classmethod
    def plan(cls, matrices: Sequence[Matrix], group: Any) -> Share:
        """The same on every rank, whatever gradients a step has; each part begins with one byte per matrix."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        everywhere = [[(0, m.piece.numel) for m in matrices]] * size
        owners = choose_owners(everywhere, [orthogonalization_cost(m.shape) for m in matrices])
        offsets, used = [], [padded(len(matrices))] * size
        for matrix, owner in zip(matrices, owners, strict=True):
            offsets.append(used[owner])
            used[owner] += padded(_result_bytes(matrix))
        return cls(group, rank, size, owners, offsets, max(used))

    def gather(self, parts: Sequence[Tensor], buffer: Tensor) -> None:
        """Bring every rank's part of ``buffer`` to all."""
        if buffer.device.type != "cpu":
            _ALL_GATHER(buffer, parts[self.rank], group=self.group)
            return
        # gloo's all_gather copies into a flat buffer of its own and back: 5 to 10 times as slow as plain messages.
        peers = [peer for peer in range(self.size) if peer != self.rank]
        works = [dist.isend(parts[self.rank], group=self.group, group_dst=peer) for peer in peers]
        works += [dist.irecv(parts[peer], group=self.group, group_src=peer) for peer in peers]
        for work in works:
            if work is not None:
                work.wait()


def _run_shared(
    share: Share, matrices: Sequence[Matrix], grads: dict[int, Tensor], states: States, observe: Observer | None
) -> None:
    """Every rank has every momentum; only the orthogonalisation is divided, its results go to all."""
    held = local(matrices[0].param)
    gathered = torch.empty(share.size * share.length, dtype=torch.uint8, device=held.device)
    parts = gathered.split(share.length)
    mine = parts[share.rank]
    present = [id(m.param) in grads for m in matrices]
    mine[: len(matrices)] = torch.tensor(present, dtype=torch.uint8)
    where = {id(m.param): offset for m, offset in zip(matrices, share.offsets, strict=True)}
    own = [m for m, owner, here in zip(matrices, share.owners, present, strict=True) if owner == share.rank and here]
    for run in _runs(own):
        updates = _update_run(run, grads, states, observe)
        for matrix, update in zip(run, updates.unbind(0), strict=True):
            views = _result_views(matrix, mine[where[id(matrix.param)] :])
            views["update"].view(matrix.shape).copy_(update)
            for name in _returned(matrix):
                views[name].copy_(states[matrix.param][name])
        del updates, update  # the next batch needs the room
    share.gather(parts, gathered)
    require_same_gradients([part[: len(matrices)].tolist() for part in parts], [m.shape for m in matrices])
    for matrix, owner, offset, here in zip(matrices, share.owners, share.offsets, present, strict=True):
        if here:
            views = _result_views(matrix, parts[owner][offset:])
            if owner != share.rank:
                for name in _returned(matrix):
                    states[matrix.param][name].copy_(views[name])
            _apply(matrix, local(matrix.param), views["update"].view(matrix.shape))


def _run_cut(
    exchange: Exchange,
    members: Sequence[Matrix],
    grads: dict[int, Tensor],
    states: States,
    observe: Observer | None,
) -> None:
    """One all_to_all makes every matrix whole at its owner, one brings the ranges of the results back.

    The timetable never depends on which gradients exist, so that no rank can miss a collective: a matrix without a
    gradient sends zeros and ignores what comes back. Holders of one matrix that disagree are an error on all ranks.
    """
    device = local(members[0].param).device
    inward = [_inward(matrix) for matrix in members]
    outward = [_outward(matrix) for matrix in members]

    def fill_inward(i: int, parcel: Parcel, target: Tensor) -> None:
        matrix = members[i]
        if id(matrix.param) not in grads:
            target.zero_()
        elif parcel.name == "direction":
            state = states[matrix.param]
            momentum = local(state["momentum_buffer"])
            direction = matrix.rule.direction(momentum, grads[id(matrix.param)], matrix.group)
            target.copy_(direction.reshape(-1))
        else:
            target.copy_(states[matrix.param][parcel.name])

    owned = [i for i, owner in enumerate(exchange.owners) if owner == exchange.rank]
    index_of = {id(members[i]): i for i in owned}
    runs = [(run, [index_of[id(matrix)] for matrix in run]) for run in _runs([members[i] for i in owned])]
    whole: dict[tuple[int, str], Tensor] = {}
    stacks = []
    for run, indices in runs:  # directions arrive where the batched product reads them
        stacked = torch.empty((len(run), *run[0].shape), dtype=run[0].dtype, device=device)
        stacks.append(stacked)
        for i, direction in zip(indices, stacked.unbind(0), strict=True):
            whole[i, "direction"] = direction.view(-1)
            for parcel in inward[i][1:]:
                whole[i, parcel.name] = torch.empty(parcel.length, dtype=parcel.dtype, device=device)
    flags = [0 if m.piece.start == m.piece.stop else 1 + (id(m.param) in grads) for m in members]
    everywhere = exchange.send_in(inward, fill_inward, whole, device, flags)
    # An empty piece has no say: FSDP1 gives it no gradient.
    held_flags = [[None if flag == 0 else flag - 1 for flag in of_rank] for of_rank in everywhere]
    require_same_gradients(held_flags, [m.shape for m in members])
    results: dict[tuple[int, str], Tensor] = {}
    for (run, indices), stacked in zip(runs, stacks, strict=True):
        directions = stacked.unbind(0)
        companions = {p.name: [whole[i, p.name] for i in indices] for p in inward[indices[0]] if p.name != "direction"}
        if run[0].rule.rewrites_momentum:
            companions["momentum_buffer"] = [direction.clone() for direction in directions]
        entering = stacked.clone() if observe is not None else stacked
        updates = run[0].rule.update_matrices(stacked, companions, run[0].group).to(run[0].dtype)
        if observe is not None:
            for matrix, direction, update in zip(run, entering.unbind(0), updates.unbind(0), strict=True):
                observe(matrix.param, direction, update, matrix.group)
        for position, i in enumerate(indices):
            results[i, "update"] = updates[position].reshape(-1)
            for name, arrays in companions.items():
                results[i, name] = arrays[position].reshape(-1)

    def fill_outward(i: int, parcel: Parcel, target: Tensor, span: tuple[int, int]) -> None:
        target.copy_(results[i, parcel.name][span[0] : span[1]])

    arrived = exchange.send_out(outward, fill_outward, device)
    for i in owned:
        low, high = members[i].piece.start, members[i].piece.stop
        for parcel in outward[i]:
            span = (min(low, parcel.length), min(high, parcel.length))
            if span[1] > span[0]:
                _deliver(members[i], parcel.name, results[i, parcel.name][span[0] : span[1]], grads, states)
    for (i, name, _, _), values in arrived:
        _deliver(members[i], name, values, grads, states)


def _deliver(matrix: Matrix, name: str, values: Tensor, grads: dict[int, Tensor], states: States) -> None:
    if id(matrix.param) not in grads:
        return
    held = local(matrix.param)
    if name == "update":
        _apply(matrix, held, values.view(held.shape))
    elif name == "momentum_buffer":
        momentum = local(states[matrix.param][name])
        momentum.copy_(values.view(momentum.shape))
    else:
        states[matrix.param][name].copy_(values)


def _inward(matrix: Matrix) -> list[Parcel]:
    companions = matrix.rule.companions(matrix.shape, matrix.group)
    return [
        Parcel("direction", matrix.piece.numel, matrix.dtype),
        *(Parcel(name, length, torch.float32) for name, length in companions.items()),
    ]


def _outward(matrix: Matrix) -> list[Parcel]:
    companions = matrix.rule.companions(matrix.shape, matrix.group)
    parcels = [Parcel("update", matrix.piece.numel, matrix.dtype)]
    if matrix.rule.rewrites_momentum:
        parcels.append(Parcel("momentum_buffer", matrix.piece.numel, matrix.dtype))
    return parcels + [Parcel(name, length, torch.float32) for name, length in companions.items()]


def _runs(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
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


def _update_run(run: Sequence[Matrix], grads: dict[int, Tensor], states: States, observe: Observer | None) -> Tensor:
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


def _apply(matrix: Matrix, held: Tensor, update: Tensor) -> None:
    group = matrix.group
    lr = float(group["lr"]) * group["lr_ratio"]
    if group["weight_decay"] != 0:
        held.mul_(1 - lr * group["weight_decay"])
    held.add_(update, alpha=-lr * matrix.rule.shape_factor(matrix.shape, group))


def _returned(matrix: Matrix) -> list[str]:
    return list(matrix.rule.companions(matrix.shape, matrix.group))


def _result_bytes(matrix: Matrix) -> int:
    companions = sum(matrix.rule.companions(matrix.shape, matrix.group).values())
    return matrix.piece.numel * matrix.dtype.itemsize + 16 + 4 * companions


def _result_views(matrix: Matrix, buffer: Tensor) -> dict[str, Tensor]:
    """The update and companions of one matrix inside a byte buffer that starts at its place."""
    end = matrix.piece.numel * matrix.dtype.itemsize
    views = {"update": buffer[:end].view(matrix.dtype)}
    offset = padded(end)
    for name, length in matrix.rule.companions(matrix.shape, matrix.group).items():
        views[name] = buffer[offset : offset + 4 * length].view(torch.float32)
        offset += 4 * length
    return views
