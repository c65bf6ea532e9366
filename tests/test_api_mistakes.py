"""What people get wrong in Python: the answer names the argument, what was seen, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_spectral
from lightning_spectral import (
    FabricSpectralProbe,
    HuggingFaceProbe,
    Muon,
    QKClipCallback,
    SpectralAlarm,
    SpectralRankCallback,
    TailTokenProbe,
    UpdateAudience,
    WeightSpectrumCallback,
    load,
    observe,
    read_spectral,
    show,
)
from lightning_spectral.cli import main
from lightning_spectral.functional import hard_rank
from lightning_spectral.metrics import SpectralRank
from lightning_spectral.text import did_you_mean, read_yaml
from tests.analysis.synthetic import write_study


def _updated(*shape: int) -> Any:
    SpectralRank(8).update(torch.zeros(*shape))


QUIET: dict[str, Any] = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
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


MORE: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: TailTokenProbe(bucket="tail"), TypeError, "TailTokenProbe has no argument `bucket`: known here: counts"),
    (lambda: SpectralRankCallback(every=9), TypeError, "SpectralRankCallback has no argument `every`.*`every_n_steps`"),
    (lambda: SpectralRankCallback(on=["val"]), ValueError, r"`on` .*\['val'\]; did you mean `validation`"),
    (lambda: SpectralRankCallback(on="validation"), ValueError, r"`on` .*'validation': write on=\['validation'\]"),
    (lambda: UpdateAudience(rule=["muon"]), TypeError, "UpdateAudience has no argument `rule`.*`rules`"),
    (lambda: QKClipCallback(treshold=9), TypeError, "QKClipCallback has no argument `treshold`.*`threshold`"),
    (lambda: WeightSpectrumCallback(wat=["weight"]), TypeError, "WeightSpectrumCallback has no argument `wat`.*`what`"),
    (lambda: WeightSpectrumCallback(what=["weights"]), ValueError, r"`what` .*\['weights'\]; did you mean `weight`"),
    (lambda: SpectralAlarm(treshold=0.5), TypeError, "SpectralAlarm has no argument `treshold`: known here: .*below"),
    (
        lambda: SpectralAlarm(below=50, relative_to="width"),
        ValueError,
        r"`below=50` of the width.* share \(0.5 is half",
    ),
    (lambda: observe(_net(), optimizer=torch.optim.SGD), ValueError, "`optimizer` .* the class `SGD`: make one first"),
    (lambda: observe(_net(), optimizer=3), ValueError, "`optimizer` must be an optimizer .*, got 3"),
    (lambda: observe(_net(), dirpath="x"), ValueError, "`dirpath` is for callbacks: .*`out='x'`"),
    (lambda: observe(_net(), resume="auto"), ValueError, "`resume` must be True or False, got 'auto'"),
    (
        lambda: observe(_net(), process_group="dp"),
        ValueError,
        "`process_group` must be a process group, got 'dp'.*get_group",
    ),
    (lambda: FabricSpectralProbe(_net()), ValueError, "TailTokenProbe, not Linear: give it one of them"),
    (
        lambda: FabricSpectralProbe(SpectralRankCallback),
        ValueError,
        "not SpectralRankCallback: give it one of them, made",
    ),
    (lambda: Trainer(**QUIET, callbacks=[HuggingFaceProbe(1)]), TypeError, "HuggingFaceProbe is for transformers"),
    (
        lambda: Trainer(**QUIET, callbacks=[FabricSpectralProbe(SpectralRankCallback(1))]),
        MisconfigurationException,
        r"a Trainer takes `callbacks=\[SpectralRankCallback\(...\)\]` itself",
    ),
    (
        lambda: _in_fabric(SpectralRankCallback(1)),
        MisconfigurationException,
        r"FabricSpectralProbe\(SpectralRankCallback",
    ),
    (
        lambda: _in_fabric(SpectralAlarm(below=0.5)),
        MisconfigurationException,
        r"FabricSpectralProbe\(callback, alarms=",
    ),
    (
        lambda: SpectralRankCallback(1).on_init_end(),
        MisconfigurationException,
        "transformers.Trainer takes a HuggingFaceProbe",
    ),
    (lambda: read_spectral("/nowhere"), FileNotFoundError, "no `spectral.jsonl` at `/nowhere`: give a run folder"),
    (lambda: load(3), TypeError, "run folders are paths or patterns, got 3 of type int"),
    (lambda: show(3), TypeError, "run folders are paths or patterns, got 3 of type int"),
    (lambda: Muon(_net().parameters), TypeError, r"`params` is the function `parameters`: call it, `parameters\(\)`"),
    (
        lambda: Muon([{"parms": [_net().weight]}]),
        ValueError,
        r"keys \['parms'\] and no `params`; did you mean `params`",
    ),
    (lambda: Muon(_net(), ns_steps=5), TypeError, "Muon has no argument `ns_steps`: here it is `steps`"),
    (lambda: lightning_spectral.Dion(_net(), rank=64), TypeError, "`rank`: here it is `rank_fraction`"),
    (lambda: lightning_spectral.NorMuon(_net(), beta2=0.9), TypeError, "`beta2`: here it is `moment_beta`"),
    (lambda: SpectralRank(8).update([[1.0] * 8]), TypeError, r"`rows` must be a tensor of shape \(N, D\), got list"),
    (lambda: hard_rank([1.0, 2.0]), TypeError, "`eigs` must be a tensor of eigenvalues, got list"),
]
MISTAKES += MORE

MISTAKES += [
    (lambda: Muon(None), TypeError, "`params` is None, not a model. Pass the module itself"),
    (lambda: Muon("model"), TypeError, "`params` is 'model', not a model. Pass the module itself"),
    (lambda: Muon(_net(), lr=float("nan")), ValueError, "`lr` must be a number, got nan, which is none"),
    (
        lambda: SpectralAlarm(below=float("nan")),
        ValueError,
        "`below` must be a number, got nan, which is none",
    ),
    (lambda: observe([_net(), _net()]), TypeError, r"got `\[Linear\(.*`: call it for each model, with an `out`"),
    (lambda: load(None), TypeError, "run folders are paths or patterns, got None of type NoneType"),
    (lambda: load(["out", 3]), TypeError, "run folders are paths or patterns, got 3 of type int"),
    (lambda: load("/nowhere/points.csv"), FileNotFoundError, "`/nowhere/points.csv`.*read with pandas or `fit`"),
]


def _net() -> nn.Linear:
    return nn.Linear(2, 2)


def _in_fabric(callback: Any) -> None:
    Fabric(accelerator="cpu", devices=1, callbacks=[callback]).setup(_net())


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
