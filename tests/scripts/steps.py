"""Scripts whose training step is not ``loss = f(batch)`` once: skips, retries, optimizers, checkpointing, copies."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.toys import LM, Lit, cross_entropy


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class SkipsBatches(Lit):
    """Returns None before the forward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx in (0, 2) else self.loss(batch)


class SkipsAfterForward(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        return None if batch_idx == 2 else loss


class Critic(Lit):
    """GAN style: odd batches train the critic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer, loss = generator, self.loss(batch)
        else:
            optimizer, loss = critic, self.critic(torch.ones(8, 4)).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)


class TwoOptimizers(Critic):
    """Two optimizers of one model in every batch: the step counter jumps by two."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(batch)
        first.zero_grad()
        self.manual_backward(loss + self.critic(torch.ones(8, 4)).mean())
        first.step()
        second.step()


class TwoStepsPerBatch(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        super().training_step(batch[:4], batch_idx)
        super().training_step(batch[4:], batch_idx)


class Sharpness(Manual):
    """SAM: two forwards and two backwards for one step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(parameter.grad, alpha=1e-2)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Closure(Lit):
    """LBFGS calls the training step several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class OutOfMemory(Lit):
    """The forward fails half-way on batch 2; subclasses say what then."""

    def failing(self, batch: Tensor) -> Tensor | None:
        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        handle = self.net.model.layers[1].register_forward_pre_hook(fail)
        try:
            return self.loss(batch)
        except RuntimeError:
            return None
        finally:
            handle.remove()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return self.failing(batch) if batch_idx == 2 else self.loss(batch)


class Retries(OutOfMemory):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx == 2 and self.failing(batch) is None:
            for callback in self.trainer.callbacks:
                if hasattr(callback, "forget"):
                    callback.forget(
                        self.trainer.global_step
                    )  # the oracle's rows of the forward that failed: none trains
            return (self.loss(batch[:4]) + self.loss(batch[4:])) / 2
        return self.loss(batch)


class WholeCheckpoint(Lit):
    reentrant = False

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(checkpoint(self.net, ids[:, :-1], use_reentrant=self.reentrant), ids[:, 1:])


class Reentrant(WholeCheckpoint):
    reentrant = True


class LossInCheckpoint(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return checkpoint(lambda x: cross_entropy(self.net(x[:, :-1]), x[:, 1:]), ids, use_reentrant=False)


class BlockCheckpoint(Lit):
    def __init__(self) -> None:
        super().__init__()
        for block in self.net.model.layers:
            inner = block.forward
            block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)


class Functional(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        logits = torch.func.functional_call(self.net, dict(self.net.named_parameters()), (ids[:, :-1],))
        return cross_entropy(logits, ids[:, 1:])


class PerSample(Lit):
    """Per-sample gradient norms beside the loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        parameters = {name: value.detach() for name, value in self.net.named_parameters()}

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.net, parameters, (sample[None, :-1],))
            return cross_entropy(logits, sample[1:])

        gradients = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, batch)
        self.norm = sum(value.square().sum() for value in gradients.values())
        return self.loss(batch)


class Vmapped(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        parameters = dict(self.net.named_parameters())

        def one(sample: Tensor) -> Tensor:
            return cross_entropy(torch.func.functional_call(self.net, parameters, (sample[None, :-1],)), sample[1:])

        return torch.vmap(one)(ids).mean()


class Teacher(Lit):
    """A copy made in the first step, run in each (BYOL, DINO)."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.teacher = [copy.deepcopy(self.net).requires_grad_(False)]
        with torch.no_grad():
            target = self.teacher[0](batch[:, :-1])
        logits = self.net(batch[:, :-1])
        return F.mse_loss(logits, target) + cross_entropy(logits, batch[:, 1:])


class Reference(Lit):
    """A frozen reference beside the model, as in DPO and distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.reference(batch[:, :-1])
        logits = self.net(batch[:, :-1])
        return cross_entropy(logits, batch[:, 1:]) + 0.1 * F.mse_loss(logits, target)


class Generates(Lit):
    """Samples a continuation before the loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        text = batch[:1, :4]
        with torch.no_grad():
            for _ in range(5):
                text = torch.cat([text, self.net(text)[:, -1:].argmax(-1)], 1)
        return self.loss(batch)


class Contrastive(Lit):
    """Two forwards a step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[:4, :-1]).square().mean() + self.net(batch[4:, :-1]).square().mean()


class EvalForward(Lit):
    """Measures itself in eval mode inside the training step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.net.eval()
        with torch.no_grad():
            self.net(batch[:, :-1])
        self.net.train()
        return self.loss(batch)


class Raises(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            raise ValueError("the script's own error")
        return self.loss(batch)


class Interrupted(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            raise KeyboardInterrupt
        return self.loss(batch)


class Stops(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.trainer.should_stop = batch_idx >= 2
        return self.loss(batch)


class SkipsOptimizer(Lit):
    """Takes the optimizer's step on even batches only."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=closure)
        else:
            closure()


class EndsEpoch(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class EndsEpochItself(Lit):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class RaisingCallback(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        if args[4] == 3:
            raise RuntimeError("another callback's error")


class HoldsModule(Lit):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[])
        self.net = inner if inner is not None else LM()


class SavesWhole(Lit):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.save(self.net, io.BytesIO())


class Dropout(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        hidden = F.dropout(self.net.model(ids[:, :-1]), 0.2)
        return cross_entropy(self.net.lm_head(hidden), ids[:, 1:])


class Nan(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) * (float("nan") if batch_idx == 1 else 1.0)


class Compiled(Lit):
    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.net.compile(backend="eager")


def saver() -> list[Any]:
    return [ModelCheckpoint(dirpath=tempfile.mkdtemp(), every_n_train_steps=1)]


def _resumed(path: Any) -> dict[str, Any]:
    """Three steps by a Trainer that the environment does not see, then on from their checkpoint."""
    variable = os.environ.pop("LIGHTNING_SPECTRAL", None)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(path),
    )  # fmt: skip
    trainer.fit(Lit(), toys.loader())
    trainer.save_checkpoint(path / "begun.ckpt")
    if variable is not None:
        os.environ["LIGHTNING_SPECTRAL"] = variable
    return {"ckpt_path": str(path / "begun.ckpt")}


SCRIPTS = {
    "plain": Script(Lit),
    "clipping": Script(Lit, options={"gradient_clip_val": 0.1}),
    "accumulation": Script(Lit, options={"accumulate_grad_batches": 2, "max_steps": 4}, losses=False),
    "accumulation by schedule": Script(
        Lit,
        options={"max_steps": -1, "max_epochs": 2},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 4})],
        losses=False,
    ),
    "manual": Script(Manual),
    "returns None": Script(SkipsBatches, options={"max_steps": 5}, losses=False),
    "returns None after its forward": Script(SkipsAfterForward, losses=False),
    "critic on odd batches": Script(Critic),
    "two optimizers": Script(TwoOptimizers),
    "two steps a batch": Script(TwoStepsPerBatch),
    "sharpness-aware": Script(Sharpness),
    "closure (LBFGS)": Script(Closure, options={"max_steps": 3}, losses=False),
    "out of memory, skipped": Script(OutOfMemory, options={"max_steps": 5}, exact=False),
    "out of memory, retried": Script(Retries, exact=False),
    "whole model checkpointed": Script(WholeCheckpoint),
    "whole model checkpointed, reentrant": Script(Reentrant, exact=False),
    "loss inside a checkpoint": Script(LossInCheckpoint),
    "blocks checkpointed": Script(BlockCheckpoint),
    "functional_call": Script(Functional),
    "per-sample gradients": Script(PerSample, exact=False),
    "vmap": Script(Vmapped, exact=False),
    "teacher copied in a step": Script(Teacher, losses=False),
    "reference model": Script(Reference, losses=False, exact=False),
    "generates in the step": Script(Generates),
    "contrastive pair": Script(Contrastive, losses=False),
    "eval forward in the step": Script(EvalForward),
    "raises": Script(Raises),
    "interrupted": Script(Interrupted),
    "stops itself": Script(Stops),
    "skips the optimizer": Script(SkipsOptimizer, losses=False, exact=False),
    "callback raises": Script(Lit, callbacks=lambda: [RaisingCallback()]),
    "callback ends the epoch": Script(Lit, callbacks=lambda: [EndsEpoch()], options={"max_steps": 4, "max_epochs": 3}),
    "module ends the epoch": Script(EndsEpochItself, options={"max_steps": 4, "max_epochs": 3}),
    "hyperparameters hold a module": Script(
        lambda: HoldsModule(LM()), callbacks=saver, options={"enable_checkpointing": True}, exact=False
    ),
    "saves the whole model": Script(SavesWhole, exact=False),
    "dropout": Script(Dropout),
    "NaN loss": Script(Nan, losses=False, exact=False),
    "compiled": Script(Compiled),
    "bf16": Script(Lit, options={"precision": "bf16-mixed"}, losses=False),
    "fp64": Script(Lit, options={"precision": "64-true"}),
    "resumed": Script(Lit, data=lambda: (toys.loader(128),), prepare=_resumed, losses=False),
}
