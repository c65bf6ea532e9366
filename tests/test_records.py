from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_spectral import records as rec


def spectral(step: int = 0, **changes) -> rec.SpectralRecord:
    record = rec.SpectralRecord(
        run_id="run", stage="train", step=step, tokens_seen=10 * step, layer=1, module="h.1.mlp.proj", site="post",
        bucket="tail", num_tokens=2000, width=64, tokens_per_dim=31.25, status="ok", soft_rank=20.0, hard_rank=10.0,
        hard_rank_debiased=10.1, spectral_entropy=math.log(20.0), early_enrichment=0.4, top_share=0.2, trace=3.0,
        renyi={"0.5": 25.0, "1": 20.0},
    )  # fmt: skip
    return replace(record, **changes)


def test_round_trip(tmp_path):
    written = [spectral(step) for step in (0, 10, 20)]
    rec.append_records(tmp_path / rec.SPECTRAL_FILE, written[:1])
    rec.append_records(tmp_path / rec.SPECTRAL_FILE, written[1:])
    assert rec.read_spectral(tmp_path).records == written
    losses = [rec.LossRecord("run", "train", 0, 0, "tail", 100, 7.5, 0.01)]
    rec.append_records(tmp_path / rec.LOSSES_FILE, losses)
    assert rec.read_losses(tmp_path).records == losses


def test_a_number_that_could_not_be_computed_is_null_not_nan(tmp_path):
    path = tmp_path / "spectral.jsonl"
    rec.append_records(path, [spectral(soft_rank=math.nan, renyi={"2": math.inf})])
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["soft_rank"] is None
    assert line["renyi"] == {"2": None}


def test_a_file_cut_at_any_byte_gives_back_every_whole_record(tmp_path):
    path = tmp_path / "spectral.jsonl"
    written = [spectral(step) for step in range(3)]
    rec.append_records(path, written)
    content = path.read_bytes()
    ends = [index for index, byte in enumerate(content) if byte == ord("\n")]
    cut_file = tmp_path / "cut.jsonl"
    for cut in range(len(content) + 1):
        cut_file.write_bytes(content[:cut])
        whole = sum(cut >= end for end in ends)  # a line is whole from its last brace on
        report = read_quietly(cut_file)
        assert report.records == written[:whole]
        assert len(report.skipped) == (0 if cut == 0 or cut - 1 in ends or cut in ends else 1)


def test_appending_after_a_torn_line_keeps_what_follows_readable(tmp_path):
    path = tmp_path / "spectral.jsonl"
    rec.append_records(path, [spectral(0)])
    with path.open("ab") as file:
        file.write(b'{"run_id": "ru')
    rec.append_records(path, [spectral(1)])
    with pytest.warns(UserWarning, match="1 of 3 lines left out"):
        report = rec.read_spectral(path)
    assert [record.step for record in report.records] == [0, 1]


def test_foreign_newer_and_duplicate_lines_are_named(tmp_path):
    path = tmp_path / "spectral.jsonl"
    rec.append_records(path, [spectral(0), spectral(0)])
    with path.open("a") as file:
        file.write('garbage\n{"a": 1}\n[1]\n{"schema_version": 99}\n{"schema_version": 1}\n')
    report = read_quietly(path)
    assert len(report.records) == 1
    assert [number for number, _ in report.skipped] == [2, 3, 4, 5, 6, 7]
    assert "duplicate" in report.skipped[0][1]
    assert "newer" in report.skipped[4][1]


def test_runs_in_one_file_are_kept_apart(tmp_path):
    path = tmp_path / "spectral.jsonl"
    rec.append_records(path, [spectral(0), spectral(0, run_id="other")])
    assert len(rec.read_spectral(path).records) == 2


def test_run_info_round_trip_and_refusals(tmp_path):
    info = rec.RunInfo("run", "2026-11-22T00:00:00", "Muon", seed=3, hparams={"a": [1, 2.5]}, labels={"x": "1"})
    rec.write_run(tmp_path, info)
    assert rec.read_run(tmp_path) == info
    (tmp_path / rec.RUN_FILE).write_text("{")
    with pytest.raises(ValueError, match="not a run description"):
        rec.read_run(tmp_path)
    with pytest.raises(FileNotFoundError):
        rec.read_run(tmp_path / "nowhere")


def test_reading_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['lightning'] = None;"
        "import lightning_spectral; lightning_spectral.read_spectral; lightning_spectral.SpectralRecord"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asymmetry_and_unknown_names():
    assert spectral().asymmetry == pytest.approx(math.log(2))
    assert spectral(soft_rank=None).asymmetry is None
    import lightning_spectral

    with pytest.raises(AttributeError, match="no attribute"):
        _ = lightning_spectral.nothing


def read_quietly(path) -> rec.ReadReport:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rec.read_spectral(path)


SCHEMA_1 = Path(__file__).parent / "fixtures" / "schema_1"


def test_records_of_schema_1_are_read_under_todays_names():
    report = rec.read_spectral(SCHEMA_1)
    first = report.records[0]
    assert (len(report.records), report.skipped) == (32, [])
    assert (first.num_tokens, first.tokens_per_dim, first.width) == (1399, 5.46484375, 256)
    assert (first.hard_rank_debiased, first.early_enrichment) == (16.95987571886419, 0.8998040106311522)
    assert (first.stack, first.loader, first.ordinal, first.extra) == ("", None, 0, {})
    assert rec.read_losses(SCHEMA_1).records[0].num_tokens == 1399
    assert rec.read_run(SCHEMA_1).optimizer == "AdamW"


def test_a_status_of_schema_1_has_todays_name():
    line = (SCHEMA_1 / rec.SPECTRAL_FILE).read_bytes().splitlines()[0].replace(b'"ok"', b'"few_rows"')
    assert rec.parse_record(line, rec.SpectralRecord).status == "few_tokens"


def test_a_further_metric_stands_beside_the_fields_and_comes_back(tmp_path):
    record = spectral(extra={"my_metric": 1.5})
    rec.append_records(tmp_path / rec.SPECTRAL_FILE, [record])
    assert json.loads((tmp_path / rec.SPECTRAL_FILE).read_text())["my_metric"] == 1.5
    assert rec.read_spectral(tmp_path).records == [record]
    assert (record.value("my_metric"), record.value("hard_rank"), record.value("nothing")) == (1.5, 10.0, None)


def test_lines_follow_whole_lines_at_once_and_torn_ones_on_a_line_of_their_own(tmp_path):
    file = tmp_path / "some.jsonl"
    rec.files.append_lines(file, ["first", "second"])
    rec.files.append_lines(file, ["third"])
    assert file.read_bytes() == b"first\nsecond\nthird\n"
    file.write_bytes(b"first\nto")
    rec.files.append_lines(file, ["third"])
    assert file.read_bytes() == b"first\nto\nthird\n"
