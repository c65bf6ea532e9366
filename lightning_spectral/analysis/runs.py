"""A run as dense arrays, and the set of runs of a study; ``reading`` makes them from folders."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.scan import SpectralColumns
from lightning_spectral.records import (
    POOLED,
    LossRecord,
    RunInfo,
    layer_name,
)
from lightning_spectral.text import did_you_mean

FloatArray = NDArray[np.float64]

# labels that name the x axis or a repetition: never a series of their own
_NOT_A_SERIES: Final = {"optimizer", "seed", "width", "ffn_multiplier", "intermediate_size", "data_order", "run_id"}
_STAGE_ORDER: Final = (b"train", b"validation", b"measure", b"test", b"predict")
_LOST: Final = (b"no_forward", b"not_matched", b"solve_failed")
_SITE_ORDER: Final = ("post", "pre")
_BUCKET_ORDER: Final = ("pooled", "head", "mid", "tail")


@dataclass(frozen=True)
class Problem:
    """Something a reader of the result must know: which input, what is wrong, how bad.

    Attributes:
        source: File, folder or run id.
        kind: Short machine-readable name, e.g. ``skipped_lines``.
        message: One sentence for people.
        refused: Whether the input was left out.
    """

    source: str
    kind: str
    message: str
    refused: bool = False


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it was read from.
        info: Its ``run.json``.
        width: FFN hidden size D.
        columns: Spectral records of one stage.
        losses: Loss records, any stage.
        digest: SHA-256 of ``spectral.jsonl``.
        progress: What the sweep's monitor wrote beside it; empty outside a sweep.
        turns: Windows in which every layer was measured once; more than 1 where layers took turns.
    """

    folder: Path
    info: RunInfo
    width: int
    columns: SpectralColumns
    losses: tuple[LossRecord, ...]
    digest: str
    progress: dict[str, Any] = field(default_factory=dict)
    turns: int = 1

    @property
    def run_id(self) -> str:
        """Id from ``run.json``."""
        return self.info.run_id

    @property
    def optimizer(self) -> str:
        """Label of the optimizer, else its class name."""
        return self.info.labels.get("optimizer") or self.info.optimizer

    @property
    def seed(self) -> str:
        """Seed as text; empty if unknown."""
        value = self.info.labels.get("seed", self.info.seed)
        return "" if value is None else str(value)

    @property
    def data_digests(self) -> dict[str, str]:
        """Digests of the training order and of the held-out tokens that it really saw, if a sweep recorded them."""
        data = self.progress.get("data")
        return {name: str(data[name]) for name in ("train", "validation") if data.get(name)} if data else {}

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Optimizer steps of the windows, ascending."""
        return np.unique(self.columns.ints["step"])

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """``layer_00``, ..., or ``layer_00.expert_01`` inside a mixture of experts."""
        return tuple(layer_name(layer, expert if expert >= 0 else None) for layer, expert in self._layer_keys.tolist())

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Sites measured, ``post`` first."""
        return _ordered(self.columns.texts["site"], _SITE_ORDER)

    @cached_property
    def buckets(self) -> tuple[str, ...]:
        """Buckets measured, pooled first."""
        return _ordered(self.columns.texts["bucket"], _BUCKET_ORDER)

    @cached_property
    def _layer_keys(self) -> NDArray[np.int64]:
        pairs = np.stack([self.columns.ints["layer"], self.columns.ints["expert"]], axis=1)
        return np.unique(pairs, axis=0)

    @cached_property
    def position(self) -> tuple[NDArray[np.intp], ...]:
        """Where each record sits in a (site, bucket, window, layer) array."""
        texts, ints = self.columns.texts, self.columns.ints
        pairs = np.stack([ints["layer"], ints["expert"]], axis=1)
        layer = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        return (
            _index(texts["site"], self.sites),
            _index(texts["bucket"], self.buckets),
            np.searchsorted(self.steps, ints["step"]),
            layer,
        )

    def cube(self, metric: str) -> FloatArray:
        """``metric`` as (site, bucket, window, layer); NaN where there is no number.

        Raises:
            ValueError: If there is no such metric.
        """
        if metric in ("num_tokens", "num_sequences"):
            counts = self.columns.ints[metric].astype(np.float64)
            return self._dense(np.where(counts < 0, np.nan, counts))
        if metric not in self.columns.floats:
            known = [name for name in self.columns.floats if name != "tokens_seen"]
            raise ValueError(f"unknown metric `{metric}`; {did_you_mean(metric, known, otherwise='the records hold')}")
        return self._dense(self.columns.floats[metric])

    def orders(self, name: str, windows: int) -> dict[str, FloatArray]:
        """``renyi`` or ``reinjection`` of the last ``windows`` windows: order -> (site, bucket, window, layer)."""
        late = self.columns.ints["step"] >= self.steps[-windows:][0]
        parsed = [json.loads(cell) for cell in self.columns.texts[name][late]]
        keys = sorted({key for cell in parsed for key in cell if _is_order(key)}, key=float)
        out = {}
        for key in keys:
            full = np.full(len(self.columns), np.nan)
            full[late] = [np.nan if cell.get(key) is None else cell[key] for cell in parsed]
            out[key] = self._dense(full)[:, :, -windows:]
        return out

    @cached_property
    def conventions(self) -> tuple[str, ...]:
        """The distinct convention sets of its records, as JSON; more than one means they do not mix."""
        return tuple(sorted(cell.decode() for cell in set(self.columns.texts["conventions"].tolist())))

    @property
    def num_jackknife_groups(self) -> int:
        """Groups of sequences behind an interval; 1 if there are none, or more than one convention."""
        sets = self.conventions
        said = str(json.loads(sets[0]).get("jackknife_groups", "")) if len(sets) == 1 else ""
        return int(said) if re.fullmatch(r"[0-9]{1,9}", said) else 1

    @cached_property
    def diverged_from(self) -> int | None:
        """Step from which on all activations are NaN or infinite; ``None`` if those of the last window are numbers."""
        pooled = self.columns.texts["bucket"] == POOLED.encode()
        steps, bad = self.columns.ints["step"][pooled], self.columns.texts["status"][pooled] == b"nonfinite"
        sound = steps[~bad]
        after = steps[bad] if not len(sound) else steps[bad & (steps > sound.max())]
        return int(after.min()) if len(after) else None

    @cached_property
    def status_counts(self) -> dict[str, int]:
        """Records of each status."""
        counts = Counter(self.columns.texts["status"].tolist())
        return {name.decode(): count for name, count in counts.items()}

    def _dense(self, values: FloatArray) -> FloatArray:
        shape = (len(self.sites), len(self.buckets), len(self.steps), len(self.layers))
        dense = np.full(shape, np.nan)
        dense[self.position] = values
        return dense


@dataclass(frozen=True)
class RunSet:
    """All usable runs under some paths, and what was wrong with the rest.

    Attributes:
        runs: One for each run id, by width and id.
        problems: Left-out lines, refused folders, repeated runs.
    """

    runs: tuple[Run, ...]
    problems: tuple[Problem, ...]

    @cached_property
    def series_labels(self) -> tuple[str, ...]:
        """Labels, besides the optimizer, that differ between runs and are neither width nor seed."""
        names = sorted({name for run in self.runs for name in run.info.labels} - _NOT_A_SERIES)
        return tuple(name for name in names if self._tells_series_apart(name))

    def _tells_series_apart(self, name: str) -> bool:
        pairs = {(run.info.labels.get(name, ""), run.width) for run in self.runs}
        values = {value for value, _ in pairs}
        renames_width = len(pairs) == len(values) == len({width for _, width in pairs})
        return len(values) > 1 and not renames_width

    def label_of(self, run: Run, name: str) -> str:
        """Value of a ``by`` column for one run."""
        return run.optimizer if name == "optimizer" else run.info.labels.get(name, "")


def _ordered(cells: NDArray[np.bytes_], order: tuple[str, ...]) -> tuple[str, ...]:
    found = [cell.decode() for cell in set(cells.tolist())]
    return tuple(sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)))


def _index(cells: NDArray[np.bytes_], names: tuple[str, ...]) -> NDArray[np.intp]:
    index = np.zeros(len(cells), dtype=np.intp)
    for position, name in enumerate(names):
        index[cells == name.encode()] = position
    return index


def _is_order(key: str) -> bool:
    """Whether a key of ``renyi`` is an order, as all are that were not written by hand."""
    try:
        return float(key) > 0
    except ValueError:
        return False
