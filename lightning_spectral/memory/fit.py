"""``results.jsonl`` of the memory commands: read it, fit exponents, and hold them against prediction and law.

A line of ``results.jsonl`` is one run: ``kind`` (``one-step``, ``batch``, ``steps``, ``newton-schulz``), every input,
every output. The README lists the fields. Measured slopes are compared with the slope of the PREDICTED counts over
the same d, never with the asymptote, which small d do not reach.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS_FILE = "results.jsonl"
Row = dict[str, Any]
_DRAWS = 4000
_CLOSE = 0.02  # a slope this near its prediction agrees even where the interval is narrower: terms of order 1 / d


@dataclass(frozen=True)
class Exponent:
    """Slope of ln(mean count) on ln(x) with a 95 % interval.

    Attributes:
        slope: Least squares.
        low: Lower end; a bootstrap that draws the mean at each x from its standard error.
        high: Upper end.
        xs: Distinct x values.
        means: Mean at each.
        errors: Standard error at each.
    """

    slope: float
    low: float
    high: float
    xs: tuple[float, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """One law, measured and predicted.

    Attributes:
        law: What is claimed.
        case: Rule and parameters.
        measured: Measured value (an exponent unless ``law`` says otherwise).
        low: Lower end of its 95 % interval.
        high: Upper end.
        predicted: Finite-size prediction over the same d, or ``None``.
        asymptote: The paper's exponent, or ``None`` where none applies.
        verdict: ``agrees``, ``differs`` or ``no prediction``.
        over: The points behind it, in words.
    """

    law: str
    case: str
    measured: float
    low: float
    high: float
    predicted: float | None
    asymptote: float | None
    verdict: str
    over: str


def read_results(path: str | Path) -> list[Row]:
    """Rows of a ``results.jsonl`` or of the folder that holds it; broken lines are left out with one warning.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist; run `lightning-spectral memory one-step --out DIR` first.")
    rows: list[Row] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError
            rows.append(row)
        except ValueError:
            broken.append(number)
    if broken:
        warnings.warn(f"`{path}`: {len(broken)} broken lines left out, the first is line {broken[0]}.", stacklevel=2)
    return rows


def fit_exponent(
    xs: Sequence[float], counts: Sequence[Sequence[float]], spreads: Sequence[float] | None = None, seed: int = 0
) -> Exponent:
    """Slope of ln(mean) on ln(x).

    Args:
        xs: Distinct positive values.
        counts: Counts of the seeds at each x.
        spreads: Standard deviation of one count at each x as predicted; the larger of it and the sample's is used, so
            that one or two seeds do not pretend to know their own spread.
        seed: Of the bootstrap.

    Raises:
        ValueError: Fewer than two distinct x, or a mean of zero (its logarithm does not exist).
    """
    if len(set(xs)) < 2 or len(set(xs)) != len(xs):
        raise ValueError(f"`xs` must be at least two distinct values to fit an exponent, got {list(xs)}.")
    means = np.array([np.mean(values) for values in counts], dtype=np.float64)
    for x, mean in zip(xs, means, strict=True):
        if not mean > 0:
            raise ValueError(f"The mean count at x={x:g} is {mean:g}: no logarithm. Leave that x out, or add seeds.")
    own = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in counts]
    single = np.maximum(np.array(own), np.array(spreads if spreads is not None else 0.0))
    errors = single / np.sqrt([len(values) for values in counts])
    log_x = np.log(np.asarray(xs, dtype=np.float64))
    rng = np.random.default_rng(seed)
    drawn = means + errors * rng.standard_normal((_DRAWS, len(means)))
    slopes = _slopes(log_x, np.log(np.maximum(drawn, 0.05 * means)))
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Exponent(
        slope=float(_slopes(log_x, np.log(means)[None])[0]),
        low=float(low),
        high=float(high),
        xs=tuple(float(x) for x in xs),
        means=tuple(means.tolist()),
        errors=tuple(errors.tolist()),
    )


def local_slopes(xs: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Slope between neighbouring points on log scales: (geometric middles, slopes); zero counts are left out."""
    points = sorted((x, y) for x, y in zip(xs, values, strict=True) if y > 0)
    middles = [math.sqrt(a[0] * b[0]) for a, b in pairwise(points)]
    slopes = [math.log(b[1] / a[1]) / math.log(b[0] / a[0]) for a, b in pairwise(points)]
    return middles, slopes


def group(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of ``fields``, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(field) for field in fields)].append(row)
    return dict(groups)


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """Rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def by_size(rows: Sequence[Row], axis: str, value: str) -> tuple[list[float], list[list[float]]]:
    """Sorted values of ``axis`` and the values of the seeds at each."""
    sizes = {key[0]: [row[value] for row in members] for key, members in group(rows, axis).items() if key[0]}
    xs = sorted(sizes)
    return [float(x) for x in xs], [sizes[x] for x in xs]


CASE = ("rule_label", "alpha", "n_items", "anisotropy")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every law that the rows can speak to."""
    return [*_one_step(rows), *_levels(rows), *_batches(rows), *_steps(rows), *_losses(rows)]


def _one_step(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for case, members in group(of_kind(rows, "one-step"), *CASE, "batch_size").items():
        usable = [row for row in members if row["d"] >= 128 and not row["censored"]]
        verdict = _slope_verdict("count ~ d^e, one step", usable, "d", f"{_name(case)}")
        if verdict is not None:
            found.append(verdict)
    return found


def _slope_verdict(law: str, rows: Sequence[Row], axis: str, case: str) -> Verdict | None:
    xs, counts = by_size(rows, axis, "count")
    if len(xs) < 2 or any(not np.mean(values) > 0 for values in counts):
        return None
    _, predictions = by_size(rows, axis, "predicted_count")
    _, spreads = by_size(rows, axis, "predicted_spread")
    known = all(value is not None for values in predictions for value in values)
    fitted = fit_exponent(xs, counts, [values[0] or 0.0 for values in spreads] if known else None)
    predicted = fit_exponent(xs, predictions).slope if known else None
    seeds = min(len(values) for values in counts)
    return Verdict(
        law=law,
        case=case,
        measured=fitted.slope,
        low=fitted.low,
        high=fitted.high,
        predicted=predicted,
        asymptote=rows[0].get("asymptotic_exponent"),
        verdict=judge(fitted.slope, fitted.low, fitted.high, predicted),
        over=f"{axis} = {', '.join(f'{x:g}' for x in xs)}; {seeds} seeds or more each",
    )


def judge(measured: float, low: float, high: float, predicted: float | None, close: float = _CLOSE) -> str:
    """``agrees`` if the prediction is inside the interval or within ``close`` of the measured value."""
    if predicted is None:
        return "no prediction"
    return "agrees" if low <= predicted <= high or abs(measured - predicted) <= close else "differs"


def _levels(rows: Sequence[Row]) -> list[Verdict]:
    """Measured count over predicted count at the largest d: 1 if the theory is right without a fitted number."""
    found = []
    usable = [r for r in of_kind(rows, "one-step") if r["predicted_count"] and r["d"] >= 128 and not r["censored"]]
    for case, members in group(usable, *CASE, "batch_size").items():
        ratios: list[float] = []
        spreads: list[float] = []
        sizes: list[str] = []
        for (d,), same in group(sorted(members, key=lambda row: row["d"]), "d").items():
            ratio = np.mean([row["count"] for row in same]) / np.mean([row["predicted_count"] for row in same])
            own = np.std([row["count"] for row in same], ddof=1) if len(same) > 1 else 0.0
            spread = max(float(own), same[0]["predicted_spread"]) / math.sqrt(len(same))
            ratios.append(float(ratio))
            spreads.append(spread / float(np.mean([row["predicted_count"] for row in same])))
            sizes.append(str(d))
        weight = 1 / np.square(spreads)
        ratio, error = float(np.sum(weight * ratios) / weight.sum()), float(weight.sum() ** -0.5)
        low, high = ratio - 1.96 * error, ratio + 1.96 * error
        verdict = judge(ratio, low, high, 1.0, close=0.03)
        found.append(
            Verdict(
                "count / predicted count", _name(case), ratio, low, high, 1.0, None, verdict, "d = " + ", ".join(sizes)
            )
        )
    return found


def _batches(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    sampled = of_kind(rows, "batch")
    for case, members in group(sampled, "rule_label", "alpha", "n_items", "anisotropy").items():
        critical: dict[float, list[tuple[float, float | None]]] = {}
        for (d,), same in group(members, "d").items():
            measured = measured_critical_batch(same)
            if measured is not None and d >= 64:
                predicted = next((row["predicted_critical_batch"] for row in same if row["batch_size"] is None), None)
                critical[d] = [(measured, predicted)]
        if case[0] == "muon":
            found += _stored(members, case)
        if len(critical) < 2:
            continue
        xs = sorted(critical)
        values = [[point[0] for point in critical[x]] for x in xs]
        fitted = fit_exponent(xs, values)
        guesses = [critical[x][0][1] for x in xs]
        predicted = None
        if all(guess for guess in guesses):
            predicted = fit_exponent(xs, [[float(guess or 0)] for guess in guesses]).slope
        # B is read off a coarse grid between two counts: a quarter of an octave at either end
        half = 0.35 / math.log(xs[-1] / xs[0])
        low, high = fitted.slope - half, fitted.slope + half
        exponent = next((row["asymptotic_critical_batch_exponent"] for row in members), None)
        verdict = judge(fitted.slope, low, high, predicted)
        over = "d = " + ", ".join(f"{x:g}" for x in xs)
        found.append(
            Verdict("critical batch ~ d^e", _name(case), fitted.slope, low, high, predicted, exponent, verdict, over)
        )
    return found


def _stored(rows: Sequence[Row], case: tuple[Any, ...]) -> list[Verdict]:
    """Below the critical batch every sampled item is stored: the count grows as B^(1/alpha)."""
    largest = max(row["d"] for row in rows)
    at = [row for row in rows if row["d"] == largest]
    critical = measured_critical_batch(at)
    small = [row for row in at if row["batch_size"] and critical and 64 <= row["batch_size"] <= critical / 2]
    verdict = _slope_verdict("count ~ B^e below the critical batch", small, "batch_size", f"{_name(case)}, d={largest}")
    if verdict is None:
        return []
    return [Verdict(**{**vars(verdict), "asymptote": 1 / case[1]})]


def measured_critical_batch(rows: Sequence[Row], share: float = 0.9) -> float | None:
    """Smallest B with ``share`` of the population count, between two batches on log scales."""
    whole = [row["count"] for row in rows if row["batch_size"] is None]
    xs, counts = by_size([row for row in rows if row["batch_size"]], "batch_size", "count")
    if not whole or not xs:
        return None
    target = share * float(np.mean(whole))
    means = [float(np.mean(values)) for values in counts]
    for position, mean in enumerate(means):
        if mean >= target:
            if position == 0 or means[position - 1] <= 0:
                return None if position == 0 else xs[position]
            before, below = xs[position - 1], means[position - 1]
            return float(before * (xs[position] / before) ** (math.log(target / below) / math.log(mean / below)))
    return None


def _steps(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    deflation = [row for row in of_kind(rows, "steps") if row["mode"] == "deflation"]
    for case, members in group(deflation, "rule_label", "alpha", "n_items", "anisotropy", "step").items():
        usable = [row for row in members if 3 * row["count"] <= row["n_items"] and row["count"] > 0]
        verdict = _slope_verdict(f"d_t ~ d^e_t, step {case[-1]}", usable, "d", _name(case[:-1]))
        if verdict is not None:
            found.append(verdict)
    return found


def _losses(rows: Sequence[Row]) -> list[Verdict]:
    """Loss after the last exact step over ln N times the mass beyond the first ``count`` items: a constant near 1.3."""
    found = []
    exact = [row for row in of_kind(rows, "steps") if row["mode"] == "exact" and row.get("loss_over_tail_mass")]
    for case, members in group(exact, *CASE, "d").items():
        last = max(row["step"] for row in members)
        values = [row["loss_over_tail_mass"] for row in members if row["step"] == last]
        value, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        over = f"step {last}, {len(values)} seeds"
        law = "loss / (ln N x mass beyond d_t)"
        name = f"{_name(case[:-1])}, d={case[-1]}"
        low, high = value - 2 * spread, value + 2 * spread
        found.append(Verdict(law, name, value, low, high, None, None, "no prediction", over))
    return found


def _name(case: tuple[Any, ...]) -> str:
    label, alpha, n_items, anisotropy = case[:4]
    beta = f", beta={anisotropy:g}" if anisotropy else ""
    batch = f", B={case[4]}" if len(case) > 4 and case[4] else ""
    return f"{label}, alpha={alpha:g}, N={n_items}{beta}{batch}"


def _slopes(log_x: NDArray[np.float64], log_y: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = log_x - log_x.mean()
    return np.asarray(log_y @ centred / (centred @ centred))
