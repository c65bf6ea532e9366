"""Gains of two ranks, DDP or FSDP2, are those of one process; what hides matrices is refused before step 1."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy

from lightning_spectral.callbacks import UpdateAudience
from lightning_spectral.callbacks.update_audience import read_audience, token_losses
from lightning_spectral.optim import Muon
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_callbacks import Fsdp2, TensorParallel, loader, model_parallel

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


class ShardedSgd(Sgd, Fsdp2):
    pass


class ShardedMuon(OurMuon, Fsdp2):
    pass


def fsdp2() -> object:
    return model_parallel(2, 1)


@pytest.mark.parametrize(
    ("strategy", "module_class", "distributed_class"),
    [("ddp", Sgd, Sgd), ("ddp", OurMuon, OurMuon), (fsdp2, Sgd, ShardedSgd), (fsdp2, OurMuon, ShardedMuon)],
)
def test_two_ranks_equal_one_process(strategy, module_class, distributed_class, tmp_path):
    fit(0, 1, str(tmp_path / "single"), "auto", module_class)
    run_ranks(fit, 2, str(tmp_path / "double"), strategy, distributed_class, init=strategy == "ddp")
    single, double = (
        {(r.step, r.kind, r.rule, r.bucket): r for r in read_audience(Path(tmp_path / name))}
        for name in ("single", "double")
    )
    assert single.keys() == double.keys()
    assert len(single) > 50
    for key, one in single.items():
        other = double[key]
        assert (other.num_tokens, other.num_matrices) == (one.num_tokens, one.num_matrices)
        assert other.held_out == one.held_out
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        # fp32 sums of another order; weights drift apart by them step by step
        assert other.gain == pytest.approx(one.gain, rel=1e-2, abs=2e-3), key


def trained(rank: int, world_size: int, path: str, watched: bool, accumulate: int) -> list[torch.Tensor]:
    audience = [UpdateAudience(1, counts=tiny.counts(), dirpath=path)] if watched else []
    trainer = tiny.trainer(
        path, audience, devices=world_size, use_distributed_sampler=False, strategy=fsdp2(),
        accumulate_grad_batches=accumulate, gradient_clip_val=0.1,
    )  # fmt: skip
    module = ShardedMuon()
    trainer.fit(module, loader(rank, world_size))
    return [parameter.full_tensor().detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_under_fsdp2_is_bit_identical(accumulate, tmp_path):
    plain, watched = (
        run_ranks(trained, 2, str(tmp_path / str(on)), on, accumulate, init=False)[0] for on in (False, True)
    )
    assert {record.step for record in read_audience(tmp_path / "True")} >= {0, 1}
    for one, other in zip(plain, watched, strict=True):
        assert torch.equal(one, other)


class FirstRankOnly(UpdateAudience):
    """Rank 1 holds no token of a group that rank 0 has: its targets are padding."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        own = self.losses_fn

        def masked(module, batch):
            loss_N, target_N = own(module, batch)
            return loss_N, target_N if trainer.global_rank == 0 else torch.full_like(target_N, -1)

        self.losses_fn = masked
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.losses_fn = own


def one_sided(rank: int, world_size: int, path: str, strategy: object, module_class: type) -> None:
    audience = FirstRankOnly(1, counts=tiny.counts(), dirpath=path, rules=("momentum",))
    trainer = tiny.trainer(
        path, [audience], devices=world_size, use_distributed_sampler=False, max_steps=2,
        strategy=strategy() if callable(strategy) else strategy,
    )  # fmt: skip
    trainer.fit(module_class(), loader(rank, world_size))


def test_a_rank_without_tokens_of_a_group_takes_part(tmp_path):
    run_ranks(one_sided, 2, str(tmp_path / "ddp"), "ddp", Sgd)
    run_ranks(one_sided, 2, str(tmp_path / "fsdp2"), fsdp2, ShardedSgd, init=False)
    first, second = (
        {(r.step, r.kind, r.bucket): r for r in read_audience(tmp_path / name)} for name in ("ddp", "fsdp2")
    )
    assert first.keys() == second.keys()
    for key, one in first.items():
        assert second[key].num_tokens == one.num_tokens
        assert second[key].gain == pytest.approx(one.gain, rel=1e-2, abs=2e-3), key


class Tensors(Forward, TensorParallel):
    pass


def refused(rank: int, world_size: int, path: str) -> str:
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size=2"):
        fit(rank, world_size, path, lambda: model_parallel(1, 2), Tensors)
    return "refused"


def test_tensor_parallelism_is_refused(tmp_path):
    assert run_ranks(refused, 2, str(tmp_path), init=False) == ["refused", "refused"]


def test_fsdp1_is_refused():
    strategy = FSDPStrategy.__new__(FSDPStrategy)  # a real one needs a GPU
    trainer = SimpleNamespace(strategy=strategy, ckpt_path=None, global_step=0)
    with pytest.raises(MisconfigurationException, match="FSDP2"):
        UpdateAudience(counts=tiny.counts()).begin_fit(trainer, Sgd())


def on_one_rank(rank: int, world_size: int, path: str, odd: str) -> tuple[list[torch.Tensor], float, list[str]]:
    """Something about rank 1, or about rank 0, is not as on the other; "" for nothing of ours."""

    def losses_fn(module: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if odd == "fails" and rank == 1 and seen.pop():
            raise MemoryError("no room")
        return token_losses(module, batch)

    seen = [False, False, False, True]
    callbacks = [UpdateAudience(1 + (odd == "other"), counts=tiny.counts(), dirpath=path, losses_fn=losses_fn)]
    if not odd or odd == f"not on {rank}":
        callbacks = []
    elif odd == "other" and rank == 1:
        callbacks = [UpdateAudience(1, counts=tiny.counts(), dirpath=path)]
    trainer = tiny.trainer(path, callbacks, devices=world_size, use_distributed_sampler=False, strategy="ddp")
    module, began = Sgd(), time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, loader(rank, world_size))
    said = [str(one.message) for one in told if "UpdateAudience" in str(one.message)]
    return [parameter.detach().clone() for parameter in module.parameters()], time.monotonic() - began, said


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("not on 0", "rank(s) 0 did not come"),
        ("not on 1", "rank(s) 1 did not come"),
        ("other", "other arguments"),
        ("fails", "Training goes on"),
    ],
)
def test_what_is_odd_on_one_rank_ends_and_hangs_no_training(tmp_path, odd, said):
    plain = run_ranks(on_one_rank, 2, str(tmp_path / "plain"), "")
    found = run_ranks(on_one_rank, 2, str(tmp_path / "odd"), odd)
    for (weights, *_), (measured, seconds, _) in zip(plain, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, measured, strict=True))
        assert seconds < 45
    for rank, (_, _, told) in enumerate(found):
        assert odd == f"not on {rank}" or any(said in text for text in told), told
    steps = {record.step for record in read_audience(tmp_path / "odd")} if odd == "fails" else None
    if steps is not None:
        assert steps == {1, 2, 3}
