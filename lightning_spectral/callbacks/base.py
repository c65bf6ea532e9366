"""The shell around a measurement in a Trainer: Lightning's hooks, translated into the observer's.

fit start: attach. Batch start: a window opens where one is due. Batch end: activations are accumulated; once the
optimizer has stepped, the window is closed, solved and published. Teardown: hooks off. Nothing of this touches the
model, the loss or a global random state; what goes wrong after step 1 is a record and a warning.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.attached import AttachedToTrainer
from lightning_spectral.callbacks.counting import count_ahead
from lightning_spectral.callbacks.evaluation import EvaluationHooks
from lightning_spectral.callbacks.fit_start import BeginsFit
from lightning_spectral.callbacks.trainer_host import publish_medians
from lightning_spectral.callbacks.turns import leave
from lightning_spectral.probe.settings import ProbeSettings, SharedArguments, Unpack, refuse_unknown


class SpectralCallback(BeginsFit, AttachedToTrainer, EvaluationHooks):
    """Base of :class:`SpectralRankCallback` and :class:`TailTokenProbe`.

    Args:
        every_n_steps: Optimizer steps between windows.
        **shared: :class:`~lightning_spectral.probe.settings.ProbeSettings` documents them.
    """

    def __init__(self, every_n_steps: int = 200, **shared: Unpack[SharedArguments]) -> None:
        refuse_unknown(type(self), shared)
        self.begin(ProbeSettings(every_n_steps=every_n_steps, **shared), None)

    @override
    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self.observer.forget()
        self.attach(trainer, pl_module)
        if trainer.ckpt_path is not None and self.run_folder is not None and self.measurement.settings.dirpath is None:
            self.progress.warn_of_gap(self.run_folder)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.progress.reconcile(self.observer, trainer.global_step)
        if self.observer.is_armed and self.observer.stream is not None:
            with self.observer.guard("counting tokens ahead"):
                count_ahead(self.observer, trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.observer.is_armed:
            step = trainer.global_step
            self.observer.begin_step(step, is_last=self.last_step.is_next(trainer, batch_idx, step))
            self.observer.begin_micro_batch()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.observer.pause()  # checkpointed blocks run again during the backward pass

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.observer.step is not None and trainer.global_step == self.observer.step:
            self.observer.resume()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.automatic_optimization:
            self.observer.begin_update()
        else:
            self.observer.pause()  # what the batch runs after its first step belongs to the next one

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.observer.is_armed:
            return
        self.observer.end_micro_batch(batch)
        step = trainer.global_step
        self.last_step.learn(step)
        if step != self.observer.step:
            self.observer.end_step()
        self._log_medians(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observer.pause()
        self.observer.drain()
        self._log_medians(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observer.drain()
        self.progress.finish(trainer.global_step)
        with self.observer.guard("drawing"):
            if self.run_folder is not None:
                self.pictures.finish(trainer, trainer.global_step, self.run_folder.path, self.run_folder.info)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.observer.drain()
        self.observer.detach(**self.progress.facts())
        leave(trainer, self)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.observer.after_error()

    def _log_medians(self, pl_module: pl.LightningModule) -> None:
        scalars = self.observer.take_scalars()
        if scalars:
            with self.observer.guard("logging medians"):
                publish_medians(pl_module, scalars)
