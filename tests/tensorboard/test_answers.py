"""What the page draws are the numbers of the records and of the analysis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.trajectory import beta_trajectories
from lightning_spectral.records import SPECTRAL_FILE, AlarmRecord, append_records, read_spectral
from lightning_spectral.records.looks import BUCKET_COLORS, bucket_colors
from lightning_spectral.tensorboard import answers
from lightning_spectral.tensorboard.reader import RunReader
from tests.analysis.synthetic import write_one, write_spectra, write_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_one(tmp_path, "muon", 0.9, 128, steps=(0, 20, 60), layers=3, sites=("pre", "post"))


def read(folder: Path) -> RunReader:
    reader = RunReader(folder)
    reader.refresh()
    return reader


def test_curves_are_medians_over_layers(folder: Path) -> None:
    curves = answers.curves(read(folder), "train", "post", "soft_rank")
    assert list(curves["buckets"]) == ["pooled", "head", "mid", "tail"]
    assert (curves["steps"], curves["tokens"], curves["width"]) == ([0, 20, 60], [0, 20480, 61440], 128)
    for place, step in enumerate(curves["steps"]):
        own = [
            record.soft_rank
            for record in read_spectral(folder).records
            if (record.step, record.site, record.bucket) == (step, "post", "tail")
        ]
        tail = curves["buckets"]["tail"]
        assert tail["median"][place] == median(own)
        assert (tail["low"][place], tail["high"][place]) == (min(own), max(own))
    assert curves["choices"]["sites"] == ["post", "pre"]
    assert curves["choices"]["metrics"][:3] == ["hard_rank", "soft_rank", "asymmetry"]
    assert curves["choices"]["metrics"][-2:] == ["loss", "accuracy"]


def test_a_window_without_a_number_is_null_and_the_worst_status_shows(folder: Path) -> None:
    records = [record for record in read_spectral(folder).records if record.step == 60]
    later = [
        replace(record, step=80, hard_rank=None if record.bucket == "tail" else 3.0, status=status)
        for record, status in zip(records, ["undersampled", "ok", "nonfinite"] * len(records), strict=False)
    ]
    append_records(folder / SPECTRAL_FILE, later)
    curves = answers.curves(read(folder), "train", "post", "hard_rank")
    assert curves["buckets"]["tail"]["median"][-1] is None
    own = [record for record in later if (record.bucket, record.site) == ("mid", "post")]
    worst = "nonfinite" if any(record.status == "nonfinite" for record in own) else "undersampled"
    assert curves["buckets"]["mid"]["status"] == ["ok", "ok", "ok", worst]
    json.dumps(curves, allow_nan=False)


def test_losses_of_another_stage_are_shown_and_named(folder: Path) -> None:
    curves = answers.curves(read(folder), "train", "post", "loss")
    assert curves["stage"] == "validation"
    assert curves["buckets"]["head"]["median"][0] == pytest.approx(7.7, abs=1e-12)


def test_an_alarm_is_at_its_curve_only(folder: Path) -> None:
    reader = read(folder)
    alarm = AlarmRecord("muon_128_0", "train", 60, "hard_rank", "post", "tail", 3.0, 128.0, "width", 0.05, "low")
    reader.alarms.append(alarm)
    assert answers.curves(reader, "train", "post", "hard_rank")["alarms"] == [
        {"step": 60, "bucket": "tail", "message": "low"}
    ]
    assert answers.curves(reader, "train", "pre", "hard_rank")["alarms"] == []
    assert answers.curves(reader, "train", "post", "soft_rank")["alarms"] == []


def test_layers_by_window(folder: Path) -> None:
    found = answers.layers(read(folder), "train", "post", "hard_rank", "mid")
    assert found["layers"] == ["layer_00", "layer_01", "layer_02"]
    for record in read_spectral(folder).records:
        if (record.site, record.bucket) == ("post", "mid"):
            assert found["values"][record.layer][found["steps"].index(record.step)] == record.hard_rank
    nothing = answers.layers(read(folder), "train", "post", "hard_rank", "no_such_bucket")
    assert nothing["layers"] == []


def test_spectra_have_the_ranks_of_their_eigenvalues(folder: Path) -> None:
    write_spectra(folder, 128)
    (folder / "eigenvalues" / "train_00000080.safetensors").write_bytes(b"torn")
    found = answers.spectra(folder, "train", "post", "tail", "layer_01")
    assert found["steps"] == [20, 60, 100]
    for k, step in enumerate(found["steps"]):
        p = np.arange(1, 129, dtype=np.float32).astype(np.float64) ** -(0.5 + step / 100)
        p /= p.sum()
        assert found["hard"][k] == pytest.approx(1 / (p**2).sum(), rel=1e-5)  # the file holds fp32
        assert found["soft"][k] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert found["modes"][k][0] == 1
        assert found["modes"][k][-1] == 128
        assert found["shares"][k] == pytest.approx(p[np.array(found["modes"][k]) - 1], rel=1e-5)
    assert answers.spectra(folder, "train", "post", "tail", "layer_02")["steps"] == []
    assert answers.spectra(folder, "validation", "post", "tail", "layer_01")["steps"] == []


def test_exponents_are_those_of_the_analysis(tmp_path: Path) -> None:
    folders = write_study(tmp_path, {"muon": 0.9, "adamw": 0.3}, (128, 256, 512), noise=0.01)
    found = answers.exponents(folders, "train", "post", "hard_rank")
    paths = {p.series: p for p in beta_trajectories(load_runs([tmp_path]), metrics=("hard_rank",), smoothing=1)}
    assert len(found["series"]) == len(paths) == 8
    for series in found["series"]:
        path = paths[series["name"], "post", series["bucket"], "hard_rank"]
        assert series["beta"] == path.beta.tolist()
        assert series["low"] == path.low.tolist()
        assert series["widths"] == 3
    muon = next(s for s in found["series"] if (s["name"], s["bucket"]) == ("muon", "tail"))
    assert muon["beta"][-1] == pytest.approx(0.9, abs=0.05)  # the study's slope, noise of 1 % a layer


def test_one_width_is_no_exponent_but_a_sentence(folder: Path) -> None:
    found = answers.exponents([folder], "train", "post", "hard_rank")
    assert found["series"] == []
    assert "two widths" in found["message"]
    assert "D = 128" in found["message"]
    assert answers.exponents([], "train", "post", "hard_rank")["message"]


def test_the_four_buckets_always_have_their_colours() -> None:
    assert bucket_colors(["tail", "pooled"]) == {name: BUCKET_COLORS[name] for name in ("pooled", "tail")}
    mine = bucket_colors(["early", "late", "tail"])
    assert mine["tail"] == BUCKET_COLORS["tail"]
    assert len(set(mine.values())) == 3
    assert len(set(BUCKET_COLORS.values())) == 4
