"""From an even sample of a window's rows to the ranks that all of them would have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.functional.rank import sampling_status
from lightning_spectral.functional.row_ranks import rank_rows
from lightning_spectral.functional.sample import Gram, gram
from lightning_spectral.probe.ranks_of import HARD_RANK_ACROSS, UNMEASURABLE, RankMeasurement, measure
from lightning_spectral.probe.row_sample import SampledRows

SOFT_METHOD = "sample"
SAMPLED_ROWS, HARD_ERROR, SOFT_ERROR = "sampled_rows", "hard_rank_error", "soft_rank_error"  # in `extra` of a record


def measure_sample(state: SampledRows, groups: Sequence[int], renyi_orders: Sequence[float] = ()) -> RankMeasurement:
    """Ranks of the rows of ``groups`` together; ``num_tokens`` is how many they were drawn from.

    Where all of them were kept, the numbers are exact.
    """
    own_N = torch.isin(state.groups_N, torch.tensor(list(groups), device=state.groups_N.device))
    rows_ND = state.rows_ND if bool(own_N.all()) else state.rows_ND[own_N]
    num_seen = max(int(state.seen_G[list(groups)].sum()), len(rows_ND))
    if len(rows_ND) == num_seen:
        return measure(_whole(rows_ND), renyi_orders=renyi_orders)
    ranks = rank_rows(rows_ND, state.sequences_N[own_N], num_seen)
    status = sampling_status(num_seen if ranks.num_rows else 0, state.width, ranks.trace, ranks.rounding)
    if status in UNMEASURABLE:
        return RankMeasurement(num_seen, state.width, status, soft_method=SOFT_METHOD)
    values = {
        "soft_rank": ranks.soft_rank,
        "hard_rank": ranks.hard_rank,
        "spectral_entropy": math.log(ranks.soft_rank) if ranks.soft_rank > 0 else math.nan,
        HARD_RANK_ACROSS: ranks.hard_rank_across,
        HARD_ERROR: ranks.hard_rank_error,
        SOFT_ERROR: ranks.soft_rank_error,
        SAMPLED_ROWS: float(ranks.num_rows),
    }
    return RankMeasurement(
        num_tokens=num_seen,
        width=state.width,
        status=status if ranks.hard_rank > 0 else "few_tokens",
        values={name: value for name, value in values.items() if not math.isnan(value)},
        hard_rank_debiased=_known(ranks.hard_rank_debiased),
        soft_rank_debiased=_known(ranks.soft_rank_debiased),
        trace=ranks.trace,
        soft_method=SOFT_METHOD,
    )


def _whole(rows_ND: Tensor) -> Moments | Gram:
    num_rows, width = rows_ND.shape
    if num_rows < width:
        return gram(rows_ND, [num_rows])
    moments = empty_moments(1, width, device=rows_ND.device)
    update_(moments, rows_ND, [num_rows])
    return moments


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
