"""Who holds which piece of which matrix, and one exchange in and one out that make every matrix whole somewhere.

FSDP1 shows an optimizer 1-D slices of a flat buffer, FSDP2 shows DTensors cut along rows. Both are the same thing: a
range of the row-major flattening of the matrix. A rank that already holds a whole matrix keeps it; of a cut matrix one
holder, the least loaded, becomes the owner and receives the missing ranges. All matrices travel in one ``all_to_all``,
their updates in a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGN = 16  # bytes; every dtype may start here


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one parameter.

    Attributes:
        shape: Logical shape.
        start: First entry of the row-major flattening that is held here.
        stop: One past the last; equal to ``start`` on a rank without a piece.
        group: The process group the parameter is cut over; None when it is whole here.
        kind: ``"whole"``, ``"flat"`` (FSDP1) or ``"rows"`` (FSDP2).
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    group: Any
    kind: str

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return int(torch.Size(self.shape).numel())


def local(tensor: Tensor) -> Tensor:
    """The storage this rank holds; writing to it writes to the tensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing DTensor where nobody uses it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def piece_of(param: Tensor, flat_views: dict[int, Piece] | None = None) -> Piece:
    """Describe what this rank holds of ``param``.

    Args:
        param: Whole parameter, FSDP1 shard or DTensor.
        flat_views: What ``fsdp1_pieces`` returned; looked up again when None.

    Raises:
        ValueError: If a DTensor is cut in a way that is not a range of its flattening (tensor parallelism, strided).
    """
    if is_dtensor(param):
        return _dtensor_piece(param)
    flat_views = fsdp1_pieces() if flat_views is None else flat_views
    if id(param) in flat_views:
        return flat_views[id(param)]
    return Piece(tuple(param.shape), 0, param.numel(), None, "whole")


def fsdp1_pieces() -> dict[int, Piece]:
    """Pieces of all original parameters of all live FSDP1 modules, by ``id``; empty when FSDP1 is not in use."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not (dist.is_available() and dist.is_initialized()):
        return {}
    import gc

    pieces: dict[int, Piece] = {}
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), module.FullyShardedDataParallel):
            continue
        handle = candidate.__dict__.get("_handle")
        if handle is None:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError(
                "FSDP was built with use_orig_params=False: the optimizer sees one vector for many parameters and "
                "cannot tell matrices apart. Build it with use_orig_params=True (Lightning's and litgpt's default)."
            )
        for param, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            whole = int(torch.Size(shape).numel())
            if not handle.uses_sharded_strategy:
                continue
            start, stop = (
                (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (whole, whole)
            )
            pieces[id(param)] = Piece(tuple(shape), start, stop, handle.process_group, "flat")
    return pieces


def _dtensor_piece(param: Any) -> Piece:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(param.shape)
    cuts = [(dim, p) for dim, p in enumerate(param.placements) if not isinstance(p, Replicate)]
    if not cuts or param.numel() == 0:
        return Piece(shape, 0, param.numel(), None, "rows")
    if len(cuts) > 1 or type(cuts[0][1]) is not Shard or cuts[0][1].dim != 0:
        raise ValueError(
            f"a parameter of shape {shape} is cut as {param.placements}: only whole parameters and cuts along rows "
            "over one mesh dimension (FSDP2, HSDP) are supported; leave tensor-parallel ones to another optimizer."
        )
    local_shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    width = param.numel() // shape[0]
    rows = local_shape[0] if local_shape else 0
    start = min(offset[0], shape[0]) * width
    return Piece(shape, start, start + rows * width, param.device_mesh.get_group(cuts[0][0]), "rows")


@dataclass(frozen=True)
class Parcel:
    """One array that travels with a matrix: its name, its dtype, and its length laid along the matrix's flattening."""

    name: str
    length: int
    dtype: torch.dtype


@dataclass
class Exchange:
    """The fixed timetable of one process group: which range of which array goes from whom to whom.

    Attributes:
        group: Process group.
        ranges: ``ranges[rank][matrix]`` is the range that the rank holds.
        owners: Rank (in the group) that makes each matrix whole.
    """

    group: Any
    ranges: list[list[tuple[int, int]]]
    owners: list[int]
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    @classmethod
    def plan(cls, pieces: Sequence[Piece], costs: Sequence[float], group: Any) -> Exchange:
        """Ask every rank once what it holds and choose the owners; a collective over ``group``."""
        mine = [(piece.start, piece.stop) for piece in pieces]
        ranges: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranges, mine, group=group)
        return cls(group, ranges, choose_owners(ranges, costs))

    def send_in(
        self,
        parcels: Sequence[Sequence[Parcel]],
        fill: Callable[[int, Parcel, Tensor], None],
        whole: dict[tuple[int, str], Tensor],
        device: torch.device,
        flags: Sequence[int],
    ) -> list[list[int]]:
        """Bring every array to the owner of its matrix, and a few flags to everybody.

        Args:
            parcels: Arrays of each matrix, the same on every rank.
            fill: Writes this rank's range of an array into the tensor it is given.
            whole: Flat arrays of the matrices owned here by (matrix, name), to be filled; the ranges cover them.
            device: Where buffers live.
            flags: This rank's bytes for all, equally many on every rank.

        Returns:
            The flags of every rank.
        """
        for i, owner in enumerate(self.owners):
            if owner == self.rank:
                for parcel in parcels[i]:
                    low, high = self._range(self.rank, i, parcel)
                    if high > low:
                        fill(i, parcel, whole[i, parcel.name][low:high])
        received, everywhere = self._swap(parcels, fill, to_owner=True, device=device, flags=flags)
        for (i, name, low, high), values in received:
            whole[i, name][low:high] = values
        return everywhere

    def send_out(
        self,
        parcels: Sequence[Sequence[Parcel]],
        fill: Callable[[int, Parcel, Tensor, tuple[int, int]], None],
        device: torch.device,
    ) -> list[tuple[tuple[int, str, int, int], Tensor]]:
        """Bring ranges of the owners' results back to the other holders.

        Args:
            parcels: Arrays of each matrix, the same on every rank.
            fill: Writes a range of a result into the tensor it is given.
            device: Where buffers live.

        Returns:
            ``((matrix, name, low, high), values)`` of the ranges held here and owned elsewhere.
        """
        return self._swap(parcels, fill, to_owner=False, device=device)[0]

    def _range(self, rank: int, matrix: int, parcel: Parcel) -> tuple[int, int]:
        low, high = self.ranges[rank][matrix]
        return min(low, parcel.length), min(high, parcel.length)

    def _letter(
        self, holder: int, owner: int, parcels: Sequence[Sequence[Parcel]], head: int = 0
    ) -> tuple[list[tuple[int, Parcel, int, int, int]], int]:
        """What passes between a holder and an owner: (matrix, parcel, low, high, byte offset) rows and total bytes."""
        rows, offset = [], padded(head)
        if holder != owner:
            for i, of in enumerate(self.owners):
                if of != owner:
                    continue
                for parcel in parcels[i]:
                    low, high = self._range(holder, i, parcel)
                    if high > low:
                        rows.append((i, parcel, low, high, offset))
                        size = (high - low) * parcel.dtype.itemsize
                        offset += padded(size)
        return rows, offset

    def _swap(
        self,
        parcels: Sequence[Sequence[Parcel]],
        fill: Callable[..., None],
        to_owner: bool,
        device: torch.device,
        flags: Sequence[int] = (),
    ) -> tuple[list[tuple[tuple[int, str, int, int], Tensor]], list[list[int]]]:
        head = len(flags)
        as_holder = [self._letter(self.rank, peer, parcels, head) for peer in range(self.size)]
        as_owner = [self._letter(peer, self.rank, parcels, head) for peer in range(self.size)]
        out_letters, in_letters = (as_holder, as_owner) if to_owner else (as_owner, as_holder)
        out_sizes, in_sizes = [size for _, size in out_letters], [size for _, size in in_letters]
        outgoing = torch.empty(sum(out_sizes), dtype=torch.uint8, device=device)
        incoming = torch.empty(sum(in_sizes), dtype=torch.uint8, device=device)
        if head:
            for envelope in outgoing.split(out_sizes):
                envelope[:head] = torch.tensor(flags, dtype=torch.uint8)
        for (i, parcel, low, high), view in _views(outgoing, out_letters):
            if to_owner:
                fill(i, parcel, view)
            else:
                fill(i, parcel, view, (low, high))
        dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=self.group)
        arrived = [((i, parcel.name, low, high), view) for (i, parcel, low, high), view in _views(incoming, in_letters)]
        heads = [envelope[:head].tolist() for envelope in incoming.split(in_sizes)] if head else []
        return arrived, heads


def _views(
    buffer: Tensor, letters: Sequence[tuple[list[tuple[int, Parcel, int, int, int]], int]]
) -> list[tuple[tuple[int, Parcel, int, int], Tensor]]:
    views, base = [], 0
    for rows, size in letters:
        for i, parcel, low, high, offset in rows:
            begin = base + offset
            raw = buffer[begin : begin + (high - low) * parcel.dtype.itemsize]
            views.append(((i, parcel, low, high), raw.view(parcel.dtype)))
        base += size
    return views


def padded(size: int) -> int:
    """Bytes that ``size`` bytes take when the next array must start aligned."""
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def require_same_gradients(present: Sequence[Sequence[int | None]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a step in which a matrix has a gradient on some of its holders only.

    Args:
        present: ``present[rank][matrix]``: 1, 0, or None for a rank that holds nothing of it; the same on every rank,
            so that all of them raise.
        shapes: For the message.

    Raises:
        RuntimeError: If holders disagree.
    """
    for i, shape in enumerate(shapes):
        said = {rank: of_rank[i] for rank, of_rank in enumerate(present) if of_rank[i] is not None}
        if len(set(said.values())) > 1:
            missing = [rank for rank, has in said.items() if not has]
            raise RuntimeError(
                f"a matrix of shape {tuple(shape)} (number {i} of those that ranks share) has a gradient on some ranks "
                f"but `grad is None` on ranks {missing}. Momentum would drift apart: give every rank a gradient (zeros "
                "where the matrix was not used), or clear it on all ranks."
            )


def choose_owners(ranges: Sequence[Sequence[tuple[int, int]]], costs: Sequence[float]) -> list[int]:
    """Of the ranks that hold a part of a matrix the least loaded one owns it; costly matrices choose first."""
    load = [0.0] * len(ranges)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        holders = [rank for rank, held in enumerate(ranges) if held[i][1] > held[i][0]] or [0]
        owners[i] = min(holders, key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


def orthogonalization_cost(shape: Sequence[int]) -> float:
    """Multiplications of one quintic step up to a constant: 2 short^2 long + short^3."""
    short, long = min(shape), max(shape)
    return float(2 * short * short * long + short**3)


def replica_group(params: Sequence[Tensor]) -> Any:
    """The process group of the live DDP module that averages the gradients of these parameters, or None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    module = sys.modules.get("torch.nn.parallel.distributed")
    if module is None:
        return None
    import gc

    wanted = {id(p) for p in params}
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), module.DistributedDataParallel):
            continue
        if wanted & {id(p) for p in candidate.parameters()} and dist.get_world_size(candidate.process_group) > 1:
            return candidate.process_group
    return None
