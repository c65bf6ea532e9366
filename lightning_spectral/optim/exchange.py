"""Matrices that several ranks hold parts or copies of: sent to one owner, bucket by bucket, and the result back.

Who holds which entries is asked once. A copy and a part are the same thing here: the owner of a matrix gathers what it
lacks (nothing, under DDP), and every holder gets the entries of the result that it holds. While a bucket is
orthogonalised the next one is on its way in and the last one on its way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.models.views import Range, Rectangle
from lightning_spectral.optim.matrices import Matrix, spans_of

_ALIGN = 16  # bytes; every dtype may start here
Holding = tuple[Rectangle, ...]  # the entries of one matrix that one rank holds
Messages = tuple[list["Message"], list["Message"]]  # to every rank, and from every rank


@dataclass(frozen=True)
class Segment:
    """One array, or a part of it, inside what one rank sends another.

    Attributes:
        matrix: Index.
        name: ``input``, what a rule ``also_sees``, ``update``, ``momentum_buffer`` or a name of extra state.
        rectangles: Entries of the matrix, for arrays of its shape.
        spans: Ranges of the array, for extra state.
        offset: Begin, in bytes.
        count: Number of values.
        dtype: Of the values.
    """

    matrix: int
    name: str
    rectangles: Holding
    spans: tuple[Range, ...]
    offset: int
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Message:
    """All segments from one rank to another in one bucket, and their length in bytes."""

    segments: tuple[Segment, ...] = ()
    size: int = 0


@dataclass
class Bucket:
    """Some matrices that travel together, and this rank's messages from and to every rank.

    Attributes:
        matrices: Indices.
        owned: Those that this rank makes whole.
        inward: Messages (to every rank, from every rank) on the way in; None when no rank sends any.
        outward: The same for the way out.
        runs: Owned matrices that go through the rule together; found at the first step.
    """

    matrices: list[int]
    owned: list[int]
    inward: Messages | None
    outward: Messages | None
    runs: list[list[Matrix]] | None = None


@dataclass
class Exchange:
    """The communication plan of one process group.

    Attributes:
        group: Process group.
        matrices: The same on every rank, in the same order.
        holdings: ``holdings[rank][matrix]``.
        owners: Rank (in the group) that makes each matrix whole.
    """

    group: Any
    matrices: list[Matrix]
    holdings: list[list[Holding]]
    owners: list[int]
    buckets: list[Bucket] = field(default_factory=list)
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """This rank and the number of ranks in the group."""
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    @classmethod
    def plan(cls, matrices: list[Matrix], group: Any, bucket_bytes: float) -> Exchange:
        """Ask every rank once what it holds, choose owners and plan the buckets; a collective over ``group``.

        Raises:
            RuntimeError: If the ranks of the group do not have the same matrices in their optimizers.
        """
        holdings, owners = ask_holdings(matrices, group)
        exchange = cls(group, matrices, holdings, owners)
        sizes = [matrix.numel * matrix.dtype.itemsize for matrix in matrices]
        for indices in in_buckets(matrices, sizes, bucket_bytes):
            exchange.buckets.append(exchange._bucket(indices))
        return exchange

    @cached_property
    def holds(self) -> list[list[bool]]:
        """Whether a rank holds a part of each matrix, ``holds[rank][matrix]``."""
        return [[bool(held) for held in of_rank] for of_rank in self.holdings]

    def send(self, messages: Messages, outgoing: Tensor) -> tuple[Tensor, Any]:
        """Start exchanging messages; returns the buffer that is being filled and what to wait for."""
        to, arriving = ([message.size for message in side] for side in messages)
        incoming = torch.empty(sum(arriving), dtype=torch.uint8, device=outgoing.device)
        work = dist.all_to_all_single(incoming, outgoing, arriving, to, group=self.group, async_op=True)
        return incoming, work

    def _bucket(self, indices: list[int]) -> Bucket:
        inward = {(i, source) for i in indices for source in sources_of(self.holdings, i, self.owners[i])}
        inward -= {(i, self.owners[i]) for i in indices}
        outward = {
            (i, rank) for i in indices for rank in range(self.size) if rank != self.owners[i] and self.holdings[rank][i]
        }
        owned = [i for i in indices if self.owners[i] == self.rank]
        return Bucket(indices, owned, self._messages(inward, True), self._messages(outward, False))

    def _messages(self, pairs: set[tuple[int, int]], to_owner: bool) -> Messages | None:
        """Messages between this rank and every other for (matrix, holder) pairs; None if no rank sends any."""
        if not pairs:
            return None
        between: dict[tuple[int, int], list[int]] = {}
        for i, holder in sorted(pairs):
            between.setdefault((holder, self.owners[i]), []).append(i)
        peers, rank = range(self.size), self.rank
        as_holder = [self._pack(rank, between.get((rank, peer), []), to_owner) for peer in peers]
        as_owner = [self._pack(peer, between.get((peer, rank), []), to_owner) for peer in peers]
        return (as_holder, as_owner) if to_owner else (as_owner, as_holder)

    def _pack(self, holder: int, indices: list[int], to_owner: bool) -> Message:
        segments, offset = [], 0
        for i in indices:
            for segment in self._segments(holder, i, to_owner, offset):
                segments.append(segment)
                offset += padded(segment.count * segment.dtype.itemsize)
        return Message(tuple(segments), offset)

    def _segments(self, holder: int, i: int, to_owner: bool, offset: int) -> Iterator[Segment]:
        matrix, held = self.matrices[i], self.holdings[holder][i]
        names = ["input", *matrix.rule.also_sees] if to_owner else ["update"]
        if matrix.rule.rewrites_momentum and not to_owner:
            names.append("momentum_buffer")
        count = sum(rectangle.numel for rectangle in held)
        for name in names:
            dtype = matrix.dtype_of(name)
            yield Segment(i, name, held, (), offset, count, dtype)
            offset += padded(count * dtype.itemsize)
        for name, extra in matrix.extra.items():
            spans = spans_of(held, matrix.shape[1], extra.length)
            count = sum(high - low for low, high in spans)
            if count:
                yield Segment(i, name, (), spans, offset, count, torch.float32)
                offset += padded(count * 4)


def views_into(buffer: Tensor, messages: Sequence[Message]) -> Iterator[tuple[Segment, Tensor]]:
    """Every segment of messages that lie one after the other in a byte buffer, with its values."""
    base = 0
    for message in messages:
        for segment in message.segments:
            begin = base + segment.offset
            yield segment, buffer[begin : begin + segment.count * segment.dtype.itemsize].view(segment.dtype)
        base += message.size


def padded(size: int) -> int:
    """Bytes that ``size`` bytes take when the next array must start aligned."""
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def ask_holdings(matrices: Sequence[Matrix], group: Any) -> tuple[list[list[Holding]], list[int]]:
    """Which rank holds what, and who makes each matrix whole; a collective over ``group``.

    Raises:
        RuntimeError: If the ranks of the group do not have the same matrices in their optimizers.
    """
    mine = [(m.member.name, m.shape, tuple(block.target for block in m.blocks)) for m in matrices]
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, mine, group=group)
    require_same_matrices([[(name, shape) for name, shape, _ in of_rank] for of_rank in everybody])
    holdings = [[held for _, _, held in of_rank] for of_rank in everybody]
    return holdings, choose_owners(holdings, [orthogonalization_cost(m.shape) for m in matrices])


def sources_of(holdings: Sequence[Sequence[Holding]], i: int, owner: int) -> list[int]:
    """Ranks whose entries make matrix ``i`` whole: of those that hold the same entries the owner, else the nearest."""
    alike: dict[Holding, list[int]] = {}
    for rank, of_rank in enumerate(holdings):
        if of_rank[i]:
            alike.setdefault(of_rank[i], []).append(rank)
    return [min(ranks, key=lambda rank: abs(rank - owner)) for ranks in alike.values()]


def choose_owners(holdings: Sequence[Sequence[Holding]], costs: Sequence[float]) -> list[int]:
    """Of the ranks that hold a part of a matrix the least loaded one owns it; costly matrices choose first."""
    load = [0.0] * len(holdings)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        holders = [rank for rank, held in enumerate(holdings) if held[i]] or [0]
        owners[i] = min(holders, key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


def orthogonalization_cost(shape: Sequence[int]) -> float:
    """Multiplications of one quintic step up to a constant: 2 short^2 long + short^3."""
    short, long = min(shape), max(shape)
    return float(2 * short * short * long + short**3)


def in_buckets(matrices: Sequence[Matrix], sizes: Sequence[float], bucket_bytes: float) -> list[list[int]]:
    """Costly matrices first, alike ones together, as many to a bucket as fit; a larger one is a bucket of its own."""
    shapes = [matrix.shape for matrix in matrices]
    order = sorted(range(len(matrices)), key=lambda i: (-orthogonalization_cost(shapes[i]), shapes[i], i))
    buckets: list[list[int]] = []
    room = 0.0
    for i in order:
        if not buckets or sizes[i] > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(i)
        room -= sizes[i]
    return buckets


def require_same_matrices(named: Sequence[Sequence[tuple[str, tuple[int, int]]]]) -> None:
    """Refuse ranks that bring different matrices to one exchange.

    Raises:
        RuntimeError: On all ranks alike, with the first difference.
    """
    for rank, of_rank in enumerate(named):
        if of_rank != named[0]:
            pairs = zip(named[0], of_rank, strict=False)
            first = next((f"{a} and {b}" for a, b in pairs if a != b), f"{len(named[0])} and {len(of_rank)} matrices")
            raise RuntimeError(
                f"ranks 0 and {rank} of one process group bring different matrices to the optimizer ({first}). If "
                "ZeroRedundancyOptimizer or another optimizer that gives every rank its own parameters wraps this one: "
                "use it alone under DDP, it divides the work itself (`share_over_ranks`), or use FSDP2."
            )
