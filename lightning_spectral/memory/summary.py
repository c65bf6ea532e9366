"""What a memory command prints: means by case; what has no prediction and why, what was censored or singular."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_spectral.memory.fit import group, ok
from lightning_spectral.text.tables import Column, Table

Row = dict[str, Any]
_SUMMARY = ("rule_label", "alpha", "d", "d_out", "n_items", "batch_size", "anisotropy", "mode", "dtype", "step")


def summary_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per kind of row."""
    tables: list[Table] = []
    for (kind,), members in group(rows, "kind").items():
        fields = [f for f in _SUMMARY if any(f in row for row in members) and _varies_or_names(members, f)]
        theory = kind == "theory"
        columns = ["predicted", "asymptotic", "crit. batch"] if theory else ["count", "sd", "predicted"]
        cells = []
        for key, same in group([row for row in members if theory or ok(row)], *fields).items():
            named = ["population" if f == "batch_size" and v is None else v for f, v in zip(fields, key, strict=True)]
            cells.append([*named, *(_theory_cells(same) if theory else _measured_cells(same))])
        tables.append(Table([*fields, *(Column(name, ".1f") for name in columns)], cells, kind))
    return tables


def summary_notes(rows: Sequence[Row]) -> list[str]:
    """Sentences below the tables."""
    return [*_notes(rows), *_singular(rows), *_censored(rows)]


def _varies_or_names(rows: Sequence[Row], field: str) -> bool:
    return field in ("rule_label", "d") or len({row.get(field) for row in rows}) > 1


def _measured_cells(rows: Sequence[Row]) -> list[float | None]:
    counts = [row["count"] for row in rows]
    mean = sum(counts) / len(counts)
    variance = sum((count - mean) ** 2 for count in counts) / max(len(counts) - 1, 1)
    return [mean, variance**0.5 if len(counts) > 1 else None, _guess(rows)]


def _theory_cells(rows: Sequence[Row]) -> list[float | None]:
    critical, limit = rows[0].get("predicted_critical_batch"), rows[0].get("asymptotic_count")
    return [_guess(rows), limit or None, critical or None]


def _guess(rows: Sequence[Row]) -> float | None:
    predicted = [row["predicted_count"] for row in rows if row.get("predicted_count") is not None]
    return sum(predicted) / len(predicted) if predicted else None


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Why predictions are missing or may be off."""
    notes: dict[str, set[str]] = {}
    for row in rows:
        if row.get("prediction_note"):
            notes.setdefault(row["prediction_note"], set()).add(row["rule_label"])
    for note, rules in notes.items():
        yield f"\nprediction of {', '.join(sorted(rules))}: {note}"


def _singular(rows: Sequence[Row]) -> Iterator[str]:
    missing = [row for row in rows if not ok(row)]
    if missing:
        why = missing[0]["reason"]
        yield f"\nwarning: {len(missing)} of {len(rows)} runs could not be made (status singular): {why}"


def _censored(rows: Sequence[Row]) -> Iterator[str]:
    censored = [row for row in rows if row.get("censored")]
    if censored:
        worst = max(censored, key=lambda row: int(row["count"]))
        yield (
            f"\nwarning: censored: {len(censored)} of {len(rows)} runs recover more than a third of all items (e.g. "
            f"{worst['rule_label']}, d={worst['d']}: {worst['count']} of n_items={worst['n_items']}); their counts are "
            f"too low. Use --n-items {3 * worst['count']} or more."
        )
