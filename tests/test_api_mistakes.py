"""What people get wrong in Python: the answer names the argument, what was seen, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lightning_spectral
from lightning_spectral import Muon, SpectralAlarm, load, observe, show
from lightning_spectral.cli import main
from lightning_spectral.metrics import SpectralRank
from lightning_spectral.text import did_you_mean, read_yaml
from tests.analysis.synthetic import write_study


def _updated(*shape: int) -> Any:
    SpectralRank(8).update(torch.zeros(*shape))


MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lightning_spectral.SpectralRankCalback, AttributeError, "SpectralRankCalback.*`SpectralRankCallback`"),
    (lambda: observe("model"), TypeError, r"observe measures a model .*'model'"),
    (lambda: observe(nn.Linear), TypeError, "the class `Linear`: make one first"),
    (lambda: Muon(nn.Linear), TypeError, "`params` is the class `Linear`.*make one first"),
    (lambda: Muon(nn.Linear(2, 2), momentumm=0.9), TypeError, "Muon has no argument `momentumm`.*`momentum`"),
    (lambda: Muon(nn.Linear(2, 2), moment_bta=0.9), TypeError, "Muon has no argument `moment_bta`"),
    (
        lambda: lightning_spectral.NorMuon(nn.Linear(2, 2), moment_bta=0.9),
        TypeError,
        "NorMuon has no argument `moment_bta`.*`moment_beta`",
    ),
    (lambda: Muon(1e-3, nn.Linear(2, 2)), (TypeError, ValueError), "`lr` must be a number, got Linear"),
    (lambda: Muon(nn.Linear(2, 2), roles={"[": "matrix"}), ValueError, r"`roles`: `\[` is no regular expression"),
    (lambda: SpectralAlarm(below=0.5, site="psot"), ValueError, "`site` .*'psot'; did you mean `post`"),
    (lambda: SpectralAlarm(below=0.5, stage="training"), ValueError, "`stage` .*'training'; did you mean `train`"),
    (lambda: SpectralRank(8).compute(), ValueError, r"SpectralRank has seen no two rows yet: call `update\(rows\)`"),
    (lambda: _updated(4, 3, 8), ValueError, r"\(4, 3, 8\).*`rows.flatten\(0, -2\)`"),
    (lambda: _updated(4, 7), ValueError, r"\(4, 7\) do not fit a state of width 8\.$"),
    (lambda: load("/nowhere/at/all"), FileNotFoundError, "`/nowhere/at/all`.*`out_dir` of a run"),
    (lambda: load("/nowhere", kind="spectrl"), ValueError, "`spectrl`; did you mean `spectral`"),
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # torchmetrics' own word to it
@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_the_answer_names_argument_value_and_remedy(call: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    said = str(caught.value)
    assert re.search(message, said), said
    assert len(said) < 700


def test_one_metric_need_not_be_a_list(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9}, (64,), layers=1, steps=(0, 20))
    assert len(show(tmp_path, metrics="hard_rank").figure.axes) < len(show(tmp_path).figure.axes)


@pytest.mark.parametrize(
    ("wrong", "near"), [("TRAIN", "train"), ("adamw", "AdamW"), ("MUON", "Muon"), ("moun", "Muon")]
)
def test_capitals_are_no_difference(wrong: str, near: str) -> None:
    assert did_you_mean(wrong, ["train", "AdamW", "Muon"]) == f"did you mean `{near}`?"


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "top:\n  a: 1\n  a: 2\n", "- {x: 1, x: 2}\n"])
def test_a_key_twice_is_refused_at_any_depth(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="stands twice"):
        read_yaml(text)


def test_keys_of_a_merge_may_be_set_again() -> None:
    assert read_yaml("base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  x: 3\n")["own"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("words", [["help", "fit"], ["pretrain", "help"], ["pretrain", "--config", "debug", "-h"]])
def test_help_is_given_wherever_it_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    assert "usage: lightning-spectral" in capsys.readouterr().out


def test_patterns_in_quotes_are_expanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.3}, (64, 128, 256), layers=1, steps=(0, 20))
    main(["fit", str(tmp_path / "muon_*"), "--last", "1"])
    said = capsys.readouterr().out
    assert "muon" in said
    assert "adamw" not in said


def test_a_comma_that_may_be_either_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "points.csv").write_text('optimizer,width,value\na,64,1\na,128,"2,500"\na,256,3\na,512,4\n')
    main(["fit", str(tmp_path / "points.csv")])
    said = capsys.readouterr().err
    assert (
        "line 3: `2,500` in column `value` is not a number (a thousand or a decimal? nothing in the table says)" in said
    )
