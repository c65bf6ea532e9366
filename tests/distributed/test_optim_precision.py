"""Clipping, accumulation, bf16 and fp16 with a GradScaler in a real Trainer: what the same loop does by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_spectral.models.placement import local
from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import KINDS, Weights, fresh_model
from tests.distributed.test_optim_lightning import LM, fit, loss_of, trainer_for

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on loaders, workers and loggers
]
SCALE = 1024.0
SHARDING = (FSDPStrategy, ModelParallelStrategy)


def by_hand(
    steps: int,
    clip: Callable[[Iterable[Tensor]], Any] = lambda params: None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    kind: str = "muon",
) -> Weights:
    """Three steps in plain torch; with a GradScaler under fp16."""
    model = fresh_model()
    optimizer = KINDS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=autocast == torch.float16)
    for step in range(steps):
        for micro in range(accumulate):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
                loss = loss_of(model, step * accumulate + micro) / accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip([p for group in optimizer.param_groups for p in group["params"]])  # in the order Lightning sums in
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norm": ({"gradient_clip_val": 0.1}, {"clip": lambda params: nn.utils.clip_grad_norm_(params, 0.1)}),
    "value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": lambda params: nn.utils.clip_grad_value_(params, 0.01)},
    ),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "bf16": ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "fp16": ({"plugins": fp16()}, {"autocast": torch.float16}),
    "fp16 and norm": (
        {"plugins": fp16(), "gradient_clip_val": 0.1},
        {"autocast": torch.float16, "clip": lambda params: nn.utils.clip_grad_norm_(params, 0.1)},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_options_do_what_the_loop_by_hand_does(name):
    in_trainer, at_hand = OPTIONS[name]
    found, expected, plain = fit(0, 1, "single", "muon", 3, in_trainer), by_hand(3, **at_hand), by_hand(3)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert any(not torch.equal(value, plain[key]) for key, value in found.items())


class Overflows(LM):
    """The second of three batches gives the last rank an infinite gradient entry; keeps what every batch left."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.after: list[tuple[list[Tensor], list[Tensor], float]] = []

    def on_train_start(self) -> None:
        if not isinstance(self.trainer.strategy, SHARDING):  # before DDP averages, as an overflow would
            list(self.parameters())[-1].register_hook(lambda grad: self.overflowed(grad.clone()))

    def on_after_backward(self) -> None:
        if isinstance(self.trainer.strategy, SHARDING):  # in one rank's shard
            grads = (local(p.grad) for p in self.parameters() if p.grad is not None)
            self.overflowed(next(grad for grad in grads if grad.numel()))

    def overflowed(self, grad: Tensor) -> Tensor:
        if self.trainer.global_step == 1 and self.trainer.global_rank == self.trainer.world_size - 1:
            grad.view(-1)[0] = float("inf")
        return grad

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        weights = [local(p).detach().clone() for group in optimizer.param_groups for p in group["params"]]
        states = [local(value).clone() for state in optimizer.state.values() for value in state.values()]
        self.after.append((weights, states, self.trainer.precision_plugin.scaler.get_scale()))


def overflow(rank: int, world_size: int, name: str, kind: str) -> list[tuple[list[Tensor], list[Tensor], float]]:
    lm = Overflows(kind)
    plugin = fp16()
    if name == "fsdp1":
        plugin = FSDPPrecision("16-mixed")
        plugin.scaler = ShardedGradScaler(device="cpu", init_scale=SCALE)  # the argument is refused by a slip
    trainer_for(name, world_size, 3, None, plugins=plugin).fit(lm, torch.utils.data.DataLoader(range(8)))
    return lm.after


def check_overflow(after: list[tuple[list[Tensor], list[Tensor], float]]) -> None:
    (weights, states, scale), skipped, later = after
    assert all(torch.equal(a, b) for a, b in zip(weights, skipped[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states, skipped[1], strict=True))  # momentum, steps, factors
    assert any(bool(state.any()) for state in states)
    assert (scale, skipped[2], later[2]) == (SCALE, SCALE / 2, SCALE / 2)
    assert any(not torch.equal(a, b) for a, b in zip(weights, later[0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(states, later[1], strict=True))


@pytest.mark.parametrize("kind", ["muon", "normuon", "dion", "adamw"])
def test_an_overflow_skips_the_step_and_halves_the_scale(kind):
    check_overflow(overflow(0, 1, "single", kind))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_an_overflow_on_one_rank_skips_the_step_of_all(strategy):
    for after in run_ranks(overflow, 2, strategy, "normuon", init=False):
        check_overflow(after)
