"""Streaming moments of rows that belong to groups: everything a rank needs, in one pass.

A row is one token's activation; its group is its bucket (or bucket x shard). Rows arrive sorted by group, are shifted
once by a fixed vector near their mean and enter one symmetric product per group. Everything kept is a plain sum over
rows, so that states of other chunks, processes or groups simply add (after moving to a common shift).

Why a fixed shift: raw fp32 second moments lose all digits when the mean is 1,000 times the spread; sums about the first
chunk's mean keep 6e-7 there, cost no merge per chunk, and stay additive.

Axes: N rows, D features, G groups, P packed entries of a symmetric D x D matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_spectral.functional.packed import (
    packed_matvec,
    packed_size,
    packed_trace,
    strip_bounds,
    strip_views,
    sum_dtype,
    unpack,
)
from lightning_spectral.functional.products import Product, full_precision, row_buffer, strips

# Rows are shifted through a workspace of this size: large enough for the product, small enough that the allocator gives
# the same memory again (above 32 MiB every pass would fault in fresh pages, which costs as much as the product).
_CHUNK_ROWS = 1_024
_CHUNK_ENTRIES = 1 << 22
_BLOCK_ENTRIES = 1 << 17  # 512 KiB: a core's own cache
_SHIFT_ROWS = 256
_SUMS = ("count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G")


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

    def to(self, device: torch.device | str) -> Moments:
        """The same sums on a device; themselves where they are there."""
        return Moments(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def empty_moments(
    num_groups: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Moments:
    """No rows yet.

    Args:
        num_groups: Number of groups G.
        width: Number of features D.
        dtype: Type of the products; the O(D) sums are kept in fp64.
        device: Where the sums live.

    Raises:
        ValueError: If ``width`` or ``num_groups`` is below 1.
    """
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


def update_(
    moments: Moments,
    rows_ND: Float[Tensor, "N D"],
    sizes: Sequence[int],
    order_M: Int[Tensor, " M"] | None = None,
    product: Product = strips,
    shift_D: Float[Tensor, " D"] | None = None,
) -> None:
    """Add rows by group, in place: the first ``sizes[0]`` rows are group 0's, and so on.

    Args:
        moments: State to add to. The first rows it ever sees fix its shift.
        rows_ND: Rows of any float type; products run in the state's type, never in autocast's.
        sizes: Rows of each group.
        order_M: Indices of the rows to add, sorted by group; default all rows as they stand. Sorting costs no copy of
            the rows this way.
        product: How to compute ``sum y y^T``; see :mod:`~lightning_spectral.functional.products`.
        shift_D: Shift of a state without rows; default the mean of some of these.

    Raises:
        ValueError: If shapes or sizes do not fit the state.
    """
    if rows_ND.ndim != 2 or rows_ND.shape[1] != moments.width:
        is_deep = rows_ND.ndim > 2 and rows_ND.shape[-1] == moments.width
        remedy = ": flatten what is before the features, `rows.flatten(0, -2)`." if is_deep else "."
        raise ValueError(f"Rows of shape {tuple(rows_ND.shape)} do not fit a state of width {moments.width}{remedy}")
    num_tokens = rows_ND.shape[0] if order_M is None else order_M.shape[0]
    if len(sizes) != moments.num_groups or sum(sizes) != num_tokens:
        raise ValueError(
            f"`sizes` must have {moments.num_groups} entries that sum to {num_tokens} rows, got {list(sizes)}."
        )
    if num_tokens == 0:
        return
    with torch.no_grad(), full_precision(rows_ND.device):
        if not bool(moments.count_G.any()):
            moments.shift_D.copy_(first_shift(rows_ND, order_M) if shift_D is None else shift_D)
        chunk = max(_CHUNK_ROWS, _CHUNK_ENTRIES // moments.width)
        low_D = moments.shift_D.to(moments.scatter_GP.dtype)
        workspace = row_buffer(low_D, min(chunk, max(sizes)), moments.width)
        end = 0
        for group, size in enumerate(sizes):
            start, end = end, end + size
            for first in range(start, end, chunk):
                part = slice(first, min(first + chunk, end))
                shifted_ND = workspace[: part.stop - part.start]
                _add_rows(moments, group, shifted_ND, rows_ND, part, order_M, low_D)
                product(strip_views(moments.scatter_GP[group], moments.width), shifted_ND)


def _add_rows(
    moments: Moments,
    group: int,
    shifted_ND: Tensor,
    rows_ND: Tensor,
    part: slice,
    order_M: Tensor | None,
    shift_D: Tensor,
) -> None:
    """Shift the rows of ``part`` into the workspace and add up all but their product."""
    weights_2N = shifted_ND.new_ones(2, len(shifted_ND))  # of the two weighted sums over rows
    sums_2D = shifted_ND.new_zeros(2, moments.width)
    # a few rows at a time, so that every step after the first finds them in the processor's cache
    block = len(shifted_ND) if rows_ND.device.type != "cpu" else max(_BLOCK_ENTRIES // moments.width, 16)
    for first in range(0, len(shifted_ND), block):
        y_ND, weights_2B = shifted_ND[first : first + block], weights_2N[:, first : first + block]
        begin = part.start + first
        if order_M is None:
            torch.sub(rows_ND[begin : begin + len(y_ND)], shift_D, out=y_ND)
        else:
            own_N = order_M[begin : begin + len(y_ND)]
            if rows_ND.dtype == y_ND.dtype:
                torch.index_select(rows_ND, 0, own_N, out=y_ND).sub_(shift_D)
            else:
                torch.sub(rows_ND.index_select(0, own_N), shift_D, out=y_ND)
        torch.linalg.vector_norm(y_ND, dim=1, out=weights_2B[1]).square_()
        sums_2D.addmm_(weights_2B, y_ND)
    high = moments.sum_GD.dtype
    sums_2D = sums_2D.to(high)  # across chunks they add in fp64
    moments.count_G[group] += len(shifted_ND)
    moments.sum_GD[group] += sums_2D[0]
    moments.cubic_GD[group] += sums_2D[1]
    moments.quartic_G[group] += weights_2N[1].to(high).square().sum()


def first_shift(rows_ND: Tensor, order_M: Tensor | None) -> Tensor:
    """A vector near the mean: the mean of some of the rows, taken evenly."""
    num_tokens = rows_ND.shape[0] if order_M is None else order_M.shape[0]
    step = max(num_tokens // _SHIFT_ROWS, 1)
    some_ND = rows_ND[::step] if order_M is None else rows_ND.index_select(0, order_M[::step])
    mean_D = some_ND.to(sum_dtype(rows_ND.device)).mean(0)
    # One bad row must spoil its own bucket, not every bucket through the shift.
    return torch.where(mean_D.isfinite(), mean_D, 0.0)


def rebase_(moments: Moments, shift_D: Float[Tensor, " D"]) -> None:
    """Move the sums to another shift, in place; O(G D^2), exact up to rounding."""
    move_D = moments.shift_D - shift_D.to(moments.shift_D.dtype)  # y_new = y + move
    if not bool(move_D.any()):
        return
    with torch.no_grad(), full_precision(shift_D.device):
        square_move = move_D @ move_D
        for group in range(moments.num_groups):
            count, sum_D = moments.count_G[group], moments.sum_GD[group].clone()
            strips = strip_views(moments.scatter_GP[group], moments.width)
            scattered_move_D = packed_matvec(strips, move_D)
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


def add_(moments: Moments, other: Moments) -> Moments:
    """Add sums about the same shift, in place.

    Raises:
        ValueError: If the shifts differ (:func:`merge` moves them).
    """
    if not torch.equal(moments.shift_D, other.shift_D):
        raise ValueError("sums about different shifts do not add: `merge` them.")
    for name in _SUMS:
        getattr(moments, name).add_(getattr(other, name))
    return moments


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
    for name in _SUMS:
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
            name: torch.stack(merged) if len(merged) > 1 else merged[0].unsqueeze(0)
            for name in _SUMS
            if (merged := [_sum_of(getattr(moments, name), members) for members in groups])
        },
    )


def _sum_of(values_G: Tensor, members: Sequence[int]) -> Tensor:
    """Sum over some groups, always a copy; neighbours are not gathered first."""
    if len(members) == 1:
        return values_G[members[0]].clone()
    if len(members) > 1 and list(members) == list(range(members[0], members[-1] + 1)):
        return values_G[members[0] : members[-1] + 1].sum(0)
    return values_G[list(members)].sum(0)


def mean(moments: Moments) -> Float[Tensor, "G D"]:
    """Mean row of each group; zero rows give the shift."""
    return moments.shift_D + moments.sum_GD / moments.count_G.clamp(min=1).unsqueeze(1)


def covariance(moments: Moments, group: int = 0) -> Float[Tensor, "D D"]:
    """Centred sample covariance ``(X - mu)^T (X - mu) / (N - 1)`` of one group (N < 2: divided by 1)."""
    count, sum_D = float(moments.count_G[group]), moments.sum_GD[group]
    scatter_DD = unpack(moments.scatter_GP[group], moments.width, sum_D.dtype)
    scatter_DD.addr_(sum_D, sum_D, alpha=-1.0 / max(count, 1.0))
    return scatter_DD.div_(max(count - 1.0, 1.0))


def _joint_mean(first: Moments, second: Moments) -> Tensor:
    count = first.count_G.sum() + second.count_G.sum()
    total_D = sum(
        (state.sum_GD.sum(0) + state.count_G.sum() * state.shift_D for state in (first, second)),
        start=torch.zeros_like(first.shift_D),
    )
    return total_D / count.clamp(min=1)
