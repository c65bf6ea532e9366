"""From moments to the ranks of one group, with what the sample says about them.

Uncertainty comes from shards: rows are dealt to shards by sequence, so that leaving one shard out leaves out whole
sequences (tokens of one sequence are correlated; an interval from tokens would be far too narrow).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_spectral.functional import approximate, left_out
from lightning_spectral.functional import rank as ranks
from lightning_spectral.functional.across import AcrossGroups, across_groups
from lightning_spectral.functional.covariance import Moments
from lightning_spectral.functional.few_sequences import Likeness, entropy_of_endless
from lightning_spectral.functional.sample import Gram, Sample, num_rows, sample
from lightning_spectral.probe.eigensolve import Eigensolver

HARD_RANK_ACROSS = "hard_rank_across_sequences"  # in `extra` of a record
# Where the whole correction (nats) or what rows have in common (second moment of their weights) is less, both ways to
# extrapolate the soft rank agree to some thousandths.
_LITTLE, _ALONE = 0.05, 1.5
_LEANS = 1.2  # where rows share the same in all directions, two groups show more than this in at most a third of draws
UNMEASURABLE = ("empty", "nonfinite", "degenerate")


@dataclass(frozen=True)
class RankMeasurement:
    """Ranks of one covariance; ``None`` where the status does not allow a number. Fields: ``SpectralRecord``.

    Attributes:
        values: By name, every row of ``RANK_METRICS`` that could be computed.
    """

    num_tokens: int
    width: int
    status: str
    values: dict[str, float] = field(default_factory=dict)
    hard_rank_debiased: float | None = None
    soft_rank_debiased: float | None = None
    trace: float | None = None
    renyi: dict[str, float] = field(default_factory=dict)
    hard_rank_ci: tuple[float, float] | None = None
    soft_rank_ci: tuple[float, float] | None = None
    eigenvalues: Tensor | None = None
    soft_method: str = "exact"

    @property
    def soft_rank(self) -> float | None:
        """Effective rank."""
        return self.values.get("soft_rank")

    @property
    def hard_rank(self) -> float | None:
        """Participation ratio."""
        return self.values.get("hard_rank")


def measure(
    state: Moments | Gram,
    groups: Sequence[int] = (0,),
    *,
    num_sequences: int = 0,
    renyi_orders: Sequence[float] = ranks.DEFAULT_RENYI_ORDERS,
    absolute_epsilon: float = 0.0,
    soft: str = "exact",
    eigensolver: Eigensolver | None = None,
) -> RankMeasurement:
    """Ranks of the rows of ``groups`` together; the groups are the shards that the intervals come from.

    Args:
        state: Rows of any number of groups.
        groups: Indices of the shards to merge.
        num_sequences: That the rows come from; 0 if nobody knows.
        renyi_orders: Orders of :attr:`RankMeasurement.renyi`.
        absolute_epsilon: The paper's compatibility option of ``hard_rank``.
        soft: ``exact``; ``approx`` where the matrix is wide: then what needs the whole spectrum stays ``None``.
        eigensolver: One for all spectra of a window; default one of its own.
    """
    solve = eigensolver or Eigensolver(exact=soft == "exact")
    own = sample(state, groups)
    if (status := _status(own)) in UNMEASURABLE:
        return RankMeasurement(own.num_tokens, own.width, status)
    exact = soft == "exact" or len(own.matrix_MM) < approximate.MIN_WIDTH
    eigs = solve(own) if exact else None
    values, renyi = ({}, {}) if eigs is None else ranks.rank_values(eigs, renyi_orders)
    soft_rank = values["soft_rank"] if exact else _approximate_soft_rank(own)
    hard = _hard_rank(own, absolute_epsilon)
    unbiased = ranks.debiased_hard_rank(own.num_tokens, own.trace, own.frobenius_sq, own.quartic)
    across = across_groups(state, groups)
    shown_unbiased, shown_across = (ranks.possible_rank(one, own.width) for one in (unbiased, across.hard_rank))
    parts = _leave_one_out(state, groups, absolute_epsilon, solve if exact else None)
    hard_parts = [(part.hard_rank, part.num_tokens) for part in parts]
    soft_parts = [(part.soft_rank, part.num_tokens) for part in parts]
    power = _power(own.num_tokens, hard, shown_across, own.width)
    debiased = left_out.endless(soft_rank, own.num_tokens, soft_parts, own.width, power)
    if debiased and eigs is not None and num_sequences > 1 and unbiased > 0:
        debiased = _by_model(debiased, soft_rank, eigs, own, num_sequences, parts, unbiased, across)
    return RankMeasurement(
        num_tokens=own.num_tokens,
        width=own.width,
        status=status,
        values={
            **values,
            **({} if math.isnan(shown_across) else {HARD_RANK_ACROSS: shown_across}),
            "soft_rank": soft_rank,
            "hard_rank": hard,
            "spectral_entropy": values.get("spectral_entropy", math.log(soft_rank)),
        },
        hard_rank_debiased=None if math.isnan(shown_unbiased) else shown_unbiased,
        soft_rank_debiased=debiased,
        trace=own.trace,
        renyi=renyi,
        hard_rank_ci=left_out.interval(hard, own.num_tokens, hard_parts),
        soft_rank_ci=left_out.interval(soft_rank, own.num_tokens, soft_parts),
        eigenvalues=eigs,
        soft_method="exact" if exact else "approx",
    )


@dataclass(frozen=True)
class _Part:
    """All shards but one."""

    num_tokens: int
    hard_rank: float
    soft_rank: float


def _leave_one_out(
    state: Moments | Gram, groups: Sequence[int], absolute_epsilon: float, solve: Eigensolver | None
) -> list[_Part]:
    """Without each of the shards in turn that has rows; nothing if one shard holds all that can be measured."""
    parts = []
    members = [group for group in groups if num_rows(state, group)]
    for left in members if len(members) > 1 else ():
        part = sample(state, [group for group in members if group != left])
        if _status(part) in UNMEASURABLE:
            return []
        soft_rank = float(ranks.soft_rank(solve(part))) if solve else _approximate_soft_rank(part)
        parts.append(_Part(part.num_tokens, _hard_rank(part, absolute_epsilon), soft_rank))
    return parts


def _status(own: Sample) -> str:
    return ranks.sampling_status(own.num_tokens, own.width, own.trace, own.rounding)


def _approximate_soft_rank(own: Sample) -> float:
    matrix_MM = own.matrix_MM.to(own.product_dtype)
    return math.exp(approximate.approximate_entropy(matrix_MM, own.trace, own.frobenius_sq))


def _hard_rank(own: Sample, absolute_epsilon: float) -> float:
    if own.frobenius_sq <= 0:
        return math.nan
    hard_rank = own.trace**2 / (own.frobenius_sq + absolute_epsilon)
    return hard_rank if absolute_epsilon else ranks.possible_rank(hard_rank, own.width)  # subnormal squares round


def _by_model(
    along: float,
    shown: float,
    eigs: Tensor,
    own: Sample,
    num_sequences: int,
    parts: Sequence[_Part],
    unbiased: float,
    across: AcrossGroups,
) -> float:
    """The extrapolated rank, moved towards that of a model of rows that are alike, as far as the model holds.

    The model is right where what rows share is spread as they are, and goes too far where it lies along the larger
    eigenvalues; the extrapolation is the other way round (`bench_finite_rows.py`). Unlike lengths of rows it knows.
    """
    if not (across.hard_rank > 0 and across.lean > 0):
        return along
    likeness = Likeness.of(own.num_tokens, _hard_rank(own, 0.0), unbiased, across.hard_rank)
    if math.log(along / shown) < _LITTLE or likeness.of_rows + likeness.of_sequences < _ALONE:
        return along
    seen = [(math.log(part.soft_rank), part.num_tokens) for part in parts]
    entropy = entropy_of_endless(eigs, math.log(shown), own.width, own.num_tokens, num_sequences, seen, likeness)
    if not entropy >= math.log(shown):
        return along
    trust = 1 - likeness.share_of_sequences * (1 - min(1.0, (across.lean / _LEANS) ** -6))
    return min(float(own.width), math.exp((1 - trust) * math.log(along) + trust * entropy))


def _power(num_tokens: int, hard: float, across: float, width: int) -> float:
    """Of the law along which a soft rank is extrapolated, from 0 (independent rows) to 1 (sequences of one direction).

    The bias of the hard rank, which is known, says how many rows count as one: ``1 / R_N - 1 / R`` is ``1 / N`` for
    independent rows. Their soft rank follows ``ln S_N = ln S - c / N`` closely, on every spectrum tried; the more rows
    count as one, the nearer is ``1 / S_N = 1 / S + c / N``, which the hard rank follows (`bench_finite_rows.py`). Where
    no ``1 / R`` above 0 was found, that of the largest rank is taken: a rounding must not decide.
    """
    alike = num_tokens * (1.0 / hard - 1.0 / (width if math.isnan(across) else across)) if hard > 0 else 1.0
    return 1.0 - 1.0 / max(alike, 1.0)
