"""Matrices that every rank of a DDP group holds: each rank orthogonalises its share and sends it to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.optim.matrices import Matrix, Observer, States, apply_update, runs_of, update_run
from lightning_spectral.optim.shards import choose_owners, local, orthogonalization_cost, padded, require_same_gradients

# Renamed in torch 2.13, where the old name warns.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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


def run_shared(
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
    for run in runs_of(own):
        updates = update_run(run, grads, states, observe)
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
            apply_update(matrix, local(matrix.param), views["update"].view(matrix.shape))


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
