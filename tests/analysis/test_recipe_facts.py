"""What the recorded recipe says, and nothing where it says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.recipe_facts import decay_step, learning_rate, num_steps, seed_meaning, task_key
from lightning_spectral.analysis.runs import Run
from lightning_spectral.records import PROGRESS_FILE
from tests.analysis.synthetic import recipe, write_one


def run_of(folder: Path, hparams: dict[str, Any], **changes: Any) -> Run:
    write_one(folder, "muon", 0.9, 128, hparams=hparams, layers=1, **changes)
    (run,) = load_runs([folder]).runs
    return run


def with_train(**train: Any) -> dict[str, Any]:
    tree = recipe()
    return {**tree, "train": {**tree["train"], **train}}


@pytest.mark.parametrize(
    ("hparams", "steps", "decay"),
    [
        (recipe(), 100, 80),
        (recipe(steps=520), 520, 416),
        (with_train(max_steps=None, max_tokens=64_000, max_seq_length=128, global_batch_size=8), 62, 49),
        (with_train(max_steps=10, max_tokens=64_000, max_seq_length=128, global_batch_size=8), 10, 8),
        (with_train(epochs=2), None, None),
        ({**recipe(), "lr_schedule": {"kind": "cosine", "decay_fraction": 0.2}}, 100, None),
        ({**recipe(), "lr_schedule": {"kind": "constant_linear_decay", "decay_fraction": 1.0}}, 100, 2),
        (with_train(lr_warmup_steps=90), 100, 90),
        ({}, None, None),
        ({"train": None, "lr_schedule": 3}, None, None),
    ],
)
def test_where_the_decay_starts(tmp_path: Path, hparams: dict[str, Any], steps: int | None, decay: int | None) -> None:
    run = run_of(tmp_path, hparams)
    assert (num_steps(run), decay_step(run)) == (steps, decay)


@pytest.mark.parametrize(
    ("hparams", "rate"),
    [(recipe(0.02), 0.02), ({"lr": 1e-3}, 1e-3), ({"learning_rate": 1}, 1.0), ({"lr": True}, None), ({}, None)],
)
def test_the_learning_rate(tmp_path: Path, hparams: dict[str, Any], rate: float | None) -> None:
    assert learning_rate(run_of(tmp_path, hparams)) == rate


def test_what_makes_two_runs_the_same_task(tmp_path: Path) -> None:
    trees = {"a": recipe(1e-3), "b": recipe(3e-3), "c": {**recipe(1e-3), "architecture": {"ffn_multiplier": 8}}}
    trees["c"]["architecture"]["activation"] = "relu2"
    trees["d"] = {**recipe(1e-3), "architecture": {"ffn_multiplier": 4, "activation": "gelu"}}
    runs = {name: run_of(tmp_path / name, tree) for name, tree in trees.items()}
    keys = {name: task_key(run) for name, run in runs.items()}
    bare = {name: task_key(run, without_rate=True) for name, run in runs.items()}
    assert keys["a"] == keys["c"] != keys["b"]
    assert bare["a"] == bare["b"] == bare["c"] != bare["d"]
    assert task_key(run_of(tmp_path / "none", {})) is None


@pytest.mark.parametrize(
    ("hparams", "digest", "expected"),
    [
        (recipe(), "", "the data order is shared by all runs"),
        (recipe(data_seed=None), "", "initial weights and data order"),
        ({}, "ab", "the same data in the same order"),
        ({}, "", "not recorded"),
    ],
)
def test_what_a_seed_draws(tmp_path: Path, hparams: dict[str, Any], digest: str, expected: str) -> None:
    for seed in (0, 1):
        folder = write_one(tmp_path, "muon", 0.9, 128, seed, hparams=hparams, layers=1)
        (folder / PROGRESS_FILE).write_text(json.dumps({"data": {"train": digest}}) if digest else "{torn")
    runs = load_runs([tmp_path]).runs
    assert expected in seed_meaning(runs)
    assert seed_meaning(runs[:1]) == ""
