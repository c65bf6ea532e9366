"""Tables that verbs print: one function for a terminal, JSON, CSV, Markdown and LaTeX.

A cell holds the value itself; how it is shown to a person is the column's business, so JSON and CSV keep every digit.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import math
import numbers
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from lightning_spectral.text import visible

NONE = "-"  # a value that there is not


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Heading.
        spec: How a value is shown: a format spec such as ``.2f``, or a function to text. Numbers stand on the right.
        key: Name in JSON and CSV; by default the heading.
    """

    name: str
    spec: str | Callable[[Any], str] = ""
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    Attributes:
        columns: A :class:`Column`, or a heading alone, for each value of a row.
        rows: One sequence of values per row; ``None`` and NaN are missing.
        title: One line above the table; in JSON, CSV and LaTeX left out.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    @property
    def heads(self) -> list[Column]:
        """The columns, headings alone made whole."""
        return [Column(column) if isinstance(column, str) else column for column in self.columns]

    def cells(self) -> list[list[str]]:
        """Every value as a person reads it."""
        heads = self.heads
        return [[_shown(value, head.spec) for head, value in zip(heads, row, strict=True)] for row in self.rows]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        sides = ["right" if right else "left" for right in self.on_the_right()]

        def line(kind: str, cells: Iterable[str]) -> str:
            each = zip(cells, sides, strict=True)
            return "".join(f'<{kind} style="text-align: {side}">{html.escape(cell)}</{kind}>' for cell, side in each)

        rows = [line("th", (head.name for head in self.heads)), *(line("td", row) for row in self.cells())]
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def on_the_right(self) -> list[bool]:
        """For each column whether it holds numbers, or text that stands for them."""
        return [
            bool(self.rows) and all(_is_number(row[place]) for row in self.rows) for place in range(len(self.columns))
        ]


def render(table: Table, style: str = "table", *, width: int | None = None) -> str:
    """A table as text, without a line break at its end.

    Args:
        table: The table.
        style: One of :data:`FORMATS`.
        width: Columns of the terminal, for ``table``; ``None`` never wraps.

    Raises:
        ValueError: If there is no such style.
    """
    if style not in _RENDERERS:
        raise ValueError(f"`--format` must be one of {', '.join(FORMATS)}, got {style}.")
    return _RENDERERS[style](table, width)


def print_table(table: Table, style: str = "table") -> None:
    """Print a table to standard output; on a terminal it is fitted to its width, elsewhere no line is wrapped."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(render(table, style, width=width))


def print_tables(tables: Sequence[Table], style: str = "table") -> None:
    """Print several tables, an empty line between them; as JSON they are one object, rows by title."""
    if style == "json" and len(tables) != 1:
        print(json.dumps({table.title: json.loads(_json(table, None)) for table in tables}, indent=1))
        return
    for number, table in enumerate(tables):
        if number:
            print()
        print_table(table, style)


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """``--format``, for every verb that prints a table."""
    parser.add_argument("--format", choices=FORMATS, default="table", help="of the printed table (default: table)")


def aside(style: str) -> TextIO:
    """Where sentences beside a table go: standard output, or standard error where the table is for a program."""
    return sys.stdout if style == "table" else sys.stderr


def _plain(table: Table, width: int | None) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for head, right in zip(table.heads, table.on_the_right(), strict=True):
        shown.add_column(Text(head.name), justify="right" if right else "left", overflow="fold")
    for row in table.cells():
        shown.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width or 100_000, color_system=None, highlight=False)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in [*([table.title] if table.title else []), *lines])


def _json(table: Table, width: int | None) -> str:
    names = [head.key or head.name for head in table.heads]
    rows = [dict(zip(names, map(_plain_value, row), strict=True)) for row in table.rows]
    return json.dumps(rows, indent=1, ensure_ascii=False)


def harmless(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula, whatever a label or a foreign file says."""
    if not isinstance(value, str):
        return value
    text = visible(value.replace("\r", " "))  # which ends a row for some readers and is not quoted by the writer
    is_formula = len(text.strip()) > 1 and text.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{text}" if is_formula or text.startswith("\t") else text


def _csv(table: Table, width: int | None) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([head.key or head.name for head in table.heads])
    writer.writerows([["" if _is_missing(value) else harmless(value) for value in row] for row in table.rows])
    return buffer.getvalue().rstrip("\n")


def _markdown(table: Table, width: int | None) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---:" if right else "---" for right in table.on_the_right()]
    title = [f"{table.title}\n"] if table.title else []
    return "\n".join([*title, line(head.name for head in table.heads), line(rule), *map(line, table.cells())])


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    }
)


def _latex(table: Table, width: int | None) -> str:
    def line(cells: Iterable[str]) -> str:
        text = " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells)
        # after the \\ of the line before, a bracket or a star would be its argument
        return ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"

    alignment = "".join("r" if right else "l" for right in table.on_the_right())
    rows = [line(head.name for head in table.heads), r"\hline", *map(line, table.cells())]
    return "\n".join([rf"\begin{{tabular}}{{{alignment}}}", *rows, r"\end{tabular}"])


_RENDERERS: dict[str, Callable[[Table, int | None], str]] = {
    "table": _plain,
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
    "latex": _latex,
}
FORMATS = tuple(_RENDERERS)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _shown(value: Any, spec: str | Callable[[Any], str]) -> str:
    if _is_missing(value):
        return NONE
    return format(value, spec) if isinstance(spec, str) else spec(value)


def _plain_value(value: Any) -> Any:
    if _is_missing(value) or (isinstance(value, float) and math.isinf(value)):
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):  # numpy's
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    return value if isinstance(value, (int, float, str, list, dict)) else str(value)
