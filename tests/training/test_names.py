"""Names read from sources are those that exist after the import, and a wrong one is reported without any import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import litgpt.data
import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

import lightning_spectral
from lightning_spectral.gpt.module import optimizer_class
from lightning_spectral.optim.settings import OrthogonalArguments
from lightning_spectral.probe.settings import SharedArguments
from lightning_spectral.text import import_class
from lightning_spectral.training import devices, document, measure, names, sources, values
from lightning_spectral.training.document import RecipeError, overridden
from lightning_spectral.training.schema import defaults

HEAVY = ("torch", "lightning", "litgpt", "jsonargparse", "transformers", "datasets", "scipy", "matplotlib")


def test_keys_are_those_of_the_schema():
    assert names.keys() == list(defaults())


@pytest.mark.parametrize("group", names.GROUPS)
def test_fields_are_those_of_the_dataclass(group):
    assert sources.fields_of(names.GROUPS[group]) == [f.name for f in fields(import_class(names.GROUPS[group]))]


@pytest.mark.parametrize(
    "path",
    [
        *(f"lightning_spectral.{name}" for name in ("SpectralRankCallback", "TailTokenProbe", "Muon", "Dion", "AdamW")),
        "lightning_spectral.WeightSpectrumCallback",
        "lightning_spectral.data.StateOfTheUnion",  # its base's arguments
        "lightning_spectral.memory.module.AssociativeMemory",
        "torch.optim.AdamW",
        "litgpt.data.TextFiles",  # a dataclass with fields that are no arguments
        "litgpt.data.TinyStories",
        "lightning.pytorch.callbacks.ModelCheckpoint",
    ],
)
def test_arguments_are_those_of_the_signature(path):
    known = import_class(path)
    parameters = inspect.signature(known).parameters.values()
    expected = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    if len(expected) < len(parameters):  # **shared: Unpack[SomeTypedDict]
        (name,) = re.findall(r"^Unpack\[(\w+)\]$", known.__init__.__annotations__["shared"])
        expected += known.__init__.__globals__[name].__annotations__
    assert sorted(sources.arguments_of(path)) == sorted(expected)
    assert not sources.is_missing(path)


def test_arguments_that_the_source_does_not_say_are_left_to_the_full_check():
    assert sources.arguments_of("torch.nn.Linear.nothing") is None
    assert sources.arguments_of("collections.abc.Callable") is None


def test_public_names_are_those_of_the_package():
    assert sources.public_names("litgpt.data") == litgpt.data.__all__
    assert sources.public_names("torch.optim") == torch.optim.__all__
    assert sources.public_names("lightning_spectral") == lightning_spectral.__all__


@pytest.mark.parametrize("path", ["torch.optim.Adamw", "lightning_spectral.Moun", "lightning_spectral.optim.X", "no.X"])
def test_missing(path):
    assert sources.is_missing(path)


def test_names_of_strategies_and_accelerators_are_those_that_lightning_registers():
    assert devices.strategy_names() == sorted(StrategyRegistry.available_strategies())
    assert devices.accelerator_names() == sorted(AcceleratorRegistry.available_accelerators())


def _alternatives(hint):
    """What :func:`sources.alternatives` reads in a source, of an annotation that was imported."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return [one for part in inside for one in _alternatives(part)]
    if kind is Literal:
        return [value if value is None else sources.Choice(value) for value in inside]
    if kind in (list, Sequence, tuple):
        items = [item for item in inside if item is not ...]
        return [sources.ListOf(tuple(one for item in items for one in _alternatives(item)))]
    if hint is torch.Tensor:
        return []
    return [None if hint is NoneType else hint if hint in sources.PLAIN.values() else ...]


@pytest.mark.parametrize(
    "path",
    [
        *(names.SETUP, names.OUR_KEYS, *names.GROUPS.values()),
        *("lightning_spectral.Muon", "lightning_spectral.SpectralRankCallback", "lightning_spectral.data.TextFiles"),
    ],
)
def test_alternatives_are_those_of_the_annotation(path):
    found = import_class(path)
    hints = get_type_hints(found if not isinstance(found, type) or is_dataclass(found) else found.__init__)
    if "shared" in hints:
        hints |= get_type_hints(OrthogonalArguments if path.endswith("Muon") else SharedArguments)
    for name, hint in sources.hints_of(path).items():
        read = list(sources.alternatives(hint))
        assert sorted(map(str, read)) == sorted(map(str, _alternatives(hints[name]))), name


@pytest.mark.parametrize("recipe", document.names())
def test_no_shipped_recipe_is_refused(recipe):
    assert values.check_without_imports(recipe, [])["data"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("devices", -1),
        ("devices", "auto"),
        ("strategy", "ddp_find_unused_parameters_true"),
        ("strategy", "tp:2"),
        ("strategy", {"class_path": "lightning.pytorch.strategies.DDPStrategy"}),
        ("accelerator", "mps"),  # whether there is one is asked when it trains
        ("train.max_steps", "7"),
        ("optimizer.init_args.lr", "1e-3"),
        ("optimizer.init_args.lr", 1),
        ("precision", None),
        ("resume", "auto"),
        ("resume", True),
        ("resume", "somewhere/last.ckpt"),
        ("seed", 1.0),
    ],
)
def test_what_may_be_meant_is_left_to_the_full_check(key, value):
    tree = names.with_class_paths(document.overridden(document.read_tree(document.find("debug")), {key: value}))
    values.refuse_wrong_values(tree)


QUICK = ("pretrain", "--config", "quickstart")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrian",), "unknown verb `pretrian`; did you mean `pretrain`?"),
        (("pretrain", "--config", "quikstart"), "no recipe `quikstart`: did you mean `quickstart`?"),
        ((*QUICK, "--trian.max_steps", "3"), "unknown key `trian`; did you mean `train`?"),
        ((*QUICK, "--train.max_step", "3"), "unknown key `train.max_step`; did you mean `train.max_steps`?"),
        ((*QUICK, "--optimizer", "Moun"), "no optimizer `Moun`; did you mean `Muon`?"),
        ((*QUICK, "--optimizer", "lightning_spectral.Moun"), "did you mean `lightning_spectral.Muon`?"),
        ((*QUICK, "--optimizer.init_args.lrr", "1"), "AdamW does not know `lrr`; did you mean `lr`?"),
        ((*QUICK, "--callbacks+", "SpectralRank"), "did you mean `SpectralRankCallback`?"),
        ((*QUICK, "--callbacks.TailTokenProbe.init_args.count", "x"), "does not know `count`; did you mean `counts`?"),
        ((*QUICK, "--data", "StateOfUnion"), "did you mean `StateOfTheUnion`?"),
        ((*QUICK, "--data.init_args.vocab", "5"), "did you mean `vocab_size`?"),
        ((*QUICK, "--logger_name", "tensorbord"), "`logger_name` must be one of csv, tensorboard"),
        ((*QUICK, "--model_name", "pythia-14", "--model_config", "null"), "did you mean `pythia-14m`?"),
        (("sweep", "quikstart"), "did you mean `quickstart`?"),
        (("sweep", "quickstart", "--axis", "sed=1,2"), "unknown key `sed`; did you mean `seed`?"),
        (("sweep", "quickstart", "--axis", "optimizer=SGD,AdamWW"), "no optimizer `AdamWW`; did you mean `AdamW`?"),
    ],
)
def test_a_wrong_name_is_reported_before_anything_heavy_is_imported(words, message):
    command = [sys.executable, "-X", "importtime", "-m", "lightning_spectral", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert message in "\n".join(line for line in lines if not line.startswith("import time:"))
    imported = {re.split(r"[ |]+", line)[-1].partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "lightning_spectral" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("pretrain", "--help"), ("sweep", "--help")])
def test_help_and_version_import_nothing_heavy(words):
    command = [sys.executable, "-X", "importtime", "-m", "lightning_spectral", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {re.split(r"[ |]+", line)[-1].partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & set(HEAVY)
    if words == ("--version",):
        assert re.fullmatch(
            rf"lightning-spectral {lightning_spectral.__version__}( \(commit [0-9a-f]{{12}}\))?\n", done.stdout
        )


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "Dion", "SOAP"])
@pytest.mark.parametrize("short", [lambda name: name, lambda name: {"class_path": name, "init_args": {"lr": 1e-3}}])
def test_a_bare_name_of_a_matrix_optimizer_is_ours(name, short):
    """torch has a Muon, too, which takes matrices alone and so no model."""
    tree = names.with_class_paths({"data": "StateOfTheUnion", "optimizer": short(name)})
    path = tree["optimizer"] if isinstance(tree["optimizer"], str) else tree["optimizer"]["class_path"]
    assert path == f"lightning_spectral.{name}"
    assert optimizer_class(short(name)) is getattr(lightning_spectral, name)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "torch.optim.Muon", "lightning_spectral.optim.Muon", None])
def test_every_other_name_stays_as_it_is(name):
    assert names.with_class_paths({"data": "StateOfTheUnion", "optimizer": name})["optimizer"] == name
    if name is not None:
        assert optimizer_class(name).__module__.startswith("torch" if "spectral" not in name else "lightning_spectral")


def test_a_device_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"`device` must be auto, cpu, cuda .* got `gpu0`"):
        measure._device("gpu0")


WHOLE = {
    "model_name": "pythia-14m",
    "train": {"max_steps": 7, "global_batch_size": 8},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "eps": 1e-8}},
}


@pytest.mark.parametrize(
    ("words", "key", "wanted"),
    [
        (["--train={max_steps: 3}"], "train", {"max_steps": 3, "global_batch_size": 8}),
        (["--train.max_steps=3", "--train={epochs: 1}"], "train", {**WHOLE["train"], "max_steps": 3, "epochs": 1}),
        (["--train=null", "--train={max_steps: 3}"], "train", {"max_steps": 3}),
        (
            ["--optimizer={init_args: {lr: 1}}"],
            "optimizer",
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1, "eps": 1e-8}},
        ),
        (
            ["--optimizer={class_path: torch.optim.SGD, init_args: {lr: 1}}"],
            "optimizer",
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}},
        ),
        (["--optimizer=SGD"], "optimizer", "SGD"),
    ],
)
def test_a_block_on_the_command_line_is_laid_over_the_recipes_as_jsonargparse_does(words, key, wanted) -> None:
    assert overridden(WHOLE, words)[key] == wanted


@pytest.mark.parametrize(
    "words", [["--optimizer.init_args.lr=1", "--optimizer=SGD"], ["--train.max_steps=3", "--train=null"]]
)
def test_a_whole_after_a_part_of_it_is_refused(words) -> None:
    with pytest.raises(RecipeError, match="comes after .* and would replace it: give .* first"):
        overridden(WHOLE, words)
