"""Rows of ``.jsonl`` and ``.json`` files, read with the standard library.

pyarrow's reader ends the process where a line is nested without end, and takes texts that look like dates for dates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import IO

from lightning_spectral.text import parse_json

_FIRST_ROWS = 1_000  # of which one at least has every column


def json_rows(content: IO[str]) -> Iterator[dict[str, object]]:
    """One row a line, or the objects of one list or object that is the whole file.

    A row has every column that the first rows have; where its line has none, ``None``.

    Args:
        content: The file, open for reading.

    Raises:
        ValueError: If a line is no JSON object; the message has its number.
    """
    lines = iter(content)
    first = next(lines, "")
    if first.lstrip().startswith("[") or _is_open(first):
        rows: Iterable[object] = _listed("".join(chain([first], lines)))
    else:
        rows = (_row(line, number) for number, line in enumerate(chain([first], lines), start=1) if line.strip())
    found = (_mapping(row) for row in rows)
    head = list(islice(found, _FIRST_ROWS))
    columns = dict.fromkeys(name for row in head for name in row)
    return ({**columns, **row} for row in chain(head, found))


def _is_open(line: str) -> bool:
    """Whether the first line is the beginning of an object that goes on below."""
    return line.strip() == "{"


def _listed(text: str) -> list[object]:
    content = parse_json(text)
    return content if isinstance(content, list) else [content]


def _row(line: str, number: int) -> object:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error


def _mapping(row: object) -> dict[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__}, not an object with columns")
    return row
