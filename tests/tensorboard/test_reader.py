"""A run that grows is read on from where the last reading ended."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.records import (
    ALARMS_FILE,
    SPECTRAL_FILE,
    AlarmRecord,
    append_records,
    read_run,
    read_spectral,
    to_json,
    write_run,
)
from lightning_spectral.tensorboard.reader import RunReader
from tests.analysis.synthetic import write_one

FIXTURE = Path(__file__).parent.parent / "fixtures" / "schema_1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_one(tmp_path, "muon", 0.9, 128, steps=(0, 10, 20), layers=2)


def test_values_are_the_records(folder: Path) -> None:
    reader = RunReader(folder)
    reader.refresh()
    rows = reader.columns["train", "post"]
    steps, tokens, values, statuses = rows.dense("hard_rank")
    assert steps.tolist() == [0, 10, 20]
    assert tokens.tolist() == [0, 10240, 20480]
    assert values.shape == (4, 3, 2)
    for record in read_spectral(folder).records:
        place = rows.bucket_names[record.bucket], steps.tolist().index(record.step), record.layer
        assert values[place] == record.hard_rank
        assert statuses[place] == rows.status_names["ok"]
    asymmetry = rows.dense("asymmetry")[2]
    assert np.allclose(asymmetry, np.log(rows.dense("soft_rank")[2] / values), rtol=1e-12, atol=0)


def test_only_what_is_new_is_read(folder: Path) -> None:
    reader = RunReader(folder)
    reader.refresh()
    records = read_spectral(folder).records
    before = len(reader.columns["train", "post"].steps)
    reader.refresh()
    assert len(reader.columns["train", "post"].steps) == before
    later = [replace(record, step=30, hard_rank=5.0) for record in records if record.step == 20]
    append_records(folder / SPECTRAL_FILE, later)
    reader.refresh()
    steps, _, values, _ = reader.columns["train", "post"].dense("hard_rank")
    assert steps.tolist() == [0, 10, 20, 30]
    assert (values[:, 3] == 5.0).all()


def test_a_line_that_is_being_written_waits_for_its_end(folder: Path) -> None:
    reader = RunReader(folder)
    reader.refresh()
    line = to_json(replace(read_spectral(folder).records[0], step=30, hard_rank=7.0)).encode() + b"\n"
    with (folder / SPECTRAL_FILE).open("ab") as file:
        file.write(line[:40])
        file.flush()
        reader.refresh()
        assert 30 not in reader.columns["train", "post"].steps
        file.write(line[40:])
    reader.refresh()
    assert list(reader.columns["train", "post"].steps).count(30) == 1
    assert reader.skipped == 0


def test_a_run_that_took_the_folder_is_read_anew(folder: Path, tmp_path: Path) -> None:
    reader = RunReader(folder)
    reader.refresh()
    other = write_one(tmp_path / "other", "adamw", 0.3, 256, steps=(0, 10), layers=1)
    for file in (SPECTRAL_FILE, "run.json", "losses.jsonl"):
        (folder / file).unlink()
        (other / file).rename(folder / file)
    reader.refresh()
    assert reader.info is not None
    assert reader.info.run_id == read_run(folder).run_id == "adamw_256_0"
    assert reader.width == 256
    assert reader.columns["train", "post"].dense("hard_rank")[2].shape == (4, 2, 1)


def test_what_is_not_of_the_run_is_counted_and_left_out(folder: Path) -> None:
    record = read_spectral(folder).records[0]
    with (folder / SPECTRAL_FILE).open("a") as file:
        for line in ("{torn", "[]", to_json(record), to_json(replace(record, run_id="another", step=40))):
            file.write(line + "\n")
    reader = RunReader(folder)
    reader.refresh()
    assert reader.skipped == 4
    assert reader.columns["train", "post"].dense("hard_rank")[0].tolist() == [0, 10, 20]


def test_metrics_of_the_users_own_and_numbers_that_are_missing(folder: Path) -> None:
    record = read_spectral(folder).records[-1]
    later = replace(record, step=30, extra={"kurtosis": 2.5}, hard_rank=None, status="empty")
    append_records(folder / SPECTRAL_FILE, [later])
    reader = RunReader(folder)
    reader.refresh()
    rows = reader.columns["train", "post"]
    place = rows.bucket_names[record.bucket], 3, record.layer
    assert rows.dense("kurtosis")[2][place] == 2.5
    assert math.isnan(rows.dense("hard_rank")[2][place])
    assert rows.dense("hard_rank")[3][place] == rows.status_names["empty"]
    assert np.isnan(rows.dense("kurtosis")[2][:, :3]).all()


def test_a_run_of_schema_1_is_read() -> None:
    reader = RunReader(FIXTURE)
    reader.refresh()
    lines = [json.loads(line) for line in (FIXTURE / SPECTRAL_FILE).read_text().splitlines()]
    assert len(reader.columns["train", "post"].steps) == len(lines)
    assert lines[0]["rows_per_dim"] in list(reader.columns["train", "post"].values["tokens_per_dim"])
    assert reader.width == lines[0]["width"]


def test_the_second_stack_of_blocks_has_layers_of_its_own(folder: Path) -> None:
    records = [replace(record, stack="decoder.layers") for record in read_spectral(folder).records]
    append_records(folder / SPECTRAL_FILE, records)
    reader = RunReader(folder)
    reader.refresh()
    assert set(reader.columns["train", "post"].layer_names) == {
        "layer_00",
        "layer_01",
        "decoder.layers layer_00",
        "decoder.layers layer_01",
    }


def test_alarms_are_read(folder: Path) -> None:
    info = read_run(folder)
    alarm = AlarmRecord(info.run_id, "train", 20, "hard_rank", "post", "tail", 3.0, 128.0, "width", 0.05, "too low")
    append_records(folder / ALARMS_FILE, [alarm, replace(alarm, run_id="another")])
    reader = RunReader(folder)
    reader.refresh()
    assert reader.alarms == [alarm]


def test_a_folder_without_files_is_an_empty_run(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    reader.refresh()
    assert reader.columns == {}
    write_run(tmp_path, read_run(FIXTURE))
    reader.refresh()
    assert reader.info is not None
