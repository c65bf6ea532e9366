"""The run folder of a Trainer: the same one for all our callbacks, written by rank 0 only."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import lightning.pytorch as pl

from lightning_spectral.probe.run_folder import RunFolder, new_run_id, package_versions
from lightning_spectral.records import RunInfo


def open_run_folder(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    dirpath: str | None,
    run_id: str | None,
    labels: dict[str, str] | None = None,
    conventions: dict[str, str] | None = None,
) -> RunFolder:
    """The run's folder: that of another of our callbacks if it is the same place, else opened here.

    Every rank must call it: the folder and the id are rank 0's.
    """
    path = str(Path(dirpath or trainer.log_dir or trainer.default_root_dir).absolute())
    path, fresh_id = trainer.strategy.broadcast((path, run_id or new_run_id()))
    for callback in [*trainer.callbacks]:  # type: ignore[attr-defined]
        opened = getattr(callback, "run_folder", None)
        if isinstance(opened, RunFolder) and str(opened.path) == path:
            return opened
    optimizers = trainer.optimizers
    info = RunInfo(
        run_id=fresh_id,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        optimizer=type(getattr(optimizers[0], "_optimizer", optimizers[0])).__name__ if optimizers else "none",
        seed=global_seed(),
        hparams=dict(pl_module.hparams),
        versions=package_versions(),
        labels=dict(labels or {}),
        conventions=dict(conventions or {}),
    )
    # after steps of its own a Trainer goes on: `fit` again, or `validate` after it, adds to the run
    resume = (trainer.ckpt_path is not None and trainer.state.fn == "fit") or trainer.global_step > 0
    folder = RunFolder(path, info, resume=resume, writes=trainer.is_global_zero)
    run_id = trainer.strategy.broadcast(folder.run_id)
    if folder.run_id != run_id:
        folder.info = replace(folder.info, run_id=run_id)
    return folder


def global_seed() -> int | None:
    """What `seed_everything` was called with, if it was."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else None
