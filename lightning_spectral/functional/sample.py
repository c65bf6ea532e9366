"""What the ranks of a sample need: one symmetric matrix with the covariance's spectrum, and a few scalars.

With at least as many rows as features the matrix is the D x D covariance of streamed moments. With fewer it can be the
N x N matrix of the rows' inner products (Gram): the same eigenvalues but for zeros, at N/D of the product's and
(N/D)^3 of the eigensolve's work, and any selection of rows is a block of it. It needs the rows themselves, so it is for
small windows of one process; moments stream and add.

Axes: N rows, D features, M rows or features, whichever the matrix is of.
"""

from __future__ import annotations

import itertools
import math
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


@dataclass(frozen=True)
class AcrossGroups:
    """What groups of rows say about each other.

    Attributes:
        hard_rank: Participation ratio from products of rows of different groups only; NaN where it cannot be said.
        lean: Mean eigenvalue along the difference of two groups' means over that along a row: 1 where what rows of a
            sequence share is spread as the rows are, above it where it lies along the larger eigenvalues.
    """

    hard_rank: float = math.nan
    lean: float = math.nan


def across_groups(state: Moments | Gram, groups: Sequence[int]) -> AcrossGroups:
    """The hard rank from products of rows of DIFFERENT groups only: no row meets itself or its own sequence.

    With ``C_a`` the covariance of group a about its own mean, ``E <C_a, C_b>`` is ``tr C^2`` for a != b whenever groups
    are independent, whatever rows of one group share; likewise for the product of traces. What a group's mean takes
    out of ``C_a`` comes back from the differences of two means: where sequences share what lies in a few directions it
    is a tenth of them. With four groups or more nothing is left out, however unlike a normal distribution's the rows
    are. The plain ratio counts each row, and each sequence, against itself: on 1,350 rows of sequences that share a
    fifth of their variance the exponent of a rank that grows as D is 0.26 too low, this one's within 0.02.

    Args:
        state: Rows of any number of groups; groups must hold whole sequences.
        groups: Groups to use, at least two of them with rows.

    Returns:
        NaN with fewer than two groups, or where an estimate is not positive.
    """
    if len(groups) < 2:
        return AcrossGroups()
    parts = _of_scatters(state, groups) if isinstance(state, Moments) else _of_blocks(state, groups)
    return _across(*(part.to("cpu", torch.float64) for part in parts))


# of K groups: rows (K,); <S_a, S_b> with the scatter S about the own mean (K, K); tr S_a (K,); m_b^T S_a m_c (K, K, K),
# [a, b, c]; m_a^T m_b (K, K). Means m are about one point.
_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _across(count_K: Tensor, inner_KK: Tensor, trace_K: Tensor, along_KKK: Tensor, means_KK: Tensor) -> AcrossGroups:
    """``(tr C)^2 / tr C^2`` from sums that estimate both up to one factor, which is all that the ratio needs."""
    held = count_K > 0
    means_KK = means_KK[held][:, held]
    # d^T S_a d and |d|^2 for the difference d of the means of b and c: [a, b, c] and [b, c]
    along_KKK = _of_differences(along_KKK[held][:, held][:, :, held])
    sums = _Sums(
        count_K[held].tolist(),
        inner_KK[held][:, held].tolist(),
        trace_K[held].tolist(),
        along_KKK.tolist(),
        means_KK.tolist(),
        _of_differences(means_KK).tolist(),
    )
    square, trace = sums.of_four() if len(sums.count) > 3 else sums.of_two()
    if not (square > 0 and trace > 0):  # no variance but in one group
        return AcrossGroups()
    hard_rank = trace / square
    along_means, means_squared = sums.of_means()
    along_rows = sum(sums.traces) / sum(sums.count) / hard_rank  # tr C^2 / tr C
    lean = along_means / means_squared / along_rows if min(means_squared, along_rows) > 0 else math.nan
    return AcrossGroups(hard_rank, lean)


def _of_differences(forms_KK: Tensor) -> Tensor:
    """``(v_b - v_c)^T M (v_b - v_c)`` from all ``v_b^T M v_c``; a leading ``...`` is a batch."""
    own_K = forms_KK.diagonal(dim1=-2, dim2=-1)
    return own_K.unsqueeze(-1) + own_K.unsqueeze(-2) - 2 * forms_KK


@dataclass(frozen=True)
class _Sums:
    """Groups with rows, by number; ``along[a][b][c]`` and ``squared[b][c]`` are of the difference of two means."""

    count: list[float]
    inner: list[list[float]]
    traces: list[float]
    along: list[list[list[float]]]
    means: list[list[float]]
    squared: list[list[float]]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Two groups."""
        return list(itertools.combinations(range(len(self.count)), 2))

    def harmonic(self, a: int, b: int) -> float:
        """Rows of two groups by which the difference of their means counts."""
        return self.count[a] * self.count[b] / (self.count[a] + self.count[b])

    def of_two(self) -> tuple[float, float]:
        """Of ``tr C^2`` and ``(tr C)^2``, times ``n_a n_b``, from pairs of groups.

        ``E d_ab d_ab^T = V_a + V_b``, the covariances of the two means, of which ``V_a`` is missing from ``C_a``; two
        groups' V are taken as inverse to their rows. What is left out is ``<V_a, V_b>``, and what a group's mean has to
        do with its own scatter.
        """
        square = trace = 0.0
        for a, b in self.pairs:
            harmonic = self.harmonic(a, b)
            square += self.inner[a][b] + harmonic * (self.along[a][a][b] + self.along[b][a][b])
            trace += self.traces[a] * self.traces[b]
            trace += harmonic * self.squared[a][b] * (self.traces[a] + self.traces[b])
        return square, trace

    def of_four(self) -> tuple[float, float]:
        """The same up to another factor, without bias, from pairs of pairs that have no group in common.

        The difference of two rows of two groups has the covariance ``2 C``, whatever rows of a group share. Over all
        rows of a and b its square is ``S_a / n_a + S_b / n_b + d_ab d_ab^T``, which nothing of c and d depends on.
        """
        square = trace = 0.0
        for (a, b), (c, d) in itertools.combinations(self.pairs, 2):
            if {a, b} & {c, d}:
                continue
            weight = self.harmonic(a, b) * self.harmonic(c, d)
            own = sum(self.inner[i][j] / (self.count[i] * self.count[j]) for i in (a, b) for j in (c, d))
            own += sum(self.along[i][c][d] / self.count[i] for i in (a, b))
            own += sum(self.along[j][a][b] / self.count[j] for j in (c, d))
            square += weight * (own + self._product(a, b, c, d) ** 2)
            trace += weight * self._length(a, b) * self._length(c, d)
        return square, trace

    def of_means(self) -> tuple[float, float]:
        """``d_ab^T C d_ab`` and ``|d_ab|^2``, both weighted and added over all pairs."""
        weights = {pair: self.harmonic(*pair) for pair in self.pairs}
        along = sum(
            weight * (self.along[a][a][b] + self.along[b][a][b]) / (self.count[a] + self.count[b])
            for (a, b), weight in weights.items()
        )
        return along, sum(weight * self.squared[a][b] for (a, b), weight in weights.items())

    def _product(self, a: int, b: int, c: int, d: int) -> float:
        """``d_ab^T d_cd``."""
        return self.means[a][c] - self.means[a][d] - self.means[b][c] + self.means[b][d]

    def _length(self, a: int, b: int) -> float:
        """Mean squared length of the differences of rows of a and b."""
        return self.traces[a] / self.count[a] + self.traces[b] / self.count[b] + self.squared[a][b]


def _of_scatters(moments: Moments, groups: Sequence[int]) -> _Parts:
    index = list(groups)
    count_K = moments.count_G[index]
    mean_KD = moments.sum_GD[index] / count_K.clamp(min=1)[:, None]  # about the shift
    about_KD = mean_KD - mean_KD[count_K > 0].mean(0)
    scatters, along = [], []
    for place, group in enumerate(index):
        scatter_DD = unpack(moments.scatter_GP[group], moments.width, mean_KD.dtype)
        scatter_DD.addr_(mean_KD[place], moments.sum_GD[group], alpha=-1.0)
        along.append(about_KD @ scatter_DD @ about_KD.mT)
        scatters.append(scatter_DD)
    inner_KK = torch.stack([torch.stack([(one * two).sum() for two in scatters]) for one in scatters])
    trace_K = torch.stack([own.diagonal().sum() for own in scatters])
    return count_K, inner_KK, trace_K, torch.stack(along), about_KD @ about_KD.mT


def _of_blocks(state: Gram, groups: Sequence[int]) -> _Parts:
    sizes = [state.size(group) for group in groups]
    inner_NN = state.among(groups)
    count_K = inner_NN.new_tensor(sizes)
    member_NK = inner_NN.new_zeros(len(inner_NN), len(sizes))
    for group, own_NK in enumerate(member_NK.split(sizes)):
        own_NK[:, group] = 1
    mean_NK = inner_NN @ member_NK / count_K.clamp(min=1)  # x_i^T m_b
    means_KK = member_NK.mT @ mean_NK / count_K.clamp(min=1)[:, None]
    # |H_a K_ab H_b|^2, with H_a K = K less the mean of group a's rows
    across_KK = (member_NK.mT @ mean_NK.square()) * count_K
    inner_KK = member_NK.mT @ (inner_NN.square() @ member_NK)
    inner_KK += torch.outer(count_K, count_K) * means_KK.square() - across_KK - across_KK.mT
    trace_K = inner_NN.diagonal() @ member_NK - count_K * means_KK.diagonal()
    # (x_i - m_a)^T (m_b - mean of the m)
    apart_NK = mean_NK - member_NK @ means_KK
    apart_NK = apart_NK - apart_NK[:, count_K > 0].mean(1, keepdim=True)
    along_KKK = torch.stack([own_NK.mT @ own_NK for own_NK in apart_NK.split(sizes)])
    return count_K, inner_KK, trace_K, along_KKK, means_KK


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
