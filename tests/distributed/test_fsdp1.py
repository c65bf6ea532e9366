"""FSDP1 through the Trainer and through Fabric: on CPU by a subclass that says so to torch; equal to one process."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy as FabricFSDP
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.strategies import FSDPStrategy
from litgpt.model import Block
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_spectral import TailTokenProbe, read_spectral
from lightning_spectral.callbacks.fabric import FabricSpectralProbe
from lightning_spectral.gpt.module import LitGPT
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_callbacks import by_key, check, loader, measure_strategy

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*:UserWarning"),
]


class CpuFsdp(FSDPStrategy):
    """Lightning refuses FSDP on CPU by its exact type, and gives torch the index that a CPU does not have."""

    def _setup_model(self, model):
        wrapped = sharded(model, self, self.kwargs)
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        self.model = wrapped
        return wrapped


class CpuFabricFsdp(FabricFSDP):
    def setup_module(self, module):
        wrapped = sharded(module, self, self._fsdp_kwargs)
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped


def sharded(model, strategy, options):
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), sharding_strategy=strategy.sharding_strategy,
        mixed_precision=strategy.mixed_precision_config, **options,
    )  # fmt: skip


STRATEGIES = {
    "blocks": {"auto_wrap_policy": {Block}},
    "whole": {},
    "shard_grad_op": {"auto_wrap_policy": {Block}, "sharding_strategy": "SHARD_GRAD_OP"},
    "checkpointed": {"auto_wrap_policy": {Block}, "activation_checkpointing_policy": {Block}},
}


@pytest.fixture
def single(tmp_path):
    measure_strategy(0, 1, str(tmp_path / "single"), "auto", tiny.Module)
    return by_key(tmp_path / "single")


@pytest.mark.parametrize("name", STRATEGIES)
def test_trainer(tmp_path, single, name):
    path = tmp_path / name
    run_ranks(measure_strategy, 2, str(path), lambda: CpuFsdp(**STRATEGIES[name]), tiny.Module, init=False)
    check(single, path, rel=1e-5, world_size=2)


def fabric_loop(rank: int, world_size: int, path: str, strategy: object, compile_model: bool = False) -> str:
    callback = TailTokenProbe(
        2, counts=tiny.counts(), sites=["pre", "post"], dirpath=path, num_jackknife_groups=2, losses=False
    )  # fmt: skip
    probe = FabricSpectralProbe(callback, num_steps=4)
    options = {"devices": world_size, "accelerator": "cpu", "callbacks": [probe]}
    fabric = Fabric(
        **options, **({"strategy": strategy() if callable(strategy) else strategy} if world_size > 1 else {})
    )
    fabric.launch()
    gpt = tiny.Module().gpt
    if compile_model:
        warnings.simplefilter("ignore")  # Dynamo has its own to say about DDP's and FSDP's collectives
    wrapped = fabric.setup(torch.compile(gpt, backend="eager") if compile_model else gpt)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(wrapped.parameters(), lr=1e-3))
    batches = iter(loader(rank, world_size))
    for _ in range(4):
        batch = next(batches)
        for part in batch.chunk(2):
            logits = wrapped(part[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            fabric.backward(loss / 2)
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        with torch.no_grad():
            wrapped(batch[:, :-1])
        wrapped.train()
    return type(wrapped._forward_module).__name__


@pytest.fixture
def single_fabric(tmp_path):
    fabric_loop(0, 1, str(tmp_path / "single"), "auto")
    return by_key(tmp_path / "single")


@pytest.mark.parametrize("name", STRATEGIES)
def test_fabric(tmp_path, single_fabric, name):
    path = tmp_path / name
    kinds = run_ranks(fabric_loop, 2, str(path), lambda: CpuFabricFsdp(**STRATEGIES[name]), init=False)
    assert kinds == [FullyShardedDataParallel.__name__] * 2
    check(single_fabric, path, rel=1e-5, world_size=2)
    assert {r.num_tokens for r in read_spectral(path).records if r.bucket == "pooled"} == {8 * tiny.LENGTH}


@pytest.mark.parametrize("world_size", [2, 4])
def test_fabric_ddp(tmp_path, single_fabric, world_size):
    path = tmp_path / "ddp"
    kinds = run_ranks(fabric_loop, world_size, str(path), "ddp", init=False)
    assert kinds == ["DistributedDataParallel"] * world_size
    check(single_fabric, path, rel=1e-5, world_size=world_size)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", lambda: CpuFabricFsdp(**STRATEGIES["blocks"])], ids=["ddp", "fsdp1"])
def test_fabric_compiled(tmp_path, single_fabric, strategy):
    run_ranks(fabric_loop, 2, str(tmp_path / "compiled"), strategy, True, init=False)
    check(single_fabric, tmp_path / "compiled", rel=1e-5, world_size=2)


def clipped_norm(rank: int, world_size: int) -> tuple[float, float]:
    """Norm of the whole gradient before and after the module of recipes has clipped it."""
    module = LitGPT(tiny.tiny.litgpt().config, max_seq_length=tiny.LENGTH)
    module.configure_model()
    strategy = CpuFsdp(auto_wrap_policy={Block})
    strategy.model = sharded(module, strategy, {"auto_wrap_policy": strategy.kwargs["auto_wrap_policy"]})
    module.trainer = SimpleNamespace(strategy=strategy)
    torch.manual_seed(rank)
    torch.nn.functional.cross_entropy(
        strategy.model(tiny.data()[:4, :-1]).flatten(0, 1), tiny.data()[:4, 1:].flatten()
    ).backward()
    norms = []
    for _ in range(2):
        square = sum(p.grad.double().square().sum() for p in module.parameters() if p.grad is not None)
        torch.distributed.all_reduce(square)
        norms.append(float(square.sqrt()))
        module.configure_gradient_clipping(None, norms[0] / 2, "norm")
    return norms[0], norms[1]


def test_a_recipe_clips_by_the_norm_over_all_ranks():
    """Lightning's own precision plugin refuses to; every shipped recipe clips."""
    for before, after in run_ranks(clipped_norm, 2):
        assert after == pytest.approx(before / 2, rel=1e-4)
