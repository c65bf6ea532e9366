"""Moments of all ranks together: three reductions per layer, however many experts it has, and no gather.

The peak memory does not grow with the number of ranks: sums are moved to one common shift in place and added in place,
several small states in one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.covariance import Moments, rebase_
from lightning_spectral.probe.collectives import all_reduce, reduce

_SMALL = ("count_G", "sum_GD", "cubic_GD", "quartic_G")
BUFFER_BYTES = 1 << 28  # states are added together up to this size


def reduce_(moments: Moments, owner: int | None = None, process_group: dist.ProcessGroup | None = None) -> None:
    """Add the moments of all ranks, in place; :func:`reduce_all_` of one state."""
    reduce_all_([moments], owner, process_group)


def reduce_all_(
    states: Sequence[Moments], owner: int | None = None, process_group: dist.ProcessGroup | None = None
) -> None:
    """Add several states of all ranks, each in place.

    Every rank of the group must call it, with states of the same shapes, also one without rows. Without a process group
    nothing happens.

    Args:
        states: This rank's states. Where they are not the owner's, their content is undefined afterwards.
        owner: Rank within the group that needs the sums; ``None`` for all.
        process_group: Default: the world.
    """
    if not states or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return
    for moments, shift_D in zip(states, _common_shifts(states, process_group), strict=True):
        rebase_(moments, shift_D)
    for members in _buffered([getattr(moments, name) for moments in states for name in _SMALL]):
        _add(members, owner, process_group)
    for members in _buffered([moments.scatter_GP for moments in states]):
        _add(members, owner, process_group)


def _add(tensors: Sequence[Tensor], owner: int | None, process_group: dist.ProcessGroup | None) -> None:
    together = tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
    if owner is None:
        all_reduce(together, process_group)
    else:
        reduce(together, owner, process_group)
    if len(tensors) > 1:
        for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buffered(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many as fit into a buffer, of one type each."""
    members: list[Tensor] = []
    size = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if members and (size + num_bytes > BUFFER_BYTES or tensor.dtype != members[0].dtype):
            yield members
            members, size = [], 0
        members.append(tensor)
        size += num_bytes
    if members:
        yield members


def _common_shifts(states: Sequence[Moments], process_group: dist.ProcessGroup | None) -> list[Tensor]:
    """The mean over all ranks of each state's rows."""
    parts = []
    for moments in states:
        count = moments.count_G.sum()
        parts += [moments.sum_GD.sum(0) + count * moments.shift_D, count.unsqueeze(0)]
    joint = torch.cat(parts)
    all_reduce(joint, process_group)
    shifts = []
    for total in joint.split([moments.width + 1 for moments in states]):
        mean_D = total[:-1] / total[-1].clamp(min=1)
        shifts.append(torch.where(mean_D.isfinite(), mean_D, 0.0))  # a bad row of one bucket must not reach the others
    return shifts
