"""``--where optimizer!=muon``: which rows, runs and points are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from lightning_spectral.analysis.cells import number_of
from lightning_spectral.analysis.points import PointTable
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.analysis.spelling import column_of
from lightning_spectral.text import did_you_mean

T = TypeVar("T")
MEASURED: Final = ("site", "bucket", "metric", "layer")  # columns of what was measured in a run
_CONDITION: Final = re.compile(r"^\s*([^=!<>]+?)\s*(==|=|!=|<=|>=|<|>)\s*(.*?)\s*$")
_TESTS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}


def condition(text: str) -> Callable[[Mapping[str, str]], bool]:
    """``optimizer!=muon``, ``width>=512``, ``lr=3e-3`` as a test of a row; numbers are equal whatever they look like.

    Raises:
        ValueError: If it is no condition; on a row without that column or with a word where a number is needed, too.
    """
    asked, sign, wanted = _parts(text)

    def holds(row: Mapping[str, str]) -> bool:
        name = asked if asked in row else column_of(asked, list(row))
        if name not in row:
            hint = did_you_mean(name, list(row), otherwise="there are")
            raise ValueError(f"there is no column `{name}` (--where {text}); {hint}")
        cell, limit = number_of(row[name]), number_of(wanted)
        if sign not in _TESTS:
            same = row[name] == wanted or (cell is not None and cell == limit)
            return same == (sign != "!=")
        if cell is None or limit is None or math.isnan(limit):
            which = f"'{wanted}'" if limit is None or math.isnan(limit) else f"'{row[name]}' in that column"
            raise ValueError(f"`--where {text}` compares numbers, and {which} is none.")
        return _TESTS[sign](cell, limit)

    return holds


def runs_where(runs: RunSet, where: Sequence[str]) -> RunSet:
    """Runs that pass the conditions on optimizer, width, seed, id and labels; those on :data:`MEASURED` are left out.

    Raises:
        ValueError: If a condition names no column of a run, or no run passes.
    """
    names = sorted({name for run in runs.runs for name in run.info.labels})
    kept = _passing([(_row(run, names), run) for run in runs.runs], [t for t in where if not _is_measured(t)], "run")
    return replace(runs, runs=tuple(kept))


def points_where(table: PointTable, where: Sequence[str]) -> PointTable:
    """Points that pass the conditions on :data:`MEASURED`.

    Raises:
        ValueError: If the points are not told apart by such a column, or none passes.
    """
    rows = [(dict(zip(table.by, point.series, strict=True)), point) for point in table.points]
    return replace(table, points=tuple(_passing(rows, of_measured(where), "point")))


def of_measured(where: Sequence[str]) -> list[str]:
    """The conditions on :data:`MEASURED`."""
    return [text for text in where if _is_measured(text)]


def _passing(rows: Sequence[tuple[dict[str, str], T]], where: Sequence[str], noun: str) -> list[T]:
    """What belongs to the rows that pass all conditions."""
    for text in where:
        holds, name = condition(text), _parts(text)[0]
        left = [(row, it) for row, it in rows if holds(row)]
        if rows and not left:
            values = sorted({row[name] for row, _ in rows})
            shown = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
            raise ValueError(f"no {noun} passes `--where {text}`: `{name}` is {shown}.")
        rows = left
    return [it for _, it in rows]


def _is_measured(text: str) -> bool:
    return _parts(text)[0] in MEASURED


def _parts(text: str) -> tuple[str, str, str]:
    match = _CONDITION.match(text)
    if match is None:
        raise ValueError(f"`{text}` is no condition: write COLUMN=VALUE, COLUMN!=VALUE or COLUMN<NUMBER.")
    name, sign, wanted = match.groups()
    return name, sign, wanted


def _row(run: Run, names: Sequence[str]) -> dict[str, str]:
    labels = {name: run.info.labels.get(name, "") for name in names}
    own = {"run_id": run.run_id, "optimizer": run.optimizer, "width": str(run.width), "seed": str(run.seed)}
    return {**labels, **own, **dict.fromkeys(MEASURED, "")}
