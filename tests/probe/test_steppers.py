"""``observe(optimizer=)`` takes an optimizer's steps for those of the loop, also where it wraps another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_spectral import observe
from lightning_spectral.probe.steppers import steppers
from lightning_spectral.records import read_spectral
from tests.scripts import toys

Backward = Callable[[], Tensor]
STEPS = 3


class Sharpness(Optimizer):
    """As of many repositories (sharpness-aware minimisation): a step in two halves, or with a closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups)

    def first_step(self) -> None:
        self.zero_grad()

    def second_step(self) -> None:
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        closure()
        self.second_step()


class Lookahead(Optimizer):
    """As of many repositories: what torch's own constructor sets is set by hand, or not at all."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Grouped:
    """As DeepSpeed's: no optimizer, but it has one, which it steps for every group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def in_halves(optimizer: Any, backward: Backward) -> None:
    backward()
    optimizer.first_step()
    backward()
    optimizer.second_step()


def with_a_closure(optimizer: Any, backward: Backward) -> None:
    backward()
    optimizer.step(backward)


def at_once(optimizer: Any, backward: Backward) -> None:
    backward()
    optimizer.step()


def accelerated(parameters: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(SGD(parameters, lr=0.1))


KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Backward], None], int]] = {
    "in halves": (Sharpness, in_halves, 2),
    "with a closure": (Sharpness, with_a_closure, 2),
    "lookahead": (lambda parameters: Lookahead(SGD(parameters, lr=0.1)), at_once, 1),
    "wrapped twice": (lambda parameters: Lookahead(Lookahead(SGD(parameters, lr=0.1))), at_once, 1),
    "accelerate": (accelerated, at_once, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_counted_once(tmp_path: Path, kind: str) -> None:
    make, step, passes = KINDS[kind]
    torch.manual_seed(0)
    model = toys.LM()
    optimizer = make(model.parameters())
    with observe(model, 1, out=tmp_path, optimizer=optimizer, sites=["post"]) as probe:
        for batch in toys.ids(8 * STEPS).split(8):

            def backward(batch: Tensor = batch) -> Tensor:
                loss = toys.cross_entropy(model(batch[:, :-1]), batch[:, 1:])
                loss.backward()
                return loss

            step(optimizer, backward)
    assert probe.num_steps == STEPS
    found = {(record.step, record.num_tokens) for record in read_spectral(tmp_path).records}
    assert found == {(step, 128 * passes) for step in range(STEPS)}
    assert all(not one._optimizer_step_post_hooks for one in steppers(optimizer))


def test_one_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    model = toys.LM()
    grouped = Grouped(SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="is a `Grouped`, of whose steps torch tells nothing: leave it out, and call"):
        observe(model, 1, out=tmp_path, optimizer=grouped)  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_step_that_failed_is_none(tmp_path: Path) -> None:
    model: nn.Module = toys.LM()
    optimizer = Sharpness(model.parameters())
    with observe(model, 1, out=tmp_path, optimizer=optimizer) as probe:
        with pytest.raises(TypeError, match="not callable"):
            optimizer.step()
        optimizer.step(lambda: None)
        assert probe.num_steps == 1
