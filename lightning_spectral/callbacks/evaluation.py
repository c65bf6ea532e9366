"""Validation, test and prediction loops have hooks of their own names that all mean the same four things."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_spectral.callbacks.trainer_host import publish_medians


class EvaluationHooks(Callback):
    """Forwards each evaluation loop's hooks with the name of its stage."""

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the first batch of an evaluation."""
        raise NotImplementedError

    def start_evaluation_batch(self, trainer: pl.Trainer, stage: str, loader: int) -> None:
        """Before a batch of a dataloader."""
        raise NotImplementedError

    def end_evaluation_batch(self, trainer: pl.Trainer, stage: str, batch: Any) -> None:
        """After a batch."""
        raise NotImplementedError

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> dict[str, float]:
        """After the last batch; the medians to monitor."""
        raise NotImplementedError

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
        self.start_evaluation_batch(trainer, "validation", dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start_evaluation_batch(trainer, "test", dataloader_idx)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start_evaluation_batch(trainer, "predict", dataloader_idx)

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.end_evaluation_batch(trainer, "validation", batch)

    @override
    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.end_evaluation_batch(trainer, "test", batch)

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.end_evaluation_batch(trainer, "predict", batch)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        medians = self.end_evaluation(trainer, pl_module, "validation")
        publish_medians(pl_module, medians, at_epoch_end=True)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_evaluation(trainer, pl_module, "test")

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_evaluation(trainer, pl_module, "predict")
