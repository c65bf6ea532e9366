"""Text of tables as others write it: encodings, separators, rows, and what number a cell says."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
# byte order marks -> encodings that read them
_MARKS: Final = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


@dataclass(frozen=True)
class Sheet:
    """A table as it stands in its file.

    Attributes:
        path: The file.
        names: Columns.
        rows: Cells by column; a row with more cells has the key ``None``, one with fewer such values.
        ends_whole: Whether the file ends with a line break.
    """

    path: Path
    names: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    ends_whole: bool

    @property
    def whole_rows(self) -> list[dict[str, str]]:
        """Rows with as many cells as there are columns."""
        return [row for row in self.rows if is_whole(row)]


def text_of(path: str | Path) -> str:
    """A text file, also a gzipped one: UTF-8, or UTF-16 with its mark.

    Raises:
        ValueError: If it is neither, or a gzipped file is cut off; the message names it.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode(next((code for mark, code in _MARKS.items() if content.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not a text file in UTF-8: {error}.") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"`{path}` is no whole gzip file: {error}.") from error


def read_sheet(source: str | Path | Sheet) -> Sheet:
    """A table; cells are separated by the sign that separates the names. One that was read is given back.

    Raises:
        ValueError: If it is no text in UTF-8, no CSV, empty, or has a column twice; the message names it.
    """
    if isinstance(source, Sheet):
        return source
    path, text = Path(source), text_of(source)
    if not text.strip():
        raise ValueError(f"`{path}` is empty.")
    first_line = text.partition("\n")[0]
    delimiter = next((sign for sign in ",;\t" if sign in first_line), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    names = [name.strip() for name in _guarded(path, lambda: reader.fieldnames) or []]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"`{path}` has the column `{twice[0]}` more than once: which is meant? Rename or remove one.")
    reader.fieldnames = names
    return Sheet(path, tuple(names), tuple(_guarded(path, lambda: list(reader))), text.endswith(("\n", "\r")))


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except csv.Error as error:
        raise ValueError(f"`{path}` is no whole table: {error} (is a quotation mark left open?).") from error


def is_whole(row: dict[str, str]) -> bool:
    """Whether a row has as many cells as the table has columns."""
    return None not in row and None not in row.values()


def number_of(cell: Any) -> float | None:
    """What number a cell says: NaN for a blank one, infinity as it is, ``None`` for a word.

    ``1_16`` is a word: Python reads underscores as nothing, and nobody writes a number so.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    try:
        return None if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def finite(cell: Any) -> float | None:
    """The number of a cell; ``None`` for a blank, a word, NaN or infinity."""
    value = number_of(cell)
    return value if value is not None and math.isfinite(value) else None


def names_of(columns: str | None) -> Sequence[str]:
    """``LOW,HIGH`` as names."""
    return [name.strip() for name in (columns or "").split(",") if name.strip()]
