"""Every law that rows can speak to, measured beside predicted, with a verdict that many rows at once do not spoil.

Measured slopes are compared with the slope of the PREDICTED counts over the same d, never with the asymptote, which
small d do not reach. A table of 30 rows at 95 % each has one or two false alarms: a row ``differs`` only outside the
interval that covers all rows of the table together with 95 % (Bonferroni), and ``agrees`` only where that interval is
narrow enough to have noticed; else it is ``not decided``. Where the theory does not say how far counts spread, the
seeds do, and few seeds know that badly: Student's t. A prediction that is not trusted (``prediction_note``) cannot be
contradicted. Laws that no row speaks to are listed as ``not tested``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import t as student

from lightning_spectral.memory.critical_batch import critical_batches, measured_critical_batch
from lightning_spectral.memory.fit import Row, by_size, cases, fit_exponent, group, of_kind
from lightning_spectral.text.tables import Column, Table

LEVEL = 0.95  # of the table as a whole
_CLOSE = 0.02  # a slope this near its prediction agrees even where the interval is narrower: terms of order 1 / d
_CLOSE_RATIO = 0.03
_SEEDS_AT_LEAST = 3
_RESOLUTION = {"exponent": 0.25, "ratio": 0.10}  # half-width of the table's interval up to which "agrees" means much
# what `memory reproduce` is to test
LAWS = (
    *(("count ~ d^e, one step", rule) for rule in ("sgd", "muon", "newton")),
    *(("count / predicted count", rule) for rule in ("sgd", "muon", "ns5", "newton")),
    *(("critical batch ~ d^e", rule) for rule in ("sgd", "muon")),
    ("count ~ B^e below the critical batch", "muon"),
    *((f"d_t ~ d^e_t, step {step}", rule) for step in range(1, 6) for rule in ("sgd", "muon")),
    *(("loss / (ln N x mass beyond d_t)", rule) for rule in ("sgd", "muon")),
)


@dataclass(frozen=True)
class Verdict:
    """One law, measured and predicted.

    Attributes:
        law: What is claimed.
        case: Rule and parameters.
        measured: Measured value (an exponent unless ``law`` says otherwise), ``None`` where it was not tested.
        low: Lower end of its own 95 % interval.
        high: Upper end.
        predicted: Finite-size prediction over the same d, or ``None``.
        asymptote: The paper's exponent, or ``None`` where none applies.
        verdict: ``agrees``, ``differs``, ``not decided`` (and why), ``no prediction`` or ``not tested``.
        over: The points behind it, in words.
        error: Standard error of ``measured``.
        seeds: Fewest seeds of any point.
        kind: ``exponent`` or ``ratio``.
        freedom: Degrees of freedom behind ``error``; infinite where the theory knows the spread of a count.
        doubt: Why the prediction is not to be trusted, if it is not.
    """

    law: str
    case: str
    measured: float | None
    low: float | None
    high: float | None
    predicted: float | None
    asymptote: float | None
    verdict: str
    over: str
    error: float | None = None
    seeds: int = 0
    kind: str = "exponent"
    freedom: float = math.inf
    doubt: str | None = None


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every law that the rows can speak to, judged together."""
    found = [*_one_step(rows), *_levels(rows), *_batches(rows), *_steps(rows), *_losses(rows)]
    rivals = sum(verdict.predicted is not None for verdict in found)
    return [replace(verdict, verdict=judge(verdict, rivals)) for verdict in found]


def judge(verdict: Verdict, rivals: int = 1) -> str:
    """The verdict on one of ``rivals`` rows that are judged together; see the head of this file."""
    if verdict.predicted is None or verdict.measured is None or verdict.error is None:
        return "no prediction"
    half = float(student.ppf(1 - (1 - LEVEL) / 2 / max(rivals, 1), verdict.freedom)) * verdict.error
    distance = abs(verdict.measured - verdict.predicted)
    close = _CLOSE_RATIO if verdict.kind == "ratio" else _CLOSE
    if verdict.seeds < _SEEDS_AT_LEAST:
        return f"not decided ({verdict.seeds} seed{'s' if verdict.seeds > 1 else ''}, at least {_SEEDS_AT_LEAST})"
    if distance > half and distance > close:
        return "differs" if verdict.doubt is None else f"not decided (off by {distance:.2g}; {verdict.doubt})"
    return "agrees" if half <= _RESOLUTION[verdict.kind] else f"not decided (+- {half:.2g})"


def untested(table: Sequence[Verdict]) -> list[Verdict]:
    """Laws of :data:`LAWS` that the table has no row for."""
    missing = []
    for law, rule in LAWS:
        if not any(v.law == law and v.case.split(",")[0] == rule for v in table):
            nothing = Verdict(law, rule, None, None, None, None, None, "not tested", "needs two sizes")
            missing.append(nothing)
    return missing


def verdict_table(table: Sequence[Verdict]) -> Table:
    """All verdicts."""
    columns = (
        "law", "case", Column("measured", ".3f"), Column("low", ".3f"), Column("high", ".3f"),
        Column("predicted at this size", ".3f", "predicted"), Column("asymptote", ".3f"), "verdict", "over",
    )  # fmt: skip
    cells = [(v.law, v.case, v.measured, v.low, v.high, v.predicted, v.asymptote, v.verdict, v.over) for v in table]
    return Table(columns, cells, "laws")


def verdict_note(table: Sequence[Verdict]) -> str:
    """What the verdicts mean."""
    judged = sum(v.predicted is not None for v in table)
    return (
        f"Intervals are 95 % each. Verdicts hold for the {judged} judged rows together at 95 % (Bonferroni): `differs` "
        "is outside the wider interval of the table, `agrees` inside one narrow enough to tell, else `not decided`. In "
        "`reproduce`, cells of different d, alpha and batch size have seeds of their own; the rules of a cell share "
        "its draws."
    )


def _cells(rows: Sequence[Row], *axes: str) -> list[tuple[str, str, list[Row]]]:
    """(rule, "rule, case", rows) of each rule in each case."""
    return [
        (rule, f"{rule}, {name}", members)
        for name, same in cases(rows, *axes).items()
        for (rule,), members in group(same, "rule_label").items()
    ]


def _slope_verdict(law: str, rows: Sequence[Row], axis: str, case: str) -> Verdict | None:
    xs, counts = by_size(rows, axis, "count")
    if len(xs) < 2 or any(not np.mean(values) > 0 for values in counts):
        return None
    _, predictions = by_size(rows, axis, "predicted_count")
    known = all(value is not None for values in predictions for value in values)
    spreads = None
    if known and all(row.get("predicted_spread") is not None for row in rows):
        spreads = [float(values[0]) for values in by_size(rows, axis, "predicted_spread")[1]]
    fitted = fit_exponent(xs, counts, spreads)
    seeds = min(len(values) for values in counts)
    return Verdict(
        law=law,
        case=case,
        measured=fitted.slope,
        low=fitted.low,
        high=fitted.high,
        predicted=fit_exponent(xs, predictions).slope if known else None,
        asymptote=rows[0].get("asymptotic_exponent"),
        verdict="",
        over=f"{axis} = {', '.join(f'{x:g}' for x in xs)}; {seeds} seeds or more each",
        error=fitted.error,
        seeds=seeds,
        freedom=math.inf if spreads is not None else sum(len(values) - 1 for values in counts),
        doubt=_doubt(rows),
    )


def _doubt(rows: Sequence[Row]) -> str | None:
    """The first reason not to trust a prediction; rows of the first versions have none."""
    return next((str(row["prediction_note"]) for row in rows if row.get("prediction_note")), None)


def _one_step(rows: Sequence[Row]) -> list[Verdict]:
    usable = [row for row in of_kind(rows, "one-step") if row["d"] >= 128 and not row["censored"]]
    made = (_slope_verdict("count ~ d^e, one step", same, "d", case) for _, case, same in _cells(usable, "d"))
    return [verdict for verdict in made if verdict is not None]


def _levels(rows: Sequence[Row]) -> list[Verdict]:
    """Measured count over predicted count, sizes weighed by what they know: 1 if the theory is right."""
    found = []
    usable = [r for r in of_kind(rows, "one-step") if r["predicted_count"] and r["d"] >= 128 and not r["censored"]]
    for _, case, members in _cells(usable, "d"):
        ratios, spreads, sizes, seeds = [], [], [], []
        for (d,), same in group(sorted(members, key=lambda row: row["d"]), "d").items():
            expected = float(np.mean([row["predicted_count"] for row in same]))
            own = np.std([row["count"] for row in same], ddof=1) if len(same) > 1 else 0.0
            ratios.append(float(np.mean([row["count"] for row in same])) / expected)
            spreads.append(max(float(own), same[0]["predicted_spread"]) / math.sqrt(len(same)) / expected)
            sizes.append(str(d))
            seeds.append(len(same))
        weight = 1 / np.square(spreads)
        ratio, error = float(np.sum(weight * ratios) / weight.sum()), float(weight.sum() ** -0.5)
        found.append(
            Verdict(
                "count / predicted count",
                case,
                ratio,
                ratio - 1.96 * error,
                ratio + 1.96 * error,
                1.0,
                None,
                "",
                f"d = {', '.join(sizes)}",
                error,
                min(seeds),
                "ratio",
            )
        )
    return found


def _batches(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for rule, case, members in _cells(of_kind(rows, "batch"), "d", "batch_size"):
        if rule == "muon":
            found += _stored(members, case)
        points = critical_batches([row for row in members if row["d"] >= 64])
        if len(points) < 2:
            continue
        log_d = np.log([point.d for point in points])
        pull = (log_d - log_d.mean()) / ((log_d - log_d.mean()) ** 2).sum()
        slope = float(pull @ np.log([point.batch for point in points]))
        error = float(np.sqrt(pull**2 @ np.square([point.log_error for point in points])))
        guesses = [point.predicted for point in points]
        predicted = float(pull @ np.log([float(guess or 0) for guess in guesses])) if all(guesses) else None
        exponent = next((row["asymptotic_critical_batch_exponent"] for row in members), None)
        found.append(
            Verdict(
                "critical batch ~ d^e",
                case,
                slope,
                slope - 1.96 * error,
                slope + 1.96 * error,
                predicted,
                exponent,
                "",
                f"d = {', '.join(str(point.d) for point in points)}",
                error,
                min(point.seeds for point in points),
                doubt=_doubt(members),
            )
        )
    return found


def _stored(rows: Sequence[Row], case: str) -> list[Verdict]:
    """Below the critical batch every sampled item is stored: the count grows as B^(1/alpha)."""
    largest = max(row["d"] for row in rows)
    at = [row for row in rows if row["d"] == largest]
    critical = measured_critical_batch(at)
    small = [row for row in at if row["batch_size"] and critical and 64 <= row["batch_size"] <= critical / 2]
    verdict = _slope_verdict("count ~ B^e below the critical batch", small, "batch_size", f"{case}, d = {largest}")
    return [] if verdict is None else [replace(verdict, asymptote=1 / at[0]["alpha"])]


def _steps(rows: Sequence[Row]) -> list[Verdict]:
    deflation = [row for row in of_kind(rows, "steps") if row["mode"] == "deflation"]
    found: list[Verdict | None] = []
    for (step,), at in sorted(group(deflation, "step").items()):
        usable = [row for row in at if 3 * row["count"] <= row["n_items"] and row["count"] > 0]
        for _, case, same in _cells(usable, "d"):
            found.append(_slope_verdict(f"d_t ~ d^e_t, step {step}", same, "d", case))
    return [verdict for verdict in found if verdict is not None]


def _losses(rows: Sequence[Row]) -> list[Verdict]:
    """Loss after the last exact step over ln N times the mass beyond the first ``count`` items: a constant near 1.3."""
    found = []
    exact = [row for row in of_kind(rows, "steps") if row["mode"] == "exact" and row.get("loss_over_tail_mass")]
    for _, case, members in _cells(exact):
        last = max(row["step"] for row in members)
        values: list[Any] = [row["loss_over_tail_mass"] for row in members if row["step"] == last]
        value, error = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        error /= math.sqrt(len(values))
        case = f"{case}, d = {members[0]['d']}" if "d = " not in case else case
        found.append(
            Verdict(
                "loss / (ln N x mass beyond d_t)",
                case,
                value,
                value - 1.96 * error,
                value + 1.96 * error,
                None,
                None,
                "",
                f"step {last}, {len(values)} seeds",
                error,
                len(values),
                "ratio",
            )
        )
    return found
