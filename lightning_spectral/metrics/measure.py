"""From moments to the ranks of one group, with what the sample says about them.

Uncertainty comes from shards: rows are dealt to shards by sequence, so that leaving one shard out leaves out whole
sequences (tokens of one sequence are correlated; an interval from tokens would be far too narrow).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy import stats
from torch import Tensor

from lightning_spectral.functional import approximate
from lightning_spectral.functional import rank as ranks
from lightning_spectral.functional.covariance import Invariants, Moments, covariance, invariants, take_groups

UNMEASURABLE = ("empty", "nonfinite", "degenerate")


@dataclass(frozen=True)
class RankMeasurement:
    """Ranks of one covariance; ``None`` where the status does not allow a number. Fields: ``SpectralRecord``."""

    num_rows: int
    width: int
    status: str
    soft_rank: float | None = None
    hard_rank: float | None = None
    hard_rank_unbiased: float | None = None
    soft_rank_unbiased: float | None = None
    spectral_entropy: float | None = None
    eee: float | None = None
    top_share: float | None = None
    trace: float | None = None
    renyi: dict[str, float] = field(default_factory=dict)
    hard_rank_ci: tuple[float, float] | None = None
    soft_rank_ci: tuple[float, float] | None = None
    eigenvalues: Tensor | None = None
    soft_method: str = "exact"


def measure(
    moments: Moments,
    groups: Sequence[int] = (0,),
    *,
    renyi_orders: Sequence[float] = ranks.DEFAULT_RENYI_ORDERS,
    absolute_epsilon: float = 0.0,
    soft: str = "exact",
) -> RankMeasurement:
    """Ranks of the rows of ``groups`` together; the groups are the shards that the intervals come from.

    Args:
        moments: State with any number of groups.
        groups: Indices of the shards to merge.
        renyi_orders: Orders of :attr:`RankMeasurement.renyi`.
        absolute_epsilon: The paper's compatibility option of ``hard_rank``.
        soft: ``exact``; or ``approx``, where the state is wide enough for that to be faster: then everything that needs
            the whole spectrum stays ``None``.
    """
    own = take_groups(moments, [list(groups)])
    numbers = invariants(own)
    status = _status(numbers, moments.width)
    if status in UNMEASURABLE:
        return RankMeasurement(numbers.num_rows, moments.width, status)
    exact = soft == "exact" or moments.width < approximate.MIN_WIDTH
    eigs = _spectrum(own) if exact else None
    values = {} if eigs is None else {name: float(metric(eigs)) for name, metric in ranks.RANK_METRICS.items()}
    soft_rank = values["soft_rank"] if exact else _approximate_soft_rank(own, numbers)
    hard = _hard_rank(numbers, absolute_epsilon)
    unbiased = ranks.unbiased_hard_rank(numbers.num_rows, numbers.trace, numbers.frobenius_sq, numbers.quartic)
    several = groups if len(groups) > 1 else ()
    leave_one_out = [take_groups(moments, [[g for g in groups if g != left]]) for left in several]
    parts = [invariants(part) for part in leave_one_out]
    usable = bool(parts) and not any(_status(part, moments.width) in UNMEASURABLE for part in parts)
    hard_parts = [_hard_rank(part, absolute_epsilon) for part in parts] if usable else []
    soft_parts = [
        float(ranks.soft_rank(_spectrum(part))) if exact else _approximate_soft_rank(part, part_numbers)
        for part, part_numbers in zip(leave_one_out, parts, strict=True)
        if usable
    ]
    return RankMeasurement(
        num_rows=numbers.num_rows,
        width=moments.width,
        status=status,
        soft_rank=soft_rank,
        hard_rank=hard,
        hard_rank_unbiased=None if math.isnan(unbiased) else unbiased,
        soft_rank_unbiased=_jackknife_estimate(soft_rank, soft_parts),
        spectral_entropy=values.get("spectral_entropy", math.log(soft_rank)),
        eee=values.get("eee"),
        top_share=values.get("top_share"),
        trace=numbers.trace,
        renyi={} if eigs is None else {f"{order:g}": float(ranks.renyi_rank(eigs, order)) for order in renyi_orders},
        hard_rank_ci=_jackknife_interval(hard, hard_parts),
        soft_rank_ci=_jackknife_interval(soft_rank, soft_parts),
        eigenvalues=eigs,
        soft_method="exact" if exact else "approx",
    )


def _status(numbers: Invariants, width: int) -> str:
    return ranks.sampling_status(numbers.num_rows, width, numbers.trace, numbers.rounding)


def _spectrum(moments: Moments) -> Tensor:
    # A scatter is a sum of squares: whatever is negative in its spectrum is rounding. Its trace is known to be finite,
    # and so is what it bounds; `ranks.spectrum` would look at every entry again.
    return torch.linalg.eigvalsh(covariance(moments)).flip(-1).clamp(min=0)


def _approximate_soft_rank(moments: Moments, numbers: Invariants) -> float:
    matrix_DD = covariance(moments, dtype=moments.scatter_GP.dtype)
    return math.exp(approximate.approximate_entropy(matrix_DD, numbers.trace, numbers.frobenius_sq))


def _hard_rank(numbers: Invariants, absolute_epsilon: float) -> float:
    if numbers.frobenius_sq <= 0:
        return math.nan
    return numbers.trace**2 / (numbers.frobenius_sq + absolute_epsilon)


def _jackknife_estimate(value: float, parts: Sequence[float]) -> float | None:
    """Bias-corrected value ``K * all - (K - 1) * mean of leave-one-out``; two shards: ``2 S(N) - mean S(N/2)``."""
    if not parts:
        return None
    return len(parts) * value - (len(parts) - 1) * sum(parts) / len(parts)


def _jackknife_interval(value: float, parts: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Delete-a-shard jackknife t interval of ``ln rank``: a rank is positive and its errors are relative."""
    if len(parts) < 2 or not all(part > 0 for part in (value, *parts)):
        return None
    logs = torch.tensor(parts, dtype=torch.float64).log()
    standard_error = math.sqrt((len(parts) - 1) * float(logs.var(unbiased=False)))
    reach = float(stats.t.ppf((1 + level) / 2, len(parts) - 1)) * standard_error
    return value * math.exp(-reach), value * math.exp(reach)
