"""Records of many runs as one table."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lightning_spectral
from lightning_spectral.analysis.load import rows
from lightning_spectral.cli import main
from lightning_spectral.records import SPECTRAL_FILE, append_records, read_spectral
from tests.analysis.synthetic import write_study


def test_one_row_a_record_of_every_run(tmp_path: Path) -> None:
    first, second = write_study(tmp_path / "out", {"muon": 0.9, "adamw": 0.3}, widths=(128,), steps=(0, 20), layers=2)
    records = read_spectral(first).records
    (first / SPECTRAL_FILE).unlink()
    append_records(first / SPECTRAL_FILE, [replace(record, extra={"mine": 3.0}) for record in records])
    (second / "previous" / "old").mkdir(parents=True)
    (second / "previous" / "old" / SPECTRAL_FILE).write_text((second / SPECTRAL_FILE).read_text())
    found = rows(str(tmp_path / "out" / "**"))
    assert len(found) == 2 * 2 * 2 * 4
    assert {row["optimizer"] for row in found} == {"muon", "adamw"}
    one = next(row for row in found if row["run_id"] == records[0].run_id)
    assert (one["hard_rank"], one["renyi_0.5"], one["mine"]) == (records[0].hard_rank, records[0].renyi["0.5"], 3.0)
    assert next(row for row in found if row["optimizer"] == "adamw")["mine"] is None
    assert {tuple(row) for row in found} == {tuple(found[0])}
    frame = lightning_spectral.load(tmp_path / "out")
    assert frame.shape == (32, len(found[0]))
    assert float(frame["hard_rank"][0]) == found[0]["hard_rank"]
    assert len(rows(tmp_path / "out", "losses")) == 2 * 2 * 4


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown kind of records `ranks`; choose: spectral, losses, weights"):
        rows(tmp_path, "ranks")
    with pytest.raises(FileNotFoundError, match=r"no `spectral.jsonl` at or below"):
        rows(tmp_path)


def test_the_verb_writes_csv_json_and_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "out", {"muon": 0.9}, widths=(128,), steps=(0,), layers=1)
    expected = rows(tmp_path / "out")
    assert main(["records", str(tmp_path / "out"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["records", str(tmp_path / "out"), "--out", str(tmp_path / "r.csv")]) == 0
    with (tmp_path / "r.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["hard_rank"]) for row in table] == [row["hard_rank"] for row in expected]
    pytest.importorskip("pyarrow")
    assert main(["records", str(tmp_path / "out"), "--out", str(tmp_path / "r.parquet")]) == 0
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "r.parquet").to_pylist() == expected
    assert main(["records", str(tmp_path / "out"), "--out", str(tmp_path / "r.xlsx")]) == 2
    assert "ends in no known format" in capsys.readouterr().err


def test_a_torn_line_is_one_line_of_warning(tmp_path: Path) -> None:
    (run,) = write_study(tmp_path, {"muon": 0.9}, widths=(128,), steps=(0,), layers=1)
    with (run / SPECTRAL_FILE).open("a") as file:
        file.write('{"run_id": "mu')
    done = subprocess.run(
        [sys.executable, "-m", "lightning_spectral", "records", str(run)], capture_output=True, text=True, check=True
    )
    warning, count = done.stderr.splitlines()
    assert (
        warning
        == f"WARNING `{run / SPECTRAL_FILE}`: 1 of 5 lines left out; the first is line 5: not a whole JSON object."
    )
    assert count == "4 records"
