"""Reading and writing what a run leaves behind: one JSON object per line, readable without torch.

A run folder holds up to five files, each written by one place and read through this module:

* ``run.json``: what was run (a :class:`RunInfo`), written once at fit start;
* ``spectral.jsonl``: one :class:`SpectralRecord` per (window, layer, site, bucket);
* ``losses.jsonl``: one :class:`LossRecord` per (window, bucket);
* ``weights.jsonl``: one :class:`WeightRecord` per (window, parameter, what of it);
* ``alarms.jsonl``: one :class:`AlarmRecord` per alarm.

The JSONL files only ever grow. A line is whole or it is not a record: a file cut at any byte gives back every
whole line, and :func:`append_records` first closes an incomplete last line so that what follows stays readable.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from lightning_spectral.records.schema import (
    ALARMS_FILE,
    LOSSES_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    SPECTRAL_FILE,
    WEIGHTS_FILE,
    AlarmRecord,
    LossRecord,
    RunInfo,
    SpectralRecord,
    WeightRecord,
)
from lightning_spectral.records.upgrade import upgraded
from lightning_spectral.text import parse_json, plain_file, write_text

RecordT = TypeVar("RecordT", SpectralRecord, LossRecord, WeightRecord, AlarmRecord)
Record: TypeAlias = SpectralRecord | LossRecord | WeightRecord | AlarmRecord


@dataclass(frozen=True)
class ReadReport(Generic[RecordT]):
    """Records read from one file and what had to be left out.

    Attributes:
        records: Whole, valid records in file order, first one of each key.
        skipped: ``(line number, reason)`` of every line left out.
    """

    records: list[RecordT]
    skipped: list[tuple[int, str]]


def append_records(path: str | Path, records: Sequence[Record]) -> None:
    """Append ``records`` in one synced write, all of them or none; a killed run's incomplete last line is closed first.

    Raises:
        OSError: If they cannot be written (a full disk); the file is then as it was.
    """
    append_lines(path, [to_json(record) for record in records])


def append_lines(path: str | Path, lines: Sequence[str]) -> None:
    """As :func:`append_records`, of any lines.

    Raises:
        OSError: If they cannot be written; the file is then as it was.
    """
    if not lines:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = "".join(f"{line}\n" for line in lines).encode()
    with path.open("ab", buffering=0) as file:  # a buffer would be written once more when the file is closed
        size = file.tell()
        if size and not _ends_with_newline(path):
            payload = b"\n" + payload
        try:
            while payload:
                payload = payload[file.write(payload) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)  # records that are tried again must not be there twice
            raise


def to_json(record: Record) -> str:
    """One line of a JSONL file; further metrics (``extra``) stand beside the other fields."""
    content = asdict(record)
    content |= content.pop("extra", {})
    return json.dumps(_finite(content), allow_nan=False)


def read_spectral(path: str | Path) -> ReadReport[SpectralRecord]:
    """Read ``spectral.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, SPECTRAL_FILE), SpectralRecord)


def read_losses(path: str | Path) -> ReadReport[LossRecord]:
    """Read ``losses.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, LOSSES_FILE), LossRecord)


def read_weights(path: str | Path) -> ReadReport[WeightRecord]:
    """Read ``weights.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, WEIGHTS_FILE), WeightRecord)


def read_alarms(path: str | Path) -> ReadReport[AlarmRecord]:
    """Read ``alarms.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, ALARMS_FILE), AlarmRecord)


def parse_record(line: bytes, kind: type[RecordT]) -> RecordT:
    """One line of a JSONL file as a record.

    Raises:
        ValueError: If it is not a whole JSON object, not one of our records, or one of a newer schema.
    """
    try:
        content = parse_json(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("not a whole JSON object") from None
    return _build(content, kind)


def write_run(folder: str | Path, info: RunInfo) -> None:
    """Write ``run.json`` atomically."""
    write_text(Path(folder) / RUN_FILE, json.dumps(_finite(asdict(info)), indent=2, default=str) + "\n")


def read_run(folder: str | Path) -> RunInfo:
    """Read ``run.json`` of a run folder.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is not a run description, or one of a newer schema.
    """
    path = _file(folder, RUN_FILE)
    try:
        info = _build(parse_json(path.read_bytes()), RunInfo)
        # labels of other programs may be numbers
        return replace(info, labels={name: str(value) for name, value in info.labels.items() if value is not None})
    except ValueError as error:  # of JSON, of its encoding, of its fields
        raise ValueError(f"`{path}` is not a run description: {error}. Was it edited by hand?") from error


def _read(path: Path, kind: type[RecordT]) -> ReadReport[RecordT]:
    records: list[RecordT] = []
    skipped: list[tuple[int, str]] = []
    seen: set[tuple[Any, ...]] = set()
    for number, line in _lines(path):
        try:
            record: RecordT = parse_record(line, kind)
        except ValueError as error:
            skipped.append((number, str(error)))
            continue
        key = (record.run_id, *record.key)
        if key in seen:
            skipped.append((number, f"duplicate of {key}"))
        else:
            seen.add(key)
            records.append(record)
    if skipped:
        number, reason = skipped[0]
        warnings.warn(
            f"`{path}`: {len(skipped)} of {len(records) + len(skipped)} lines left out; the first is line {number}: "
            f"{reason}.",
            stacklevel=3,
        )
    return ReadReport(records, skipped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


_KINDS: tuple[type[Any], ...] = (SpectralRecord, LossRecord, WeightRecord, AlarmRecord, RunInfo)
_FIELD_NAMES = {kind.__name__: frozenset(f.name for f in fields(kind)) for kind in _KINDS}
_LARGEST = 10**18  # of an integer, below it: what 64 bits hold


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value of a JSON file is of a field's type, as the dataclasses of records spell it."""
    kind, _, none = annotation.partition(" | ")
    if value is None:
        return none == "None"
    if kind == "dict[str, float]":
        return isinstance(value, dict) and all(_fits(item, "float | None") for item in value.values())
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
    if kind == "float":
        return isinstance(value, float) or _fits(value, "int")
    return isinstance(value, {"bool": bool, "str": str}.get(kind, dict))


_TYPES = {kind.__name__: [(f.name, str(f.type)) for f in fields(kind)] for kind in _KINDS}


BuiltT = TypeVar("BuiltT", SpectralRecord, LossRecord, WeightRecord, AlarmRecord, RunInfo)


def _build(content: Any, kind: type[BuiltT]) -> BuiltT:
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError("no schema_version: not one of our records")
    version = content["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"schema_version {version} is newer than {SCHEMA_VERSION}: upgrade lightning-spectral")
    content = upgraded(content, version)
    known = _FIELD_NAMES[kind.__name__]
    given = {name: value for name, value in content.items() if name in known}
    if "extra" in known:
        # what is no number is a later version's field, or a damaged name
        more = {name: value for name, value in content.items() if name not in known}
        given["extra"] = {name: more[name] for name in more if _fits(more[name], "float | None")}
    for name, wanted in _TYPES[kind.__name__]:
        if name in given and not _fits(given[name], wanted):
            raise ValueError("a field holds a value of the wrong type")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


def _file(path: str | Path, name: str) -> Path:
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"no `{name}` at `{path}`: give a run folder (`lightning_spectral.load` looks below one)."
        )
    return plain_file(file)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that could not be computed is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def known_keys(records: Iterable[Record]) -> set[tuple[Any, ...]]:
    """Keys already on disk: what a resumed run must not write again."""
    return {record.key for record in records}
