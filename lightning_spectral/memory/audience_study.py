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


def table(runs: Sequence[tuple[str, Sequence[Row]]]) -> list[str]:
    """Markdown: mean gain of each group, and what rare tokens get per gain of frequent ones, against raw momentum's.

    The last column is ``(TAIL / HEAD of the rule) / (TAIL / HEAD of the momentum)``, a mean over runs with its 95 % t
    interval: below 1 an update disturbs (or serves) rare tokens less than raw momentum at the same HEAD gain.
    """
    gains: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ratios: dict[Key, list[float]] = defaultdict(list)
    for optimizer, records in runs:
        one = {(r["step"], r["kind"], r["rule"], r["bucket"]): r["gain"] for r in records if r["gain"] is not None}
        for (step, kind, rule, bucket), gain in one.items():
            gains[optimizer, step, kind, rule][bucket].append(gain)
        for step, kind, rule in dict.fromkeys(key[:3] for key in one):
            needed = [one.get((step, kind, r, b)) for r in (rule, "momentum") for b in ("tail", "head")]
            if all(value for value in needed):
                tail, head, raw_tail, raw_head = (float(value or 0) for value in needed)
                ratios[optimizer, step, kind, rule].append((tail / head) / (raw_tail / raw_head))
    buckets = list(dict.fromkeys(bucket for of in gains.values() for bucket in of))
    lines = [
        f"| optimizer | step | matrices | rule | {' | '.join(buckets)} | TAIL per HEAD, of momentum's | runs |",
        "|" + "---|" * (len(buckets) + 6),
    ]
    for key in sorted(gains):
        optimizer, step, kind, rule = key
        cells = [interval(gains[key].get(bucket, [])) for bucket in buckets]
        runs_of = max(len(values) for values in gains[key].values())
        ratio = interval(ratios.get(key, []))
        lines.append(f"| {optimizer} | {step} | {kind} | {rule} | {' | '.join(cells)} | {ratio} | {runs_of} |")
    return lines


def interval(values: Sequence[float]) -> str:
    """``mean [low, high]``: the 95 % t interval over runs; the mean alone for one run."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.3g}"
    half = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.3g} [{mean - half:.3g}, {mean + half:.3g}]"
