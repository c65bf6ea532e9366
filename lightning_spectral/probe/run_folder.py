"""The run folder: one per run, shared by all our callbacks, written by rank 0 only.

A resumed run appends what is not there yet; a fresh run in a used folder moves the old files to ``previous/``, so that
nothing written is lost and two runs are never mixed.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
        for name in rec.RUN_FILES:
            if (self.path / name).exists():
                (self.path / name).rename(target / name)


def new_run_id() -> str:
    """Time and chance."""
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def package_versions() -> dict[str, str]:
    """Versions of what a record depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
