"""The critical batch size: the smallest batch that stores 90 % of what the population gradient stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_spectral.memory.fit import Row, group

_DRAWS = 400  # of the mean counts, for the standard error


@dataclass(frozen=True)
class CriticalBatch:
    """Smallest batch with 90 % of the population count at one d; ``log_error`` is the standard error of its log.

    ``predicted`` is found in the same way from the counts predicted for these very draws.
    """

    d: int
    batch: float
    log_error: float
    predicted: float | None
    seeds: int


def critical_batches(rows: Sequence[Row]) -> list[CriticalBatch]:
    """The critical batch at every d that has one, rows of one rule and case."""
    found = []
    for (d,), same in group(sorted(rows, key=lambda row: row["d"]), "d").items():
        batch, error = measured_critical_batch(same), 0.0
        if batch is None:
            continue
        rng = np.random.default_rng(0)
        drawn = [measured_critical_batch(same, rng=rng) for _ in range(_DRAWS)]
        known = [math.log(value) for value in drawn if value is not None]
        error = float(np.std(known)) if len(known) > _DRAWS // 2 else float("inf")
        guesses = [{**row, "count": row.get("predicted_count")} for row in same]
        predicted = measured_critical_batch(guesses) if all(row["count"] for row in guesses) else None
        seeds = min(len(values) for values in group(same, "batch_size").values())
        found.append(CriticalBatch(int(d), batch, error, predicted, seeds))
    return found


def measured_critical_batch(
    rows: Sequence[Row], share: float = 0.9, rng: np.random.Generator | None = None
) -> float | None:
    """Smallest B with ``share`` of the population count, between two batches on log scales.

    With ``rng``, from mean counts drawn anew within their standard errors.
    """
    whole = [row for row in rows if row["batch_size"] is None]
    by_batch = {size: same for (size,), same in group(rows, "batch_size").items() if size}
    xs = sorted(by_batch)
    if not whole or not xs:
        return None
    target = share * _mean(whole, rng)
    means = [_mean(by_batch[size], rng) for size in xs]
    for position, mean in enumerate(means):
        if mean >= target:
            if position == 0:
                return xs[0] if xs[0] == 1 else None
            before, below = xs[position - 1], max(means[position - 1], 1e-3)
            return float(before * (xs[position] / before) ** (math.log(target / below) / math.log(mean / below)))
    return None


def _mean(rows: Sequence[Row], rng: np.random.Generator | None) -> float:
    values = [row["count"] for row in rows]
    mean = float(np.mean(values))
    if rng is None:
        return mean
    # a sampled count varies at least as a count of independent items: sqrt is an upper bound for Muon
    own = float(np.std(values, ddof=1)) if len(values) > 1 else math.sqrt(max(mean, 1.0))
    spread = max(own, max(row.get("predicted_spread") or 0.0 for row in rows))
    return max(mean + spread / math.sqrt(len(values)) * float(rng.standard_normal()), 1e-3)
