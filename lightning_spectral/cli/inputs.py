"""What ``fit``, ``compare`` and ``report`` read: run folders or one tidy CSV, with the same options."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_spectral.cli.parser import at_least
from lightning_spectral.records import RUN_FILES
from lightning_spectral.text import CommandError, tables

if TYPE_CHECKING:
    from lightning_spectral.analysis.cells import Sheet
    from lightning_spectral.analysis.points import PointTable
    from lightning_spectral.analysis.runs import Problem, RunSet
    from lightning_spectral.analysis.study import Fitted

T = TypeVar("T")
_SHOWN_OF_A_KIND = 6
# options that one kind of input has no use for, and their defaults
_OF_RUNS: dict[str, Any] = {
    **{"metrics": ["soft_rank", "hard_rank"], "ranks": "auto", "last": 5},
    **dict.fromkeys(("until_step", "stage", "stack", "loader")),
}
_OF_TABLES: dict[str, Any] = {
    **{"y": "value", "drop_duplicates": False},
    **dict.fromkeys(("x", "seed", "id", "spread", "rows")),
}


def _choose(column: str, value: str) -> str:
    return f"rows and runs are chosen by their columns, `--where {column}={value}`."


# what people write to fit, compare and report
ELSEWHERE: dict[str, str] = {
    "--bucket": _choose("bucket", "tail"),
    "--buckets": _choose("bucket", "tail"),
    "--optimizer": _choose("optimizer", "muon"),
    "--optimizers": _choose("optimizer", "muon"),
    "--layer": _choose("layer", "layer_03"),
    "--layers": _choose("layer", "layer_03"),
    **dict.fromkeys(("--width", "--widths"), "`--where width=512`, or `--where 'width>=128'`, chooses among them."),
    "--metric": "it is called `--metrics` here, `--metrics hard_rank`.",
    "--steps": "`--last N` says how many windows, `--until-step STEP` up to which.",
    "--step": "`--until-step STEP` takes the last windows up to a step.",
    "--filter": _choose("optimizer", "muon"),
}


def names(text: str) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what to read and how to group it."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="RUNS|points.csv",
        action=_Patterns,
        help="run folders (any depth), or tidy CSV files",
    )
    parser.add_argument("--by", type=names, metavar="COLUMNS", help="columns that make a series, e.g. optimizer,bucket")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="keep such rows or runs, e.g. optimizer!=muon"
    )
    runs = parser.add_argument_group("run folders")
    runs.add_argument("--metrics", type=names, default=_OF_RUNS["metrics"], metavar="NAMES")
    runs.add_argument(
        "--ranks",
        choices=["auto", "raw"],
        default=_OF_RUNS["ranks"],
        help="auto: ranks across sequences, where all runs have them; raw: as the finite sample gives them",
    )
    runs.add_argument("--last", type=at_least(1), default=_OF_RUNS["last"], help="windows in the median (default: 5)")
    runs.add_argument("--until-step", type=at_least(0), metavar="STEP", help="use the last windows up to this step")
    runs.add_argument("--stage", help="stage of the records (default: train, else the first there is)")
    runs.add_argument("--stack", help="stack of blocks, where a model has several: its path, or a part (encoder)")
    runs.add_argument("--loader", type=int, help="index of the evaluation dataloader (default: the first)")
    table = parser.add_argument_group("tidy CSV")
    table.add_argument("--x", help="column of the width (default: width, or another usual name)")
    table.add_argument("--y", default=_OF_TABLES["y"], help="column of the value (default: value)")
    table.add_argument("--drop-duplicates", action="store_true", help="leave out both of two bit-identical points")
    table.add_argument("--seed", metavar="COLUMN", help="column of the seed")
    table.add_argument("--id", metavar="COLUMN", help="column of the run behind a row (default: run_id or id)")
    table.add_argument(
        "--spread", metavar="COLUMN", help="column of one standard deviation, or the ends of a bar: LOW,HIGH"
    )
    table.add_argument("--rows", metavar="COLUMN", help="column of the rows N behind the value")
    tables.add_format_option(parser)
    parser.add_argument(
        "--method", default="auto", help="auto, ols, ols_seed_means, weighted, theil_sen, seed_slopes or bootstrap"
    )


def refuse_unused(options: argparse.Namespace, *, tables_given: bool) -> None:
    """Options that say nothing of what was given.

    Raises:
        CommandError: If one is set all the same.
    """
    unused, given, other = (
        (_OF_RUNS, "tables", "run folders") if tables_given else (_OF_TABLES, "run folders", "tables")
    )
    for name, default in unused.items():
        if getattr(options, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise CommandError(f"`{option}` is for {other}, and {given} were given: leave it out.")


def guarded(call: Callable[[], T]) -> T:
    """Turn what the analysis says about bad input into a sentence and exit code 2."""
    try:
        return call()
    except OSError as error:
        named = f"`{error.filename}`: {error.strerror}; give another place." if error.filename else str(error)
        raise CommandError(named) from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def load(options: argparse.Namespace) -> tuple[Fitted, RunSet | None]:
    """Read, group and fit the inputs.

    Raises:
        CommandError: If an input is missing, unreadable or has no such column.
    """
    return guarded(lambda: _load(options))


def refuse_missing(paths: Iterable[str]) -> None:
    """Inputs that are neither run folders nor tables.

    Raises:
        CommandError: If one is not there, or is another kind of file.
    """
    from lightning_spectral.analysis.study import is_table

    for path in paths:
        if not Path(path).exists():
            raise CommandError(f"there is nothing at `{path}`: {_why_nothing(str(path))}")
        if Path(path).is_file() and not is_table(path) and Path(path).name not in RUN_FILES:
            of_run = "; records are read from their run folder, as `spectral.jsonl` beside `run.json`"
            more = of_run if ".jsonl" in Path(path).suffixes else ""
            raise CommandError(f"`{path}` is neither a run folder nor a .csv or .tsv table: give one of them{more}.")


class _Patterns(argparse.Action):
    """Inputs, with patterns in quotes expanded, as the shell does without quotes."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        found: list[str] = []
        for value in values:
            found += ([] if Path(value).exists() else sorted(glob.glob(value, recursive=True))) or [value]
        setattr(namespace, self.dest, found)


def _why_nothing(path: str) -> str:
    """The remedy for an input that is not there."""
    if "://" in path:
        return "inputs are on this machine, so download it first (W&B: `wandb artifact get`, or `import` its history)."
    if glob.has_magic(path):
        return "no name fits this pattern."
    if "," in path:
        return "several inputs are separated by spaces."
    return "give a run folder, or a .csv table of points."


def _load(options: argparse.Namespace) -> tuple[Fitted, RunSet | None]:
    from lightning_spectral.analysis.study import fit_points, is_table

    refuse_missing(options.inputs)
    files = [path for path in options.inputs if is_table(path)]
    refuse_unused(options, tables_given=bool(files))
    if not files:
        return fit_runs(options, options.by)
    if len(files) < len(options.inputs):
        raise CommandError(f"give tables or run folders, not {len(options.inputs)} inputs of both kinds.")
    table, problems = read_tables(options, files)
    return fit_points(table, method=options.method, problems=problems), None


def read_tables(options: argparse.Namespace, files: Sequence[str | Path | Sheet]) -> tuple[PointTable, list[Problem]]:
    """All points of some tables as one, without duplicates if that is asked for."""
    from lightning_spectral.analysis.cells import read_sheet
    from lightning_spectral.analysis.health import without_duplicates
    from lightning_spectral.analysis.tables import differing, one_table, recognised
    from lightning_spectral.analysis.tidy import read_points_csv

    what = {"x": options.x, "y": options.y, "seed": options.seed, "source": options.id}
    what |= {"spread": options.spread, "rows": options.rows, "where": options.where}
    sheets = [read_sheet(file) for file in files]
    apart = [] if options.by or len(sheets) < 2 else differing([sheet.rows for sheet in sheets])
    parts = [
        read_points_csv(sheet, by=[*recognised(sheet.names, options.x).by, *apart] if apart else options.by, **what)
        for sheet in sheets
    ]
    table = one_table([own for own, _ in parts])
    problems = [problem for _, own in parts for problem in own]
    if options.drop_duplicates:
        table, dropped = without_duplicates(table)
        problems += dropped
    return table, problems


def fit_runs(options: argparse.Namespace, by: list[str] | None) -> tuple[Fitted, RunSet]:
    """Points and fits of run folders, nulls included."""
    from lightning_spectral.analysis.conditions import points_where, runs_where
    from lightning_spectral.analysis.points import default_by, points_of_runs, pre_decay
    from lightning_spectral.analysis.reading import Choice, load_runs
    from lightning_spectral.analysis.study import finished_only, fit_points, nulls_of_runs, said_of_diverged

    runs = runs_where(
        load_runs(options.inputs, choice=Choice(options.stage, options.stack, options.loader)), options.where
    )
    if options.stage is not None and not runs.runs:
        raise CommandError(
            f"no run has records of `--stage {options.stage}`; stages are train, validation and measure."
        )
    if options.stack is not None and not runs.runs and runs.problems:
        raise CommandError(f"no run has the stack `--stack {options.stack}`: {runs.problems[0].message}")
    if options.until_step is None:
        runs = finished_only(runs)
    runs = said_of_diverged(runs, options.until_step)
    if not runs.runs and any(problem.refused for problem in runs.problems):
        raise CommandError(f"no run could be read: {_reasons(runs.problems)}")
    columns = by or list(default_by(runs))
    what = {"by": columns, "metrics": options.metrics, "last": options.last, "ranks": options.ranks}
    table = points_where(points_of_runs(runs, **what, until_step=options.until_step), options.where)
    nulls = nulls_of_runs(runs, columns, options.metrics)
    steps = pre_decay(runs) if options.until_step is None else {}
    before = points_of_runs(runs, **what, until_step=steps)
    before = points_where(before, options.where) if before.points else before
    return fit_points(table, method=options.method, problems=runs.problems, nulls=nulls, before=before), runs


def _reasons(problems: Sequence[Problem]) -> str:
    """The first few, as one sentence."""
    text = "; ".join(problem.message.rstrip(".") for problem in problems[:3])
    return text if text.endswith("?") else f"{text}."


def print_problems(problems: Iterable[Problem]) -> None:
    """Warnings on stderr, worst first, a few of each kind and the number of the rest."""
    kinds: dict[tuple[bool, str], list[str]] = {}
    for problem in problems:
        kinds.setdefault((not problem.refused, problem.kind), []).append(problem.message)
    for (harmless, kind), messages in sorted(kinds.items()):
        word = "WARNING" if harmless else "REFUSED"
        for message in messages[:_SHOWN_OF_A_KIND]:
            print(f"{word} {message}", file=sys.stderr)
        if len(messages) > _SHOWN_OF_A_KIND:
            more = len(messages) - _SHOWN_OF_A_KIND
            print(
                f"{word} {more} more of this kind ({kind.replace('_', ' ')}), {len(messages)} in all.", file=sys.stderr
            )


def print_flags(statuses: Iterable[str]) -> None:
    """What the flags of a status column mean, once each."""
    from lightning_spectral.analysis.health import FLAG_TEXT, REFUSAL_TEXT

    for flag in dict.fromkeys(flag for status in statuses for flag in status.split("+")):
        if flag in REFUSAL_TEXT:
            print(f"REFUSED {flag.removeprefix('refused:')}: {REFUSAL_TEXT[flag]}.", file=sys.stderr)
        if flag in FLAG_TEXT:
            print(f"WARNING {flag}: {FLAG_TEXT[flag]}.", file=sys.stderr)


def print_notes(sentences: Iterable[str], style: str = "table") -> None:
    """What must be read with the numbers, under their table; on stderr where the table is for a program."""
    for sentence in sentences:
        print(f"note: {sentence}", file=tables.aside(style))


def interval(low: float, high: float) -> str:
    """``[0.19, 0.34]``; a dash when there is none."""
    return "-" if low != low else f"[{number(low)}, {number(high)}]"


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: str = "table",
    values: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None,
) -> None:
    """Print a table of ready texts.

    Args:
        header: Headings.
        rows: Texts as a person reads them.
        style: Of ``--format``.
        values: Header and rows for ``json`` and ``csv``: names without spaces, numbers with every digit.
    """
    if values is not None and style in ("json", "csv"):
        header, rows = values
    tables.print_table(tables.Table(header, rows), style)


def number(value: float, digits: int = 3) -> str:
    """A number for a table; a dash when there is none."""
    if value != value:
        return "-"
    text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
    return text if float(text) else text.removeprefix("-")


def out_folder(text: str | None, option: str = "--out") -> Path | None:
    """``--out`` (or another option) as a folder.

    Raises:
        CommandError: If it names a file, or nothing can be written there.
    """
    if text is None:
        return None
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{option} `{folder}` is a file; give a folder.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise CommandError(f"{option} `{folder}` cannot be written (`{nearest}` is read-only): give another folder.")
    return folder
