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

from lightning_spectral.analysis.spelling import as_known, as_python_writes, multiple
from lightning_spectral.analysis.tables import KNOWN

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
        lines: Number of the line in the file at which each row ends.
    """

    path: Path
    names: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    ends_whole: bool
    lines: tuple[int, ...]

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
        raise ValueError(f"`{path}` is not a text file in UTF-8: {error} (Excel: save it as CSV UTF-8).") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"`{path}` is no whole gzip file: {error}.") from error


def read_sheet(source: str | Path | Sheet) -> Sheet:
    """A table; cells are separated by the sign that stands most often between the names, else by blanks.

    Empty lines and comments (``#``) above the names are left out, blanks around cells, too; names of known columns and
    numbers are spelled as they are looked up and read (``spelling``). A table that was read is given back.

    Raises:
        ValueError: If it is no text in UTF-8, no CSV, empty, or has a column twice; the message names it.
    """
    if isinstance(source, Sheet):
        return source
    path, text = Path(source), text_of(source)
    if not text.strip():
        raise ValueError(f"`{path}` is empty.")
    ends_whole = text.endswith(("\n", "\r"))
    text, above = _from_names(text if "\n" in text else text.replace("\r", "\n"))
    delimiter = _delimiter(text.partition("\n")[0])
    if delimiter == " ":
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    names = as_known([name.strip() for name in _guarded(path, lambda: reader.fieldnames) or []], KNOWN)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"`{path}` has the column `{twice[0]}` more than once: which is meant? Rename or remove one.")
    reader.fieldnames = names
    read = _guarded(path, lambda: [(above + reader.line_num, row) for row in reader])
    rows = [row for _, row in read]
    _tidy(rows)
    return Sheet(path, tuple(names), tuple(rows), ends_whole, tuple(line for line, _ in read))


def _from_names(text: str) -> tuple[str, int]:
    """The text from the line with the names on, and how many lines stood above.

    A comment is the line with the names where numbers stand below it, as many as it has parts (``numpy.savetxt``).
    """
    above, place = 0, 0
    while True:
        end = text.find("\n", place)
        line, below = (text[place:], "") if end < 0 else (text[place:end], text[end + 1 :].partition("\n")[0])
        if line.strip() and not line.lstrip().startswith("#"):
            return text[place:], above
        parts, values = (own.lstrip("# ").split(_delimiter(line)) for own in (line, below))
        if line.strip() and len(parts) == len(values) and any(finite(value) is not None for value in values):
            return text[place:].lstrip("# "), above
        if end < 0:
            return text[place:], above
        above, place = above + 1, end + 1


def _delimiter(names: str) -> str:
    """The sign between names: the most frequent, the first of those alike; a blank where there is none."""
    signs = ",;\t|"
    best = max(signs, key=names.count)
    return best if best in names else " " if " " in names.strip() else ","


def _tidy(rows: list[dict[str, str]]) -> None:
    """Cells as Python writes them, and no empty cells beyond the last name."""
    for row in rows:
        more: Any = row.get(None)  # type: ignore[call-overload]  # where csv puts what has no name
        if more is not None and not any(cell.strip() for cell in more):
            del row[None]  # type: ignore[arg-type]
    spelled = as_python_writes({cell for row in rows for cell in row.values() if isinstance(cell, str)})
    if spelled:
        for row in rows:
            row.update({name: spelled[cell] for name, cell in row.items() if isinstance(cell, str) and cell in spelled})


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

    ``70M`` is 70 million (k, M, B, T; m and b in names of models, too). ``1_16`` is a word: Python reads underscores as
    nothing, and nobody writes a number so.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    try:
        return None if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError, OverflowError):
        return multiple(cell) if isinstance(cell, str) else None


def finite(cell: Any) -> float | None:
    """The number of a cell; ``None`` for a blank, a word, NaN or infinity."""
    value = number_of(cell)
    return value if value is not None and math.isfinite(value) else None


def names_of(columns: str | None) -> Sequence[str]:
    """``LOW,HIGH`` as names."""
    return [name.strip() for name in (columns or "").split(",") if name.strip()]
