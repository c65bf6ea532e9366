"""Tables in and out: tidy CSV files of points, and our own result tables, written whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.cells import Sheet, finite, is_whole, names_of, number_of, read_sheet
from lightning_spectral.analysis.conditions import condition
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.analysis.runs import Problem
from lightning_spectral.analysis.spelling import column_of
from lightning_spectral.analysis.tables import ALSO, recognised, telling_apart, with_layers
from lightning_spectral.text import did_you_mean, whole_file
from lightning_spectral.text.tables import harmless

_ID_NAMES: Final = ("run_id", "id")
FIT_COLUMNS: Final = ("beta", "ln_a", "ci_low", "ci_high", "r2", "n", "status", "method")
FIT_EXTRAS: Final = (
    "std_err",
    "num_widths",
    "num_runs",
    "num_seeds",
    "x_min",
    "x_max",
    "bend",
    "bend_p",
    "slope_low",
    "slope_high",
    "raw_beta",
    "loo_low",
    "loo_high",
    "theil_sen",
    "weighted",
    "seed_low",
    "seed_high",
    "boot_low",
    "boot_high",
    "null_beta",
    "null_step",
    "before_beta",
    "before_low",
    "before_high",
    "before_step",
    "layer_low",
    "layer_high",
)


def read_points_csv(
    source_file: str | Path | Sheet,
    *,
    x: str | None = None,
    y: str = "value",
    by: Sequence[str] | None = None,
    seed: str | None = None,
    source: str | None = None,
    spread: str | None = None,
    rows: str | None = None,
    where: Sequence[str] = (),
) -> tuple[PointTable, list[Problem]]:
    """Read points from any tidy table: one row per value; cells separated by commas, semicolons or tabs.

    Args:
        source_file: The file, or what was read of it.
        x: Column of the width; by default one of the usual names.
        y: Column of the value.
        by: Columns that make a series; by default those known to (``analysis.tables``).
        seed: Column of the seed; ``seed`` if the file has one.
        source: Column that identifies the run behind a row; ``run_id`` or ``id`` if the file has one.
        spread: Column of one standard deviation of the value; or two, separated by a comma, that hold the lower and
            upper end of a bar of one.
        rows: Column of the number of rows N behind the value.
        where: Conditions on rows, as ``optimizer!=muon``.

    Raises:
        ValueError: If it is no whole table, a column is missing, or no row holds numbers.
    """
    sheet = read_sheet(source_file)
    path, names = sheet.path, sheet.names

    def meant(column: str | None) -> str | None:
        return column and column_of(column, names)

    x, seed, source, rows = meant(x), meant(seed), meant(source), meant(rows)
    y, spread = column_of(y, names), ",".join(column_of(name, names) for name in names_of(spread)) or None
    columns = recognised(names, x, by if by is None else [column_of(name, names) for name in by])
    x, by = columns.x, columns.by
    seed, spread, rows = seed or columns.seed, spread or columns.spread, rows or columns.rows
    kept = {text: condition(text) for text in where}
    needed = [("--x", x), ("--y", y), *(("--by", name) for name in by)]
    optional = [("--seed", seed), ("--id", source), ("--rows", rows)]
    _refuse_unknown(sheet, [*needed, *optional, *(("--spread", name) for name in names_of(spread))])
    if x == y:
        raise ValueError(
            f"`--x` and `--y` are both the column `{x}`: give the column of the width, and that of the value."
        )
    source = source or next((name for name in _ID_NAMES if name in names and name not in by), None)
    roles = _Roles(x, y, seed, source, spread, rows, columns.steps, columns.also)
    points, problems, used = _points_of(sheet, by, roles, kept)
    if not sheet.ends_whole:
        cut = f"`{path}` ends without a line break: if it was cut off, its last row is wrong."
        problems.append(Problem(str(path), "no_line_break", cut))
    named = [n for n in (y, *names_of(spread), rows, source, *columns.also) if n]
    problems += _repeated(path, x, telling_apart(used, replace(columns, seed=seed), named))
    return with_layers(PointTable(tuple(by), tuple(points), x)), problems


def _refuse_unknown(sheet: Sheet, columns: Sequence[tuple[str, str | None]]) -> None:
    """Columns, each with its option, that a table has not.

    Raises:
        ValueError: If there is one.
    """
    for role, column in columns:
        if column is not None and column not in sheet.names:
            hint = did_you_mean(column, sheet.names, otherwise="it has")
            if sum(_is_number(name) for name in sheet.names) > 1:
                hint += " A table begins with the names of its columns."
            raise ValueError(f"`{sheet.path}` has no column `{column}` ({role}); {hint}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _repeated(path: Path, x: str, apart: Sequence[str]) -> list[Problem]:
    """What is said of rows of one series and x that some columns tell apart."""
    if not apart:
        return []
    which = f"the column `{apart[0]}` tells" if len(apart) == 1 else f"`{apart[0]}` and `{apart[1]}` tell"
    why = f"`{path}` has several rows of one series and {x}; {which} them apart (--by, --seed)."
    return [Problem(str(path), "repeated_x", why)]


@dataclass(frozen=True)
class _Roles:
    """Columns of a table by what they hold."""

    x: str
    y: str
    seed: str | None
    source: str | None
    spread: str | None
    rows: str | None
    steps: str | None
    also: tuple[str, ...]


def _points_of(
    sheet: Sheet,
    by: Sequence[str],
    roles: _Roles,
    kept: Mapping[str, Callable[[Mapping[str, str]], bool]],
) -> tuple[list[Point], list[Problem], list[dict[str, str]]]:
    """Points, rows that were left out, and rows behind the points.

    Raises:
        ValueError: If no row holds numbers.
    """
    points: list[Point] = []
    problems: list[Problem] = []
    used: list[dict[str, str]] = []
    path, is_rank = sheet.path, "rank" in roles.y
    for number, row in zip(sheet.lines, sheet.rows, strict=True):
        if is_whole(row) and not all(holds(row) for holds in kept.values()):
            continue
        if why := _unusable(row, roles.x, roles.y):
            problems.append(Problem(str(path), "skipped_lines", f"`{path}` line {number}{why} it was left out."))
            continue
        value = _optional(row, roles.y)
        points.append(
            Point(
                tuple(row[name] for name in by),
                _optional(row, roles.x),
                value,
                row[roles.source] if roles.source else "",
                _seed(row[roles.seed]) if roles.seed else "",
                _spread(row, names_of(roles.spread)),
                _optional(row, roles.rows),
                value if is_rank or "rank" in row.get("metric", "") else math.nan,
                _steps(row, roles.steps),
                **_also(row, roles.also),  # type: ignore[arg-type]  # all of them are floats
            )
        )
        used.append(row)
    if not points:
        first = f" The first problem: {problems[0].message}" if problems else ""
        if kept and not used and not problems:
            first = f" No row passes `--where {' --where '.join(kept)}`."
        raise ValueError(f"`{path}` holds no usable row of numbers in `{roles.x}` and `{roles.y}`.{first}")
    if len(names_of(roles.spread)) == 1 and all(point.spread >= abs(point.value) for point in points):
        raise ValueError(
            f"`{roles.spread}` in `{path}` is at least as large as the value in every row: it is the end of a bar, no "
            "deviation. Give both ends, --spread LOW,HIGH."
        )
    return points, problems, used


def _seed(cell: str) -> str:
    """``0.0``, as pandas writes a column with a blank, is seed ``0``."""
    number = finite(cell)
    return str(int(number)) if number is not None and number.is_integer() else cell


def _also(row: dict[str, str], names: Sequence[str]) -> dict[str, float]:
    return {name: _optional(row, name) for name in names}


def _spread(row: dict[str, str], names: Sequence[str]) -> float:
    """One standard deviation: a column of its own, or half the distance of two ends."""
    ends = [_optional(row, name) for name in names]
    return ends[0] if len(ends) == 1 else (ends[1] - ends[0]) / 2 if len(ends) == 2 else math.nan


def read_columns(
    tables: Sequence[str | Path | Sheet], columns: Sequence[str], by: Sequence[str], where: Sequence[str] = ()
) -> tuple[dict[tuple[str, ...], list[NDArray[np.float64]]], int]:
    """Columns of numbers of some tables, by series, and how many rows were left out: a cell is no positive number.

    Raises:
        ValueError: If a table lacks a column, or no row is left.
    """
    kept = [condition(text) for text in where]
    found: dict[tuple[str, ...], list[list[float]]] = {}
    left_out = 0
    for sheet in map(read_sheet, tables):
        own, labels = ([column_of(name, sheet.names) for name in some] for some in (columns, by))
        missing = [name for name in (*own, *labels) if name not in sheet.names]
        if missing:
            raise ValueError(
                f"`{sheet.path}` has no column `{missing[0]}`; "
                f"{did_you_mean(missing[0], sheet.names, otherwise='it has')}"
            )
        for row in sheet.whole_rows:
            if all(holds(row) for holds in kept):
                numbers = [_optional(row, name) for name in own]
                if all(math.isfinite(number) and number > 0 for number in numbers):
                    found.setdefault(tuple(row[name] for name in labels), []).append(numbers)
                else:
                    left_out += 1
    if not found:
        raise ValueError(f"no row holds positive numbers in {', '.join(f'`{name}`' for name in columns)}.")
    return {series: list(np.array(numbers).T) for series, numbers in found.items()}, left_out


def _steps(row: dict[str, str], name: str | None) -> tuple[int, ...]:
    cells = row[name].split(";") if name else []
    return tuple(int(cell) for cell in cells if cell.strip().lstrip("-").isdigit())


def _unusable(row: dict[str, str], x: str, y: str) -> str:
    """Why a row gives no point; empty if it does."""
    if not is_whole(row):
        return " has another number of cells than the header;"
    bad = next((name for name in (x, y) if number_of(row[name]) is None), None)
    if bad is not None:
        comma = " (a thousand or a decimal? nothing in the table says)" if re.fullmatch(r"-?\d+,\d+", row[bad]) else ""
        return f": `{row[bad]}` in column `{bad}` is not a number{comma};"
    if not 0 < _optional(row, x) < math.inf:
        return f": `{row[x]}` in column `{x}` is no positive number;"
    return f": `{row[y]}` in column `{y}` is infinite;" if math.isinf(_optional(row, y)) else ""


def _optional(row: dict[str, str], name: str | None) -> float:
    value = number_of(row[name]) if name else None
    return math.nan if value is None else value


def fit_table(by: Sequence[str], fits: Iterable[PowerLawFit]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``fits.csv``."""
    header = [*by, *FIT_COLUMNS, *FIT_EXTRAS]
    rows = [[*fit.series, *(getattr(fit, name) for name in (*FIT_COLUMNS, *FIT_EXTRAS))] for fit in fits]
    return header, rows


def points_table(table: PointTable) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``points.csv``."""
    also = [name for name in ALSO if any(math.isfinite(getattr(p, name)) for p in table.points)]
    header = [*table.by, table.x_name, "seed", "value", "spread", "num_tokens", *also, "steps", "run_id"]
    rows = [
        [
            *(*p.series, p.x, p.seed, p.value, p.spread, p.num_tokens),
            *(getattr(p, name) for name in also),
            *(";".join(map(str, p.steps)), p.source),
        ]
        for p in table.points
    ]
    return header, rows


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table atomically; NaN becomes an empty cell, floats keep every digit."""
    return write_atomic(path, csv_text(header, rows).encode())


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[cell_text(cell) for cell in row] for row in rows])
    return buffer.getvalue()


def cell_text(cell: Any) -> str:
    """How a value is spelled in our CSV files."""
    if isinstance(cell, float):
        if math.isnan(cell):
            return ""
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else repr(float(cell))
    return str(harmless(cell))


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Replace ``path`` by ``content`` in one step: a reader or a crash sees the old file or the new one."""
    path = Path(path)
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return path


def digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
