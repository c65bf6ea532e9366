"""What the rows of ``memory recall`` show: by step and width, as exponents in the width, and optimizers in pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_spectral.memory.estimates import Estimate, joint
from lightning_spectral.memory.fit import Row, by_size, fit_exponent, group
from lightning_spectral.text.tables import Column, Table

NAMES = {"muon": "Muon", "adamw": "AdamW", "sgd": "SGD"}
MEASURED = {"count": "facts", "tail_soft_rank": "TAIL soft rank", "tail_hard_rank": "TAIL hard rank"}


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """Rows of the study, not of its search, at each optimizer's best learning rate per width.

    Best is most facts at the last step, mean over seeds; after a search there is one rate, and nothing to choose.
    """
    chosen: list[Row] = []
    study = [row for row in rows if row.get("stage", "study") == "study"]
    for same in group(study, "optimizer", "d", "network").values():
        ends: dict[Any, float] = {}
        for (lr,), tried in group(same, "lr").items():
            last = max(row["step"] for row in tried)
            ends[lr] = float(np.mean([row["count"] for row in tried if row["step"] == last]))
        chosen += [row for row in same if row["lr"] == max(ends, key=lambda lr: ends[lr])]
    return chosen


def tables(rows: Sequence[Row]) -> list[Table]:
    """Means, exponents and pairs, of the best learning rates."""
    best = best_rates(rows)
    return [_means(best), _exponents(best), _pairs(best)]


def _means(best: Sequence[Row]) -> Table:
    names = ("step", "optimizer", "d", "lr", *MEASURED.values(), "TAIL recall", "seeds")
    cells: list[list[Any]] = []
    for (step, name, d), same in sorted(group(best, "step", "optimizer", "d").items()):
        found = [_mean_sd([row.get(key) for row in same]) for key in (*MEASURED, "tail")]
        cells.append([step, NAMES.get(name, name), d, f"{same[0]['lr']:g}", *found, len(same)])
    return Table(names, cells, "facts recalled and rank of the hidden layer, mean +- sd over seeds")


def _exponents(best: Sequence[Row]) -> Table:
    cells: list[list[Any]] = []
    for (step, name), same in sorted(group(best, "step", "optimizer").items()):
        for key, what in MEASURED.items():
            known = [row for row in same if row.get(key)]
            xs, values = by_size(known, "d", key)
            if len(xs) >= 2 and min(len(at) for at in values) >= 2:  # one seed knows no interval
                fitted = fit_exponent(xs, values)
                freedom = sum(len(at) - 1 for at in values)
                low, high = Estimate(key, fitted.slope, fitted.error, freedom=freedom).interval
                cells.append([step, NAMES.get(name, name), what, fitted.slope, low, high])
    return Table(
        ("step", "optimizer", "exponent in d of", *(Column(name, ".2f") for name in ("value", "low", "high"))), cells,
        "exponents in d, with 95 % intervals",
    )  # fmt: skip


def _pairs(best: Sequence[Row]) -> Table:
    """Geometric mean over seeds of one optimizer's number divided by another's, at the first and the last step."""
    steps = sorted({row["step"] for row in best})
    cells: list[list[Any]] = []
    for step, d in itertools.product(dict.fromkeys((*steps[:1], *steps[-1:])), sorted({row["d"] for row in best})):
        at = group([row for row in best if row["step"] == step and row["d"] == d], "optimizer")
        for (first,), (second,) in itertools.combinations(at, 2):
            for key, what in MEASURED.items():
                found = log_ratio([row.get(key) for row in at[first,]], [row.get(key) for row in at[second,]])
                if found is not None:
                    pair = f"{NAMES.get(first, first)} / {NAMES.get(second, second)}"
                    cells.append([step, d, pair, what, *(math.exp(x) for x in (found.value, *found.interval))])
    return Table(
        ("step", "d", "pair", "ratio of", *(Column(name, ".2f") for name in ("value", "low", "high"))), cells,
        "optimizers in pairs, with 95 % intervals",
    )  # fmt: skip


def log_ratio(first: Sequence[float | None], second: Sequence[float | None]) -> Estimate | None:
    """Logarithm of the ratio of geometric means, from at least two positive numbers of each."""
    logs = [[math.log(value) for value in values if value] for values in (first, second)]
    if min(len(values) for values in logs) < 2:
        return None
    error, freedom = joint(
        *((float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1.0) for values in logs)
    )
    return Estimate("log ratio", float(np.mean(logs[0]) - np.mean(logs[1])), error, freedom=freedom)


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" +- {np.std(known, ddof=1):.3g}" if len(known) > 1 else ""
    return f"{np.mean(known):.4g}{spread}"
