"""Numbers behind the sentences of :mod:`claims`: exponents, ratios, critical batches, lags, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from lightning_spectral.memory.critical_batch import critical_batches
from lightning_spectral.memory.fit import Row, by_size, fit_exponent, group
from lightning_spectral.theory.exponents import critical_batch_exponent

SIZES_AT_LEAST = 3


@dataclass(frozen=True)
class Estimate:
    """One measured number.

    Attributes:
        name: What it is.
        value: The number.
        error: Its standard error.
        predicted: The theory at the sizes measured, without a fitted parameter.
        asymptote: The limit that the paper states.
        over: Sizes and seeds, in words.
        freedom: Degrees of freedom behind ``error``: four seeds know their own spread badly.
    """

    name: str
    value: float
    error: float
    predicted: float | None = None
    asymptote: float | None = None
    over: str = ""
    freedom: float = math.inf

    def half(self, outside: float = 0.05) -> float:
        """Half the width of the interval (Student's t) that leaves the share ``outside`` out."""
        return float(student.ppf(1 - outside / 2, self.freedom)) * self.error

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, on its own."""
        return self.value - self.half(), self.value + self.half()


def mean_of(
    name: str, values: Sequence[float], over: str, predicted: float | None = None, asymptote: float | None = None
) -> Estimate | None:
    """Mean of one number over independent runs; ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(name, float(np.mean(values)), error, predicted, asymptote, over, len(values) - 1)


def joint(*parts: tuple[float, float]) -> tuple[float, float]:
    """Standard error of a sum of independent parts (error, freedom), and its freedom after Welch and Satterthwaite."""
    error = math.hypot(*(part for part, _ in parts))
    fourth = sum(part**4 / freedom for part, freedom in parts)
    return error, error**4 / fourth if fourth > 0 else math.inf


def exponent(
    rows: Sequence[Row], name: str, law: Callable[[float], float | None] | None = None, floor: int = 0
) -> Estimate | None:
    """Slope of the count in d, with that of the predictions."""
    usable = [row for row in rows if row["d"] >= floor and not row.get("censored")]
    xs, counts = by_size(usable, "d", "count")
    if len(xs) < SIZES_AT_LEAST or any(not np.mean(values) > 0 for values in counts):
        return None
    _, predictions = by_size(usable, "d", "predicted_count")
    known = all(value for values in predictions for value in values)
    spreads = None
    if all(row.get("predicted_spread") for row in usable):
        spreads = [float(values[0]) for values in by_size(usable, "d", "predicted_spread")[1]]
    fitted = fit_exponent(xs, counts, spreads)
    return Estimate(
        name, fitted.slope, fitted.error, fit_exponent(xs, predictions).slope if known else None,
        law(usable[0]["alpha"]) if law else None, _over(xs, counts), sum(len(values) - 1 for values in counts),
    )  # fmt: skip


def _over(xs: Sequence[float], counts: Sequence[Sequence[float]]) -> str:
    seeds = min(len(values) for values in counts)
    return f"d = {', '.join(f'{x:g}' for x in xs)}; {seeds} seeds or more"


def difference(name: str, first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """``first`` less ``second``, taken as independent."""
    if first is None or second is None:
        return None

    def minus(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one - other

    error, freedom = joint((first.error, first.freedom), (second.error, second.freedom))
    over = first.over if first.over == second.over else f"{first.over} | {second.over}"
    return Estimate(name, first.value - second.value, error, minus(first.predicted, second.predicted),
                    minus(first.asymptote, second.asymptote), over, freedom)  # fmt: skip


def of(rows: Sequence[Row], part: str, rule: str | None = None, **fields: Any) -> list[Row]:
    """Rows of one part and rule."""
    wanted = {"part": part, **({"rule": rule} if rule else {}), **fields}
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def ratio_at_largest(rows: Sequence[Row], first: str, second: str, name: str) -> Estimate | None:
    """Mean count of one rule over the other's (geometric means) at the largest d that both have."""
    both = {rule: [row for row in rows if row["rule"] == rule] for rule in (first, second)}
    shared = {row["d"] for row in both[first]} & {row["d"] for row in both[second]}
    if not shared:
        return None
    d = max(shared)
    logs = {rule: np.log([max(row["count"], 0.5) for row in same if row["d"] == d]) for rule, same in both.items()}
    if min(len(values) for values in logs.values()) < 2:
        return None
    value = math.exp(float(logs[first].mean() - logs[second].mean()))
    error, freedom = joint(
        *((float(values.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1.0) for values in logs.values())
    )
    guess = {
        rule: np.mean([row["predicted_count"] for row in same if row["d"] == d])
        for rule, same in both.items()
        if all(row.get("predicted_count") for row in same)
    }
    predicted = float(guess[first] / guess[second]) if len(guess) == 2 else None
    return Estimate(name, value, value * error, predicted, None, f"d = {d}; {len(logs[first])} seeds", freedom)


def batch_exponent(rows: Sequence[Row], rule: str) -> Estimate | None:
    """Exponent in d of the critical batch of one rule's rows."""
    points = critical_batches(rows)
    if len(points) < SIZES_AT_LEAST:
        return None
    log_d = np.log([point.d for point in points])
    pull = (log_d - log_d.mean()) / ((log_d - log_d.mean()) ** 2).sum()
    guesses = [point.predicted for point in points]
    return Estimate(
        f"critical batch exponent of {'Muon' if rule == 'muon' else 'SGD'}",
        float(pull @ np.log([point.batch for point in points])),
        float(np.sqrt(pull**2 @ np.square([point.log_error for point in points]))),
        float(pull @ np.log([float(guess or 1) for guess in guesses])) if all(guesses) else None,
        critical_batch_exponent(rule, rows[0]["alpha"]),
        f"d = {', '.join(str(point.d) for point in points)}; {min(point.seeds for point in points)} seeds or more",
        sum(point.seeds - 1 for point in points),
    )


def lags(rows: Sequence[Row], d: int) -> list[tuple[int, float]]:
    """(Muon's step t, steps later that SGD has as many items), mean curves at one d, on log scales between steps."""
    curves = {rule: dict(_curve(rows, rule, d)) for rule in ("muon", "sgd")}
    steps = sorted(curves["sgd"])
    found = []
    for step, count in sorted(curves["muon"].items()):
        logs = np.maximum.accumulate(np.log([max(curves["sgd"][t], 0.5) for t in steps]))
        if math.log(max(count, 0.5)) <= logs[-1] and len(steps) > 1:
            found.append((step, float(np.interp(math.log(max(count, 0.5)), logs, steps)) - step))
    return found


def _curve(rows: Sequence[Row], rule: str, d: int) -> list[tuple[int, float]]:
    same = [row for row in rows if row["rule"] == rule and row["d"] == d]
    return [(int(step), float(np.mean([row["count"] for row in at]))) for (step,), at in group(same, "step").items()]
