"""When a fit begins for a callback: once the checkpoint that is resumed has been read."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class BeginsFit(Callback):
    """Calls :meth:`begin_fit` at fit start, and under strategies that shard the model as soon after it as it is known.

    FSDP, ``ModelParallelStrategy`` and DeepSpeed read a checkpoint after every callback's ``on_fit_start``: there
    ``trainer.ckpt_path`` is still None and the trainer at step 0, and a resumed run looks like a new one.
    """

    _waits = False

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the sanity check and step 1; ``trainer.ckpt_path`` and our own state are what was restored."""
        raise NotImplementedError

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._waits = trainer.strategy.restore_checkpoint_after_setup
        if not self._waits:
            self.begin_fit(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_if_late(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_if_late(trainer, pl_module)

    def _begin_if_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._waits:
            self._waits = False
            self.begin_fit(trainer, pl_module)
