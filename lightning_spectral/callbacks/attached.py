"""How a measuring callback is attached to a Trainer's model: its host, its run folder, the listeners of its windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_spectral.callbacks.progress import Progress
from lightning_spectral.callbacks.saved_state import SavedState
from lightning_spectral.callbacks.tensorboard import Pictures
from lightning_spectral.callbacks.trainer_host import host_of, tell_listeners
from lightning_spectral.callbacks.turns import LastStep, come_first
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.observer import Observer
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import BucketSettings, ProbeSettings
from lightning_spectral.records import SpectralRecord


class AttachedToTrainer(SavedState):
    """A callback whose observer watches the model of one Trainer.

    Attributes:
        home: The trainer whose run is measured.
        last_step: Knows which step is the last.
        pictures: Drawn for TensorBoard.
    """

    @override
    def begin(self, settings: ProbeSettings, buckets: BucketSettings | None) -> None:
        self.measurement = Measurement(settings, buckets)
        self.observer = Observer(self.measurement, name=type(self).__name__, key=self.state_key)
        self.home: pl.Trainer | None = None
        self.progress, self.last_step = Progress(), LastStep()
        self.pictures = Pictures(with_layers=settings.log_layers)

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go, once attached."""
        return self.observer.run_folder

    def is_redundant(self, trainer: pl.Trainer) -> bool:
        """Whether another callback of this trainer measures the same."""
        return False

    def on_after_setup(self, fabric: Any = None, module: Any = None) -> None:
        """What Fabric calls of its callbacks.

        Raises:
            MisconfigurationException: Always: it would measure nothing there.
        """
        name = type(self).__name__
        raise MisconfigurationException(
            f"{name} is a Trainer's callback: Fabric takes it as `callbacks=[FabricSpectralProbe({name}(...))]`."
        )

    def on_init_end(self, *args: Any, **objects: Any) -> None:
        """What Hugging Face's Trainer calls of its callbacks.

        Raises:
            MisconfigurationException: Always: it would measure nothing there.
        """
        raise MisconfigurationException(
            f"{type(self).__name__} is a callback of Lightning: transformers.Trainer takes a HuggingFaceProbe with the "
            "same arguments."
        )

    def refuse(self, reason: str) -> None:
        """What is asked for cannot be measured: an error before step 1."""
        raise MisconfigurationException(f"{type(self).__name__}: {reason}")

    def attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what is to be measured."""
        if self.is_redundant(trainer):
            return
        host = host_of(
            trainer,
            pl_module,
            dirpath=self.measurement.settings.dirpath,
            run_id=self.measurement.settings.run_id,
            continued_run=self.progress.run_id,
            published=lambda records, result: self._published(trainer, records, result),
        )
        counts = getattr(getattr(trainer, "datamodule", None), "token_counts", None)
        if self.home is not trainer:
            self.observer.run_folder = None  # it is of another run
        self.home = trainer
        come_first(trainer, self)
        try:
            self.observer.attach(pl_module, host, fallback_counts=counts, trains=trainer.state.fn == "fit")
        except ValueError as error:
            self.refuse(str(error))

    def attach_to_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find what is to be measured by ``Trainer.validate`` and its like; say so where nothing is."""
        on = list(self.measurement.settings.on)
        if stage in on:
            self.attach(trainer, pl_module)
        elif self.home is None and not self.is_redundant(trainer):
            rank_zero_info(
                f"{type(self).__name__}: nothing is measured here, since `on` is {on}: `on=['{stage}']` measures it."
            )

    def _published(self, trainer: pl.Trainer, records: Sequence[SpectralRecord], result: WindowResult) -> None:
        if records and records[0].stage == "train":
            self.pictures.add(trainer, records, result)
        tell_listeners(trainer, records)
