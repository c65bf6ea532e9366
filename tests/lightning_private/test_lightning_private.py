"""Each private name of Lightning still exists and means what we take it to mean; and it is used nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy

import lightning_spectral
from lightning_spectral.lightning_private import (
    accumulates,
    callback_metrics,
    callbacks_of_fabric,
    device_mesh,
    run_validation,
    state_key,
    unwrapped,
)
from tests.distributed.harness import run_ranks

PACKAGE = Path(lightning_spectral.__file__).parent


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.validated_at: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).mean())
        self.validated_at.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: pl.Callback, tmp_path: Path, **options: object) -> Linear:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        **options,
    )
    module = Linear()
    trainer.fit(module, torch.ones(5, 4, 2), torch.ones(2, 4, 2))
    return module


class Watches(pl.Callback):
    """At each batch end: whether it accumulates, and the optimizer steps so far."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.seen.append((accumulates(trainer), trainer.global_step))


def test_accumulates_where_no_optimizer_step_follows(tmp_path):
    watches = Watches()
    fit(watches, tmp_path, max_epochs=1, accumulate_grad_batches=2, limit_val_batches=0)
    assert watches.seen == [(True, 0), (False, 1), (True, 1), (False, 2), (False, 3)]  # the last batch steps alone


class ValidatesAt(pl.Callback):
    """Validates once, after one step, and keeps what the training loop may find changed."""

    def __init__(self) -> None:
        self.kept: list[tuple[object, object, bool]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == 2:
            before = trainer._logger_connector._first_loop_iter
            run_validation(trainer)
            self.kept.append((before, trainer._logger_connector._first_loop_iter, trainer.training))


def test_validation_amid_training_leaves_training_as_it_was(tmp_path):
    validates = ValidatesAt()
    module = fit(validates, tmp_path, max_epochs=1, check_val_every_n_epoch=5, num_sanity_val_steps=0)
    assert module.validated_at == [2, 2]  # two batches
    ((before, after, training),) = validates.kept
    assert before is after
    assert training
    assert module.trainer.global_step == 5
    assert "val_loss" in module.trainer.callback_metrics


class Puts(pl.Callback):
    """A metric at each batch end and after validation; what a monitor reads there."""

    def __init__(self) -> None:
        self.read: list[tuple[float, float | None]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        callback_metrics(trainer)["rank"] = torch.tensor(float(trainer.global_step))
        self.read.append((float(trainer.callback_metrics["rank"]), None))

    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: object) -> None:
        callback_metrics(trainer)["rank.val"] = torch.tensor(7.0)

    def on_validation_end(self, trainer: pl.Trainer, *args: object) -> None:
        metrics = trainer.callback_metrics
        self.read.append((float(metrics["rank.val"]), float(metrics["val_loss"])))


def test_what_is_put_into_callback_metrics_is_found_there_and_in_no_log(tmp_path):
    puts = Puts()
    trainer = fit(puts, tmp_path, max_epochs=1, num_sanity_val_steps=0).trainer
    assert [value for value, _ in puts.read] == [1, 2, 3, 4, 5, 7]
    assert puts.read[-1][1] is not None  # beside what was logged
    assert float(trainer.callback_metrics["rank"]) == 5
    assert not {"rank", "rank.val"} & set(trainer.logged_metrics)


def test_callbacks_of_a_fabric():
    first, second = pl.Callback(), pl.Callback()
    assert callbacks_of_fabric(Fabric(accelerator="cpu", callbacks=[first, second]))[:2] == [first, second]


def test_unwrapped_is_what_the_strategy_calls():
    fabric = Fabric(accelerator="cpu")
    plain = torch.nn.Linear(2, 2)
    assert unwrapped(fabric.setup_module(plain)) is plain
    assert unwrapped(plain) is plain


def mesh_of(rank: int, world_size: int) -> tuple[tuple[str, ...], object]:
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=ModelParallelStrategy(lambda module, mesh: module))
    fabric.launch()
    return device_mesh(fabric.strategy).mesh_dim_names, device_mesh(Fabric(accelerator="cpu").strategy)


@pytest.mark.distributed
def test_device_mesh_names_its_dimensions():
    for names, of_one_device in run_ranks(mesh_of, 2, init=False):
        assert names == ("data_parallel", "tensor_parallel")
        assert of_one_device is None


def test_state_key_tells_two_of_a_class_apart():
    assert state_key(Watches(), site="post") != state_key(Watches(), site="pre")
    assert state_key(Watches(), site="post") == state_key(Watches(), site="post")
    assert "Watches" in state_key(Watches(), site="post")


def private_names(source: str) -> set[str]:
    """Names with a leading underscore that are read from something, as attributes or by getattr."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            names.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            names.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and str(a.value)[:1] == "_")
    return names


OURS = private_names((PACKAGE / "lightning_private" / "__init__.py").read_text())


def test_the_scan_sees_them():
    assert {"_should_accumulate", "_first_loop_iter", "_callbacks", "_forward_module", "_generate_state_key"} <= OURS


@pytest.mark.parametrize(
    "room", ["training", "gpt", "memory", "metrics", "data", "sweep", "cli", "callbacks", "probe", "models", "optim"]
)
def test_used_nowhere_else(room):
    for file in (PACKAGE / room).rglob("*.py"):
        assert private_names(file.read_text()) & OURS == set(), file
