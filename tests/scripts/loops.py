"""Scripts that step by hand, nest loops, and Trainers that do not (only) fit."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.toys import Lit, Tokens, cross_entropy


class UnevenManual(Tokens):
    """Accumulates three batches by hand, and what is left at the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0 or self.trainer.is_last_batch:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(Tokens):
    """Two transformers that take turns, with toggled optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = toys.LM()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        fake = self.net(batch[:, :-1]).detach().argmax(-1)
        self.manual_backward(self.critic(fake).mean() - self.critic(batch[:, :-1]).mean())
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)


class GradientPenalty(Tokens):
    """A second derivative through the blocks."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.net.model.embed_tokens(batch[:, :-1])
        self.row_ids = batch[:, :-1]
        x = hidden
        for layer in self.net.model.layers:
            x = layer(x)
        loss = cross_entropy(self.net.lm_head(x), batch[:, 1:])
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return loss + gradient.square().sum()


class InnerLoop(Tokens):
    """Reptile: a copy of the model is trained inside the step, and the model moves towards it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inner = copy.deepcopy(self.net)
        optimizer = torch.optim.SGD(inner.parameters(), 0.1)
        for part in batch.chunk(2):
            optimizer.zero_grad()
            cross_entropy(inner(part[:, :-1]), part[:, 1:]).backward()
            optimizer.step()
        pairs = zip(self.net.parameters(), inner.parameters(), strict=True)
        return self.loss(batch) + sum((a - b.detach()).square().sum() for a, b in pairs)


class MetaLearning(Lit):
    """MAML: adapted weights by functional_call, second derivatives."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        names = dict(self.net.named_parameters())
        train, test = batch.chunk(2)
        self.row_ids = train[:, :-1]
        loss = cross_entropy(torch.func.functional_call(self.net, names, (train[:, :-1],)), train[:, 1:])
        gradients = torch.autograd.grad(loss, list(names.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(names.items(), gradients, strict=True)}
        self.row_ids = test[:, :-1]
        return cross_entropy(torch.func.functional_call(self.net, adapted, (test[:, :-1],)), test[:, 1:])


class TruncatedBackward(Tokens):
    """Pieces of the sequence, a backward pass and a step each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for start in (0, 8):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch[:, start : start + 9]))
            self.optimizers().step()


class Predicts(Tokens):
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[:, :-1])


def only(what: str) -> Any:
    """A script that never trains."""

    def run(trainer: pl.Trainer, module: pl.LightningModule, *data: Any, **_: Any) -> None:
        getattr(trainer, what)(module, *data)

    return run


def fits_twice(trainer: pl.Trainer, module: pl.LightningModule, *data: Any, **_: Any) -> None:
    """Four steps, a validation, then on to step eight."""
    trainer.fit(module, *data)
    trainer.validate(module, toys.loader(16), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, *data)


SCRIPTS = {
    "uneven accumulation by hand": Script(
        UnevenManual, lambda: (toys.loader(60),), {"max_epochs": 2, "max_steps": -1}, losses=False
    ),
    "adversarial": Script(Adversarial),
    "gradient penalty": Script(GradientPenalty, losses=False),
    "Reptile": Script(InnerLoop, losses=False),
    "MAML": Script(MetaLearning, losses=False),
    "truncated backward": Script(TruncatedBackward),
    "uneven accumulation": Script(
        Tokens,
        lambda: (toys.loader(60),),
        {"accumulate_grad_batches": 3, "max_epochs": 2, "max_steps": -1},
        losses=False,
    ),
    "validates only": Script(
        Tokens, lambda: (toys.loader(16),), on=("train", "validation"), run=only("validate"), exact=False
    ),
    "tests only": Script(Tokens, lambda: (toys.loader(16),), on=("train", "test"), run=only("test"), exact=False),
    "predicts only": Script(Predicts, lambda: (toys.loader(16),), run=only("predict"), exact=False),
    "fits twice": Script(Tokens, options={"max_steps": 4}, run=fits_twice),
    "compiled module": Script(lambda: torch.compile(Tokens(), backend="eager"), exact=False),
}
