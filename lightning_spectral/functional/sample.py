"""What the ranks of a sample need: one symmetric matrix with the covariance's spectrum, and a few scalars.

With at least as many rows as features the matrix is the D x D covariance of streamed moments. With fewer it can be the
N x N matrix of the rows' inner products (Gram): the same eigenvalues but for zeros, at N/D of the product's and
(N/D)^3 of the eigensolve's work, and any selection of rows is a block of it. It needs the rows themselves, so it is for
small windows of one process; moments stream and add.

Axes: N rows, D features, M rows or features, whichever the matrix is of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_spectral.functional.covariance import Moments, covariance, first_shift, take_groups
from lightning_spectral.functional.packed import packed_size, strip_views, sum_dtype, unpack
from lightning_spectral.functional.products import Product, full_precision, strips


@dataclass(frozen=True)
class Sample:
    """One group of rows.

    Attributes:
        matrix_MM: Symmetric; its eigenvalues are those of the centred covariance, but for zeros.
        width: Features D.
        num_tokens: N.
        trace: ``tr C``.
        frobenius_sq: ``tr C^2``.
        quartic: ``sum |x - mean|^4``.
        rounding: What rounding of the products may have put into the trace: equal rows far from the shift have no
            variance but this.
        product_dtype: Type of the products behind the matrix.
    """

    matrix_MM: Tensor
    width: int
    num_tokens: int
    trace: float
    frobenius_sq: float
    quartic: float
    rounding: float
    product_dtype: torch.dtype


Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gram:
    """Inner products of all rows of a window about one shift.

    Attributes:
        inner_NN: ``y_i y_j^T``, fp64.
        spans_G: Which of the rows are each group's: from, up to.
        width: Features D.
        product_dtype: Type in which they were multiplied.
    """

    inner_NN: Tensor
    spans_G: tuple[Spans, ...]
    width: int
    product_dtype: torch.dtype

    def among(self, groups: Sequence[int], *, any_order: bool = False) -> Tensor:
        """Inner products of the rows of some groups with each other, ``(N, N)``; a view where they lie together."""
        found = [span for group in groups for span in self.spans_G[group]]
        spans = _joined(sorted(found) if any_order else found)
        if len(spans) == 1:
            ((start, stop),) = spans
            return self.inner_NN[start:stop, start:stop]
        strips = [torch.cat([self.inner_NN[a:b, c:d] for c, d in spans], 1) for a, b in spans]
        return torch.cat(strips) if strips else self.inner_NN.new_empty(0, 0)

    def size(self, group: int) -> int:
        """Rows of a group."""
        return sum(stop - start for start, stop in self.spans_G[group])

    def take_groups(self, groups: Sequence[Sequence[int]]) -> Gram:
        """New groups, each the merge of the old ones listed."""
        spans_G = tuple(tuple(span for group in members for span in self.spans_G[group]) for members in groups)
        return Gram(self.inner_NN, spans_G, self.width, self.product_dtype)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without empty ones; neighbours are one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif stop > start:
            joined.append((start, stop))
    return joined


def gram(
    rows_ND: Float[Tensor, "N D"],
    sizes: Sequence[int],
    order_M: Int[Tensor, " M"] | None = None,
    product: Product = strips,
) -> Gram:
    """Inner products of rows by group; arguments as in :func:`~lightning_spectral.functional.covariance.update_`."""
    dtype = torch.float64 if rows_ND.dtype == torch.float64 else torch.float32
    with torch.no_grad(), full_precision(rows_ND.device):
        shift_D = first_shift(rows_ND, order_M).to(dtype)
        sorted_ND = rows_ND if order_M is None else rows_ND.index_select(0, order_M)
        shifted_ND = sorted_ND.to(dtype) - shift_D
        num_rows = len(shifted_ND)
        packed_P = shifted_ND.new_zeros(packed_size(num_rows))
        product(strip_views(packed_P, num_rows), shifted_ND.mT)
        inner_NN = unpack(packed_P, num_rows, sum_dtype(rows_ND.device))
    ends = list(itertools.accumulate(sizes))
    spans_G = tuple(((end - size, end),) for size, end in zip(sizes, ends, strict=True))
    return Gram(inner_NN, spans_G, rows_ND.shape[1], dtype)


def sample(state: Moments | Gram, groups: Sequence[int] = (0,)) -> Sample:
    """The rows of some groups together, about their own mean."""
    return _of_moments(state, groups) if isinstance(state, Moments) else _of_gram(state, groups)


def num_rows(state: Moments | Gram, group: int) -> int:
    """Rows of a group."""
    return int(state.count_G[group]) if isinstance(state, Moments) else state.size(group)


def _of_moments(moments: Moments, groups: Sequence[int]) -> Sample:
    own = moments if len(groups) == 1 else take_groups(moments, [groups])
    group = groups[0] if len(groups) == 1 else 0
    covariance_DD = covariance(own, group)
    count = own.count_G[group]
    mean_D = own.sum_GD[group] / count.clamp(min=1)  # about the shift
    mean_sq = mean_D @ mean_D
    trace, scale = covariance_DD.diagonal().sum(), (count - 1).clamp(min=1)
    # sum |y - mean|^4 from the sums about the shift and C; the rows' sum is `count * mean`
    quartic = (
        own.quartic_G[group]
        - 4 * (mean_D @ own.cubic_GD[group])
        + scale * (4 * (mean_D @ (covariance_DD @ mean_D)) + 2 * mean_sq * trace)
        + 3 * count * mean_sq.square()
    )
    dtype = own.scatter_GP.dtype
    rounding = torch.finfo(dtype).eps * (trace + count * mean_sq / scale)
    return _with_scalars(covariance_DD, own.width, dtype, count, trace, quartic, rounding)


def _of_gram(state: Gram, groups: Sequence[int]) -> Sample:
    inner_NN = state.among(groups, any_order=True)
    rows = len(inner_NN)
    count, scale = inner_NN.new_tensor(rows), max(rows - 1, 1)
    rounding = torch.finfo(state.product_dtype).eps * inner_NN.diagonal().sum() / scale
    mean_N = inner_NN.sum(0) / max(rows, 1)
    # (x_i - m)^T (x_j - m) in one pass: less the means of row and column, plus that of all
    ones_N = torch.ones_like(mean_N)
    left_N2 = torch.stack([ones_N, mean_N - mean_N.sum() / max(rows, 1)], 1)
    matrix_NN = torch.addmm(inner_NN, left_N2, torch.stack([mean_N, ones_N]), beta=1 / scale, alpha=-1 / scale)
    variance_N = matrix_NN.diagonal()
    trace, quartic = variance_N.sum(), variance_N.square().sum() * scale**2
    return _with_scalars(matrix_NN, state.width, state.product_dtype, count, trace, quartic, rounding)


def _with_scalars(
    matrix_MM: Tensor,
    width: int,
    dtype: torch.dtype,
    count: Tensor,
    trace: Tensor,
    quartic: Tensor,
    rounding: Tensor,
) -> Sample:
    flat = matrix_MM.flatten()
    # one look at the device for all of them
    numbers = torch.stack([count, trace, flat @ flat, quartic, rounding]).tolist()
    num_tokens, trace_value, frobenius_sq, quartic_value, rounding_value = numbers
    return Sample(matrix_MM, width, int(num_tokens), trace_value, frobenius_sq, quartic_value, rounding_value, dtype)
