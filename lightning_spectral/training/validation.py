"""Validation before the first step and after the last, inside the fit, so that loggers and callbacks see it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_spectral.lightning_private import run_validation


class InitialAndFinalValidation(Callback):
    """Run the fit's own validation loop at its edges, as litgpt's ``eval.initial_validation`` and ``final_validation``.

    Args:
        first: Before the first step of a fresh run.
        last: After the last step, unless the interval has just done so.
    """

    def __init__(self, *, first: bool, last: bool) -> None:
        self._first = first
        self._last = last
        self._validated_step: int | None = None
        self.missed = last
        """Whether the last validation is still to be done: a run that resumes at its last step trains no step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the untrained model."""
        if self._first and trainer.global_step == 0:
            run_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step, so that none is validated twice."""
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the trained model."""
        if self._last and self._validated_step != trainer.global_step:
            run_validation(trainer)
        self.missed = False
