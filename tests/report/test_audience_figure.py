"""The recall front of the report is that of the records, and falls back on the losses beside the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.callbacks.update_audience import read_audience
from lightning_spectral.probe.audience import recall_front as front_of_records
from lightning_spectral.report import figures_audience
from tests.analysis.synthetic import write_study
from tests.report.test_page import scene_of

STEPS = (0, 10, 20, 30, 40)
FALLS = {"head": (8.0, 5.5, 4.2, 4.1, 4.0), "mid": (8.0, 7.5, 5.9, 5.0, 4.5), "tail": (8.0, 8.2, 7.9, 7.0, 6.5)}


def write_audience(folder: Path) -> None:
    rows = [
        {"run_id": "r", "step": step, "kind": "mlp.proj", "rule": "applied", "bucket": bucket, "gain": 1.0,
         "loss": FALLS[bucket][at], "num_tokens": 9, "num_matrices": 1, "held_out": True}
        for at, step in enumerate(STEPS) for bucket in ("tail", "head", "mid")
    ]  # fmt: skip
    (folder / "audience.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_study(tmp_path, {"muon": 0.9, "adamw": 0.3}, (128,), seeds=(0, 1))


def test_the_front_is_that_of_the_records(folders: list[Path], tmp_path: Path) -> None:
    for folder in folders:
        write_audience(folder)
    made = figures_audience.recall_front(scene_of(tmp_path))
    assert made.figure is not None
    front = front_of_records(read_audience(folders[0]))
    assert front == {"head": 10, "mid": 20, "tail": 30}
    assert {
        bucket: figures_audience.half_way(dict(zip(STEPS, FALLS[bucket], strict=True))) for bucket in FALLS
    } == front
    assert made.headline.count("HEAD at step 10 and TAIL at step 30") == 2
    muon, adamw, _ = made.figure.axes
    assert [label.get_text() for label in muon.get_yticklabels()] == ["HEAD", "MID", "TAIL"]
    shares = np.asarray(adamw.collections[0].get_array()).reshape(3, 5)
    assert shares[0] == pytest.approx([0, 2.5 / 4, 3.8 / 4, 3.9 / 4, 1])
    assert shares[2] == pytest.approx([0, 0, 0.1 / 1.5, 1 / 1.5, 1])  # it rose first: no less than nothing


def test_without_audience_the_losses_beside_the_ranks_serve(folders: list[Path], tmp_path: Path) -> None:
    made = figures_audience.recall_front(scene_of(tmp_path))
    assert made.figure is not None
    assert "TAIL" in made.headline
    for folder in folders:
        (folder / "losses.jsonl").unlink()
    missing = figures_audience.recall_front(scene_of(tmp_path))
    assert missing.figure is None
    assert "UpdateAudience" in missing.note


def test_a_loss_that_only_rose_has_no_half_way() -> None:
    assert figures_audience.half_way({0: 4.0, 10: 5.0}) is None
    assert figures_audience.share_gone({0: 4.0, 10: 5.0}) == {0: 0.0, 10: 0.0}
