"""An argument of another kind is refused when the object is made, by name: not in the midst of training."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch

import lightning_spectral
from lightning_spectral.metrics import SpectralRank, StreamingCovariance
from lightning_spectral.probe.settings import BucketSettings, ProbeSettings
from lightning_spectral.text.arguments import require_kinds

CLASSES = [
    *("SpectralRankCallback", "TailTokenProbe", "HuggingFaceProbe", "SpectralAlarm", "WeightSpectrumCallback"),
    *("UpdateAudience", "QKClipCallback", "AdamW", "Muon", "NorMuon", "AdaMuon", "MuonH", "Dion", "Dion2", "NorDion2"),
    *("SOAP", "AssociativeMemory", "AssociativeMemoryDataModule", "FactRecall", "FactRecallDataModule"),
]
NEEDED: dict[str, dict[str, Any]] = {"SpectralAlarm": {"below": 0.5}}
WRONG = ["nonsense", "", -1, 0, 3.7, float("nan"), [], ["x"], [-1], {}, object(), True, None, (1,), lambda: 0]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; an oracle that knows these annotations and values alone."""
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if kind is Literal:
        return any(value is one for one in inside)
    if kind in (list, Sequence, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, inside[0]) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind is Callable:
        return callable(value)
    if kind in (int, float):
        return type(value) is int or (kind is float and type(value) is float and value == value)
    return kind is Any or isinstance(value, kind)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind.__init__)
    settings = getattr(kind, "settings_class", None) or (ProbeSettings if "shared" in hints else None)
    if settings is not None:
        hints |= typing.get_type_hints(settings)
    if "counts" in hints:
        hints |= typing.get_type_hints(BucketSettings) if kind is lightning_spectral.TailTokenProbe else {}
    return {name: hint for name, hint in hints.items() if name not in ("return", "params", "shared")}


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_of_another_kind_is_refused_by_name(name: str) -> None:
    kind = getattr(lightning_spectral, name)
    model = (torch.nn.Linear(4, 4),) if issubclass(kind, torch.optim.Optimizer) else ()
    num_refused = 0
    for argument, hint in _hints(kind).items():
        assert argument in str(inspect.signature(kind)) or "shared" in str(inspect.signature(kind))
        for value in WRONG:
            try:
                kind(*model, **{**NEEDED.get(name, {}), argument: value})
            except ValueError as error:
                assert argument in str(error), (argument, value, str(error))  # noqa: PT017 - most are refused, some fit
                num_refused += 1
            else:
                assert _fits(value, hint), (argument, value, hint)
    assert num_refused > 4 * len(_hints(kind))


@pytest.mark.parametrize("value", [-1, 0.5, True, "wide", None])
@pytest.mark.parametrize("kind", [SpectralRank, StreamingCovariance])
def test_a_metric_refuses_a_width_that_is_none(kind: type, value: Any) -> None:
    with pytest.raises(ValueError, match="`width` must be an integer >= 1"):
        kind(value)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("", r"`counts`: no file"),
        ("nowhere.npy", r"`counts`: no file `nowhere.npy`. Make one"),
        (["x", "y", "z"], r"`counts` must be a file, an array"),
        ({}, r"`counts` must be a file, an array"),
        ({"a": 1}, r"`counts` must be a file, an array"),
        (7, r"`counts`: .* one number per id"),
        ([5, -1, 2], r"`counts`: .* must be >= 0, got -1 for id 1"),
        ([0.5, 0.3, 0.2], r"`counts`: .* whole numbers"),
        ([3.0, float("nan"), 1.0], r"`counts`: .* whole numbers"),
        ([0, 0, 0], r"`counts`: .* all zero"),
        ([[1, 2], [3, 4]], r"`counts`: .* one number per id"),
    ],
)
@pytest.mark.parametrize("name", ["TailTokenProbe", "HuggingFaceProbe", "UpdateAudience"])
def test_counts_are_read_and_checked_when_the_callback_is_made(name: str, counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(lightning_spectral, name)(counts=counts)


def test_counts_in_a_file_are_named_by_it(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.array([4, -2, 1]))
    with pytest.raises(ValueError, match=r"`counts` \(`.*counts.npy`\): .* must be >= 0, got -2 for id 1"):
        lightning_spectral.TailTokenProbe(counts=str(tmp_path / "counts.npy"))


def test_an_audience_does_not_point_to_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"`counts='stream'` is for TailTokenProbe.*count-tokens"):
        lightning_spectral.UpdateAudience(counts="stream")


def _every_kind(
    flag: bool = False,
    count: int = 1,
    rate: float = 0.1,
    text: str = "",
    way: Literal["a", "b"] = "a",
    ways: Sequence[Literal["a", "b"]] = (),
    names: Sequence[str] = (),
    pair: tuple[float, float] = (0, 1),
    maybe: int | None = None,
    labels: dict[str, str] | None = None,
    act: Callable[[], None] | None = None,
) -> None: ...


@pytest.mark.parametrize(
    "values",
    [
        {"flag": True, "count": np.int64(3), "rate": 1, "text": Path("x"), "way": "b", "names": ["x"], "pair": [0, 1]},
        {"count": torch.tensor(3), "rate": torch.tensor([0.1]), "names": {"x"}, "pair": np.array([0.5, 1.0])},
        {"rate": np.float32(0.5), "maybe": None, "labels": {"width": 64}, "act": print, "other": object()},
        {"rate": float("inf"), "text": os.fspath(Path("x"))},
    ],
)
def test_what_is_as_good_as_the_kind_passes(values: dict[str, Any]) -> None:
    require_kinds(_every_kind, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": "false"}, "`flag` must be True or False, got 'false' of type str."),
        ({"flag": 1}, "`flag` must be True or False, got 1 of type int."),
        ({"count": True}, "`count` must be a whole number, got True of type bool."),
        ({"rate": "3e-4"}, "`rate` must be a number, got '3e-4' of type str. YAML reads .* as text: write `3.0e-4`"),
        ({"rate": "fast"}, "`rate` must be a number, got 'fast' of type str.$"),
        ({"ways": ["c"]}, r"`ways` must be a list, each item one of \['a', 'b'\], got \['c'\]"),
        ({"names": "x"}, r"`names` must be a list, got 'x': write names=\['x'\]."),
        ({"names": [1]}, r"`names` must be a list, each item text, got \[1\] of type list."),
        ({"way": "c"}, r"`way` must be one of \['a', 'b'\], got 'c'"),
        ({"maybe": 0.5}, "`maybe` must be a whole number, got 0.5"),
        ({"labels": ["x"]}, r"`labels` must be names with values, got \['x'\]"),
        ({"act": "print"}, "`act` must be a function, got 'print'"),
    ],
)
def test_the_message_names_argument_value_and_kind(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_kinds(_every_kind, values)
