from __future__ import annotations

import json
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_spectral.analysis.scan import scan_spectral
from lightning_spectral.records import SPECTRAL_FILE, SpectralRecord, append_records, read_spectral
from tests.analysis.synthetic import write_one
from tests.records_factory import spectral


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_one(tmp_path, "muon", 0.9, 128, steps=(0, 10), layers=2) / SPECTRAL_FILE


def assert_same(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = read_spectral(path)
    columns = scan_spectral(path)
    assert len(columns) == len(oracle.records)
    assert [number for number, _ in columns.skipped] == [number for number, _ in oracle.skipped]
    for name in ("step", "layer", "num_tokens", "width"):
        assert columns.ints[name].tolist() == [getattr(record, name) for record in oracle.records]
    for name, column in columns.floats.items():
        expected = [getattr(record, name) for record in oracle.records]
        np.testing.assert_array_equal(column, [np.nan if value is None else value for value in expected])
    for name in ("run_id", "stage", "site", "bucket", "status"):
        assert [cell.decode() for cell in columns.texts[name]] == [getattr(r, name) for r in oracle.records]
    assert [json.loads(cell) for cell in columns.texts["renyi"]] == [record.renyi for record in oracle.records]


def test_columns_are_the_general_readers_records(file: Path) -> None:
    assert_same(file)


def test_a_file_cut_at_any_byte_of_its_last_records(file: Path) -> None:
    content = file.read_bytes()
    last_two = len(b"".join(content.splitlines(keepends=True)[-2:]))
    for cut in range(len(content) - last_two, len(content), 7):
        file.write_bytes(content[:cut])
        assert_same(file)


def test_nulls_reordered_foreign_newer_and_repeated_lines(file: Path) -> None:
    record = read_spectral(file).records[-1]
    append_records(file, [replace(record, step=99, soft_rank=None, hard_rank=float("nan"), status="nonfinite")])
    append_records(file, [replace(record, step=100, expert=3, tokens_seen=None, module='odd "name"\\')])
    append_records(file, [replace(record, bucket="Gr\u00f6\u00dfe", step=103)])
    lines = [
        json.dumps(dict(reversed(list(asdict(replace(record, step=101)).items())))),
        "garbage",
        "{}",
        '{"loss": 3.0, "step": 4}',
        json.dumps(asdict(record) | {"schema_version": 99}),
        json.dumps(asdict(record)),
        "",
        json.dumps(asdict(replace(record, step=102))),
    ]
    with file.open("a") as handle:
        handle.write("\n".join(lines) + "\n")
    assert_same(file)
    reasons = [reason for _, reason in scan_spectral(file).skipped]
    assert len(reasons) == 5
    assert any("newer" in reason for reason in reasons)
    assert any("repeats" in reason for reason in reasons)


def test_values_of_the_wrong_type_are_left_out(file: Path) -> None:
    record = asdict(read_spectral(file).records[0])
    for k, wrong in enumerate(({"soft_rank": "many"}, {"step": [1]}, {"width": "1.2.3"})):
        with file.open("a") as handle:
            handle.write(json.dumps(record | {"layer": 50 + k} | wrong) + "\n")
    with file.open("a") as handle:  # digits and dots that are no number, where a number should be
        handle.write(json.dumps(record | {"layer": 60}).replace(f'"width": {record["width"]}', '"width": 1.2.3') + "\n")
    columns = scan_spectral(file)
    assert len(columns.skipped) == 4
    assert len(columns) == len(read_spectral_quietly(file))


WRONG = {
    "str": (1, None, [], True),
    "int": (1.5, True, "1", None, [], 10**18, 10**400),
    "int | None": (1.5, True, "1", {}, -(10**18)),
    "float": ("1.0", None, False, [2.0]),
    "float | None": ("1.0", True, [2.0], {}),
    "dict[str, float]": (None, [], {"1": "x"}, {"1": True}, {"1": [1.0]}),
    "dict[str, str]": (None, [], "x", 1),
}


@pytest.mark.parametrize("field", [field for field in fields(SpectralRecord) if field.name != "extra"])
def test_each_field_holds_its_type_or_the_line_is_left_out_by_both_readers(field: Any, file: Path) -> None:
    record = asdict(read_spectral(file).records[0])
    record.pop("extra")
    wrong = WRONG[field.type]
    lines = [json.dumps(record | {"ordinal": 9} | {field.name: value}) for value in wrong]
    before = len(scan_spectral(file))
    with file.open("a") as handle:
        handle.write("\n".join(lines) + "\n")
    columns = scan_spectral(file)
    assert (len(columns), len(columns.skipped)) == (before, len(wrong))
    assert len(read_spectral_quietly(file)) == before


def read_spectral_quietly(file: Path) -> list[SpectralRecord]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_spectral(file).records


def test_empty_and_missing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert len(scan_spectral(tmp_path / "empty.jsonl")) == 0
    with pytest.raises(FileNotFoundError):
        scan_spectral(tmp_path / "none.jsonl")


def test_braces_and_quotes_in_a_convention_are_text(file: Path) -> None:
    record = read_spectral(file).records[0]
    odd = [replace(record, step=step, conventions={"note": text}) for step, text in ((20, "a } b {"), (30, 'x "y" \\'))]
    append_records(file, odd)
    assert_same(file)
    assert len(scan_spectral(file)) == len(read_spectral(file).records)


def test_a_deeply_nested_line_is_left_out(file: Path) -> None:
    before = len(scan_spectral(file))
    with file.open("ab") as content:
        content.write(b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"\n")
    assert len(scan_spectral(file)) == before
    assert_same(file)


@pytest.mark.parametrize("text", ["\u00fc", "a\\b", 'say "x"', "\t", "}{", "\U0001f600"])
def test_both_readers_keep_a_record_whatever_its_metrics_are_called(text: str, tmp_path: Path) -> None:
    """A metric of the user's own may have any name; the fast reader used to drop the record."""
    path = tmp_path / "spectral.jsonl"
    named = {"extra": {text: 1.5}, "renyi": {text: 2.0, "2": 3.0}, "conventions": {text: text}}
    append_records(path, [spectral(step=step, module=text, stack=text, bucket=text, **named) for step in range(3)])
    columns = scan_spectral(path)
    assert columns.skipped == []
    assert columns.floats[text].tolist() == [1.5] * 3
    assert {json.loads(cell)[text] for cell in columns.texts["renyi"]} == {2.0}
    assert [cell.decode() for cell in columns.texts["bucket"]] == [text] * 3
    assert [record.value(text) for record in read_spectral(path).records] == [1.5] * 3
