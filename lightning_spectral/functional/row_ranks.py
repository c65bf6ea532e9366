"""Ranks from a few rows instead of a D x D matrix: what all rows would have shown, and how well that is known.

The hard rank needs ``tr C^2``, of which products of different rows are an unbiased estimate whatever D is; what each
row adds by meeting itself is known for any number of rows. The soft rank comes from
:mod:`~lightning_spectral.functional.few_rows`. Both errors are from parts of the sample: halves for the soft, quarters
for the hard rank, each of whole sequences.

Axes: N rows, D features, M rows or features, whichever are fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_spectral.functional.few_rows import RowWeights, entropy_of_rows, population
from lightning_spectral.functional.products import full_precision
from lightning_spectral.functional.rank import possible_rank

MIN_ROWS = 8  # fewer say nothing about halves
_FP64_UP_TO = 512  # rows: an fp64 solve of so few takes milliseconds
_BLOCK = 1_024
_FLOOR = 5e-3  # of the stated error of the soft rank: what the fit on a grid is good for
_NOTHING = 1e-9  # share of the variance of all rows: a half with less has none of its own
_TRUST = 0.1  # share of what the row weights change that counts as error


@dataclass(frozen=True)
class RowRanks:
    """Ranks of the rows that a sample was drawn from.

    Attributes:
        num_rows: Rows of the sample, N.
        trace: ``tr C``.
        rounding: What rounding of the rows may have put into the trace.
        hard_rank: Participation ratio that all rows show; NaN where it is not known.
        hard_rank_debiased: That of endlessly many.
        hard_rank_across: From products of rows of different sequences only; NaN with one sequence.
        hard_rank_error: Relative standard error of the three, from quarters.
        soft_rank: Effective rank that all rows show; NaN where it is not known.
        soft_rank_debiased: That of endlessly many rows.
        soft_rank_error: Relative error of the two, from halves.
    """

    num_rows: int
    trace: float
    rounding: float = 0.0
    hard_rank: float = math.nan
    hard_rank_debiased: float = math.nan
    hard_rank_across: float = math.nan
    hard_rank_error: float = math.nan
    soft_rank: float = math.nan
    soft_rank_debiased: float = math.nan
    soft_rank_error: float = math.nan


@dataclass(frozen=True)
class _Pairs:
    """Sums over pairs of different rows."""

    trace_sq: float  # unbiased estimate of (tr C)^2
    frobenius_sq: float  # of tr C^2
    across: float  # of tr C^2, from different sequences
    quartic: float  # mean |x - mean|^4

    @property
    def hard_rank(self) -> float:
        return self.trace_sq / self.frobenius_sq if self.frobenius_sq > 0 else math.nan


def rank_rows(rows_ND: Float[Tensor, "N D"], sequences_N: Int[Tensor, " N"], num_seen: int) -> RowRanks:
    """Ranks that ``num_seen`` rows show, from those of them that were kept.

    Args:
        rows_ND: Drawn evenly from all; any float type.
        sequences_N: Sequence of each row.
        num_seen: Rows that they were drawn from, at least N.
    """
    with torch.no_grad(), full_precision(rows_ND.device):
        num_rows = len(rows_ND)
        if num_rows == 0:
            return RowRanks(0, 0.0)
        centred_ND = rows_ND.float()
        size = float(_norms(centred_ND).sum())
        centred_ND = centred_ND - centred_ND.mean(0)
        norms_N = _norms(centred_ND)
        trace = float(norms_N.sum()) / max(num_rows - 1, 1)
        rounding = torch.finfo(rows_ND.dtype).eps ** 2 * size / max(num_rows - 1, 1)
        if num_rows < MIN_ROWS or not math.isfinite(trace) or trace <= 10 * rounding:
            return RowRanks(num_rows, trace, rounding)
        pairs = _pairs(centred_ND, norms_N, sequences_N)
        frobenius_sq = pairs.frobenius_sq + (pairs.quartic - pairs.frobenius_sq) / max(num_seen, num_rows)
        across = pairs.trace_sq / pairs.across if pairs.across > 0 else math.nan
        width = rows_ND.shape[1]
        return RowRanks(
            num_rows,
            trace,
            rounding,
            hard_rank=possible_rank(pairs.trace_sq / frobenius_sq if frobenius_sq > 0 else math.nan, width),
            hard_rank_debiased=possible_rank(pairs.hard_rank, width),
            hard_rank_across=possible_rank(across, width),
            hard_rank_error=_hard_error(centred_ND, sequences_N),
            **_soft(centred_ND, norms_N, sequences_N, pairs.hard_rank, max(num_seen, num_rows)),
        )


def _soft(
    centred_ND: Tensor, norms_N: Tensor, sequences_N: Tensor, hard_rank: float, num_seen: int
) -> dict[str, float]:
    if not hard_rank > 0:
        return {}
    eigs_M = _eigenvalues(centred_ND)
    num_rows, width = centred_ND.shape
    behind = population(eigs_M, num_rows, width, RowWeights.from_norms(norms_N, hard_rank))
    entropy = entropy_of_rows(behind, num_seen)
    one = torch.ones(1, dtype=torch.float64)
    alike = population(eigs_M, num_rows, width, RowWeights.of(one, one))
    halves = []
    for half in (0, 1):
        part_ND = centred_ND[_parts(sequences_N, 2) == half]
        part_ND = part_ND - part_ND.mean(0)
        own_N = _norms(part_ND)
        if len(part_ND) >= MIN_ROWS and float(own_N.mean()) > _NOTHING * float(norms_N.mean()):
            rows = RowWeights.from_norms(own_N, hard_rank)
            halves.append(entropy_of_rows(population(_eigenvalues(part_ND), len(part_ND), width, rows), num_seen))
    error = math.nan
    if len(halves) == 2:
        apart, off = abs(halves[0] - halves[1]) / 2, entropy - sum(halves) / 2
        error = math.hypot(apart, off, _TRUST * (entropy_of_rows(alike, num_seen) - entropy), _FLOOR)
    return {
        "soft_rank": math.exp(entropy),
        "soft_rank_debiased": math.exp(behind.entropy),
        "soft_rank_error": error,
    }


def _norms(rows_ND: Tensor) -> Tensor:
    """Squared norm of each row, without a copy of the rows."""
    return torch.linalg.vector_norm(rows_ND, dim=1).double().square()


def _eigenvalues(centred_ND: Tensor) -> Tensor:
    """Eigenvalues of the smaller of the two products, those of rounding included."""
    few = len(centred_ND) <= centred_ND.shape[1]
    matrix_MM = centred_ND @ centred_ND.mT if few else centred_ND.mT @ centred_ND
    matrix_MM = matrix_MM.double() if len(matrix_MM) <= _FP64_UP_TO else matrix_MM
    return torch.linalg.eigvalsh(matrix_MM).clamp(min=0)


def _pairs(centred_ND: Tensor, norms_N: Tensor, sequences_N: Tensor) -> _Pairs:
    """Unbiased for rows about an unknown mean (Himeno and Yamada 2014), as ``rank.debiased_hard_rank``."""
    n = len(centred_ND)
    square = own_square = own_pairs = 0.0
    for first in range(0, n, _BLOCK):
        block_BN = (centred_ND[first : first + _BLOCK] @ centred_ND.mT).square_()
        same_BN = sequences_N[first : first + _BLOCK, None] == sequences_N
        square += float(block_BN.sum(dtype=torch.float64))
        own_square += float((block_BN * same_BN).sum(dtype=torch.float64))
        own_pairs += float(same_BN.sum())
    trace, quartic = float(norms_N.sum()) / (n - 1), float(norms_N.square().sum())
    frobenius_sq, kurtosis = square / (n - 1) ** 2, n * quartic / (n - 1)
    scale = (n - 1) / (n * (n - 2) * (n - 3))
    pairs = n * n - own_pairs
    # the common mean makes rows of different sequences alike by -1 / n of a row's own
    across = (square - own_square) / pairs if pairs else math.nan
    return _Pairs(
        trace_sq=scale * (2 * frobenius_sq + (n * n - 3 * n + 1) * trace**2 - kurtosis),
        frobenius_sq=scale * ((n - 1) * (n - 2) * frobenius_sq + trace**2 - kurtosis),
        across=across,
        quartic=quartic / n,
    )


def _hard_error(centred_ND: Tensor, sequences_N: Tensor) -> float:
    parts_N, logs = _parts(sequences_N, 4), []
    for part in range(4):
        part_ND = centred_ND[parts_N == part]
        if len(part_ND) >= MIN_ROWS:
            part_ND = part_ND - part_ND.mean(0)
            value = _pairs(part_ND, _norms(part_ND), sequences_N[parts_N == part]).hard_rank
            logs.append(math.log(value) if value > 0 else math.nan)
    if len(logs) < 4 or any(math.isnan(value) for value in logs):
        return math.nan
    return float(torch.tensor(logs).double().std()) / 2


def _parts(sequences_N: Tensor, num: int) -> Tensor:
    """A part for each row: whole sequences, as far as there are enough of them."""
    _, order_N = torch.unique(sequences_N, return_inverse=True)
    if int(order_N.max()) + 1 < 2 * num:
        order_N = torch.arange(len(sequences_N), device=sequences_N.device)
    return order_N % num
