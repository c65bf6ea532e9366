"""Pictures and records reach loggers that hold them; the picture shows every bucket in its own colour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_spectral import TailTokenProbe
from lightning_spectral.callbacks.tensorboard import heat_map, rank_curves
from lightning_spectral.callbacks.trainer_host import folder_of
from lightning_spectral.callbacks.uploads import add_figure, holds_pictures, is_tensorboard, pixels, upload_records
from lightning_spectral.records import read_run
from lightning_spectral.records.looks import BUCKET_COLORS
from tests.analysis.synthetic import write_one
from tests.callbacks import tiny

CURVES = {
    "hard_rank": {bucket: {0: 50.0 + 9 * k, 20: 5.0 + k, 40: 30.0 + 8 * k} for k, bucket in enumerate(BUCKET_COLORS)},
    "soft_rank": {bucket: {20: 9.0 + 3 * k, 40: 50.0 + 8 * k} for k, bucket in enumerate(BUCKET_COLORS)},
}


def has_color(image: np.ndarray, color: str) -> bool:
    wanted = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return int((image == wanted).all(axis=-1).sum()) > 50


@pytest.mark.parametrize("buckets", [("pooled", "head", "mid", "tail"), ("tail",), ("tail", "head")])
def test_a_bucket_has_its_colour_whatever_stands_beside_it(buckets) -> None:
    figure = rank_curves({metric: {b: values[b] for b in buckets} for metric, values in CURVES.items()})
    image = pixels(figure)
    for bucket, color in BUCKET_COLORS.items():
        assert has_color(image, color) is (bucket in buckets), bucket


def test_every_window_is_drawn_as_measured_and_the_untrained_network_dotted() -> None:
    hard, soft = rank_curves(CURVES).axes
    tail = next(line for line in hard.lines if line.get_label() == "TAIL")
    assert tail.get_xydata().tolist() == [[0, 77], [20, 8], [40, 54]]
    assert sorted(line.get_ydata()[0] for line in hard.lines if line.get_linestyle() == ":") == [50, 59, 68, 77]
    assert not [line for line in soft.lines if line.get_linestyle() == ":"]  # it was not measured at step 0


class WithImages:
    def __init__(self) -> None:
        self.images: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def log_image(self, key, images, step):
        self.images.setdefault(key, []).append((step, images[0].shape))


class MLFlowLogger:
    """As Lightning's, as far as it is used; MLflow itself is heavy."""

    run_id = "abc"

    def __init__(self) -> None:
        self.files: list[str] = []
        self.experiment = SimpleNamespace(
            log_figure=lambda run_id, figure, name: self.files.append(name),
            log_artifact=lambda run_id, file, folder: self.files.append(f"{folder}/{Path(file).name}"),
        )


def test_loggers_get_what_they_can_hold(tmp_path) -> None:
    with_images, mlflow, without = WithImages(), MLFlowLogger(), SimpleNamespace()
    assert [holds_pictures(logger) for logger in (with_images, mlflow, without)] == [True, True, False]
    add_figure([with_images, mlflow, without], "spectral_pictures/rank_by_bucket", rank_curves(CURVES), 20)
    (step, shape), *_ = with_images.images["spectral_pictures/rank_by_bucket"]
    assert step == 20
    assert shape[2] == 3
    folder = write_one(tmp_path, "muon", 0.9, 128)
    upload_records([with_images, mlflow, without], folder, read_run(folder))
    assert mlflow.files == [
        "spectral_pictures/rank_by_bucket_00000020.png",
        "spectral_records/run.json",
        "spectral_records/spectral.jsonl",
        "spectral_records/losses.jsonl",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # W&B's own, on the versions of what it finds
def test_wandb_offline_keeps_scalars_pictures_and_records(tmp_path, monkeypatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="spectral", save_dir=tmp_path, offline=True)
    trainer = tiny.trainer(tmp_path, [TailTokenProbe(1, counts=tiny.counts())], logger=logger)
    trainer.fit(tiny.Module(), tiny.loader())
    folder = Path(logger.experiment.dir)
    logger.experiment.finish()
    assert list(folder.rglob("*rank_by_bucket*.png"))
    (log,) = folder.parent.glob("*.wandb")  # what `wandb sync` sends later
    content = log.read_bytes()
    for text in (
        b"spectral/hard_rank.pooled",
        b"spectral_pictures/rank_by_bucket",
        b"spectral-records",
        b"losses.jsonl",
    ):
        assert text in content, text


def test_tensorboards_logger_is_known_from_whichever_distribution(tmp_path: Path) -> None:
    """`pytorch_lightning`'s classes are no relatives of `lightning`'s, and our callbacks run in both."""
    import pytorch_lightning.loggers
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger as OfFabric
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    class Own(TensorBoardLogger):
        pass

    kinds = (TensorBoardLogger, OfFabric, Own, pytorch_lightning.loggers.TensorBoardLogger)
    assert all(is_tensorboard(kind(str(tmp_path))) for kind in kinds)
    assert not is_tensorboard(CSVLogger(str(tmp_path)))
    loggers = [CSVLogger(str(tmp_path)), pytorch_lightning.loggers.TensorBoardLogger(str(tmp_path), "n", version="v")]
    assert folder_of(SimpleNamespace(loggers=loggers)) == str(tmp_path / "n" / "v")
    assert holds_pictures(loggers[1])


@pytest.mark.parametrize("last", [0, 19, 100_000, 2_000_000])
def test_ticks_are_whole_steps_and_few_names_that_do_not_meet(last: int) -> None:
    steps = sorted({0, last // 2, last})
    layers = [f"layer_{layer:02d}" for layer in range(96)]
    figures = [
        heat_map({step: dict.fromkeys(layers, 3.0) for step in steps}, "tail"),
        rank_curves(
            {"hard_rank": {"tail": dict.fromkeys(steps, 3.0)}, "soft_rank": {"tail": dict.fromkeys(steps, 4.0)}}
        ),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        for axes in figure.axes[:2]:
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            if axes.get_xlabel() == "optimizer step":
                assert ticks
                assert all(float(tick).is_integer() for tick in ticks)
            for axis in (axes.xaxis, axes.yaxis):
                boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
                assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    shown = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert (shown[0], shown[-1]) == ("layer_00", "layer_95")


def test_many_windows_are_a_line_and_few_are_dots() -> None:
    for count, marker in ((10, "."), (100, "")):
        (axes,) = rank_curves({"hard_rank": {"tail": dict.fromkeys(range(count), 3.0)}}).axes
        assert axes.lines[0].get_marker() == marker
