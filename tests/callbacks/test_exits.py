"""Whatever ends a fit, nothing of ours stays: hooks, threads, locks, helpers in the Trainer's list."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from torch import nn

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, read_spectral
from lightning_spectral.callbacks.tensorboard import MAX_COLUMNS, Pictures, heat_map
from lightning_spectral.records import read_weights
from tests.records_factory import spectral
from tests.scripts import toys


class Fails(pl.Callback):
    """Raises in a step, and again when it is told of the exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise self.error

    def on_exception(self, *_: Any) -> None:
        raise RuntimeError("in on_exception")


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [ArithmeticError(), KeyboardInterrupt()])
def test_nothing_stays_where_an_earlier_callback_raises_in_on_exception(
    background: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning switches Ctrl-C off
    settings: dict[str, Any] = {"dirpath": str(tmp_path / "records")}
    ours = [
        SpectralRankCallback(1, background=background, **settings),
        TailTokenProbe(1, counts=toys.counts(), background=background, **settings),
        WeightSpectrumCallback(1, **settings),
    ]
    fails = Fails(error)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=6, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[fails, *ours],
    )  # fmt: skip
    lit = toys.Lit()
    with pytest.raises(RuntimeError, match="in on_exception"):
        trainer.fit(lit, toys.loader())
    assert hooks(lit) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spectral")]
    assert not list((tmp_path / "records").glob("*.lock"))
    assert trainer.callbacks == [fails, *ours]  # type: ignore[attr-defined]
    assert {r.step for r in read_spectral(tmp_path / "records").records} == {0, 1}  # the window of step 2 was open


def test_the_trainers_list_is_the_users_again_after_a_fit(tmp_path: Path) -> None:
    ours = [
        SpectralRankCallback(1, dirpath=str(tmp_path / "records")),
        WeightSpectrumCallback(2, dirpath=str(tmp_path)),
    ]
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=ours,
    )  # fmt: skip
    trainer.fit(toys.Lit(), toys.loader())
    assert trainer.callbacks == ours  # type: ignore[attr-defined]


def test_callbacks_used_again_after_an_exception_record_in_the_new_folder(tmp_path: Path) -> None:
    ours = [SpectralRankCallback(1), TailTokenProbe(1, counts=toys.counts()), WeightSpectrumCallback(1)]

    def fit(name: str, *others: pl.Callback) -> None:
        trainer = pl.Trainer(
            default_root_dir=tmp_path / name, max_steps=4, accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*ours, *others],
        )  # fmt: skip
        trainer.fit(toys.Lit(), toys.loader())

    with pytest.raises(RuntimeError, match="in on_exception"):
        fit("first", Fails(ArithmeticError()))
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.jsonl")}
    fit("second")
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.jsonl")} == before
    (spectra,) = (tmp_path / "second").rglob("spectral.jsonl")
    assert {r.step for r in read_spectral(spectra).records} == {0, 1, 2, 3}
    assert {r.step for r in read_weights(spectra.with_name("weights.jsonl")).records} == {0, 1, 2, 3}


def test_a_heat_map_has_a_bounded_number_of_columns(tmp_path: Path) -> None:
    """After 4,000 windows: the first and the last, evenly between, each value at its step."""
    pictures = Pictures()
    for step in range(4_000):
        pictures._remember_ranks(
            step, [spectral(step=step, layer=layer, hard_rank=step + layer / 8) for layer in range(3)]
        )
    values = pictures._hard["tail"]
    steps = np.array(list(values))
    assert MAX_COLUMNS <= len(steps) <= 2 * MAX_COLUMNS
    assert (steps[0], steps[-1]) == (0, 3_999)
    assert np.diff(steps).max() <= 3 * 4_000 / MAX_COLUMNS  # no hole
    grid = heat_map(values, "tail").axes[0].collections[0].get_array().reshape(3, len(steps))
    assert grid.tolist() == [[step + layer / 8 for step in steps] for layer in range(3)]
