"""Rows of others -> (run, step, tag, cell): histories, charts of W&B, downloads of TensorBoard, long tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from lightning_spectral.analysis.cells import number_of
from lightning_spectral.analysis.spelling import bare, multiple

Row = Mapping[str, Any]
_STEPS: Final = ("_step", "step", "global_step", "trainer/global_step", "Step")
_RUNS: Final = ("run_id", "run_name", "run", "name", "Name", "Run", "dir_name")  # whose rows are whose, in one file
_TAGS: Final = ("tag", "metric", "key")  # of a long table, beside `value`
_OF_TIME: Final = {"wall_time", "_runtime", "_timestamp", "epoch", "relative_time"}
_DOWNLOAD: Final = re.compile(r"run-(?P<run>.+?)-tag-(?P<tag>.+)")


class Logged(NamedTuple):
    """One cell: run, step as it stands there, tag and value."""

    run: str
    step: Any
    tag: str
    cell: Any


def logged(rows: Sequence[Row], file: str, folder: str) -> Iterator[Logged]:
    """Every number of a table that has a step.

    Args:
        rows: Cells by column.
        file: Name of the file without its ending: what TensorBoard calls a download, or the run.
        folder: Id of the run of the folder.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
    step = next((name for name in _STEPS if name in names), None)
    whose = next((name for name in _RUNS if any(_is_word(row.get(name)) for row in rows)), None)
    long = next((name for name in _TAGS if name in names and "value" in names), None)
    values = [name for name in names if name not in (step, whose, long) and bare(name) not in _OF_TIME]
    if long is None and values == ["value"] and step is not None:
        yield from _download(rows, step, whose, file, folder)
        return
    for row in rows:
        run = str((whose and row.get(whose)) or file)
        if long is not None:
            yield Logged(run, row.get(step or ""), str(row.get(long)), row.get("value"))
            continue
        for name in values:
            if _is_number(row.get(name)) and not name.endswith(("__MIN", "__MAX")):
                own, dash, tag = name.removeprefix("Group: ").rpartition(" - ")
                at = _own_step(row, name[: -len(tag)]) if dash else None
                if tag not in _STEPS and (at or step) is not None:
                    yield Logged(own if dash else run, row.get(at or step or ""), tag if dash else name, row.get(name))


def _own_step(row: Row, before: str) -> str | None:
    """The column of the steps of one run, in a chart over something else."""
    return next((before + name for name in _STEPS if before + name in row), None)


def _download(rows: Sequence[Row], step: str, whose: str | None, file: str, folder: str) -> Iterator[Logged]:
    """One tag of one run: the name of the file says which."""
    found = _DOWNLOAD.fullmatch(file)
    run, tag = (found["run"], found["tag"]) if found else (folder, file)
    for row in rows:
        yield Logged(str((whose and row.get(whose)) or run), row[step], tag, row["value"])


def _is_number(cell: Any) -> bool:
    """Whether a cell is neither blank nor a word; NaN and infinity are numbers."""
    return cell not in (None, "") and number_of(cell) is not None


def _is_word(cell: Any) -> bool:
    return isinstance(cell, str) and (number_of(cell) is None or multiple(cell) is not None)  # `160m` is a name
