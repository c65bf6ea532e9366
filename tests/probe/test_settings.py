"""Arguments are written once: types, defaults and documentation agree, and every reader of a signature finds them."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, observe
from lightning_spectral.callbacks.huggingface import HuggingFaceProbe
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.settings import (
    BucketSettings,
    ProbeSettings,
    SharedArguments,
    known_arguments,
)

OWN = {"every_n_steps"}


def test_types_and_defaults_are_of_the_same_arguments() -> None:
    declared = {f.name: f.type for f in fields(ProbeSettings) if f.name not in OWN}
    assert declared == {
        name: getattr(kind, "__forward_arg__", kind) for name, kind in SharedArguments.__annotations__.items()
    }


def test_every_argument_is_documented() -> None:
    documented = re.findall(r"^        (\w+): ", inspect.getdoc(ProbeSettings) or "", re.M) or re.findall(
        r"^    (\w+): ", inspect.getdoc(ProbeSettings) or "", re.M
    )
    assert set(documented) - {"ValueError"} == {f.name for f in fields(ProbeSettings)}


@pytest.mark.parametrize("kind", [SpectralRankCallback, TailTokenProbe, HuggingFaceProbe])
def test_a_class_knows_the_shared_arguments(kind: type) -> None:
    assert set(known_arguments(kind)) >= {f.name for f in fields(ProbeSettings)}
    assert known_arguments(WeightSpectrumCallback) == list(inspect.signature(WeightSpectrumCallback).parameters)


@pytest.mark.parametrize("kind", [SpectralRankCallback, TailTokenProbe])
def test_a_command_line_shows_defaults_and_documentation(kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "probe")
    text = " ".join(parser.format_help().split())
    for f in fields(ProbeSettings):
        assert f"--probe.{f.name}" in text
    assert "Share of the positions of every sequence to measure, in (0, 1]. (type: float, default: 1.0)" in text
    assert "Deal sequences to this many groups" in text
    parsed = parser.parse_args(["--probe.token_fraction=0.5", "--probe.sites=[pre]", "--probe.on=[test]"])
    made = parser.instantiate_classes(parsed).probe
    assert isinstance(made, kind)
    settings = made.measurement.settings
    assert (settings.token_fraction, list(settings.sites), list(settings.on)) == (0.5, ["pre"], ["test"])


def test_the_trainers_own_command_line(tmp_path: Any) -> None:
    code = (
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "LightningCLI(BoringModel, args=['fit', '--trainer.callbacks.help=lightning_spectral.TailTokenProbe'])\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    for name in ("counts", "token_fraction", "mask_fn", "strict"):
        assert f"--trainer.callbacks.{name}" in done.stdout or f".{name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_id": "../other"}, "`run_id` must be a plain name"),
        ({"run_id": ""}, "`run_id` must be a plain name"),
        ({"on": "train"}, "`on` must be a list of stages"),
        ({"every_n_steps": True}, "`every_n_steps` must be a whole number, got True"),
        ({"eigenvalues": True, "soft": "approx"}, "needs `soft='exact'`"),
    ],
)
@pytest.mark.parametrize("make", [SpectralRankCallback, lambda **a: observe(torch.nn.Linear(2, 2), **a)])
def test_bad_arguments_are_named_by_every_shell(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_misspelled_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="token_fractoin"):
        TailTokenProbe(counts=[1, 2], token_fractoin=0.5)  # type: ignore[call-arg]


CALLBACKS = [
    SpectralRankCallback(2),
    SpectralRankCallback(3),
    SpectralRankCallback(2, modules=["*.down"]),
    SpectralRankCallback(2, dirpath="a"),
    SpectralRankCallback(2, on=["validation"]),
    SpectralRankCallback(2, num_jackknife_groups=4),
    TailTokenProbe(2, counts=[3, 2, 1]),
    TailTokenProbe(2, counts=[3, 2, 2]),
    TailTokenProbe(2, counts=[3, 2, 1], attribute_to="target"),
    TailTokenProbe(2, counts="stream"),
    TailTokenProbe(2, group_by="position"),
]


def test_two_callbacks_that_differ_are_told_apart() -> None:
    keys = [callback.state_key for callback in CALLBACKS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: str(callback.measurement.identity)[:40])
def test_a_copy_measures_the_same(callback: Any) -> None:
    again = pickle.loads(pickle.dumps(callback))
    assert again.state_key == callback.state_key
    assert again.observer.state == "off"


def test_how_a_run_is_watched_does_not_change_what_is_resumed() -> None:
    plain, watched = SpectralRankCallback(2), SpectralRankCallback(2, strict=True, background=True, labels={"a": "b"})
    assert plain.state_key == watched.state_key


def test_what_a_probe_covers() -> None:
    tail = Measurement(ProbeSettings(every_n_steps=2), BucketSettings(counts=[1, 2, 3]))
    assert tail.covers(Measurement(ProbeSettings(every_n_steps=2)))
    assert not tail.covers(Measurement(ProbeSettings(every_n_steps=3)))
    assert not tail.covers(Measurement(ProbeSettings(every_n_steps=2, on=["train", "test"])))
    assert not tail.covers(Measurement(ProbeSettings(every_n_steps=2, num_jackknife_groups=4)))
    assert not tail.covers(tail)
