"""The run folder: one per run, shared by all that measures it, written by rank 0 only.

A resumed run appends what is not there yet. A fresh run in a used folder moves the earlier one to ``previous/`` and
says so; where the earlier one still runs, or where the fresh one only evaluates, it writes to ``runs/<run_id>``
instead.
"""

from __future__ import annotations

import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_spectral import records as rec
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.run_lock import RunLock
from lightning_spectral.records import LossRecord, RunInfo, SpectralRecord, WeightRecord
from lightning_spectral.text import one_line, set_aside, whole_file
from lightning_spectral.text.packages import source_commit

_PACKAGES = ("lightning-spectral", "torch", "lightning", "litgpt", "torchmetrics")
_READERS: dict[str, Callable[[Path], Any]] = {
    rec.SPECTRAL_FILE: rec.read_spectral,
    rec.LOSSES_FILE: rec.read_losses,
    rec.WEIGHTS_FILE: rec.read_weights,
}
_KINDS: dict[str, Any] = {
    rec.SPECTRAL_FILE: SpectralRecord,
    rec.LOSSES_FILE: LossRecord,
    rec.WEIGHTS_FILE: WeightRecord,
}
_WAITING_AT_MOST = 50_000  # records kept in memory, about 2 KB each, while they cannot be written
_WAITING_BYTES = 128 << 20  # likewise of files of eigenvalues
_REHEARSAL: ContextVar[bool] = ContextVar("rehearsal", default=False)
_EIGENVALUE_FILE = re.compile(rf"{rec.EIGENVALUES_FOLDER}/\w+\.safetensors", re.ASCII)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Run folders that are made here are dry runs: none is opened, and no earlier run is moved aside."""
    token = _REHEARSAL.set(True)
    try:
        yield
    finally:
        _REHEARSAL.reset(token)


class RunFolder:
    """Files of one run.

    Args:
        path: The folder that is wanted; :attr:`path` is the one that was taken.
        info: What is run.
        resume: Keep what is there and its run id; else make room. A run id keeps what is there if it is of that run.
        writes: Whether this process writes (rank 0, and no dry run).
        makes_room: Whether a fresh run moves an earlier one aside; ``False`` for an evaluation.
        locks: Hold the folder against other processes until :meth:`close`.
    """

    def __init__(
        self,
        path: str | Path,
        info: RunInfo,
        *,
        resume: bool | str,
        writes: bool,
        makes_room: bool = True,
        locks: bool = False,
    ) -> None:
        self.wanted = self.path = Path(path)
        self.writes, self.info = writes and not _REHEARSAL.get(), info
        # of each file: key of a record -> its fields that hold something; empty for what was on disk before
        self._known: dict[str, dict[tuple[Any, ...], frozenset[str]]] = {name: {} for name in _READERS}
        self._field_sets: dict[frozenset[str], frozenset[str]] = {}  # each once: a run has a few, and many records
        self._waiting: dict[str, list[Any]] = {name: [] for name in _READERS}
        self._waiting_files: dict[str, bytes] = {}
        self.solving: list[Any] = []  # windows that are being solved, in the order in which they ended
        self._num_dropped, self._num_files_dropped = 0, 0
        self._told = False
        self._lock: RunLock | None = None
        if self.writes:
            try:
                self._open(resume, makes_room, locks)
            except BaseException:
                if self._lock is not None:
                    self._lock.release()
                raise

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.info.run_id

    def append_spectral(self, records: Sequence[SpectralRecord]) -> None:
        """Append the records that are not on disk yet (a resumed run measures again what came after its checkpoint).

        Raises:
            OSError: If they cannot be written; they are kept in memory and tried again with the next ones.
        """
        self._append(rec.SPECTRAL_FILE, records)

    def append_losses(self, records: Sequence[LossRecord]) -> None:
        """Likewise for losses."""
        self._append(rec.LOSSES_FILE, records)

    def append_weights(self, records: Sequence[WeightRecord]) -> None:
        """Likewise for spectra of weights."""
        self._append(rec.WEIGHTS_FILE, records)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a whole file of spectra.

        Args:
            name: ``eigenvalues/NAME.safetensors``, below the folder.
            content: All of it.

        Raises:
            OSError: As :meth:`append_spectral`.
        """
        if sum(map(len, self._waiting_files.values())) + len(content) > _WAITING_BYTES and self._waiting_files:
            self._num_files_dropped += 1
        else:
            self._waiting_files[name] = content
        self._write_waiting()

    @property
    def waiting(self) -> dict[str, Any]:
        """What could not be written yet, lines or content by file; a checkpoint holds it for the run that goes on."""
        lines = {name: [rec.to_json(one) for one in records] for name, records in self._waiting.items() if records}
        return {**lines, **self._waiting_files, **({"run_id": self.run_id} if self._waiting_files else {})}

    def take_back(self, waiting: dict[str, Any]) -> None:
        """Write what waited when a checkpoint was written, unless it is there or of another run.

        Raises:
            OSError: As :meth:`append_spectral`.
        """
        for name, kind in _KINDS.items():
            records = [rec.parse_record(line.encode(), kind) for line in waiting.get(name, ())]
            self._append(name, [record for record in records if record.run_id == self.run_id])
        for name in filter(_EIGENVALUE_FILE.fullmatch, waiting):
            if self.writes and waiting.get("run_id") == self.run_id and not (self.path / name).exists():
                self.write_file(name, waiting[name])

    def next_ordinal(self, stage: str, step: int | None) -> int:
        """How many evaluations of this stage are on record at this step."""
        ordinals = [key[-1] for key in self._known[rec.SPECTRAL_FILE] if key[0] == stage and key[1] == step]
        return max(ordinals, default=-1) + 1

    def reopen(self) -> None:
        """Hold the folder again, for a further stage of the same run."""
        if self._lock is not None and not self._lock.held:
            self._lock.acquire(continues=True)

    def close(self, **facts: Any) -> None:
        """Write what is known now into ``run.json`` and let other processes have the folder.

        Args:
            facts: Fields of :class:`RunInfo`.

        Raises:
            OSError: If that, or records that have been waiting, cannot be written.
        """
        if not self.writes:
            return
        self.info = replace(self.info, **facts)
        try:
            self._write_waiting()
            rec.write_run(self.path, self.info)
            if lost := self._lost:
                warn(f"`{self.path}`: {lost} are lost: they could not be written for too long.")
        except OSError as error:
            raise OSError(f"{one_line(error)}; {self._lost or '0 records'} are lost") from error
        finally:
            if self._lock is not None:
                self._lock.release()

    @property
    def _lost(self) -> str:
        """What is in memory only, or not even there: ``3 records and 1 files of eigenvalues``."""
        records = self._num_dropped + sum(map(len, self._waiting.values()))
        files = self._num_files_dropped + len(self._waiting_files)
        counts = {"records": records, "files of eigenvalues": files}
        return " and ".join(f"{count} {what}" for what, count in counts.items() if count)

    def _open(self, resume: bool | str, makes_room: bool, locks: bool) -> None:
        lock = RunLock(self.path)
        if locks and not lock.acquire(continues=bool(resume)):
            self._use_folder_of_its_own("another run is writing there")
            lock = RunLock(self.path)
            lock.acquire()
        self._lock = lock if locks else None
        if not (self.path / rec.RUN_FILE).exists():
            rec.write_run(self.path, self.info)
            return
        old = _run_id(self.path)
        if resume is True or resume == old:
            self._read_known()
            try:
                self.info = rec.read_run(self.path)
            except ValueError as error:  # a torn file: the records know whose they are
                self.info = replace(self.info, run_id=old)
                warn(f"{one_line(error)} It is written anew.")
                rec.write_run(self.path, self.info)
        elif makes_room:
            target = move_earlier_run(self.path, rec.RUN_FILES, old)
            warn(f"`{self.path}` held the run `{old}`: it was moved to `{target}`.")
            rec.write_run(self.path, self.info)
        else:
            lock.release()
            self._use_folder_of_its_own(f"that folder is of the run `{old}`")
            self._lock = RunLock(self.path)
            self._lock.acquire()
            rec.write_run(self.path, self.info)

    def _use_folder_of_its_own(self, why: str) -> None:
        wanted, self.path = self.path, self.path / "runs" / self.run_id
        while (self.path / rec.RUN_FILE).exists():  # a run id that the user gave twice
            self.path = self.path.with_name(f"{self.path.name}_{secrets.token_hex(2)}")
        warn(f"records go to `{self.path}`, not to `{wanted}`: {why}.")

    def _append(self, name: str, records: Sequence[SpectralRecord | LossRecord | WeightRecord]) -> None:
        known = self._known[name]
        if name == rec.SPECTRAL_FILE:
            self._say_what_is_lost((record, known[record.key]) for record in records if record.key in known)
        new = [record for record in records if record.key not in known]
        for record in new:
            filled = _filled(record)
            known[record.key] = self._field_sets.setdefault(filled, filled)
        if self.writes and new:
            kept = new[: _WAITING_AT_MOST - len(self._waiting[name])]
            self._waiting[name] += kept
            self._num_dropped += len(new) - len(kept)
            self._write_waiting()
            if self._lock is not None:
                self._lock.touch()

    def _write_waiting(self) -> None:
        """Write what could not be written before, too; after an error it goes on waiting."""
        for name, waiting in self._waiting.items():
            rec.append_records(self.path / name, waiting)
            waiting.clear()
        for name in list(self._waiting_files):
            with whole_file(self.path / name) as partial:
                partial.write_bytes(self._waiting_files[name])
            del self._waiting_files[name]

    def _say_what_is_lost(self, dropped: Iterable[tuple[Any, frozenset[str]]]) -> None:
        """Two callbacks measure the same: the first one's record is kept, and may be the poorer one."""
        missing = sorted({name for record, kept in dropped if kept for name in _filled(record) - kept})
        if missing and not self._told:
            self._told = True
            warn(
                f"two callbacks measure the same spectra into `{self.path}`, and the first one's records are kept: "
                f"{', '.join(missing)} of the second are lost. Use one of them, or give each its own `dirpath`."
            )

    def _read_known(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the incomplete last line of a killed run is expected here
            for name, read in _READERS.items():
                if (self.path / name).exists():
                    keys = rec.known_keys(read(self.path / name).records)
                    self._known[name] = dict.fromkeys(keys, frozenset())


def _filled(record: Any) -> frozenset[str]:
    """Fields of a record that hold something."""
    empty: tuple[Any, ...] = (None, {}, "")
    return frozenset(field.name for field in fields(record) if getattr(record, field.name) not in empty)


def move_earlier_run(folder: Path, names: Sequence[str], run_id: str | None = None) -> Path | None:
    """Make room for a fresh run: what an earlier one left under ``names`` goes to ``previous/<run id>``.

    Args:
        folder: The run folder.
        names: Files and folders of a run.
        run_id: Of the earlier run; default: what its ``run.json`` says.

    Returns:
        Where it went, or ``None`` if there was nothing.
    """
    return set_aside(folder, names, run_id or _run_id(folder))


def _run_id(folder: Path) -> str:
    """Of the run in a folder, by its description or else by its records."""
    try:
        return rec.read_run(folder).run_id
    except (ValueError, FileNotFoundError):
        pass
    for name, read in _READERS.items():
        if (folder / name).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                records = read(folder / name).records
            if records:
                return str(records[-1].run_id)
    return "unreadable"


def new_run_id() -> str:
    """Timestamp and random suffix."""
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def package_versions() -> dict[str, str]:
    """Versions of what a record depends on, and the commit of our own sources where it is known."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = source_commit()
    return {**found, "lightning-spectral commit": commit[:12]} if commit else found
