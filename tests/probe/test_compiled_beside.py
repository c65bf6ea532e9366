"""Compiled functions of a script keep their forms: no mode of ours is active while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_spectral as ls
from lightning_spectral.records import read_losses

VOCAB, DIM = 40, 8
COUNTS = np.arange(VOCAB, 0, -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, 3 * DIM), nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w2(F.relu(self.w1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def optimizer_of(model: nn.Module, forms: list[int]) -> torch.optim.Optimizer:
    """Whose step is compiled, with a form for each shape, as nanochat's; it counts them."""

    def backend(graph: Any, inputs: Any) -> Any:
        forms.append(1)
        return graph.forward

    def moved(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight - 0.1 * gradient

    step = torch.compile(moved, backend=backend, fullgraph=True, dynamic=False)

    class Compiled(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(model.parameters(), {})

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None if closure is None else closure()
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.copy_(step(param, param.grad))
            return loss

    return Compiled()


def batches() -> Tensor:
    return torch.randint(0, VOCAB, (3, 4, 9), generator=torch.Generator().manual_seed(1))


def in_a_loop(path: Path, forms: list[int], *, measures: bool) -> nn.Module:
    model = Net()
    optimizer = optimizer_of(model, forms)
    probe = ls.observe(model, 1, out=path, optimizer=optimizer, counts=COUNTS) if measures else None
    for ids in batches():
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if probe is not None:
        probe.close(finished=True)
    return model


def in_a_trainer(path: Path, forms: list[int], *, measures: bool, how: str = "") -> nn.Module:
    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(Net(), backend="eager") if how == "wrapped" else Net()
            if how == "in place":
                self.net.compile(backend="eager")

        def training_step(self, ids: Tensor) -> Tensor:
            return F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self, forms)

    callbacks = [ls.TailTokenProbe(1, counts=COUNTS, dirpath=path)] if measures else []
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, log_every_n_steps=1,
    )  # fmt: skip
    module = Lit()
    trainer.fit(module, DataLoader(batches().flatten(0, 1), batch_size=4))
    return module.net


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("train", [in_a_loop, in_a_trainer])
def test_an_optimizer_that_compiles_its_step_compiles_no_more(tmp_path: Path, train: Any) -> None:
    without: list[int] = []
    within: list[int] = []
    plain = train(tmp_path, without, measures=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=len(without)):  # one form more would end the script
        measured = train(tmp_path, within, measures=True)
    assert len(within) == len(without) == 5
    for param, other in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(param, other)
    losses = read_losses(tmp_path).records
    assert {record.step for record in losses} == {0, 1, 2}
    assert all(record.loss is not None for record in losses if record.bucket == "pooled")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what enters a compiled block
@pytest.mark.parametrize("how", ["blocks", "in place", "whole", "afterwards"])
def test_no_mode_is_active_in_compiled_modules_and_losses_are_seen(tmp_path: Path, how: str) -> None:
    modes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            modes.append(torch._C._len_torch_function_stack())
            return graph.forward(*args)

        return run

    net: Any = Net()
    if how == "blocks":
        net.blocks = nn.ModuleList([torch.compile(block, backend=backend) for block in net.blocks])
    elif how == "in place":
        for block in net.blocks:
            block.compile(backend=backend)
    observed = torch.compile(net, backend=backend) if how == "whole" else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with ls.observe(observed, 1, out=tmp_path, optimizer=optimizer, counts=COUNTS):
        called = torch.compile(net, backend=backend) if how == "afterwards" else observed
        for step, ids in enumerate(batches()):
            if step == 1 and how == "afterwards":
                modes.clear()  # that it is compiled is seen in the first window
            F.cross_entropy(called(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert modes
    assert not any(modes)
    assert all(record.loss is not None for record in read_losses(tmp_path).records if record.bucket == "pooled")


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_losses_beside_a_network_that_a_lightning_module_has_compiled(tmp_path: Path, how: str) -> None:
    in_a_trainer(tmp_path, [], measures=True, how=how)
    losses = [record.loss for record in read_losses(tmp_path).records if record.bucket == "pooled"]
    assert len(losses) == 3
    assert None not in losses


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # of what dynamo imports
@pytest.mark.parametrize("told", ["by the optimizer", "by the loop"])
def test_a_compiled_step_of_an_optimizer_takes_none_of_ours_in(tmp_path: Path, told: str) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def train(measures: bool) -> list[int]:
        torch._dynamo.reset()
        graphs.clear()
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        follows = {"optimizer": optimizer} if told == "by the optimizer" else {}
        probe = ls.observe(model, 1, out=tmp_path, counts=COUNTS, **follows) if measures else None
        step = torch.compile(optimizer.step, backend=backend)
        for ids in batches():
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            step()
            optimizer.zero_grad()
            if probe is not None and not follows:
                probe.step()
        if probe is not None:
            probe.close(finished=True)
        return list(graphs)

    assert train(measures=True) == train(measures=False)
    assert len(graphs) == 1
