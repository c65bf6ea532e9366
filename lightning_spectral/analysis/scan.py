"""Read ``spectral.jsonl`` as columns: 100,000 records in about a second.

A line as :func:`lightning_spectral.records.append_records` writes it has its fields in one fixed order, so one regular
expression, built from the record's own dataclass, takes a whole file apart at C speed. Any other line goes through the
general reader: it is either a record (older, reordered) or it is left out, with its number and a reason.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.records import SCHEMA_VERSION, SpectralRecord, parse_record, to_json
from lightning_spectral.text import parse_json, plain_file

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TextArray = NDArray[np.bytes_]

# a character class is three times as fast as the grammar of a number; `float` has the last word (see `_columns`)
_NUMBER = rb"[-+.0-9eE]+|null"
_STRICT = rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"  # of what is not looked at any more
_INT = rb"-?\d{1,18}"
_STRING = rb'[^"\\]*(?:\\.[^"\\]*)*'
_NUMBERS = rb'\{(?:"' + _STRING + rb'": (?:' + _NUMBER + rb"),? ?)*\}"
_DICT = rb'\{[^{}"]*(?:"' + _STRING + rb'"[^{}"]*)*\}'  # flat; its strings may hold braces
_INTS: Final = ("step", "layer", "num_tokens", "width", "expert", "loader", "ordinal", "num_sequences")
_FLOATS: Final = (
    "tokens_seen",
    "soft_rank",
    "hard_rank",
    "hard_rank_debiased",
    "spectral_entropy",
    "early_enrichment",
    "top_share",
    "soft_rank_debiased",
    "hard_rank_ci_low",
    "hard_rank_ci_high",
    "soft_rank_ci_low",
    "soft_rank_ci_high",
)
_TEXTS: Final = ("run_id", "stage", "stack", "site", "bucket", "status", "renyi", "reinjection", "conventions")
_CHUNK: Final = 1 << 23  # bytes taken apart at a time: what is between bytes and columns is ten times as large
_JSON: Final = ("renyi", "reinjection", "conventions")


def _value(annotation: str, wanted: bool) -> bytes:
    """What a field of this type looks like, its quotes apart; the types are those that the general reader checks."""
    kind, _, none = annotation.partition(" | ")
    if kind == "float" and wanted:
        return _NUMBER if none else _NUMBER.removesuffix(rb"|null")
    value = {"str": _STRING, "int": _INT, "float": _STRICT, "dict[str, float]": _NUMBERS}.get(kind, _DICT)
    return value + rb"|null" * bool(none)


def _line_pattern() -> re.Pattern[bytes]:
    parts = []
    wanted = {*_INTS, *_FLOATS, *_TEXTS}
    for field in fields(SpectralRecord):
        name = field.name.encode()
        value = _value(str(field.type), field.name in wanted)
        group = rb"(" if field.name in wanted else rb"(?:"
        if field.name == "extra":
            continue
        if field.name == "schema_version":
            value = str(SCHEMA_VERSION).encode()
        quote = rb'"' if field.type == "str" else rb""
        parts.append(rb'"' + name + rb'": ' + quote + group + value + rb")" + quote)
    extra = rb'((?:, "' + _STRING + rb'": (?:' + _NUMBER + rb"))*)"
    return re.compile(rb"^\{" + rb", ".join(parts) + extra + rb"\}$", re.MULTILINE)


_PATTERN: Final = _line_pattern()
_WANTED: Final = {*_INTS, *_FLOATS, *_TEXTS}
_ORDER: Final = [*(field.name for field in fields(SpectralRecord) if field.name in _WANTED), "extra"]


@dataclass(frozen=True)
class SpectralColumns:
    """The records of one file as equally long columns.

    Attributes:
        ints: ``step``, ``layer``, ``num_tokens``, ``width``, ``expert``, ``loader``, ``ordinal``,
            ``num_sequences`` (-1 for none).
        floats: Ranks and other metrics, the records' own ``extra`` ones too; NaN where a record has no number.
        texts: Byte strings; ``renyi``, ``reinjection`` and ``conventions`` are still JSON.
        skipped: ``(line number, reason)`` of every line left out.
    """

    ints: dict[str, IntArray]
    floats: dict[str, FloatArray]
    texts: dict[str, TextArray]
    skipped: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.ints["step"])

    def take(self, rows: NDArray[Any]) -> SpectralColumns:
        """The given rows (indices or mask), in that order."""
        return SpectralColumns(
            {name: column[rows] for name, column in self.ints.items()},
            {name: column[rows] for name, column in self.floats.items()},
            {name: column[rows] for name, column in self.texts.items()},
            self.skipped,
        )


def scan_spectral(path: str | Path) -> SpectralColumns:
    """Read a ``spectral.jsonl``; repeated keys keep their first record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    parts = []
    with plain_file(Path(path)).open("rb") as file:
        while chunk := file.read(_CHUNK):
            part = _as_we_write_it(chunk + file.readline())
            if part is None:
                break
            parts.append(part)
        else:
            return _without_repeats(_joined(parts), None)
    rows, lines, skipped = _line_by_line(Path(path).read_bytes())
    return _without_repeats(_columns(rows, skipped), lines)


def _as_we_write_it(lines: bytes) -> SpectralColumns | None:
    """Whole lines at C speed; ``None`` if one of them is none of ours."""
    rows: list[tuple[bytes, ...]] = _PATTERN.findall(lines) if lines.isascii() else []
    if len(rows) != lines.count(b"\n") or not lines.endswith(b"\n"):
        return None
    try:
        return _columns(rows, [])
    except ValueError:  # digits and dots that are no number
        return None


def _joined(parts: list[SpectralColumns]) -> SpectralColumns:
    """Parts of one file, one after the other; a metric that a part does not have is NaN there."""
    if len(parts) < 2:
        return parts[0] if parts else _columns([], [])
    names = dict.fromkeys(name for part in parts for name in part.floats)
    return SpectralColumns(
        {name: np.concatenate([part.ints[name] for part in parts]) for name in _INTS},
        {name: np.concatenate([part.floats.get(name, np.full(len(part), np.nan)) for part in parts]) for name in names},
        {name: np.concatenate([part.texts[name] for part in parts]) for name in _TEXTS},
        [],
    )


def _line_by_line(content: bytes) -> tuple[list[tuple[bytes, ...]], list[int], list[tuple[int, str]]]:
    rows: list[tuple[bytes, ...]] = []
    lines: list[int] = []
    skipped: list[tuple[int, str]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        match = _PATTERN.fullmatch(line)
        if match is None or not _is_json(line):
            try:
                record = parse_record(line, SpectralRecord)
                match = _PATTERN.fullmatch(to_json(replace(record, schema_version=SCHEMA_VERSION)).encode())
            except ValueError as error:
                skipped.append((number, str(error)))
                continue
        if match is None:
            skipped.append((number, "a field holds a value of the wrong type"))
        else:
            rows.append(match.groups())
            lines.append(number)
    return rows, lines, skipped


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _columns(rows: list[tuple[bytes, ...]], skipped: list[tuple[int, str]]) -> SpectralColumns:
    raw = dict(zip(_ORDER, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(_ORDER, ())
    ints = {name: _numbers(raw[name]) for name in _INTS}
    floats = {name: _numbers(raw[name]) for name in _FLOATS}
    return SpectralColumns(
        {name: np.where(np.isnan(column), -1, column).astype(np.int64) for name, column in ints.items()},
        {**floats, **_extra(raw["extra"])},
        {name: _texts(raw[name], unescape=name not in _JSON) for name in _TEXTS},
        skipped,
    )


def _extra(cells: tuple[bytes, ...]) -> dict[str, FloatArray]:
    """Columns of the metrics that are no fields of the record."""
    parsed = [json.loads(b"{" + cell.removeprefix(b", ") + b"}") if cell else {} for cell in cells]
    names = sorted({name for values in parsed for name in values})
    return {
        name: np.fromiter((_float(values.get(name)) for values in parsed), dtype=np.float64, count=len(parsed))
        for name in names
    }


def _float(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _numbers(cells: tuple[bytes, ...]) -> FloatArray:
    spelled = set(cells)  # widths, layers and much that is null repeat: each spelling is read once
    value = {cell: math.nan if cell == b"null" else float(cell) for cell in spelled}
    return np.fromiter(map(value.__getitem__, cells), dtype=np.float64, count=len(cells))


def _texts(cells: tuple[bytes, ...], unescape: bool) -> TextArray:
    column = np.array(cells, dtype=np.bytes_) if cells else np.empty(0, "S1")
    if not unescape or not any(b"\\" in cell for cell in set(cells)):
        return column
    return np.array([str(json.loads(b'"' + cell + b'"')).encode() for cell in cells], dtype=np.bytes_)


def _without_repeats(columns: SpectralColumns, lines: list[int] | None) -> SpectralColumns:
    if not len(columns):
        return columns
    texts, ints = columns.texts, columns.ints
    parts = [texts[name].tolist() for name in ("run_id", "stage", "stack", "site", "bucket")]
    parts += [ints[name].tolist() for name in ("step", "layer", "expert", "loader", "ordinal")]
    place: dict[tuple[object, ...], int] = {}
    for row, key in enumerate(zip(*parts, strict=True)):
        place.setdefault(key, row)
    if len(place) == len(columns):
        return columns
    first = list(place.values())
    numbers = lines if lines is not None else list(range(1, len(columns) + 1))
    kept = np.zeros(len(columns), dtype=bool)
    kept[first] = True
    repeats = [(numbers[row], "repeats the key of an earlier record") for row in np.flatnonzero(~kept)]
    unique = columns.take(kept)
    return SpectralColumns(unique.ints, unique.floats, unique.texts, sorted([*columns.skipped, *repeats]))
