"""The same model and data give the same records in every shell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_spectral
from lightning_spectral import FabricSpectralProbe, TailTokenProbe, observe
from lightning_spectral.records import read_losses, read_run, read_spectral
from tests.scripts import toys
from tests.scripts.toys import cross_entropy

STEPS = 5
SETTINGS: dict[str, Any] = {"sites": ["post"], "num_jackknife_groups": 2}


class Model(nn.Module):
    """Takes a dictionary's entries, as Hugging Face's Trainer calls models, and computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = toys.LM()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(input_ids)
        loss = cross_entropy(logits[:, :-1], (input_ids if labels is None else labels)[:, 1:])
        return {"loss": loss, "logits": logits}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batches() -> list[Tensor]:
    return list(toys.ids(8 * STEPS, toys.T).split(8))


def by_trainer(path: Path) -> None:
    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch)["loss"]

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    callback = TailTokenProbe(2, counts=toys.counts(), dirpath=str(path), **SETTINGS)
    pl.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], default_root_dir=str(path),
    ).fit(Lit(), DataLoader(batches(), batch_size=None))  # fmt: skip  # type: ignore[arg-type]


def by_fabric(path: Path) -> None:
    callback = TailTokenProbe(2, counts=toys.counts(), dirpath=str(path), **SETTINGS)
    probe = FabricSpectralProbe(callback, num_steps=STEPS)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    model = Model()
    wrapped, optimizer = fabric.setup(model, optimizer_of(model))
    for batch in batches():
        fabric.backward(wrapped(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    probe.remove()


def by_loop(path: Path) -> None:
    model = Model()
    optimizer = optimizer_of(model)
    with observe(model, 2, out=path, counts=toys.counts(), num_steps=STEPS, **SETTINGS) as probe:
        for batch in batches():
            model(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


def by_loop_that_follows_the_optimizer(path: Path) -> None:
    model = Model()
    optimizer = optimizer_of(model)
    probe = observe(model, 2, out=path, counts=toys.counts(), num_steps=STEPS, optimizer=optimizer, **SETTINGS)
    for batch in batches():
        model(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    probe.close()


def by_accelerate(path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model()
    optimizer = optimizer_of(model)
    with observe(model, 2, out=path, counts=toys.counts(), num_steps=STEPS, optimizer=optimizer, **SETTINGS):
        wrapped, stepper = accelerator.prepare(model, optimizer)
        for batch in batches():
            accelerator.backward(wrapped(batch)["loss"])
            stepper.step()
            stepper.zero_grad()


def by_hugging_face(path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from lightning_spectral import HuggingFaceProbe

    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(path / "out"), max_steps=STEPS, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=0.0, seed=0,
    )  # fmt: skip

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader([{"input_ids": batch} for batch in batches()], batch_size=None)  # type: ignore[arg-type]

    optimizer = optimizer_of(model)
    probe = HuggingFaceProbe(2, counts=toys.counts(), dirpath=str(path), **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    InOrder(model, arguments, callbacks=[probe], optimizers=(optimizer, schedule)).train()


SHELLS = [by_fabric, by_loop, by_loop_that_follows_the_optimizer, by_accelerate, by_hugging_face]


def by_key(path: Path) -> dict[Any, Any]:
    name = ".".join
    records = read_spectral(path).records
    return {
        (r.step, r.layer, r.site, r.bucket): replace(
            r, run_id="", window_s=None, module=name(r.module.split(".")[-5:]), stack=name(r.stack.split(".")[-2:])
        )
        for r in records
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer")
    by_trainer(path)
    return path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gives_the_trainers_records(tmp_path: Path, expected: Path, shell: Callable[[Path], None]) -> None:
    shell(tmp_path)
    reference, found = by_key(expected), by_key(tmp_path)
    assert sorted({key[0] for key in reference}) == [0, 2, 4]
    assert found.keys() == reference.keys()
    for key, record in found.items():
        assert record == reference[key], key
    losses = [replace(loss, run_id="") for loss in read_losses(tmp_path).records]
    assert losses == [replace(loss, run_id="") for loss in read_losses(expected).records]
    assert read_run(tmp_path).num_windows == 3
    assert read_run(tmp_path).num_lost_windows == 0


def test_the_package_probe_is_no_function() -> None:
    assert not callable(lightning_spectral.probe)
    assert callable(lightning_spectral.observe)


def test_a_loop_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    model = Model()

    def run() -> None:
        with observe(model, 1, out=tmp_path):
            model(batches()[0])["loss"].backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not (tmp_path / "run.lock").exists()
    assert torch._C._len_torch_function_stack() == 0


def test_between_steps_and_after_the_last_one_nothing_is_looked_at(tmp_path: Path) -> None:
    model = Model()
    optimizer = optimizer_of(model)
    probe = observe(model, 1, out=tmp_path, counts=toys.counts(), optimizer=optimizer)
    for batch in batches():
        assert torch._C._len_torch_function_stack() == 0
        loss = model(batch)["loss"]
        assert torch._C._len_torch_function_stack() == 1
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(batch)
        model.train()
    assert torch._C._len_torch_function_stack() == 0
    probe.close()
    assert {loss.status for loss in read_losses(tmp_path).records} == {"ok"}


def test_a_loop_can_be_resumed(tmp_path: Path) -> None:
    def steps(model: nn.Module, probe: Any, first: int, last: int) -> None:
        optimizer = optimizer_of(model)
        for batch in batches()[first:last]:
            model(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()

    model = Model()
    with observe(model, 2, out=tmp_path / "parts", counts=toys.counts()) as probe:
        steps(model, probe, 0, 3)
        state = probe.state_dict()
    with observe(model, 2, out=tmp_path / "parts", counts=toys.counts(), resume=True) as probe:
        probe.load_state_dict(state)
        steps(model, probe, 3, 5)
    whole = Model()
    with observe(whole, 2, out=tmp_path / "whole", counts=toys.counts()) as probe:
        steps(whole, probe, 0, 5)
    assert by_key(tmp_path / "parts") == by_key(tmp_path / "whole")
    assert len({r.run_id for r in read_spectral(tmp_path / "parts").records}) == 1
