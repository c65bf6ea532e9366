"""Moments of all ranks together: three reductions a state, no gather.

The peak memory does not grow with the number of ranks: sums are moved to one common shift in place and added in place.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.covariance import Moments, rebase_
from lightning_spectral.probe.collectives import all_reduce, reduce

_SMALL = ("count_G", "sum_GD", "cubic_GD", "quartic_G")


def reduce_(moments: Moments, owner: int | None = None, process_group: dist.ProcessGroup | None = None) -> None:
    """Add the moments of all ranks, in place.

    Every rank of the group must call it, also one without rows. Without a process group nothing happens.

    Args:
        moments: This rank's state. Where it is not the owner's, its content is undefined afterwards.
        owner: Rank within the group that needs the sum; ``None`` for all.
        process_group: Default: the world.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return
    rebase_(moments, _common_shift(moments, process_group))
    small = torch.cat([getattr(moments, name).flatten() for name in _SMALL])
    for tensor in (small, moments.scatter_GP):
        if owner is None:
            all_reduce(tensor, process_group)
        else:
            reduce(tensor, owner, process_group)
    for name, part in zip(_SMALL, small.split([getattr(moments, name).numel() for name in _SMALL]), strict=True):
        getattr(moments, name).copy_(part.view_as(getattr(moments, name)))


def _common_shift(moments: Moments, process_group: dist.ProcessGroup | None) -> Tensor:
    count = moments.count_G.sum()
    total_D = moments.sum_GD.sum(0) + count * moments.shift_D
    joint = torch.cat([total_D, count.unsqueeze(0)])
    all_reduce(joint, process_group)
    mean_D = joint[:-1] / joint[-1].clamp(min=1)
    return torch.where(mean_D.isfinite(), mean_D, 0.0)  # a bad row of one bucket must not reach the others
