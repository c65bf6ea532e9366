"""Collectives that give up: a rank that dies inside one must not keep the others for the group's timeout.

Ranks agree before each of these (``agreement``), so that one which does not finish has lost a member. Nothing more can
be exchanged in that group then: the error is raised on every rank that is left, and the observer is disabled.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.probe.agreement import MissingRankError

LIMIT_S = 30.0
_SLOWEST_BYTES_PER_S = 10e6  # a link below which waiting longer is of no use
_LONGEST_SLEEP_S = 5e-3


def all_reduce(tensor: Tensor, process_group: dist.ProcessGroup | None = None, op: Any = dist.ReduceOp.SUM) -> None:
    """Add a tensor over the group (or another operation), in place.

    Raises:
        MissingRankError: If it does not finish in time, or a peer is gone.
    """
    _finish(lambda: dist.all_reduce(tensor, op, group=process_group, async_op=True), tensor.nbytes)


def reduce(tensor: Tensor, owner: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Add a tensor at one rank of the group; undefined elsewhere.

    Raises:
        MissingRankError: If it does not finish in time, or a peer is gone.
    """
    _finish(lambda: dist.reduce(tensor, group=process_group, group_dst=owner, async_op=True), tensor.nbytes)


def all_gather(part: Tensor, process_group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """What each rank of the group gives, of one shape.

    Raises:
        MissingRankError: If it does not finish in time, or a peer is gone.
    """
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
    _finish(lambda: dist.all_gather(parts, part, group=process_group, async_op=True), part.nbytes * len(parts))
    return parts


def gather(part: Tensor, owner: int, process_group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """What each rank of the group gives, of one shape, at one of them; nothing elsewhere.

    Raises:
        MissingRankError: If it does not finish in time, or a peer is gone.
    """
    size = dist.get_world_size(process_group)
    owns = dist.get_rank(process_group) == owner
    parts = [torch.empty_like(part) for _ in range(size)] if owns else None
    _finish(lambda: dist.gather(part, parts, group=process_group, group_dst=owner, async_op=True), part.nbytes * size)
    return parts or []


def all_gather_object(part: Any, process_group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank of the group gives, in their order; pickled.

    Raises:
        MissingRankError: If it does not finish in time, or a peer is gone.
    """
    device = torch.device("cpu" if "gloo" in str(dist.get_backend(process_group)) else "cuda")
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    content = torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8).to(device)
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    sizes[rank] = len(content)
    all_reduce(sizes, process_group)
    longest = int(sizes.max())
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(content)] = content
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    _finish(lambda: dist.all_gather(parts, mine, group=process_group, async_op=True), longest * world_size)
    contents = [one[:size].cpu().numpy().tobytes() for one, size in zip(parts, sizes.tolist(), strict=True)]
    return [pickle.loads(content) for content in contents]  # noqa: S301 - of this run's own ranks


def _finish(begin: Any, num_bytes: int) -> None:
    deadline = time.monotonic() + LIMIT_S + num_bytes / _SLOWEST_BYTES_PER_S
    sleep_s = 2e-5
    try:
        work = begin()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise MissingRankError("a rank did not finish a reduction in time")
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        work.wait()
    except MissingRankError:
        raise
    except RuntimeError as error:  # a peer has closed its connection
        raise MissingRankError(f"a rank was lost in a reduction ({error})") from error
