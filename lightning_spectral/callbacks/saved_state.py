"""What a checkpoint and a copy of a measuring callback hold; hooks, threads and open files stay with the original."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_spectral.callbacks.progress import ENTRY, Progress
from lightning_spectral.lightning_private import state_key
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.observer import Observer
from lightning_spectral.probe.settings import BucketSettings, ProbeSettings


class SavedState(Callback):
    """State of a callback whose life is an observer.

    Attributes:
        measurement: What is measured, checked.
        observer: Its life.
        progress: What is known of the weights.
    """

    measurement: Measurement
    observer: Observer
    progress: Progress

    def begin(self, settings: ProbeSettings, buckets: BucketSettings | None) -> None:
        """A callback that is attached to nothing."""
        raise NotImplementedError

    @cached_property  # Lightning asks for it at every hook
    def state_key(self) -> str:  # type: ignore[override]
        """All that tells two callbacks of a class apart; ``on_load_checkpoint`` finds earlier versions' keys."""
        return state_key(self, **self.measurement.identity)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.observer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observer.load_state_dict(state_dict)
        self.progress.has_state = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.observer.drain()  # a run resumed from here must not miss the window that is being solved
        self.progress.save(self.observer, trainer, checkpoint)

    def forget_unfinished_step(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """For who saves amid a step, of which the micro-batches will be seen again: they count as not seen."""
        for state in (checkpoint[ENTRY], checkpoint["callbacks"].get(self.state_key, {})):
            state["tokens_seen"] = self.observer.tokens.before(trainer.global_step)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.progress.load(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs."""
        return {"measurement": self.measurement, "observer": self.observer.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A callback that measures the same, attached to nothing."""
        self.begin(state["measurement"].settings, state["measurement"].buckets)
        self.observer.load_state_dict(state["observer"])
