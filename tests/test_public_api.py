"""What users build on: a change here is a change for them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import fields

import pytest

import lightning_spectral
from lightning_spectral.cli import VERBS
from lightning_spectral.records import LossRecord, RunInfo, SpectralRecord


@pytest.mark.parametrize("name", lightning_spectral.__all__)
def test_every_public_name_loads(name):
    assert getattr(lightning_spectral, name) is not None


def test_public_names():
    assert {"SpectralRankCallback", "TailTokenProbe", "Muon", "NorMuon", "Dion", "AdamW", "SpectralRecord"} <= set(
        lightning_spectral.__all__
    )


def test_verbs():
    assert {"pretrain", "count-tokens", "sweep", "fit", "compare", "report", "memory"} <= set(VERBS)


def test_record_fields():
    assert [f.name for f in fields(SpectralRecord)] == [
        "run_id", "stage", "step", "tokens_seen", "layer", "module", "site", "bucket", "num_tokens", "width",
        "tokens_per_dim", "status", "soft_rank", "hard_rank", "hard_rank_debiased", "spectral_entropy",
        "early_enrichment",
        "top_share", "trace", "renyi", "reinjection", "js_divergence", "soft_method", "soft_rank_debiased",
        "hard_rank_ci_low", "hard_rank_ci_high", "soft_rank_ci_low", "soft_rank_ci_high", "num_sequences", "expert",
        "dtype", "world_size", "window_s", "conventions", "stack", "reason", "loader", "ordinal", "layout",
        "layout_agreement", "schema_version", "extra",
    ]  # fmt: skip
    assert [f.name for f in fields(LossRecord)] == [
        "run_id", "stage", "step", "tokens_seen", "bucket", "num_tokens", "loss", "accuracy", "loader", "ordinal",
        "status", "reason", "schema_version",
    ]  # fmt: skip
    assert {"run_id", "optimizer", "seed", "hparams", "labels"} <= {f.name for f in fields(RunInfo)}


ROOMS_WITH_PUBLIC_NAMES = ("", ".functional", ".records", ".optim", ".theory", ".metrics", ".callbacks", ".analysis")


def _public():
    """Every class and function that a room names as public, with its full name, once."""
    found = {}
    for room in ROOMS_WITH_PUBLIC_NAMES:
        module = importlib.import_module(f"lightning_spectral{room}")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    return sorted((name, value) for value, name in found.items())


def _own_source(value):
    """What a caller runs: a function, or a class's own constructor."""
    if not inspect.isclass(value):
        return value
    return next((value.__dict__[name] for name in ("__init__", "__post_init__") if name in value.__dict__), None)


def _raises(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


@pytest.mark.parametrize(("name", "value"), _public(), ids=lambda v: v if isinstance(v, str) else "")
def test_docstrings_say_shapes_and_errors(name, value):
    doc = inspect.getdoc(value) or ""
    source = _own_source(value)
    if source is not None and inspect.isclass(value):
        doc += inspect.getdoc(source) or ""
    assert doc, f"{name} has no docstring"
    if source is None or not hasattr(source, "__code__") or source.__code__.co_filename.startswith("<"):
        return  # made by dataclass: nothing raised, fields documented as attributes
    assert "Raises:" in doc or not _raises(source), f"{name} raises, but does not say when"
    if inspect.isclass(value):
        return
    for parameter, annotation in source.__annotations__.items():
        if parameter != "return" and annotation in ("Tensor", "torch.Tensor"):
            described = re.search(rf"{parameter}`*:?[^:]*[(\[]|[Ss]hape|``\(", doc)
            assert described, f"{name}: no shape for {parameter}"
