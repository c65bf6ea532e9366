"""Scalars reach every logger, medians reach callback_metrics, TensorBoard gets layout and pictures."""

from __future__ import annotations

import csv

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.callbacks.tensorboard import MAX_SERIES, Pictures, layout
from lightning_spectral.probe.scalars import detail
from lightning_spectral.probe.schedule import Schedule
from tests.callbacks import tiny
from tests.records_factory import spectral


@pytest.fixture
def events(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")]
    trainer = tiny.trainer(
        tmp_path, [SpectralRankCallback(1), TailTokenProbe(1, counts=tiny.counts())], max_steps=8, logger=loggers
    )
    trainer.fit(tiny.Module(n_layer=5), tiny.loader())
    accumulator = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return trainer, accumulator


def test_tensorboard_and_csv_show_what_the_records_say(events):
    trainer, accumulator = events
    records = read_spectral(trainer.log_dir).records
    for record in records:
        if record.bucket == "tail" and record.layer == 3:
            found = {e.step: e.value for e in accumulator.Scalars("spectral.hard_rank.post.tail/layer_03")}
            assert found[record.step] == pytest.approx(record.hard_rank, rel=1e-6)  # stored as fp32
    tags = accumulator.Tags()
    for tag in (
        "spectral/hard_rank.tail",
        "spectral/soft_rank.pooled",
        "spectral/asymmetry.head",
        "spectral/tail_integrity",
    ):
        assert tag in tags["scalars"]
    for tag in ("spectral_health/tokens_per_dim.tail", "spectral_health/window_s", "spectral_loss/loss.tail"):
        assert tag in tags["scalars"]
    assert "spectral_pictures/hard_rank.tail" in tags["images"]
    assert any(tag.startswith("spectral_pictures/eigenspectrum") for tag in tags["images"])
    assert "custom_scalars__config__" in tags["tensors"]
    with open(f"{trainer.loggers[1].log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["spectral/hard_rank.tail"]]
    assert len(rows) == 8


def test_layout_names_only_tags_that_exist_and_at_most_four_series(events):
    trainer, accumulator = events
    records = read_spectral(trainer.log_dir).records
    existing = set(accumulator.Tags()["scalars"])
    pages = layout(records[: len(records) // 8], with_losses=True)
    charts = [tags for page in pages.values() for _, tags in page.values()]
    assert charts
    for tags in charts:
        assert len(tags) <= MAX_SERIES
        assert set(tags) <= existing


def test_medians_can_be_monitored(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="spectral/hard_rank.pooled", mode="max", every_n_train_steps=1)
    trainer = tiny.trainer(tmp_path, [SpectralRankCallback(1), saver], enable_checkpointing=True)
    trainer.fit(tiny.Module(), tiny.loader())
    assert saver.best_model_score is not None
    median = sorted(r.hard_rank for r in read_spectral(tmp_path).records if r.step == 3)
    assert float(trainer.callback_metrics["spectral/hard_rank.pooled"]) == pytest.approx(sum(median) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("every", "last", "steps", "expected"),
    [
        (5, None, range(12), [0, 5, 10]),
        (5, 11, range(12), [0, 5, 10, 11]),
        (5, None, range(0, 24, 2), [0, 6, 10, 16, 20]),  # two optimizers: the counter jumps
        (1, None, range(3), [0, 1, 2]),
    ],
)
def test_schedule(every, last, steps, expected):
    schedule, found = Schedule(every, last), []
    for step in steps:
        if schedule.is_due(step):
            schedule.previous = step
            found.append(step)
    assert found == expected


def test_layers_can_be_left_to_the_records(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    probe = TailTokenProbe(1, counts=tiny.counts(), log_layers=False)
    tiny.trainer(tmp_path, [probe], max_steps=2, logger=logger).fit(tiny.Module(), tiny.loader())
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert "spectral/hard_rank.tail" in tags
    assert not [tag for tag in tags if tag.startswith("spectral.")]
    assert "custom_scalars__config__" in accumulator.Tags()["tensors"]
    records = read_spectral(logger.log_dir).records
    assert {record.layer for record in records} == {0, 1}
    pages = layout(records, with_losses=True, with_layers=False)
    assert {tag for page in pages.values() for _, chart in page.values() for tag in chart} <= tags
    assert probe.state_key == TailTokenProbe(1, counts=tiny.counts()).state_key  # a resumed run may change it


def test_layers_of_several_stacks_are_told_apart_in_charts_and_pictures():
    stacks = {"prelude": 1, "core": 3}
    records = [
        spectral(step=0, layer=layer, stack=stack, site="post", bucket="tail", hard_rank=10.0 * len(stack) + layer)
        for stack, size in stacks.items()
        for layer in range(size)
    ]
    names = ["layer_00", "core/layer_00", "core/layer_01", "core/layer_02"]
    pages = layout(records, with_losses=False)
    charted = [tag for _, chart in pages["2 Layers"].values() for tag in chart if "hard_rank" in tag]
    assert charted == [f"spectral.hard_rank.post.tail/{name}" for name in names]
    assert {*charted} <= {*detail(records, "train")}
    pictures = Pictures()
    pictures._remember_ranks(0, records)
    assert pictures._hard["tail"][0] == dict(zip(names, [70.0, 40.0, 41.0, 42.0], strict=True))
