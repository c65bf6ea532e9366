"""``HuggingFaceProbe``: the measurement in a ``transformers.Trainer``, as one of its callbacks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from typing_extensions import Self

from lightning_spectral.models.checkpoint_file import read_checkpoint
from lightning_spectral.probe.alarms import AlarmRule, Alarms
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.loop import LoopObserver
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.run_folder import RunFolder, new_run_id
from lightning_spectral.probe.settings import (
    BucketSettings,
    ProbeSettings,
    SharedArguments,
    Unpack,
    refuse_unknown,
)


class HuggingFaceProbe(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures the model that a ``transformers.Trainer`` trains.

    A window is one optimizer step with all its micro-batches and processes. Records go to ``output_dir/spectral``
    unless ``dirpath`` says otherwise; scalars stand in :attr:`latest` and in the Trainer's logs.

    Args:
        every_n_steps: Optimizer steps between windows.
        counts: Occurrences of each token id, or ``"stream"``: measures frequent and rare tokens apart, with their
            losses, as :class:`~lightning_spectral.TailTokenProbe` does.
        alarms: :class:`~lightning_spectral.SpectralAlarm` rules; one with ``stop=True`` ends the training.
        **shared: :class:`~lightning_spectral.probe.settings.ProbeSettings` documents them; here only training is
            measured.

    Raises:
        ValueError: If an argument is out of range; at the start of training, if the model has no site that is found.

    Example::

        Trainer(model, args, train_dataset=data, callbacks=[HuggingFaceProbe(every_n_steps=100)])
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        *,
        counts: Any = None,
        alarms: Sequence[AlarmRule] = (),
        **shared: Unpack[SharedArguments],
    ) -> None:
        buckets = None if counts is None else BucketSettings(counts=counts)
        refuse_unknown(type(self), shared)
        self._begin(Measurement(ProbeSettings(every_n_steps=every_n_steps, **shared), buckets), alarms)

    @classmethod
    def of(cls, measurement: Measurement, alarms: Sequence[AlarmRule] = ()) -> Self:
        """A probe of what another shell's arguments have described."""
        probe = cls.__new__(cls)
        probe._begin(measurement, alarms)
        return probe

    def _begin(self, measurement: Measurement, alarms: Sequence[AlarmRule]) -> None:
        self.measurement = measurement
        self.alarms = Alarms(alarms, measurement, stopping="training stops")
        self.latest: Scalars = {}
        self._loop: LoopObserver | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is kept in each checkpoint of the Trainer."""
        return {} if self._loop is None else self._loop.state_dict()

    @property
    def state_key(self) -> str:
        """What a Trainer of Lightning asks its callbacks for.

        Raises:
            TypeError: Always.
        """
        name = "SpectralRankCallback" if self.measurement.buckets is None else "TailTokenProbe"
        raise TypeError(f"{type(self).__name__} is for transformers.Trainer: Lightning's takes a {name}.")

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go, once attached."""
        return None if self._loop is None else self._loop.observer.run_folder

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **objects: Any) -> None:
        """Attach to the model."""
        if self._loop is not None:
            self._loop.detach()  # an earlier training has ended in an exception
        settings, steps = self.measurement.settings, int(state.max_steps)
        self.alarms.should_stop = False
        self._loop = LoopObserver(
            self.measurement,
            name=type(self).__name__,
            num_steps=steps if steps > 0 else None,
            alarms=self.alarms,
        )
        config: Any = getattr(model, "config", None)
        resumed = int(state.global_step) > 0
        if resumed:
            self._go_on(args, int(state.global_step))
        host = Host(
            folder=Path(settings.dirpath or Path(args.output_dir) / "spectral").absolute(),
            run_id=settings.run_id or new_run_id(),
            describe={
                "optimizer": str(getattr(args, "optim", "unknown")),
                "seed": int(args.seed),
                "hparams": {} if config is None else {"model_config": config.to_dict()},
            },
            resume=resumed,
            is_first=state.is_world_process_zero,
            writes=state.is_world_process_zero,
            num_replicas=int(args.world_size),
            num_local_processes=max(torch.cuda.device_count(), 1) if args.world_size > 1 else 1,
        )
        try:
            self._loop.attach(model, host)
        except ValueError as error:
            self._loop = None
            self.refuse(str(error))

    def refuse(self, reason: str) -> None:
        """What is asked for cannot be measured: an error before step 1."""
        raise ValueError(f"{type(self).__name__}: {reason}")

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Close the window of this step, open the next one."""
        if self._loop is not None:
            self._loop.end_step()
            self.latest = self._loop.latest or self.latest
            control.should_training_stop |= self.alarms.should_stop

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **objects: Any) -> None:
        """Put the latest medians into the Trainer's logs."""
        if logs is not None and "loss" in logs:
            logs.update(self.latest)

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """A run that is resumed from here must not miss the window that is being solved, and goes on by this state."""
        if self._loop is None:
            return
        self._loop.observer.drain()
        path = self._state_file(args, int(state.global_step))
        if state.is_world_process_zero and path.parent.is_dir():
            with self._loop.observer.guard(f"writing `{path}`", "not_closed"):
                torch.save(self.state_dict(), path)

    def _state_file(self, args: Any, step: int) -> Path:
        """In the Trainer's own checkpoint, one for each probe."""
        digest = hashlib.sha256(repr(sorted(self.measurement.identity.items())).encode()).hexdigest()[:8]
        return Path(args.output_dir) / f"checkpoint-{step}" / f"spectral_{digest}.pt"

    def _go_on(self, args: Any, step: int) -> None:
        """Resumed at this step; by our state, unless the checkpoint was moved, or made without a probe."""
        assert self._loop is not None
        path, saved = self._state_file(args, step), None
        with self._loop.observer.guard(f"reading `{path}`", "not_closed"):
            saved = read_checkpoint(path) if path.is_file() else None
        if saved is None:
            self._loop.follow(step)
        else:
            self._loop.load_state_dict(saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take every hook off."""
        if self._loop is not None:
            self._loop.detach(finished=True)
