"""A LightningCLI script of the user's own: callbacks and optimizers by full path, or by name once imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_spectral import Muon, SpectralRankCallback, TailTokenProbe
from tests.callbacks import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),  # pytest has a command line, too
    pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI"),  # as is meant here
]

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def made(folder: Path, callbacks: list[Any], words: list[str]) -> LightningCLI:
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {**QUIET, "callbacks": callbacks}}))
    args = ["--config", str(folder / "config.yaml"), *words]
    return LightningCLI(tiny.Module, run=False, args=args, save_config_callback=None, seed_everything_default=False)


@pytest.mark.parametrize("prefix", ["", "lightning_spectral."])
def test_callbacks_by_name_and_by_path(prefix: str, tmp_path: Path) -> None:
    callbacks = [{"class_path": f"{prefix}SpectralRankCallback", "init_args": {"every_n_steps": 3, "soft": "approx"}}]
    more = [f"--trainer.callbacks+={prefix}TailTokenProbe", "--trainer.callbacks.counts=stream"]
    found = made(tmp_path, callbacks, more).trainer.callbacks
    (rank,) = [one for one in found if type(one) is SpectralRankCallback]
    (tail,) = [one for one in found if type(one) is TailTokenProbe]
    assert rank.measurement.settings.every_n_steps == 3
    assert rank.measurement.settings.soft == "approx"
    assert tail.measurement.buckets.is_stream


def test_an_optimizer_by_its_path(tmp_path: Path) -> None:
    cli = made(tmp_path, [], ["--optimizer=lightning_spectral.Muon", "--optimizer.lr=0.002"])
    assert cli.config["optimizer"].class_path == "lightning_spectral.Muon"
    assert cli.config["optimizer"].init_args.lr == 0.002
    assert Muon  # a bare `Muon` is torch's and ours: LightningCLI asks which


@pytest.mark.parametrize(
    ("callback", "words", "said"),
    [
        ({"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"every_n_step": 3}}, [], "every_n_step"),
        ({"class_path": "lightning_spectral.TailTokenProb"}, [], "TailTokenProb"),
        (None, ["--optimizer=Muon", "--optimizer.lr=0.1"], "torch.optim.Muon, lightning_spectral"),
    ],
)
def test_what_is_wrong_is_named(
    callback: Any, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        made(tmp_path, [callback] if callback else [], words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_print_config_shows_every_argument_with_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        made(tmp_path, [{"class_path": "lightning_spectral.TailTokenProbe"}], ["--print_config"])
    assert not end.value.code
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"]
    assert shown["every_n_steps"] == 200
    assert shown["attribute_to"] == "input"
    assert shown["token_fraction"] == 1.0
