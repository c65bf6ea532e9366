"""Streaming moments of rows that belong to groups: everything a rank needs, in one pass.

A row is one token's activation; its group is its bucket (or bucket x shard). Rows arrive sorted by group, are shifted
once by a fixed vector near their mean and enter one symmetric product per group. Everything kept is a plain sum over
rows, so that states of other chunks, processes or groups simply add (after moving to a common shift).

Why a fixed shift: raw fp32 second moments lose all digits when the mean is 1,000 times the spread; sums about the first
chunk's mean keep 6e-7 there, cost no merge per chunk, and stay additive.

Axes: N rows, D features, G groups, P packed entries of a symmetric D x D matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

# Upper strips of a symmetric matrix: 8 strips do 9/16 of the full product's work; more of them only get thinner.
NUM_STRIPS = 8


@dataclass
class Moments:
    """Sums over the rows of each group, about ``shift_D``; ``y = row - shift``.

    Attributes:
        shift_D: Common shift of all groups.
        count_G: Number of rows.
        sum_GD: ``sum y``.
        scatter_GP: ``sum y y^T``, upper strips packed into one vector (:func:`strip_views`).
        cubic_GD: ``sum |y|^2 y``.
        quartic_G: ``sum |y|^4``.
    """

    shift_D: Tensor
    count_G: Tensor
    sum_GD: Tensor
    scatter_GP: Tensor
    cubic_GD: Tensor
    quartic_G: Tensor

    @property
    def width(self) -> int:
        """Number of features D."""
        return self.shift_D.shape[-1]

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self.count_G.shape[0]

    def clone(self) -> Moments:
        """Deep copy."""
        return Moments(**{f.name: getattr(self, f.name).clone() for f in fields(self)})


def strip_bounds(width: int) -> list[tuple[int, int]]:
    """Row ranges of the upper strips; strip ``(a, b)`` holds columns ``a`` to ``width``."""
    height = -(-width // NUM_STRIPS)
    return [(start, min(start + height, width)) for start in range(0, width, height)]


def packed_size(width: int) -> int:
    """Entries P of a packed symmetric ``width x width`` matrix."""
    return sum((stop - start) * (width - start) for start, stop in strip_bounds(width))


def strip_views(packed_P: Tensor, width: int) -> list[Tensor]:
    """The strips of one packed matrix as views, each ``(rows, width - first row)``."""
    views, offset = [], 0
    for start, stop in strip_bounds(width):
        shape = (stop - start, width - start)
        views.append(packed_P[offset : offset + shape[0] * shape[1]].view(shape))
        offset += shape[0] * shape[1]
    return views


def unpack(packed_P: Tensor, width: int) -> Float[Tensor, "D D"]:
    """The full symmetric matrix of one packed vector."""
    matrix_DD = packed_P.new_empty(width, width)
    for (start, stop), strip in zip(strip_bounds(width), strip_views(packed_P, width), strict=True):
        matrix_DD[start:stop, start:] = strip
        matrix_DD[start:, start:stop] = strip.mT
    return matrix_DD


def empty_moments(
    num_groups: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Moments:
    """No rows yet. ``dtype`` is the type of the products; the O(D) sums are kept in fp64."""
    if width < 1 or num_groups < 1:
        raise ValueError(f"`width` and `num_groups` must be >= 1, got {width} and {num_groups}.")
    high = sum_dtype(device)
    return Moments(
        shift_D=torch.zeros(width, dtype=high, device=device),
        count_G=torch.zeros(num_groups, dtype=high, device=device),
        sum_GD=torch.zeros(num_groups, width, dtype=high, device=device),
        scatter_GP=torch.zeros(num_groups, packed_size(width), dtype=dtype, device=device),
        cubic_GD=torch.zeros(num_groups, width, dtype=high, device=device),
        quartic_G=torch.zeros(num_groups, dtype=high, device=device),
    )


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Type of the O(D) sums: fp64 where the device has it (Apple's GPU does not)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def update_(moments: Moments, rows_ND: Float[Tensor, "N D"], sizes: Sequence[int]) -> None:
    """Add rows sorted by group, in place: the first ``sizes[0]`` rows are group 0's, and so on.

    Args:
        moments: State to add to. The first rows it ever sees fix its shift.
        rows_ND: Rows of any float type; products run in the state's type, never in autocast's.
        sizes: Rows of each group; they sum to N.

    Raises:
        ValueError: If shapes or sizes do not fit the state.
    """
    if rows_ND.ndim != 2 or rows_ND.shape[1] != moments.width:
        raise ValueError(f"Rows of shape {tuple(rows_ND.shape)} do not fit a state of width {moments.width}.")
    if len(sizes) != moments.num_groups or sum(sizes) != rows_ND.shape[0]:
        raise ValueError(
            f"`sizes` must have {moments.num_groups} entries that sum to {rows_ND.shape[0]} rows, got {list(sizes)}."
        )
    if rows_ND.shape[0] == 0:
        return
    with torch.no_grad(), _full_precision(rows_ND.device):
        rows_ND = rows_ND.to(moments.scatter_GP.dtype)
        if not bool(moments.count_G.any()):
            # One bad row must spoil its own bucket, not every bucket through the shift.
            mean_D = rows_ND.mean(0, dtype=moments.shift_D.dtype)
            moments.shift_D.copy_(torch.where(mean_D.isfinite(), mean_D, 0.0))
        shifted_ND = rows_ND - moments.shift_D.to(rows_ND.dtype)
        start = 0
        for group, size in enumerate(sizes):
            if size:
                _add_group(moments, group, shifted_ND[start : start + size])
            start += size


def _add_group(moments: Moments, group: int, shifted_ND: Tensor) -> None:
    high = moments.sum_GD.dtype
    square_norm_N = shifted_ND.square().sum(1)
    moments.count_G[group] += shifted_ND.shape[0]
    moments.sum_GD[group] += shifted_ND.sum(0, dtype=high)
    moments.cubic_GD[group] += (square_norm_N @ shifted_ND).to(high)
    moments.quartic_G[group] += square_norm_N.to(high).square().sum()
    for (start, stop), strip in zip(
        strip_bounds(moments.width), strip_views(moments.scatter_GP[group], moments.width), strict=True
    ):
        strip.addmm_(shifted_ND[:, start:stop].mT, shifted_ND[:, start:])


def rebase_(moments: Moments, shift_D: Float[Tensor, " D"]) -> None:
    """Move the sums to another shift, in place; O(G D^2), exact up to rounding."""
    move_D = moments.shift_D - shift_D.to(moments.shift_D.dtype)  # y_new = y + move
    if not bool(move_D.any()):
        return
    with torch.no_grad(), _full_precision(shift_D.device):
        square_move = move_D @ move_D
        for group in range(moments.num_groups):
            count, sum_D = moments.count_G[group], moments.sum_GD[group].clone()
            strips = strip_views(moments.scatter_GP[group], moments.width)
            scattered_move_D = _packed_matvec(strips, move_D)
            trace = packed_trace(moments.scatter_GP[group], moments.width)
            along = move_D @ sum_D
            moments.quartic_G[group] += (
                4 * (move_D @ moments.cubic_GD[group])
                + 4 * (move_D @ scattered_move_D)
                + 2 * square_move * trace
                + 4 * square_move * along
                + count * square_move**2
            )
            moments.cubic_GD[group] += (
                2 * scattered_move_D + square_move * sum_D + (trace + 2 * along + count * square_move) * move_D
            )
            # sum y y^T + sum y m^T + m sum y^T + n m m^T as one rank-2 update: a m^T + m a^T
            half_D = sum_D + 0.5 * count * move_D
            for (start, stop), strip in zip(strip_bounds(moments.width), strips, strict=True):
                left = torch.stack((half_D[start:stop], move_D[start:stop]), 1)
                right = torch.stack((move_D[start:], half_D[start:]), 0)
                strip += (left @ right).to(strip.dtype)
            moments.sum_GD[group] += count * move_D
    moments.shift_D.copy_(shift_D)


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of both sets of rows together; commutative and associative up to rounding.

    Raises:
        ValueError: If widths or group counts differ.
    """
    if (first.width, first.num_groups) != (second.width, second.num_groups):
        raise ValueError(
            f"Cannot merge {first.num_groups} groups of width {first.width} with {second.num_groups} of {second.width}."
        )
    shift_D = _joint_mean(first, second)
    merged, other = first.clone(), second.clone()
    for state in (merged, other):
        rebase_(state, shift_D)
    for name in ("count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G"):
        getattr(merged, name).add_(getattr(other, name))
    return merged


def pool(moments: Moments) -> Moments:
    """One group holding the rows of all groups: a sum, since all share one shift."""
    return take_groups(moments, [list(range(moments.num_groups))])


def take_groups(moments: Moments, groups: Sequence[Sequence[int]]) -> Moments:
    """New groups, each the merge of the old ones listed."""
    return Moments(
        shift_D=moments.shift_D,
        **{
            name: torch.stack([getattr(moments, name)[list(members)].sum(0) for members in groups])
            for name in ("count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G")
        },
    )


def mean(moments: Moments) -> Float[Tensor, "G D"]:
    """Mean row of each group; zero rows give the shift."""
    return moments.shift_D + moments.sum_GD / moments.count_G.clamp(min=1).unsqueeze(1)


def covariance(moments: Moments, group: int = 0, dtype: torch.dtype | None = None) -> Float[Tensor, "D D"]:
    """Centred sample covariance ``(X - mu)^T (X - mu) / (N - 1)`` of one group (N < 2: divided by 1)."""
    dtype = dtype or moments.shift_D.dtype
    count = moments.count_G[group]
    sum_D = moments.sum_GD[group].to(dtype)
    scatter_DD = unpack(moments.scatter_GP[group], moments.width).to(dtype)
    scatter_DD.addr_(sum_D, sum_D, alpha=-1.0 / max(float(count), 1.0))
    return scatter_DD.div_(max(float(count) - 1.0, 1.0))


@dataclass(frozen=True)
class Invariants:
    """Scalars of one group's centred covariance that need no eigensolve.

    Attributes:
        num_rows: N.
        trace: ``tr C``.
        frobenius_sq: ``tr C^2``.
        quartic: ``sum |x - mean|^4``.
        rounding: What rounding of the products may have put into the trace: equal rows far from the shift have no
            variance but this.
    """

    num_rows: int
    trace: float
    frobenius_sq: float
    quartic: float
    rounding: float = 0.0


def invariants(moments: Moments, group: int = 0) -> Invariants:
    """Trace, squared Frobenius norm and fourth moment of one group about its own mean; O(D^2)."""
    own = take_groups(moments, [[group]])
    num_rows = int(own.count_G[0])
    scale = max(num_rows - 1, 1)
    rounding = torch.finfo(own.scatter_GP.dtype).eps * float(packed_trace(own.scatter_GP[0], own.width)) / scale
    if num_rows:
        rebase_(own, mean(own)[0])
    return Invariants(
        num_rows=num_rows,
        trace=float(packed_trace(own.scatter_GP[0], own.width)) / scale,
        frobenius_sq=float(packed_square_norm(own.scatter_GP[0], own.width)) / scale**2,
        quartic=float(own.quartic_G[0]),
        rounding=rounding,
    )


def packed_trace(packed_P: Tensor, width: int) -> Tensor:
    """Trace of a packed symmetric matrix, in fp64 where there is fp64."""
    high = sum_dtype(packed_P.device)
    return torch.stack([strip.diagonal().sum(dtype=high) for strip in strip_views(packed_P, width)]).sum()


def packed_square_norm(packed_P: Tensor, width: int) -> Tensor:
    """Squared Frobenius norm of a packed symmetric matrix: off-diagonal blocks count twice."""
    high = sum_dtype(packed_P.device)
    total = torch.zeros((), dtype=high, device=packed_P.device)
    for strip in strip_views(packed_P, width):
        block = strip.shape[0]
        total += strip[:, :block].to(high).square().sum() + 2 * strip[:, block:].to(high).square().sum()
    return total


def _packed_matvec(strips: Sequence[Tensor], vector_D: Tensor) -> Tensor:
    result_D = torch.zeros_like(vector_D)
    start = 0
    for strip in strips:
        stop = start + strip.shape[0]
        high = strip.to(vector_D.dtype)
        result_D[start:stop] += high @ vector_D[start:]
        result_D[stop:] += high[:, stop - start :].mT @ vector_D[start:stop]
        start = stop
    return result_D


def _joint_mean(first: Moments, second: Moments) -> Tensor:
    count = first.count_G.sum() + second.count_G.sum()
    total_D = sum(
        (state.sum_GD.sum(0) + state.count_G.sum() * state.shift_D for state in (first, second)),
        start=torch.zeros_like(first.shift_D),
    )
    return total_D / count.clamp(min=1)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """True fp32 products: outside autocast, and with TF32 / bf16 shortcuts off for their duration."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
