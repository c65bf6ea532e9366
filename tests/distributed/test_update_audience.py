"""Gains and losses of two DDP ranks are those of one process; sharded parameters are refused before step 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_spectral.callbacks import UpdateAudience
from lightning_spectral.callbacks.update_audience import read_audience
from lightning_spectral.optim import Muon
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_callbacks import Fsdp2, loader, model_parallel

pytestmark = pytest.mark.distributed


class Forward:
    def forward(self, ids):
        return self.gpt(ids)


class Sgd(Forward, tiny.Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class OurMuon(Forward, tiny.Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Muon(self, lr=0.05, weight_decay=0.0, precision="fp32")  # on some CPUs `auto` is bf16, and rounds


def fit(rank: int, world_size: int, path: str, strategy: object, module_class: type) -> list[torch.Tensor]:
    audience = UpdateAudience(1, counts=tiny.counts(), dirpath=path, rules=("applied", "momentum", "polar"))
    trainer = tiny.trainer(
        path, [audience], devices=world_size, use_distributed_sampler=False,
        strategy=strategy() if callable(strategy) else strategy,
    )  # fmt: skip
    module = module_class()
    trainer.fit(module, loader(rank, world_size))
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("module_class", [Sgd, OurMuon])
def test_two_ranks_equal_one_process(module_class, tmp_path):
    fit(0, 1, str(tmp_path / "single"), "auto", module_class)
    run_ranks(fit, 2, str(tmp_path / "double"), "ddp", module_class)
    single, double = (
        {(r.step, r.kind, r.rule, r.bucket): r for r in read_audience(Path(tmp_path / name))}
        for name in ("single", "double")
    )
    assert single.keys() == double.keys()
    assert len(single) > 50
    for key, one in single.items():
        other = double[key]
        assert other.num_tokens == one.num_tokens
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        # fp32 sums of another order; weights drift apart by them step by step
        assert other.gain == pytest.approx(one.gain, rel=1e-2, abs=2e-3), key


class Sharded(Forward, Fsdp2):
    pass


def refused(rank: int, world_size: int, path: str) -> str:
    with pytest.raises(MisconfigurationException, match="sharded parameters"):
        fit(rank, world_size, path, lambda: model_parallel(2, 1), Sharded)
    return "refused"


def test_sharded_parameters_are_refused(tmp_path):
    assert run_ranks(refused, 2, str(tmp_path)) == ["refused", "refused"]
