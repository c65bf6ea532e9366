"""One run folder as columns, read on from where the last reading ended."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.records import (
    ALARMS_FILE,
    LOSSES_FILE,
    RUN_FILE,
    SPECTRAL_FILE,
    AlarmRecord,
    LossRecord,
    RunInfo,
    SpectralRecord,
    layer_name,
    parse_record,
    read_run,
)
from lightning_spectral.text import plain_file

METRICS: Final = (
    "hard_rank",
    "soft_rank",
    "asymmetry",
    "hard_rank_debiased",
    "soft_rank_debiased",
    "spectral_entropy",
    "early_enrichment",
    "top_share",
    "tokens_per_dim",
)
LOSS_METRICS: Final = ("loss", "accuracy")
LOSS_SITE: Final = "output"  # losses are of the model's output, not of a layer
OK: Final = "ok"


class Columns:
    """Rows of one (stage, site): step, tokens, layer, bucket, status and a column for each metric."""

    def __init__(self) -> None:
        self.steps, self.tokens = array("q"), array("d")
        self.layers, self.buckets, self.statuses = array("l"), array("l"), array("l")
        self.values: dict[str, array[float]] = {}
        self.layer_names: dict[str, int] = {}
        self.bucket_names: dict[str, int] = {}
        self.status_names: dict[str, int] = {OK: 0}

    def add(
        self,
        step: int,
        tokens: int | None,
        layer: str,
        bucket: str,
        status: str,
        values: dict[str, float | None],
    ) -> None:
        """Append one row; a metric not seen before is NaN in the rows above."""
        for name in values.keys() - self.values.keys():
            self.values[name] = array("d", [math.nan]) * len(self.steps)
        self.steps.append(step)
        self.tokens.append(math.nan if tokens is None else tokens)
        self.layers.append(self.layer_names.setdefault(layer, len(self.layer_names)))
        self.buckets.append(self.bucket_names.setdefault(bucket, len(self.bucket_names)))
        self.statuses.append(self.status_names.setdefault(status, len(self.status_names)))
        for name, column in self.values.items():
            value = values.get(name)
            column.append(math.nan if value is None else value)

    def dense(
        self, metric: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """``(steps, tokens, values, statuses)``: (T,), (T,), (buckets, T, layers) and the same; status -1 is no row."""
        rows = np.array(self.steps, dtype=np.int64)
        steps, window = np.unique(rows, return_inverse=True)
        shape = (len(self.bucket_names), len(steps), len(self.layer_names))
        values, statuses = np.full(shape, np.nan), np.full(shape, -1, dtype=np.int64)
        place = (np.array(self.buckets, dtype=np.intp), window.reshape(-1), np.array(self.layers, dtype=np.intp))
        if metric in self.values:
            values[place] = np.array(self.values[metric])
        statuses[place] = np.array(self.statuses, dtype=np.int64)
        tokens = np.full(len(steps), np.nan)
        tokens[window.reshape(-1)] = np.array(self.tokens)
        return steps, tokens, values, statuses


@dataclass
class _Tail:
    """How far a file has been read."""

    offset: int = 0
    inode: int = -1


@dataclass
class RunReader:
    """What is known of one run; :meth:`refresh` takes in what the run has written since.

    Attributes:
        folder: The run folder.
        info: Its ``run.json``, or ``None`` if there is none that can be read.
        columns: (stage, site) -> rows.
        alarms: Records of ``alarms.jsonl``.
        width: FFN width D of the first record; 0 before it.
        skipped: Lines that are no record of this run.
    """

    folder: Path
    info: RunInfo | None = None
    columns: dict[tuple[str, str], Columns] = field(default_factory=dict)
    alarms: list[AlarmRecord] = field(default_factory=list)
    width: int = 0
    skipped: int = 0
    _tails: dict[str, _Tail] = field(default_factory=dict)
    _seen: set[Hashable] = field(default_factory=set)
    _stacks: list[str] = field(default_factory=list)
    _described_at: tuple[int, int] = (-1, -1)

    def describe(self) -> None:
        """Read ``run.json`` if it has changed, and the width from the first record: cheap, for lists of many runs."""
        try:
            found = os.stat(self.folder / RUN_FILE)
        except OSError:
            return
        if (found.st_mtime_ns, found.st_size) != self._described_at:
            self._described_at = found.st_mtime_ns, found.st_size
            try:
                info = read_run(self.folder)
            except (OSError, ValueError):
                return
            if self.info is not None and self.info.run_id != info.run_id:
                self._forget()
            self.info = info
        if not self.width:
            self.width = self._first_width()

    def refresh(self) -> None:
        """Read what is new in every file; one that was replaced is read anew."""
        self.describe()
        names = (SPECTRAL_FILE, LOSSES_FILE, ALARMS_FILE)
        if any(self._was_replaced(name) for name in names):
            self._forget()
        for line in self._new_lines(SPECTRAL_FILE):
            self._take_spectral(line)
        for line in self._new_lines(LOSSES_FILE):
            self._take_loss(line)
        for line in self._new_lines(ALARMS_FILE):
            self._take_alarm(line)

    def _forget(self) -> None:
        self.columns, self.alarms, self.width, self.skipped = {}, [], 0, 0
        self._tails, self._seen, self._stacks = {}, set(), []

    def _first_width(self) -> int:
        try:
            with plain_file(self.folder / SPECTRAL_FILE).open("rb") as file:
                return parse_record(file.readline(), SpectralRecord).width
        except (OSError, ValueError):
            return 0

    def _was_replaced(self, name: str) -> bool:
        tail = self._tails.get(name)
        if tail is None:
            return False
        try:
            found = os.stat(self.folder / name)
        except OSError:
            return True
        return found.st_size < tail.offset or found.st_ino != tail.inode

    def _new_lines(self, name: str) -> list[bytes]:
        """Whole lines after the last reading; a line still being written waits for its end."""
        tail = self._tails.get(name) or _Tail()
        try:
            with plain_file(self.folder / name).open("rb") as file:
                file.seek(tail.offset)
                content = file.read()
                inode = os.fstat(file.fileno()).st_ino
        except OSError:
            return []
        whole = content.rfind(b"\n") + 1
        self._tails[name] = _Tail(tail.offset + whole, inode)
        return [line for line in content[:whole].split(b"\n") if line.strip()]

    def _is_new(self, record: SpectralRecord | LossRecord | AlarmRecord) -> bool:
        key = (type(record).__name__, *record.key)
        foreign = self.info is not None and record.run_id != self.info.run_id
        if foreign or key in self._seen:
            self.skipped += 1
            return False
        self._seen.add(key)
        return True

    def _take_spectral(self, line: bytes) -> None:
        try:
            record = parse_record(line, SpectralRecord)
            if record.step is None or not self._is_new(record):
                return
            values = {name: record.value(name) for name in (*METRICS, *record.extra)}
            self.width = self.width or record.width
            self._rows(record.stage, record.loader, record.site).add(
                record.step, record.tokens_seen, self._layer(record), record.bucket, record.status, values
            )
        except (ValueError, TypeError):
            self.skipped += 1

    def _take_loss(self, line: bytes) -> None:
        try:
            record = parse_record(line, LossRecord)
            if record.step is None or not self._is_new(record):
                return
            values = {name: getattr(record, name) for name in LOSS_METRICS}
            self._rows(record.stage, record.loader, LOSS_SITE).add(
                record.step, record.tokens_seen, "", record.bucket, record.status, values
            )
        except (ValueError, TypeError):
            self.skipped += 1

    def _take_alarm(self, line: bytes) -> None:
        try:
            record = parse_record(line, AlarmRecord)
            if self._is_new(record):
                self.alarms.append(record)
        except (ValueError, TypeError):
            self.skipped += 1

    def _layer(self, record: SpectralRecord) -> str:
        """``layer_03``; a model's second and further stacks of blocks are named."""
        if record.stack not in self._stacks:
            self._stacks.append(record.stack)
        name = layer_name(record.layer, record.expert)
        return name if record.stack == self._stacks[0] else f"{record.stack} {name}"

    def _rows(self, stage: str, loader: int | None, site: str) -> Columns:
        key = (stage if not loader else f"{stage} {loader}", site)
        return self.columns.setdefault(key, Columns())
