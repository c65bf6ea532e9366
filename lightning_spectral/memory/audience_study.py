"""``memory audience DIR``: the records of ``UpdateAudience`` over seeds, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import NONE, Column, Table

Row = dict[str, Any]
Key = tuple[str, int, str, str]  # optimizer, step, kind, rule


def read_runs(folder: str) -> list[tuple[str, list[Row]]]:
    """(optimizer, records) of every ``audience.jsonl`` below a folder; the run's name where it does not say.

    Raises:
        CommandError: There is none.
    """
    from lightning_spectral.callbacks.update_audience import AUDIENCE_FILE, read_audience
    from lightning_spectral.records import read_run

    found = []
    for path in sorted(Path(folder).rglob(AUDIENCE_FILE)):
        if "previous" in path.parts:
            continue
        try:
            name = read_run(path.parent).optimizer
        except (OSError, ValueError):
            name = path.parent.name
        found.append((name, [record.as_dict() for record in read_audience(path)]))
    if not found:
        raise CommandError(f"`DIR` {folder} holds no {AUDIENCE_FILE}; train with `UpdateAudience` first.")
    return found


def table(runs: Sequence[tuple[str, Sequence[Row]]]) -> Table:
    """Mean gain of each group, TAIL gain per HEAD gain, and how much that exceeds raw momentum's.

    All three are means over runs with 95 % t intervals; the difference is taken run by run, on the same momentum. While
    HEAD gains, a positive difference says that the rule serves rare tokens more, or disturbs them less, than raw
    momentum would at the same HEAD gain; where HEAD gains nothing, neither number means much.
    """
    gains: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[Key, list[float]] = defaultdict(list)
    excess: dict[Key, list[float]] = defaultdict(list)
    for optimizer, records in runs:
        one = {(r["step"], r["kind"], r["rule"], r["bucket"]): r["gain"] for r in records if r["gain"] is not None}
        for (step, kind, rule, bucket), gain in one.items():
            gains[optimizer, step, kind, rule][bucket].append(gain)
        for step, kind, rule in dict.fromkeys(key[:3] for key in one):
            own, raw = (_tail_per_head(one, step, kind, of) for of in (rule, "momentum"))
            if own is not None:
                shares[optimizer, step, kind, rule].append(own)
            if own is not None and raw is not None and rule != "momentum":
                excess[optimizer, step, kind, rule].append(own - raw)
    buckets = list(dict.fromkeys(bucket for of in gains.values() for bucket in of))
    columns = ["optimizer", "step", "matrices", "rule", *buckets, "TAIL per HEAD", "less momentum's"]
    shown = [Column(name, _shown, name.lower().replace(" ", "_").replace("'", "")) for name in columns[4:]]
    cells = [
        [*key, *(interval(gains[key].get(bucket, [])) for bucket in buckets), interval(shares.get(key, [])),
         interval(excess.get(key, [])), max(len(values) for values in gains[key].values())]
        for key in sorted(gains)
    ]  # fmt: skip
    return Table([*columns[:4], *shown, "runs"], cells, "gain of each group, mean [95 % interval] over runs")


def _shown(of: Sequence[float] | None) -> str:
    """``mean [low, high]``; the mean alone for one run."""
    if not of:
        return NONE
    return f"{of[0]:.3g}" if len(of) == 1 else f"{of[0]:.3g} [{of[1]:.3g}, {of[2]:.3g}]"


def _tail_per_head(gains: dict[tuple[int, str, str, str], float], step: int, kind: str, rule: str) -> float | None:
    tail, head = (gains.get((step, kind, rule, bucket)) for bucket in ("tail", "head"))
    return None if tail is None or not head else tail / head


def interval(values: Sequence[float]) -> list[float] | None:
    """Mean, and the ends of its 95 % t interval over runs; the mean alone for one run, ``None`` for none."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return [mean]
    half = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]
