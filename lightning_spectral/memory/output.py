"""What a memory command leaves behind: results.jsonl as it goes, then tables, figures and a summary.

Nothing written is ever lost: a new command in a used folder moves the old files to ``previous/NNN``, an interrupted one
leaves its rows, which ``memory report DIR`` draws and ``--resume`` continues.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_spectral.memory import fit as memory_fit
from lightning_spectral.memory.plan import Progress, Task, identity
from lightning_spectral.memory.summary import summary_notes, summary_tables
from lightning_spectral.memory.verdicts import Verdict, untested, verdict_note, verdict_table, verdicts
from lightning_spectral.text import CommandError, whole_file, write_text
from lightning_spectral.text import set_aside as move_aside
from lightning_spectral.text.tables import Table, aside, print_tables, render

Row = dict[str, Any]
INTERRUPTED = 130  # exit code, as of a shell
_OURS = ("results.jsonl", "results.csv", "verdicts.csv", "verdicts.md", "claims.json", "claims.md", "recall.md")


def run_tasks(
    out: str, tasks: Sequence[Task], *, resume: bool = False, figures: bool = True, style: str = "table"
) -> int:
    """Make the rows of all tasks, each written when it is done, then tables and figures; returns the exit code.

    Args:
        out: The folder.
        tasks: What to run.
        resume: Keep the rows that are there and run only what is missing.
        figures: Draw.
        style: Of the printed tables.
    """
    say = sayer(style)
    folder = prepare(out, keep=resume, style=style)
    left = _missing(folder, tasks) if resume else list(tasks)
    if resume:
        say(f"resume: {len(tasks) - len(left)} of {len(tasks)} runs are there already")
    interrupted = write_rows(folder, with_progress(left, Progress(left)))
    if interrupted:
        say(f"\ninterrupted; the rows so far are in {folder}: the same command with `--resume` runs the rest.")
    done = memory_fit.read_results(folder)
    runs = [row for row in done if row.get("kind") != "theory"]
    if runs and not any(memory_fit.ok(row) for row in runs) and not interrupted:
        raise CommandError(str(runs[0]["reason"]))
    conclude(folder, done, figures=figures, style=style)
    return INTERRUPTED if interrupted else 0


def sayer(style: str) -> Callable[[str], None]:
    """Says sentences beside tables of a style, without mixing them into what a program reads."""
    return lambda text: print(text, file=aside(style))


def with_progress(tasks: Sequence[Task], progress: Progress) -> Iterator[Row]:
    """The rows of all tasks, each announced."""
    for number, task in enumerate(tasks):
        progress.begin(number)
        yield from task.make()
        progress.end(number)


def prepare(out: str, *, keep: bool = False, style: str = "table") -> Path:
    """The folder, ready to be written to; results that are there are moved aside unless they are kept."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"`--out` {out} is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not keep and (moved := set_aside(folder)) is not None:
        sayer(style)(f"the earlier results in {folder} are in {moved} now (`--resume` continues them instead)")
    return folder


def set_aside(folder: Path) -> Path | None:
    """Move everything that a memory command wrote to ``previous/NNN``; returns it, or ``None`` if there was nothing."""
    from lightning_spectral.memory.figures import FIGURE_FILES

    return move_aside(folder, (*_OURS, *FIGURE_FILES))


def write_rows(folder: Path, rows: Iterable[Row]) -> bool:
    """Append each row when it is made; returns whether the user interrupted."""
    with (folder / memory_fit.RESULTS_FILE).open("a") as file:
        try:
            for row in rows:
                file.write(json.dumps(finite(row), allow_nan=False) + "\n")
                file.flush()
        except KeyboardInterrupt:
            return True
    return False


def _missing(folder: Path, tasks: Sequence[Task]) -> list[Task]:
    """Tasks whose rows are not all there; rows of a task that was cut short are taken out of the file."""
    path = folder / memory_fit.RESULTS_FILE
    if not path.exists():
        return list(tasks)
    there = memory_fit.read_results(folder)
    counts: dict[str, int] = {}
    for row in there:
        counts[identity(row)] = counts.get(identity(row), 0) + 1
    # rows are written in order, so only the last run in the file may have been cut short
    last = identity(there[-1]) if there else None
    left: list[Task] = []
    torn: set[str] = set()
    for task in tasks:
        whole = all(name in counts for name in task.identities)
        if whole and (last not in task.identities or sum(counts[name] for name in task.identities) >= task.rows):
            continue
        left.append(task)
        torn |= task.identities
    write_text(path, "".join(json.dumps(row) + "\n" for row in there if identity(row) not in torn))
    return left


def conclude(folder: Path, rows: Sequence[Row], *, figures: bool, laws: bool = False, style: str = "table") -> None:
    """Tables, ``results.csv``, figures; all from the rows alone, and of the kind that the rows are.

    Args:
        folder: Where files go.
        rows: Of ``results.jsonl``.
        figures: Draw.
        laws: Also judge the laws of the paper.
        style: Of the printed tables.
    """
    flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    write_csv(folder / "results.csv", flat)
    kinds = {row["kind"] for row in rows}
    if kinds == {"recall"}:
        tables, notes, made = _recall(folder, rows, figures)
    elif kinds == {"flattening"}:
        tables, notes, made = _flattening(rows)
    elif kinds == {"advice"}:
        tables, notes, made = _advice(rows)
    elif any(row.get("part") for row in rows):
        tables, notes, made = _claims(folder, rows, figures)
    else:
        tables, notes, made = _laws(folder, rows, figures, laws)
    print_tables(tables, style)
    say = sayer(style)
    for note in notes:
        say(note)
    say(f"\nwritten to {folder}: {', '.join(['results.jsonl', 'results.csv', *made])}")


Concluded = tuple[list[Table], list[str], list[str]]  # tables, sentences, names of files


def _laws(folder: Path, rows: Sequence[Row], figures: bool, laws: bool) -> Concluded:
    """Means by case; with ``laws`` what the paper says of them."""
    tables, notes, made = summary_tables(rows), summary_notes(rows), []
    if laws:
        table: list[Verdict] = verdicts(rows)
        table += untested(table)
        write_csv(folder / "verdicts.csv", [vars(verdict) for verdict in table])
        tables.append(verdict_table(table))
        notes.append("\n" + verdict_note(table))
        write_text(folder / "verdicts.md", f"{render(tables[-1], 'markdown')}\n\n{verdict_note(table)}\n")
        made += ["verdicts.csv", "verdicts.md"]
    if figures:
        from lightning_spectral.memory.figures import draw_all

        made += [path.name for path in draw_all(rows, folder)]
    return tables, notes, made


def _claims(folder: Path, rows: Sequence[Row], figures: bool) -> Concluded:
    """The eight sentences, from rows of ``memory claims``."""
    from lightning_spectral.memory.claims import claims, claims_tables

    found = claims(rows)
    tables = claims_tables(found)
    write_text(folder / "claims.md", _markdown(tables))
    write_text(folder / "claims.json", json.dumps(finite([one.as_dict() for one in found]), indent=1) + "\n")
    made = ["claims.md", "claims.json"]
    if figures:
        from lightning_spectral.memory.figures_claims import draw_claims

        made.append(draw_claims(rows, found, folder).name)
    return tables, [], made


def _recall(folder: Path, rows: Sequence[Row], figures: bool) -> Concluded:
    """Rows of ``memory recall``."""
    from lightning_spectral.memory.recall_tables import tables

    found = tables(rows)
    write_text(folder / "recall.md", _markdown(found))
    made = ["recall.md"]
    if figures:
        from lightning_spectral.memory.figures_recall import draw_recall

        made += [path.name for path in (draw_recall(rows, folder),) if path is not None]
    return found, [], made


def _flattening(rows: Sequence[Row]) -> Concluded:
    """Rows of ``memory newton-schulz --checkpoint``."""
    from lightning_spectral.memory.flattening import tables

    made, closing = tables(rows)
    return made, ["", *closing], []


def _advice(rows: Sequence[Row]) -> Concluded:
    """Rows of ``memory advise``."""
    from lightning_spectral.memory.advise import Advice, advice_table, closing

    found = [Advice(**{field.name: row[field.name] for field in fields(Advice)}) for row in rows]
    return [advice_table(found)], ["", *closing(found)], []


def _markdown(tables: Sequence[Table]) -> str:
    return "\n\n".join(render(table, "markdown") for table in tables) + "\n"


def finite(value: Any) -> Any:
    """Plain JSON values; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with the union of their columns, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
