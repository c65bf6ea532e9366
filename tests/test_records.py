from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import pytest

from lightning_spectral import records as rec
from lightning_spectral.records.files import append_lines
from lightning_spectral.records.upgrade import upgraded


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
    append_lines(file, ["first", "second"])
    append_lines(file, ["third"])
    assert file.read_bytes() == b"first\nsecond\nthird\n"
    file.write_bytes(b"first\nto")
    append_lines(file, ["third"])
    assert file.read_bytes() == b"first\nto\nthird\n"


def test_lines_are_appended_in_folders_that_are_there_or_not_yet(tmp_path):
    path = tmp_path / "sweep" / "cell" / "spectral.jsonl"
    for lines in (["{}"], ["{}", "{}"]):  # the second time the folders are there
        append_lines(path, lines)
    assert path.read_bytes() == b"{}\n" * 3


def test_a_layer_and_its_experts_sort_by_depth():
    assert rec.layer_name(3) == "layer_03"
    assert rec.layer_name(3, 7) == "layer_03.expert_07"
    assert sorted(rec.layer_name(layer) for layer in range(100)) == [rec.layer_name(layer) for layer in range(100)]


SAID = {"ordinal": 0, "world_size": 1, "soft_method": "exact", "num_windows": 0, "num_lost_windows": 0}
UNSAID = {"int | None": None, "float | None": None, "bool | None": None, "dict[str, float] | None": None, "str": ""}


@pytest.mark.parametrize("kind", [rec.SpectralRecord, rec.LossRecord, rec.WeightRecord, rec.AlarmRecord, rec.RunInfo])
def test_what_a_record_does_not_say_is_nothing_but_for_these(kind):
    """A line of an earlier version has no such field: what it then means must not move."""
    said = SAID | {"schema_version": 2} | ({"status": "ok"} if kind is rec.LossRecord else {})
    for field in fields(kind):
        if field.default_factory is not MISSING:
            assert field.default_factory() == {}, field.name
        elif field.default is not MISSING:
            assert field.default == (said[field.name] if field.name in said else UNSAID[field.type]), field.name


def test_the_schema_of_today_is_2_and_only_earlier_fields_are_renamed():
    """A further metric may be called what a field was called once. Another number needs a reader for files of this."""
    assert rec.SCHEMA_VERSION == spectral().schema_version == 2
    assert json.loads(rec.to_json(spectral()))["schema_version"] == 2
    assert upgraded({"eee": 0.25, "status": "few_rows"}, 2) == {"eee": 0.25, "status": "few_rows"}
    assert upgraded({"eee": 0.25, "status": "few_rows"}, 1) == {"early_enrichment": 0.25, "status": "few_tokens"}


@pytest.mark.parametrize("wrong", [{"stage": ["train"]}, {"step": [3]}, {"layer": {"a": 1}}, {"loader": []}])
def test_a_field_of_the_wrong_type_in_a_key_is_a_line_left_out_with_its_number(wrong, tmp_path):
    path = tmp_path / "spectral.jsonl"
    rec.append_records(path, [spectral(0), spectral(1)])
    append_lines(path, [json.dumps(json.loads(rec.to_json(spectral(2))) | wrong)])
    with pytest.warns(UserWarning, match="1 of 3 lines left out; the first is line 3") as caught:
        report = rec.read_spectral(path)
    assert report.records == [spectral(0), spectral(1)]
    assert report.skipped == [(3, "a field holds a value of the wrong type")]
    assert caught[0].filename == __file__  # who reads is told, not the library about itself


def test_what_a_spectral_record_does_not_say_is_said_once_here():
    record = rec.SpectralRecord(
        "r", "train", 1, None, 0, "m", "post", "tail", 4, 8, 0.5, "ok", None, None, None, None, None, None, None
    )
    found = {name: value for name, value in asdict(record).items() if name not in ("run_id", "stage", "module")}
    assert {name: value for name, value in found.items() if value is not None} == {
        "step": 1, "layer": 0, "site": "post", "bucket": "tail", "num_tokens": 4, "width": 8, "tokens_per_dim": 0.5,
        "status": "ok", "renyi": {}, "reinjection": {}, "soft_method": "exact", "dtype": "", "world_size": 1,
        "conventions": {}, "stack": "", "reason": "", "ordinal": 0, "layout": "", "schema_version": 2, "extra": {},
    }  # fmt: skip
