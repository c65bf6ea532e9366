"""What a memory command leaves behind: results.jsonl as it goes, then tables, figures and a summary."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_spectral.memory import fit as memory_fit
from lightning_spectral.text import CommandError

Row = dict[str, Any]
_SUMMARY = ("rule_label", "alpha", "d", "batch_size", "anisotropy", "step")


def write_outputs(out: str, rows: Iterable[Row], figures: bool, verdicts: bool, say: Callable[[str], None]) -> int:
    """Write each row when it is done; print a summary; returns the exit code."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"`--out` {out} is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    with (folder / memory_fit.RESULTS_FILE).open("w") as file:
        for row in rows:
            line = finite(row)
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            done.append(line)
    _say_summary(done, say)
    _say_censored(done, say)
    write_csv(
        folder / "results.csv", [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in done]
    )
    made = ["results.jsonl", "results.csv"]
    if verdicts:
        table = memory_fit.verdicts(done)
        write_csv(folder / "verdicts.csv", [vars(verdict) for verdict in table])
        lines = verdict_table(table)
        (folder / "verdicts.md").write_text("\n".join(lines) + "\n")
        say("\n" + "\n".join(lines))
        made += ["verdicts.csv", "verdicts.md"]
    if figures:
        from lightning_spectral.memory.figures import draw_all

        made += [path.name for path in draw_all(done, folder)]
    say(f"\nwritten to {folder}: {', '.join(made)}")
    return 0


def write_rows(out: str, rows: Iterable[Row]) -> Path:
    """Write ``results.jsonl`` alone; returns its path."""
    path = Path(out) / memory_fit.RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))
    return path


def finite(value: Any) -> Any:
    """Plain JSON values; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_csv(path: Path, rows: list[Row]) -> None:
    """Rows with the union of their columns, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def verdict_table(verdicts: list[memory_fit.Verdict]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| law | case | measured | 95 % interval | predicted at this size | asymptote | verdict | over |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        interval = f"[{v.low:.3f}, {v.high:.3f}]"
        lines.append(
            f"| {v.law} | {v.case} | {v.measured:.3f} | {interval} | {_number(v.predicted)} | {_number(v.asymptote)} | "
            f"{v.verdict} | {v.over} |"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _say_summary(rows: list[Row], say: Callable[[str], None]) -> None:
    for (kind,), members in memory_fit.group(rows, "kind").items():
        fields = [f for f in _SUMMARY if any(f in row for row in members) and _varies_or_names(members, f)]
        if kind == "theory":
            say(f"\n{kind}: " + "  ".join(f"{f:>12}" for f in [*fields, "predicted", "asymptotic", "crit. batch"]))
        else:
            say(f"\n{kind}: " + "  ".join(f"{f:>12}" for f in [*fields, "count", "sd", "predicted"]))
        for key, same in memory_fit.group(members, *fields).items():
            predicted = [row["predicted_count"] for row in same if row.get("predicted_count") is not None]
            guess = f"{sum(predicted) / len(predicted):.1f}" if predicted else "-"
            if kind == "theory":
                critical = same[0].get("predicted_critical_batch")
                limit = same[0].get("asymptotic_count")
                cells = [guess, f"{limit:.1f}" if limit else "-", f"{critical:.0f}" if critical else "-"]
            else:
                counts = [row["count"] for row in same]
                mean = sum(counts) / len(counts)
                variance = sum((count - mean) ** 2 for count in counts) / max(len(counts) - 1, 1)
                cells = [f"{mean:.1f}", f"{variance**0.5:.1f}" if len(counts) > 1 else "-", guess]
            named = [
                "population" if f == "batch_size" and v is None else str(v) for f, v in zip(fields, key, strict=True)
            ]
            say(" " * (len(kind) + 2) + "  ".join(f"{cell:>12}" for cell in [*named, *cells]))


def _varies_or_names(rows: list[Row], field: str) -> bool:
    return field in ("rule_label", "d") or len({row.get(field) for row in rows}) > 1


def _say_censored(rows: list[Row], say: Callable[[str], None]) -> None:
    censored = [row for row in rows if row.get("censored")]
    if censored:
        worst = max(censored, key=lambda row: row["count"])
        say(
            f"\nwarning: censored: {len(censored)} of {len(rows)} runs recover more than a third of all items (e.g. "
            f"{worst['rule_label']}, d={worst['d']}: {worst['count']} of n_items={worst['n_items']}); their counts are "
            f"too low. Use --n-items {3 * worst['count']} or more."
        )
