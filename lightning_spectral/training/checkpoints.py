"""Checkpoints that survive a kill: written beside, renamed when whole, and read back newest first.

A checkpoint of step 300 is ``checkpoints/step-00000300.ckpt``. It is always of a finished optimizer step, so a resumed
run repeats nothing and skips nothing. The newest two are kept: should the last one be incomplete after a full disk or
a crash of the machine, the one before still continues the run.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_spectral.callbacks.saved_state import SavedState
from lightning_spectral.lightning_private import accumulates
from lightning_spectral.models.checkpoint_file import CheckpointError, read_checkpoint
from lightning_spectral.models.checkpoint_folder import check_checkpoint_folder
from lightning_spectral.training.preemption import PreemptedError, StopSignals

FOLDER = "checkpoints"
KEEP = 2

_NAME = re.compile(r"step-(\d{8,})\.ckpt")


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run_folder / FOLDER / f"step-{step:08d}.ckpt"


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step in a checkpoint's name, if it is one of ours."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def newest_whole(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read; incomplete ones are passed over with a warning."""
    for checkpoint in _newest_first(run_folder):
        if is_whole(checkpoint):
            return checkpoint
        warnings.warn(
            f"`{checkpoint}` is incomplete or corrupted and is passed over; delete it to silence this.", stacklevel=2
        )
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read to the end (a folder is a sharded checkpoint; its metadata is written last)."""
    try:
        check_whole(checkpoint)
    except (OSError, CheckpointError):
        return False
    return True


def check_whole(checkpoint: Path) -> None:
    """As :func:`is_whole`, saying what is wrong.

    Raises:
        FileNotFoundError: If a part of it is missing.
        CheckpointError: If it is incomplete or corrupted, or holds objects whose reading would execute code.
    """
    if checkpoint.is_dir():
        check_checkpoint_folder(checkpoint)
    read_checkpoint(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint, device="meta")


class StepCheckpoint(Checkpoint):
    """Save the run every ``every_n_steps`` optimizer steps, at the end, and when it is interrupted.

    Args:
        run_folder: Where ``checkpoints/`` goes.
        every_n_steps: ``None`` saves only at the end and at an interruption.
        signals: Say when to save and stop because the machine is taken away.
    """

    def __init__(self, run_folder: Path, every_n_steps: int | None, signals: StopSignals | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`train.save_interval` must be >= 1, got {every_n_steps}; `null` saves only at the end.")
        self._run_folder = run_folder
        self._every_n_steps = every_n_steps
        self._signals = signals
        self._saved_step = 0
        self._weights_moving = False
        self._interrupted = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The state that training starts from is already on disk, or is the seed's."""
        self._saved_step = trainer.global_step
        weights = sum(parameter.numel() * parameter.element_size() for parameter in pl_module.parameters())
        refusal = trainer.strategy.broadcast(_no_space(self._run_folder, weights) if trainer.is_global_zero else "")
        if refusal:
            raise MisconfigurationException(refusal)
        if trainer.is_global_zero:
            remove_partials(self._run_folder)
        if self._signals is not None:
            self._signals.install(trainer.world_size)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Signals are the caller's again."""
        if self._signals is not None:
            self._signals.restore()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """From here to the end of the batch, weights, moments and learning rate do not belong together."""
        self._weights_moving = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save where an optimizer step is complete."""
        if accumulates(trainer):
            return
        self._weights_moving = False
        interval = self._every_n_steps or trainer.max_steps
        stop = self._signals.due(trainer.global_step, trainer.world_size) if self._signals is not None else None
        if stop or trainer.global_step % interval == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        if stop:
            raise PreemptedError(stop)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step of a run that ended early (``max_time``, early stopping)."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last whole step; several processes do not, as not all may get here."""
        if trainer.world_size > 1 or self._weights_moving or trainer.state.fn != "fit":
            return
        self._interrupted = True
        try:
            self._save(trainer)
        except Exception as error:  # the first exception is the one to report
            rank_zero_warn(f"could not save a checkpoint after {type(exception).__name__}: {error}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make Lightning's counters those of the last whole step.

        Micro-batches of an unfinished step are forgotten: their gradients are not saved, so they must be seen again.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        loaders = loop.get("state_dict", {}).get("combined_loader", [])
        whole = trainer.global_step * trainer.accumulate_grad_batches
        if not any("position" in loader for loader in loaders):
            return  # a foreign loader: leave Lightning's bookkeeping alone
        progress = loop["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False  # the run may go on with more steps
        if not self._interrupted:
            return
        for loader in loaders:
            loader["position"] = whole
        # what Lightning itself would have saved at the end of the last whole step's batch
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=whole, started=whole, processed=whole, completed=whole - 1)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SavedState):
                callback.forget_unfinished_step(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning counts in micro-batches: where a step now takes another number of them, it counts anew.

        So a run goes on with other devices or another micro-batch size. A checkpoint in mid-step is left to the loader,
        which refuses it.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        loaders = [state for state in loop.get("state_dict", {}).get("combined_loader", []) if "position" in state]
        step, accumulation = checkpoint["global_step"], trainer.accumulate_grad_batches
        if not loaders or any(state["position"] != step * state["accumulation"] for state in loaders):
            return
        for state in loaders:
            state.update(position=step * accumulation, accumulation=accumulation)
        progress, whole = loop["epoch_loop.batch_progress"], step * accumulation
        for counts in (progress["total"], progress["current"]):
            waits = counts["processed"] - counts["completed"]  # 1 if it was saved at the end of the batch
            counts.update(ready=whole, started=whole, processed=whole, completed=whole - waits)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step <= self._saved_step:
            return
        final = checkpoint_path(self._run_folder, step)
        partial = final.with_suffix(".partial")
        if trainer.is_global_zero:
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
        try:
            trainer.save_checkpoint(partial)  # all ranks take part
        except BaseException:
            if trainer.is_global_zero:
                _remove(partial)
            raise
        if trainer.is_global_zero:
            _remove(final)
            os.replace(partial, final)
            for old in _newest_first(self._run_folder)[KEEP:]:
                _remove(old)
        trainer.strategy.barrier("checkpoint renamed")
        self._saved_step = step


def remove_partials(run_folder: Path) -> None:
    """What a run that died while it saved has left; it takes the room that the next one needs."""
    for partial in (run_folder / FOLDER).glob("step-*.partial"):
        _remove(partial)


def _no_space(run_folder: Path, weights: int) -> str:
    """Why a run cannot end on this disk; where it only may not, a warning.

    Args:
        run_folder: Exists.
        weights: Bytes of the model's parameters.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run_folder).free
    mib = 2.0**20
    least, usual = 2 * weights, (KEEP + 1) * 3 * weights + weights  # AdamW's checkpoints are three times the weights
    if free < least:
        return (
            f"`{run_folder}` has {free / mib:,.1f} MiB free; the last checkpoint and the final weights alone take "
            f"{least / mib:,.1f}: free some, or give another `out_dir`."
        )
    if free < usual:
        rank_zero_warn(
            f"`{run_folder}` has {free / mib:,.1f} MiB free; checkpoints and final weights take up to "
            f"{usual / mib:,.1f}."
        )
    return ""


def _newest_first(run_folder: Path) -> list[Path]:
    found = [path for path in (run_folder / FOLDER).glob("step-*.ckpt") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
