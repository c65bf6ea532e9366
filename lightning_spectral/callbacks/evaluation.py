"""Validation, test and prediction loops have hooks of their own names that all mean the same four things."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_spectral.callbacks.progress import Progress
from lightning_spectral.callbacks.trainer_host import num_loaders, publish_medians
from lightning_spectral.probe.observer import Observer


class EvaluationHooks(Callback):
    """Hands each evaluation loop's hooks to the observer, with the name of its stage."""

    observer: Observer
    progress: Progress

    def attach_to_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what is to be measured, if this stage is."""
        raise NotImplementedError

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the first batch of an evaluation."""
        if self.observer.state == "off" and trainer.state.fn != "fit":
            self.attach_to_evaluation(trainer, pl_module, stage)
        self.observer.begin_evaluation("" if trainer.sanity_checking else stage)

    def start_evaluation_batch(self, trainer: pl.Trainer, loader: int) -> None:
        """Before a batch of a dataloader."""
        self.observer.begin_evaluation_batch(loader if num_loaders(trainer) > 1 else None)

    def end_evaluation(self, trainer: pl.Trainer) -> dict[str, float]:
        """After the last batch; the medians to monitor."""
        step, tokens_seen = self.progress.of_weights(self.observer, trainer)
        return self.observer.end_evaluation(step, tokens_seen, num_loaders=num_loaders(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_evaluation(trainer, pl_module, "validation")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_evaluation(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_evaluation(trainer, pl_module, "predict")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start_evaluation_batch(trainer, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start_evaluation_batch(trainer, dataloader_idx)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start_evaluation_batch(trainer, dataloader_idx)

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.observer.end_evaluation_batch(batch)

    @override
    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.observer.end_evaluation_batch(batch)

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.observer.end_evaluation_batch(batch)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        medians = self.end_evaluation(trainer)
        publish_medians(pl_module, medians)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_evaluation(trainer)

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_evaluation(trainer)
