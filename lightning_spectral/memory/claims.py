"""The abstract of arXiv:2603.26554 as a test: eight sentences, each with numbers, intervals and a verdict.

A sentence is an inequality about measured numbers. It ``holds`` if the interval that covers all eight tests together
with 95 % (Bonferroni) lies on the right side, ``fails`` if it lies on the wrong one, and is ``not decided`` if it
reaches over: then it says what this budget could have told apart. Beside every number stand the theory's prediction at
the very sizes measured, without a fitted parameter, and the asymptote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_spectral.memory.estimates import (
    SIZES_AT_LEAST,
    Estimate,
    batch_exponent,
    difference,
    exponent,
    joint,
    lags,
    mean_of,
    of,
    ratio_at_largest,
)
from lightning_spectral.memory.fit import Row, group
from lightning_spectral.text.tables import Column, Table
from lightning_spectral.theory.exponents import one_step_exponent

SENTENCES = 8
OUTSIDE = 0.05 / SENTENCES
_GRAM_FROM = 1024  # below it SGD's count follows no power law: the bulk's noise binds, not the heads


@dataclass(frozen=True)
class Claim:
    """One sentence.

    Attributes:
        number: 1 to 8.
        sentence: What the abstract says.
        test: The inequality that decides it.
        verdict: ``holds``, ``fails`` or ``not decided``.
        why: The decisive number, its simultaneous interval, and what the budget could tell apart.
        estimates: The numbers.
    """

    number: int
    sentence: str
    test: str
    verdict: str
    why: str
    estimates: list[Estimate] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for ``claims.json``."""
        return asdict(self)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """All eight, whatever the rows can say about them."""
    mine = [row for row in rows if row.get("part") and row.get("status", "ok") == "ok"]
    return [make(mine) for make in _CLAIMS]


def decide(estimate: Estimate | None, low: float, high: float = math.inf) -> tuple[str, str]:
    """Verdict on ``low < value < high``, and why."""
    if estimate is None or not math.isfinite(estimate.error) or estimate.error <= 0:
        return "not decided", "too few sizes or seeds in this budget"
    half = estimate.half(OUTSIDE)
    text = f"{estimate.name} = {estimate.value:.3f} +- {half:.3f} (all eight together 95 %)"
    if estimate.value - half > low and estimate.value + half < high:
        return "holds", text
    if estimate.value + half < low or estimate.value - half > high:
        return "fails", text
    return "not decided", f"{text}; this budget tells apart what differs by {2 * half:.2g}"


def _claim(
    number: int, sentence: str, test: str, decisive: Estimate | None, bounds: tuple[float, float],
    others: Sequence[Estimate | None] = (),
) -> Claim:  # fmt: skip
    verdict, why = decide(decisive, *bounds)
    return Claim(number, sentence, test, verdict, why, [one for one in (decisive, *others) if one is not None])


def _capacity(rows: Sequence[Row]) -> Claim:
    muon = exponent(of(rows, "capacity", "muon"), "exponent of Muon", lambda a: one_step_exponent("muon", a), 256)
    sgd = exponent(of(rows, "capacity", "sgd"), "exponent of SGD", lambda a: one_step_exponent("sgd", a), _GRAM_FROM)
    return _claim(
        1, "One step of Muon stores more items than one step of SGD: d^(1 + 1/2a) against d^(1/2a)",
        "exponents differ by more than 1/2 (the law: by 1)", difference("difference of exponents", muon, sgd),
        (0.5, math.inf), (muon, sgd),
    )  # fmt: skip


def _newton(rows: Sequence[Row]) -> Claim:
    muon = exponent(of(rows, "capacity", "muon"), "exponent of Muon", lambda a: one_step_exponent("muon", a), 256)
    newton = exponent(
        of(rows, "capacity", "newton"), "exponent of Newton", lambda a: one_step_exponent("newton", a), 256
    )
    ratio = ratio_at_largest(of(rows, "capacity"), "muon", "newton", "Muon's count over Newton's, largest d")
    return _claim(
        2, "Muon matches Newton's method with first-order information only",
        "exponents of Muon and Newton differ by less than 0.2", difference("difference of exponents", muon, newton),
        (-0.2, 0.2), (muon, newton, ratio),
    )  # fmt: skip


def _batch(rows: Sequence[Row]) -> Claim:
    made = {rule: batch_exponent(of(rows, "batch", rule), rule) for rule in ("muon", "sgd")}
    return _claim(
        3, "Muon saturates at a larger critical batch size: d^(a + 1/2) against d^(1/2)",
        "exponents of the critical batch differ by more than 1/2 (the law: by a)",
        difference("difference of exponents", made["muon"], made["sgd"]), (0.5, math.inf), tuple(made.values()),
    )  # fmt: skip


def _initial(rows: Sequence[Row]) -> Claim:
    first = {rule: [row for row in of(rows, "deflation", rule) if row["step"] == 1] for rule in ("muon", "sgd")}
    ratio = ratio_at_largest([*first["muon"], *first["sgd"]], "muon", "sgd", "Muon's first step over SGD's, largest d")
    slopes = {rule: exponent(same, f"exponent of {rule}'s first step") for rule, same in first.items()}
    return _claim(
        4, "Muon recovers items faster at the beginning", "Muon's first step stores more than three times as many",
        ratio, (3.0, math.inf), (difference("its growth with d, as an exponent", slopes["muon"], slopes["sgd"]),),
    )  # fmt: skip


def _later(rows: Sequence[Row]) -> Claim:
    deflation = of(rows, "deflation")
    drifts, guesses, sizes = [], [], []
    for d in sorted({row["d"] for row in deflation}):
        by_seed = group([row for row in deflation if row["d"] == d], "seed").values()
        for same in by_seed:
            known = lags(same, d)
            if len(known) >= 3:
                drifts.append((known[-1][1] - known[1][1]) / (known[-1][0] - known[1][0]))
        one_run = [row for row in next(iter(by_seed)) if row["predicted_count"]]
        as_predicted = [{**row, "count": row["predicted_count"]} for row in one_run]
        known = lags(as_predicted, d) if as_predicted else []
        if len(known) >= 3:
            guesses.append((known[-1][1] - known[1][1]) / (known[-1][0] - known[1][0]))
            sizes.append(str(d))
    drift = None
    if len(drifts) >= SIZES_AT_LEAST:
        drift = mean_of("steps SGD falls back per step of Muon, from its second on", drifts,
                        f"d = {', '.join(sizes)}; {len(drifts)} runs", float(np.mean(guesses)) if guesses else None,
                        0.0)  # fmt: skip
    return _claim(
        5, "Later both recover items at comparable speed",
        "SGD falls back by less than half a step for every step of Muon", drift, (-0.5, 0.5),
    )  # fmt: skip


def _limit(rows: Sequence[Row]) -> Claim:
    exact = of(rows, "exact")
    last = max((row["step"] for row in exact), default=0)
    shares: dict[str, Estimate] = {}
    slopes: list[Estimate | None] = []
    for rule, name in (("muon", "Muon"), ("sgd", "SGD")):
        ended = [row for row in exact if row["rule"] == rule and row["step"] == last]
        if not ended:
            continue
        d = max(row["d"] for row in ended)
        values = [row["count"] / row["information_limit"] for row in ended if row["d"] == d]
        share = mean_of(f"share of d^2/(2 ln N), {name}", values, f"d = {d}, {last} steps; {len(values)} seeds")
        if share is not None:
            shares[rule] = share
        slopes.append(exponent([{**row, "predicted_count": None} for row in ended], f"exponent in d, {name}",
                                lambda _: 2.0))  # fmt: skip
    worst = min(shares.values(), key=lambda one: one.value) if len(shares) == 2 else None
    return _claim(
        6, "Both come up to the information-theoretic limit d^2 / (2 ln N)",
        "after the last step each stores more than 0.4 of the limit, exact softmax dynamics", worst, (0.4, math.inf),
        (*(one for one in shares.values() if one is not worst), *slopes),
    )  # fmt: skip


def _amplification(rows: Sequence[Row]) -> Claim:
    made = exponent(of(rows, "amplification"), "exponent in d of the amplification", lambda a: a - 0.5)
    level = of(rows, "amplification")
    factor = None
    if level:
        d = max(row["d"] for row in level)
        values = [row["count"] for row in level if row["d"] == d]
        guess = float(np.mean([row["predicted_count"] for row in level if row["d"] == d]))
        factor = mean_of("amplification", values, f"d = {d}; {len(values)} seeds", guess)
    return _claim(
        7, "Muon amplifies the signal of rare items: signal over noise just beyond its reach, against SGD",
        "the amplification grows with d, exponent above 1/2 (the law: a - 1/2)", made, (0.5, math.inf), (factor,),
    )  # fmt: skip


def _anisotropy(rows: Sequence[Row]) -> Claim:
    found = []
    for (d,), same in group(of(rows, "anisotropy"), "d").items():
        for beta in sorted({row["anisotropy"] for row in same}):
            at = [row for row in same if row["anisotropy"] == beta]
            ratio = ratio_at_largest(at, "muon", "newton", f"Muon over Newton, beta = {beta:g}, d = {d}")
            if ratio is not None:
                found.append((d, beta, ratio))
    largest = max((d for d, _, _ in found), default=0)
    mine = [(beta, ratio) for d, beta, ratio in found if d == largest]
    drop = None
    if len(mine) >= 2:
        (_, plain), (beta, steep) = mine[0], mine[-1]
        value = math.log(steep.value / plain.value)
        error, freedom = joint((steep.error / steep.value, steep.freedom), (plain.error / plain.value, plain.freedom))
        guess = None
        if steep.predicted and plain.predicted:
            guess = math.log(steep.predicted / plain.predicted)
        name = f"ln of Muon over Newton, beta = {beta:g} less beta = 0"
        drop = Estimate(name, value, error, guess, None, f"d = {largest}; {plain.over.split('; ')[1]}", freedom)
    return _claim(
        8, "With anisotropic inputs Muon cedes ground to Newton", "the ratio falls by a factor of more than 1.25",
        drop, (-math.inf, -math.log(1.25)), [ratio for _, ratio in mine],
    )  # fmt: skip


_CLAIMS = (_capacity, _newton, _batch, _initial, _later, _limit, _amplification, _anisotropy)


def claims_tables(made: Sequence[Claim]) -> list[Table]:
    """One table of sentences, one of numbers."""
    sentences = Table(
        ("claim", "sentence", "test", "verdict", "why"),
        [(c.number, c.sentence, c.test, c.verdict, c.why) for c in made], "sentences",
    )  # fmt: skip
    columns = (
        "claim", "number", Column("measured", ".3f"), Column("low", ".3f"), Column("high", ".3f"),
        Column("predicted at these sizes", ".3f", "predicted"), Column("asymptote", ".3f"), "over",
    )  # fmt: skip
    cells = [
        (claim.number, one.name, one.value, *one.interval, one.predicted, one.asymptote, one.over)
        for claim in made
        for one in claim.estimates
    ]
    return [sentences, Table(columns, cells, "numbers, with 95 % intervals of their own")]
