"""Dion among ranks that hold parts of a matrix: products of the update's rank travel, (m + n) r, never a matrix.

Every holder multiplies the entries it has by the right factor; the owner adds the parts, makes them orthonormal and
sends every holder its rows; the same again for the right factor, by columns. Each holder then takes what the update
explains out of its own momentum, and moves its own weights.

Axes: M rows, N columns, R rank of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.models.placement import local
from lightning_spectral.models.views import Range, Rectangle
from lightning_spectral.optim.exchange import Holding, ask_holdings, in_buckets, sources_of
from lightning_spectral.optim.matrices import Matrix, spans_of

Size = Callable[[int, int], int]  # (matrix, holder) -> number of values


@dataclass(frozen=True)
class Frame:
    """The rows and the columns in which a holder has entries of a matrix."""

    rows: tuple[Range, ...]
    columns: tuple[Range, ...]

    @classmethod
    def of(cls, held: Sequence[Rectangle]) -> Frame:
        """Of everything that a rank holds."""
        return cls(_union([one.rows for one in held]), _union([one.columns for one in held]))

    @property
    def height(self) -> int:
        """Number of rows."""
        return _length(self.rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        return _length(self.columns)


def factor_bytes(matrix: Matrix, holdings: Sequence[Holding], owner: int) -> int:
    """Bytes that one step of ``LowRankTrip`` moves between ranks for one matrix.

    With a holder of m' rows and n' columns, power iterations p and rank r: n' r + 2 p (m' + n') r, and 2 r (or, with
    ``orthogonal_right``, 2 n' r) and the rows' shares of what is kept beside, some numbers. Holders of the same entries
    as a nearer one send nothing: p (m' + n') r less.

    Args:
        matrix: Its dtype and settings count.
        holdings: What every rank holds of it.
        owner: Adds and orthogonalises.
    """
    rank, rounds = rank_of(matrix), int(matrix.group["power_iterations"])
    sources = sources_of([[held] for held in holdings], 0, owner)
    total = 0
    for holder, held in enumerate(holdings):
        if holder != owner and held:
            frame, sends = Frame.of(held), holder in sources
            total += (1 + sends) * rounds * (frame.height + frame.width) * rank
            total += sends * (1 + kept_size(matrix, held))  # its largest entry and what it keeps
            total += 1 + frame.width * rank  # scale and right factor
            total += 1 + used_size(matrix, frame) + kept_size(matrix, held)
    return total * matrix.dtype.itemsize


def whole_bytes(matrix: Matrix, holdings: Sequence[Holding], owner: int) -> int:
    """Bytes that an ``Exchange`` moves for the same: the direction in; the update and the momentum out."""
    sources = sources_of([[held] for held in holdings], 0, owner)
    entries = 0
    for holder, held in enumerate(holdings):
        if holder != owner:
            entries += (2 + (holder in sources)) * sum(one.numel for one in held)
    return entries * matrix.dtype.itemsize


def rank_of(matrix: Matrix) -> int:
    """R: rows of the right factor."""
    return matrix.extra["right_factor"].length // matrix.shape[1]


def kept_size(matrix: Matrix, held: Holding) -> int:
    """How many values of extra state a holder keeps."""
    return sum(_length(spans_of(held, matrix.shape[1], extra.length)) for extra in matrix.extra.values())


def used_size(matrix: Matrix, frame: Frame) -> int:
    """How many values tell a holder its columns of the new right factor: all, or the lengths of its rows."""
    return rank_of(matrix) * (frame.width if matrix.group["orthogonal_right"] else 1)


@dataclass(frozen=True)
class Leg:
    """One ``all_to_all`` of a bucket, as this rank sees it.

    Attributes:
        stays: Matrices that it owns and holds: nothing travels.
        to: Matrices whose values leave, for every rank.
        leaves: How many values leave for every rank.
        arrives: How many values come from every rank.
        slots: (matrix, peer, begin, end) of what comes.
    """

    stays: list[int]
    to: list[list[int]]
    leaves: list[int]
    arrives: list[int]
    slots: list[tuple[int, int, int, int]]


@dataclass
class LowRankExchange:
    """The timetable of the matrices of one process group whose factors travel, all of one dtype and as often.

    Attributes:
        group: Process group.
        matrices: The same on every rank, in the same order.
        holdings: ``holdings[rank][matrix]``.
        owners: Rank (in the group) that orthogonalises the factors of each matrix.
        power_iterations: Trips of both factors in a step.
        buckets: Indices of matrices whose factors travel together.
        legs: Those that ``leg`` has made.
        kept: What ``spans`` has found.
    """

    group: Any
    matrices: list[Matrix]
    holdings: list[list[Holding]]
    owners: list[int]
    power_iterations: int = 1
    buckets: list[list[int]] = field(default_factory=list)
    legs: dict[tuple[int, bool, str], Leg] = field(default_factory=dict)
    kept: dict[tuple[int, int], dict[str, tuple[Range, ...]]] = field(default_factory=dict)

    @cached_property
    def holds(self) -> list[list[bool]]:
        """Whether a rank holds a part of each matrix, ``holds[rank][matrix]``."""
        return [[bool(held) for held in of_rank] for of_rank in self.holdings]

    @cached_property
    def frames(self) -> list[list[Frame]]:
        """``frames[rank][matrix]``."""
        return [[Frame.of(held) for held in of_rank] for of_rank in self.holdings]

    @cached_property
    def sources(self) -> list[list[int]]:
        """Ranks whose parts are added, for each matrix."""
        return [sources_of(self.holdings, i, owner) for i, owner in enumerate(self.owners)]

    @cached_property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group)

    def spans(self, i: int, holder: int) -> dict[str, tuple[Range, ...]]:
        """Which values of every extra state a holder keeps; found once."""
        if (i, holder) not in self.kept:
            matrix, held = self.matrices[i], self.holdings[holder][i]
            self.kept[i, holder] = {n: spans_of(held, matrix.shape[1], e.length) for n, e in matrix.extra.items()}
        return self.kept[i, holder]

    def left_size(self, i: int, holder: int) -> int:
        """Values of a left factor in the rows of a holder."""
        return self.frames[holder][i].height * rank_of(self.matrices[i])

    def right_size(self, i: int, holder: int) -> int:
        """Values of a right factor in the columns of a holder."""
        return self.frames[holder][i].width * rank_of(self.matrices[i])

    def first_size(self, i: int, holder: int) -> int:
        """A right factor and the scale."""
        return 1 + self.right_size(i, holder)

    def state_size(self, i: int, holder: int) -> int:
        """What a holder keeps of the extra state, and its largest entry."""
        return 1 + kept_size(self.matrices[i], self.holdings[holder][i])

    def final_size(self, i: int, holder: int) -> int:
        """The new extra state, how far the update fades, and the new right factor."""
        return self.state_size(i, holder) + used_size(self.matrices[i], self.frames[holder][i])

    def leg(self, bucket: list[int], to_owner: bool, size: Size) -> Leg:
        """What goes where when every source (or every holder) of a bucket's matrices meets its owner; made once."""
        key = (bucket[0], to_owner, size.__name__)
        if key not in self.legs:
            self.legs[key] = self._leg(bucket, to_owner, size)
        return self.legs[key]

    def _leg(self, bucket: list[int], to_owner: bool, size: Size) -> Leg:
        here, peers = self.rank, range(len(self.holdings))

        def meets(i: int, holder: int) -> bool:
            return holder in self.sources[i] if to_owner else self.holds[holder][i]

        as_holder = [[i for i in bucket if self.owners[i] == peer and meets(i, here)] for peer in peers]
        as_owner = [[i for i in bucket if self.owners[i] == here and meets(i, peer)] for peer in peers]
        stays, as_holder[here], as_owner[here] = as_holder[here], [], []
        of_holder = [sum(size(i, here) for i in indices) for indices in as_holder]
        of_owner = [sum(size(i, peer) for i in indices) for peer, indices in enumerate(as_owner)]
        to, leaves, from_, arrives = as_holder, of_holder, as_owner, of_owner
        if not to_owner:
            to, leaves, from_, arrives = as_owner, of_owner, as_holder, of_holder
        slots, begin = [], 0
        for peer, indices in enumerate(from_):
            for i in indices:
                end = begin + size(i, peer if to_owner else here)
                slots.append((i, peer, begin, end))
                begin = end
        return Leg(stays, to, leaves, arrives, slots)


def plan_low_rank(
    matrices: Sequence[Matrix], group: Any, bucket_bytes: float
) -> tuple[list[LowRankExchange], list[Matrix]]:
    """(exchanges of factors, matrices that are cheaper to move whole); a collective over ``group`` if any may travel.

    A momentum narrower than fp32 moves whole: parts that are added in another order round it to other last bits.
    """
    able = [m for m in matrices if m.rule.has_factors and local(m.param).dtype.itemsize >= 4]
    whole = [m for m in matrices if m not in able]
    if not able:
        return [], whole
    holdings, owners = ask_holdings(able, group)
    exchanges: dict[tuple[torch.dtype, int], LowRankExchange] = {}
    for i, (matrix, owner) in enumerate(zip(able, owners, strict=True)):
        held = [of_rank[i] for of_rank in holdings]
        if factor_bytes(matrix, held, owner) >= whole_bytes(matrix, held, owner):
            whole.append(matrix)
            continue
        rounds = int(matrix.group["power_iterations"])
        empty = LowRankExchange(group, [], [[] for _ in holdings], [], rounds)
        exchange = exchanges.setdefault((matrix.dtype, rounds), empty)
        exchange.matrices.append(matrix)
        exchange.owners.append(owner)
        for of_rank, one in zip(exchange.holdings, held, strict=True):
            of_rank.append(one)
    for exchange in exchanges.values():
        sizes = [rank_of(matrix) * sum(matrix.shape) * matrix.dtype.itemsize for matrix in exchange.matrices]
        exchange.buckets = in_buckets(exchange.matrices, sizes, bucket_bytes)
    order = {id(matrix): i for i, matrix in enumerate(matrices)}
    return list(exchanges.values()), sorted(whole, key=lambda matrix: order[id(matrix)])


def _union(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Ranges that overlap or touch, as one."""
    found: list[Range] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)


def _length(ranges: Sequence[Range]) -> int:
    return sum(high - low for low, high in ranges)


def inside(union: Sequence[Range], part: Range) -> slice:
    """Where a part, which lies in one range of the union, is when these lie one after the other."""
    position = 0
    for low, high in union:
        if low <= part[0] and part[1] <= high:
            return slice(position + part[0] - low, position + part[1] - low)
        position += high - low
    raise ValueError(f"{part} is in none of {union}")


def pick(whole: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    """The rows (0) or columns (1) of some ranges, beside each other."""
    return torch.cat([whole.narrow(dim, low, high - low) for low, high in ranges], dim=dim)
