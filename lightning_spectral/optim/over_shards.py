"""Matrices cut over ranks by FSDP1 or FSDP2: one all_to_all makes them whole, one brings the results back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_spectral.optim.matrices import Matrix, Observer, States, apply_update, runs_of
from lightning_spectral.optim.shards import Exchange, Parcel, local, require_same_gradients


def run_cut(
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
    runs = [(run, [index_of[id(matrix)] for matrix in run]) for run in runs_of([members[i] for i in owned])]
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
        apply_update(matrix, held, values.view(held.shape))
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
