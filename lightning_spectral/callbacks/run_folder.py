"""The run folder: one per run, shared by all our callbacks, written by rank 0 only.

A resumed run appends what is not there yet; a fresh run in a used folder moves the old files to ``previous/``, so that
nothing written is lost and two runs are never mixed.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_spectral import records as rec
from lightning_spectral.records import LossRecord, RunInfo, SpectralRecord

_PACKAGES = ("lightning-spectral", "torch", "lightning", "litgpt", "torchmetrics")


class RunFolder:
    """Files of one run.

    Args:
        path: The folder.
        info: What is run.
        resume: Keep what is there and its run id; else move it aside.
        writes: Whether this process writes (rank 0).
    """

    def __init__(self, path: str | Path, info: RunInfo, *, resume: bool, writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self._known: dict[str, set[tuple[Any, ...]]] = {rec.SPECTRAL_FILE: set(), rec.LOSSES_FILE: set()}
        self.info = info
        if not writes:
            return
        if (self.path / rec.RUN_FILE).exists():
            if resume:
                self.info = rec.read_run(self.path)
                self._read_known()
                return
            self._move_aside()
        rec.write_run(self.path, self.info)

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.info.run_id

    def append_spectral(self, records: Sequence[SpectralRecord]) -> None:
        """Append the records that are not on disk yet (a resumed run measures again what came after its checkpoint)."""
        self._append(rec.SPECTRAL_FILE, records)

    def append_losses(self, records: Sequence[LossRecord]) -> None:
        """Likewise for losses."""
        self._append(rec.LOSSES_FILE, records)

    def _append(self, name: str, records: Sequence[SpectralRecord] | Sequence[LossRecord]) -> None:
        new = [record for record in records if record.key not in self._known[name]]
        if self.writes and new:
            rec.append_records(self.path / name, new)
        self._known[name] |= rec.known_keys(new)

    def _read_known(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the torn tail of a killed run is why we are here
            for name, read in ((rec.SPECTRAL_FILE, rec.read_spectral), (rec.LOSSES_FILE, rec.read_losses)):
                if (self.path / name).exists():
                    self._known[name] = rec.known_keys(read(self.path / name).records)

    def _move_aside(self) -> None:
        try:
            old = rec.read_run(self.path).run_id
        except ValueError:
            old = "unreadable"
        target = self.path / "previous" / old
        while target.exists():
            target = target.with_name(target.name + "_")
        target.mkdir(parents=True)
        for name in (rec.SPECTRAL_FILE, rec.LOSSES_FILE, rec.RUN_FILE, rec.WEIGHTS_FILE, "eigenvalues"):
            if (self.path / name).exists():
                (self.path / name).rename(target / name)


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


def new_run_id() -> str:
    """Time and chance."""
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def global_seed() -> int | None:
    """What `seed_everything` was called with, if it was."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else None


def package_versions() -> dict[str, str]:
    """Versions of what a record depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
