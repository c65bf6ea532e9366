"""An alarm when a rank leaves a share of the width, of the untrained network's rank, or of its own past."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_spectral.callbacks.attached import AttachedToTrainer
from lightning_spectral.callbacks.trainer_host import log_scalars
from lightning_spectral.lightning_private import state_key
from lightning_spectral.probe.alarms import AlarmRule, Voice
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.records import POOLED, SpectralRecord


class SpectralAlarm(AlarmRule, Callback):
    """Watches the median over layers of one rank, and says when it leaves what you allow.

    Needs a :class:`~lightning_spectral.TailTokenProbe` (or, for ``bucket="pooled"``, a
    :class:`~lightning_spectral.SpectralRankCallback`) in the same Trainer: it looks at their windows, measures nothing.
    Outside of a Trainer it is an item of ``alarms=[...]`` of :func:`~lightning_spectral.observe`, ``HuggingFaceProbe``
    or ``FabricSpectralProbe``. An alarm is one warning, one line in ``alarms.jsonl`` (marked in TensorBoard's tab
    SPECTRAL), ``1`` in the scalar ``spectral_alarm/<metric>.<bucket>``, a call of ``on_alarm``, and the end of training
    if ``stop`` (of a loop of your own: its ``should_stop``). It is raised once for as long as the rank stays beyond the
    threshold.

    Args:
        metric: ``hard_rank``, ``soft_rank`` or another rank of the records.
        bucket: ``tail``, ``mid``, ``head``, ``pooled`` or a group of your own.
        below: Alarm when the rank is less than this share of the reference.
        above: Alarm when it is more than this share; give one of the two.
        relative_to: The reference: FFN ``width`` D, the rank of the ``untrained`` network (window of step 0), or the
            highest (for ``above``: lowest) rank in the ``past`` of this run.
        patience: Windows in a row that must be beyond the threshold.
        site: ``post`` or ``pre``.
        stage: Stage whose windows are looked at.
        on_alarm: Called with the :class:`~lightning_spectral.records.AlarmRecord`, on every rank.
        stop: End the training.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if nothing in the Trainer measures the bucket, the site or the stage.

    Example::

        Trainer(callbacks=[TailTokenProbe(counts="stream"), SpectralAlarm(bucket="tail", below=0.5, patience=3)])
    """

    @cached_property  # Lightning asks for it at every hook
    def state_key(self) -> str:  # type: ignore[override]
        """Several alarms of one Trainer are told apart by what they watch."""
        side = "below" if self.is_floor else "above"
        watched = {"metric": self.metric, "bucket": self.bucket, "site": self.site, "stage": self.stage}
        return state_key(self, **watched, **{side: self.threshold}, relative_to=self.relative_to)

    def on_after_setup(self, fabric: Any = None, module: Any = None) -> None:
        """What Fabric calls of its callbacks.

        Raises:
            MisconfigurationException: Always: it would watch nothing there.
        """
        raise MisconfigurationException("SpectralAlarm in Fabric: `FabricSpectralProbe(callback, alarms=[...])`.")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [one.measurement for one in callbacks if isinstance(getattr(one, "measurement", None), Measurement)]
        needed = "SpectralRankCallback or TailTokenProbe" if self.bucket == POOLED else "TailTokenProbe"
        has = ", ".join(type(callback).__name__ for callback in callbacks)
        try:
            self.require_measured(found, f"add a {needed} to the Trainer's callbacks (it has {has}).")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AttachedToTrainer):
                callback.observer.drain()  # the window that is being solved is judged before the state is kept
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_spectral_window(self, trainer: pl.Trainer, records: Sequence[SpectralRecord]) -> None:
        """Judge one window; called by the measuring callbacks on every rank with the same records."""
        folders = [getattr(callback, "run_folder", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        voice = Voice(
            folder=next((one for one in folders if isinstance(one, RunFolder) and one.writes), None),
            tell=warn if trainer.is_global_zero else lambda text: None,
            log=lambda scalars, step: log_scalars(trainer, scalars, step),
        )
        if self.judge(records, voice) is not None:
            trainer.should_stop = trainer.should_stop or self.stop
