"""A LightningCLI script of the user's own: callbacks and optimizers by full path, or by name once imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_spectral import Muon, SentenceParser, SpectralRankCallback, TailTokenProbe
from lightning_spectral.callbacks.sentences import sentence
from tests.callbacks import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),  # pytest has a command line, too
    pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI"),  # as is meant here
]

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def made(folder: Path, callbacks: list[Any], words: list[str], **more: Any) -> LightningCLI:
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {**QUIET, "callbacks": callbacks}}))
    args = ["--config", str(folder / "config.yaml"), *words]
    return LightningCLI(
        tiny.Module, run=False, args=args, save_config_callback=None, seed_everything_default=False, **more
    )


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


def tail(**init_args: Any) -> list[dict[str, Any]]:
    return [{"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"counts": "stream", **init_args}}]


OURS = "--optimizer=lightning_spectral.Muon"
ALARM = "lightning_spectral.SpectralAlarm"
SENTENCES: list[tuple[list[Any], list[str], str]] = [
    (
        tail(group_by="frequncy"),
        [],
        "`group_by` must be one of ['frequency', 'position'], got 'frequncy'; did you mean",
    ),
    (tail(soft="aprox"), [], "TailTokenProbe: `soft` must be one of ['exact', 'approx'], got 'aprox'; did you mean"),
    (tail(every_n_steps=0), [], "`every_n_steps` must be an integer >= 1, got 0."),
    (tail(every_n_steps="many"), [], "`every_n_steps` must be a whole number, got 'many'"),
    (tail(every_n_step=3), [], "TailTokenProbe has no argument `every_n_step`: did you mean `every_n_steps`?"),
    (tail(counts="no.npy"), [], "`counts`: no file `no.npy`. Make one: `lightning-spectral count-tokens"),
    (tail(on=["val"]), [], "`on` must be a list of stages from"),
    ([{"class_path": ALARM, "init_args": {"below": 0.5, "relative_to": "widht"}}], [], "SpectralAlarm: `relative_to`"),
    (
        [{"class_path": "lightning_spectral.TailTokenProb"}],
        [],
        "no attribute 'TailTokenProb': did you mean `TailTokenP",
    ),
    ([], [OURS, "--optimizer.lr=fast"], "`optimizer`: Muon: `lr` must be float, got fast."),
    ([], [OURS, "--optimizer.momentumm=.9"], "Muon has no argument `momentumm`: did you mean `momentum`?"),
    ([], ["--optimizer=lightning_spectral.Moun"], "no attribute 'Moun': did you mean `Muon`?"),
    ([], ["--optimizer=Muon"], "Give the full class path to avoid ambiguity: torch.optim.Muon, lightning_spectral"),
    ([], ["--trainer.max_stepz=3"], "no option `--trainer.max_stepz`; did you mean `--trainer.max_steps`?"),
    ([], ["--modle.x=3"], "there is no option `--modle.x`;"),
    ([], ["--trainer.max_steps=three"], "`trainer.max_steps` must be int, got three."),
    ([], ["--trainer.precision=fp16"], "`trainer.precision` must be one of 64, 32, 16, transformer-engine"),
    ([], ["--trainer.precision=bf16-mixd"], "got bf16-mixd; did you mean `bf16-mixed`?"),
    (
        [{"class_path": "SpectralRankCalback"}],
        [],
        "no class `SpectralRankCalback`; did you mean `SpectralRankCallback`?",
    ),
    ([{"class_path": "SpectralAlrm"}], [], "no class `SpectralAlrm`; did you mean `SpectralAlarm`?"),
    (
        [{"class_path": "lightning_spectral.SpectralRankCallback", "every_n_steps": 5}],
        [],
        "SpectralRankCallback takes `every_n_steps` below `init_args`, not beside `class_path`.",
    ),
    (
        [{"class_path": "lightning_spectral.SpectralRankCallback", "init_args": [5]}],
        [],
        "`init_args` of SpectralRankCallback must hold names and values, got [5].",
    ),
]


@pytest.mark.parametrize(("callbacks", "words", "said"), SENTENCES, ids=[said for _, _, said in SENTENCES])
def test_with_our_parser_a_mistake_is_one_sentence(
    callbacks: list[Any], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        made(tmp_path, callbacks, words, parser_class=SentenceParser)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert len(line) < 400


def test_our_parser_takes_what_is_right(tmp_path: Path) -> None:
    cli = made(tmp_path, tail(every_n_steps=7), [OURS, "--optimizer.lr=0.002"], parser_class=SentenceParser)
    (probe,) = [one for one in cli.trainer.callbacks if type(one) is TailTokenProbe]
    assert probe.measurement.settings.every_n_steps == 7


def test_a_message_without_a_tree_is_one_line() -> None:
    assert sentence('Parser key "a.b":\n  is\n  odd') == '`a.b`: Parser key "a.b": is odd'
