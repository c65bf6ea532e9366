"""The shell around a measurement in a Trainer: Lightning's hooks, translated into the observer's.

fit start: attach. Batch start: a window opens where one is due. Batch end: activations are accumulated; once the
optimizer has stepped, the window is closed, solved and published. Teardown: hooks off. Nothing of this touches the
model, the loss or a global random state; what goes wrong after step 1 is a record and a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.counting import count_ahead
from lightning_spectral.callbacks.evaluation import EvaluationHooks
from lightning_spectral.callbacks.progress import Progress
from lightning_spectral.callbacks.tensorboard import Pictures
from lightning_spectral.callbacks.trainer_host import LastStep, host_of, publish_medians
from lightning_spectral.probe.observer import Observer
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import BucketSettings, Measurement, ProbeSettings, SharedArguments, Unpack
from lightning_spectral.probe.window import WindowResult
from lightning_spectral.records import SpectralRecord


class SpectralCallback(EvaluationHooks):
    """Base of :class:`SpectralRankCallback` and :class:`TailTokenProbe`.

    Args:
        every_n_steps: Optimizer steps between windows.
        **shared: :class:`~lightning_spectral.probe.settings.ProbeSettings` documents them.

    Attributes:
        measurement: What is measured, checked.
        observer: Its life.
        home: The trainer whose run is measured.
    """

    def __init__(self, every_n_steps: int = 200, **shared: Unpack[SharedArguments]) -> None:
        self._begin(ProbeSettings(every_n_steps=every_n_steps, **shared), None)

    def _begin(self, settings: ProbeSettings, buckets: BucketSettings | None) -> None:
        self.measurement = Measurement(settings, buckets)
        self.observer = Observer(self.measurement, name=type(self).__name__, key=self.state_key)
        self.home: pl.Trainer | None = None
        self._pictures = Pictures()
        self._progress, self._last_step = Progress(), LastStep()

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go, once attached."""
        return self.observer.run_folder

    def is_redundant(self, trainer: pl.Trainer) -> bool:
        """Whether another callback of this trainer measures the same."""
        return False

    def refuse(self, reason: str) -> None:
        """What is asked for cannot be measured: an error before step 1."""
        raise MisconfigurationException(f"{type(self).__name__}: {reason}")

    # fit

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self.observer.forget()
        self._attach(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.reconcile(self.observer, trainer.global_step)
        if self.observer.is_armed and self.observer.stream is not None:
            with self.observer.guard("counting tokens ahead"):
                count_ahead(self.observer, trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.observer.is_armed:
            step = trainer.global_step
            self.observer.begin_step(step, is_last=self._last_step.is_next(trainer, batch_idx, step))
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
        if not pl_module.automatic_optimization:
            self.observer.pause()  # what the batch runs after its first step belongs to the next one

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.observer.is_armed:
            return
        self.observer.end_micro_batch(batch)
        step = trainer.global_step
        self._last_step.learn(step)
        if step != self.observer.step:
            self.observer.end_step()
        self._log_medians(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observer.pause()
        self.observer.drain()
        self._log_medians(pl_module, at_epoch_end=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observer.drain()
        self._progress.finish(trainer.global_step)
        with self.observer.guard("drawing"):
            if self.run_folder is not None:
                self._pictures.finish(trainer, trainer.global_step, self.run_folder.path, self.run_folder.info)

    # evaluation

    @override
    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.observer.state == "off" and trainer.state.fn != "fit" and stage in self.measurement.settings.on:
            self._attach(trainer, pl_module)
        self.observer.begin_evaluation("" if trainer.sanity_checking else stage)

    @override
    def start_evaluation_batch(self, trainer: pl.Trainer, stage: str, loader: int) -> None:
        self.observer.begin_evaluation_batch(loader if _num_loaders(trainer) > 1 else None)

    @override
    def end_evaluation_batch(self, trainer: pl.Trainer, stage: str, batch: Any) -> None:
        self.observer.end_evaluation_batch(batch)

    @override
    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> dict[str, float]:
        step, tokens_seen = self._progress.of_weights(self.observer, trainer)
        return self.observer.end_evaluation(step, tokens_seen, num_loaders=_num_loaders(trainer))

    # end, state

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.observer.drain()
        self.observer.detach(**self._progress.facts())

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.observer.after_error()

    @property
    def state_key(self) -> str:
        """All that tells two callbacks of a class apart; ``on_load_checkpoint`` finds earlier versions' keys."""
        return self._generate_state_key(**self.measurement.identity)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.observer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observer.load_state_dict(state_dict)
        self._progress.has_state = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.observer.drain()  # a run resumed from here must not miss the window that is being solved
        self._progress.save(self.observer, trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._progress.load(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: hooks, threads and open files stay with the original."""
        return {"measurement": self.measurement, "observer": self.observer.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A callback that measures the same, attached to nothing."""
        self._begin(state["measurement"].settings, state["measurement"].buckets)
        self.observer.load_state_dict(state["observer"])

    # inside

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_redundant(trainer):
            return
        settings = self.measurement.settings
        host = host_of(
            trainer,
            pl_module,
            dirpath=settings.dirpath,
            run_id=settings.run_id,
            continued_run=self._progress.run_id,
            published=lambda records, result: self._published(trainer, records, result),
        )
        counts = getattr(getattr(trainer, "datamodule", None), "token_counts", None)
        if self.home is not trainer:
            self.observer.run_folder = None  # it is of another run
        self.home = trainer
        try:
            self.observer.attach(pl_module, host, fallback_counts=counts, trains=trainer.state.fn == "fit")
        except ValueError as error:
            self.refuse(str(error))

    def _published(self, trainer: pl.Trainer, records: Sequence[SpectralRecord], result: WindowResult) -> None:
        if records and records[0].stage == "train":
            self._pictures.add(trainer, records, result)
        for callback in [*trainer.callbacks]:  # type: ignore[attr-defined]
            listen = getattr(callback, "on_spectral_window", None)
            if listen is not None:
                listen(trainer, records)

    def _log_medians(self, pl_module: pl.LightningModule, *, at_epoch_end: bool = False) -> None:
        scalars = self.observer.take_scalars()
        if scalars:
            with self.observer.guard("logging medians"):
                publish_medians(pl_module, scalars, at_epoch_end=at_epoch_end)


def _num_loaders(trainer: pl.Trainer) -> int:
    numbers = {
        "validation": trainer.num_val_batches,
        "test": trainer.num_test_batches,
        "predict": trainer.num_predict_batches,
    }
    stage = "validation" if trainer.validating else "test" if trainer.testing else "predict"
    found = numbers["validation" if trainer.state.fn == "fit" else stage]
    return len(found) if isinstance(found, list) else 1
