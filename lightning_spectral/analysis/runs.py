"""Run folders on disk -> :class:`Run` objects with dense arrays, and a list of everything that was wrong with them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.scan import SpectralColumns, scan_spectral
from lightning_spectral.records import (
    LOSSES_FILE,
    PROGRESS_FILE,
    RUN_FILE,
    SPECTRAL_FILE,
    LossRecord,
    RunInfo,
    layer_name,
    read_losses,
    read_run,
)

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
    """

    folder: Path
    info: RunInfo
    width: int
    columns: SpectralColumns
    losses: tuple[LossRecord, ...]
    digest: str
    progress: dict[str, Any] = field(default_factory=dict)

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
            known = ", ".join(name for name in self.columns.floats if name != "tokens_seen")
            raise ValueError(f"unknown metric `{metric}`; the records hold {known}.")
        return self._dense(self.columns.floats[metric])

    def orders(self, name: str, windows: int) -> dict[str, FloatArray]:
        """``renyi`` or ``reinjection`` of the last ``windows`` windows: order -> (site, bucket, window, layer)."""
        late = self.columns.ints["step"] >= self.steps[-windows:][0]
        parsed = [json.loads(cell) for cell in self.columns.texts[name][late]]
        keys = sorted({key for cell in parsed for key in cell}, key=float)
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
        return int(json.loads(sets[0]).get("jackknife_groups", 1)) if len(sets) == 1 else 1

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


@dataclass(frozen=True)
class Choice:
    """Which of a run's records are read, where it has several kinds of them.

    Attributes:
        stage: ``train``, ``validation``, ...; by default ``train`` if a run has it, else the first it has.
        stack: Path of a stack of blocks, or its end (``encoder``); needed where a model has several.
        loader: Index of an evaluation dataloader; by default the first.
    """

    stage: str | None = None
    stack: str | None = None
    loader: int | None = None


def load_runs(paths: Iterable[str | Path], stage: str | None = None, choice: Choice | None = None) -> RunSet:
    """Read every run folder at or below ``paths``.

    Args:
        paths: Run folders, or folders that hold them at any depth; runs moved to ``previous/`` are not looked for.
        stage: Stage of the records to use, short for ``Choice(stage)``.
        choice: Which records to use.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there is no run folder at all.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"no such file or folder: `{root}`.")
    folders = sorted({file.parent for root in roots for file in _run_files(root)})
    if not folders:
        where = ", ".join(f"`{root}`" for root in roots)
        raise ValueError(
            f"no run folder (one with a `{RUN_FILE}`) under {where}. Give the `out_dir` of a run or sweep."
        )
    runs: dict[str, Run] = {}
    problems = [
        Problem(str(folder), "no_run_file", f"`{folder}` was left out: it has records, but no `{RUN_FILE}`.", True)
        for folder in sorted({file.parent for root in roots for file in _below(root, SPECTRAL_FILE)} - set(folders))
    ]
    for folder in folders:
        run, found = read_run_folder(folder, choice or Choice(stage))
        problems += found
        if run is None:
            continue
        if run.run_id in runs:
            first = runs[run.run_id].folder
            text = f"`{folder}` has the run id `{run.run_id}` of `{first}` and was left out."
            problems.append(Problem(str(folder), "repeated_run_id", text, refused=True))
        else:
            runs[run.run_id] = run
    ordered = sorted(runs.values(), key=lambda run: (run.width, run.run_id))
    return RunSet(tuple(ordered), tuple(problems))


class _Unusable(ValueError):
    """Why a run folder cannot be used: a kind and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_run_folder(folder: Path, choice: Choice | None = None) -> tuple[Run | None, list[Problem]]:
    """One run folder, or ``None`` and the reason."""
    problems: list[Problem] = []
    try:
        return _read(folder, choice or Choice(), problems), problems
    except _Unusable as error:
        message, kind = str(error), error.kind
    except (OSError, ValueError) as error:
        message, kind = str(error), "unreadable"
    return None, [*problems, Problem(str(folder), kind, f"`{folder}` was left out: {message}", refused=True)]


def _read(folder: Path, choice: Choice, problems: list[Problem]) -> Run:
    file = folder / SPECTRAL_FILE
    info, content, columns = read_run(folder), file.read_bytes(), scan_spectral(file)

    def note(kind: str, text: str) -> None:
        if text:
            problems.append(Problem(str(folder), kind, f"`{folder}`: {text}"))

    if columns.skipped:
        number, reason = columns.skipped[0]
        note("skipped_lines", f"{len(columns.skipped)} line(s) left out; the first is line {number}: {reason}.")
    own = columns.texts["run_id"] == info.run_id.encode()
    if not own.all():
        note("foreign_records", f"{int((~own).sum())} record(s) of another run left out (this is `{info.run_id}`).")
    columns, text = _one_stage(columns.take(own), choice.stage)
    note("several_stages", text)
    columns = _one_stack(columns, choice.stack)
    columns, text = _one_evaluation(columns, choice.loader)
    note("several_evaluations", text)
    columns, text = _with_numbers(columns)
    note("lost_windows", text)
    if not len(columns):
        raise _Unusable("no_records", "it holds no spectral record with a number of the kind asked for.")
    widths = np.unique(columns.ints["width"])
    if len(widths) != 1:
        text = f"its records have FFN widths {widths.tolist()}; a scaling fit needs one per run."
        raise _Unusable("mixed_widths", text)
    losses, loss_problems = _losses(folder, info.run_id, choice.loader)
    problems += loss_problems
    digest = hashlib.sha256(content).hexdigest()
    run = Run(folder, info, int(widths[0]), columns, losses, digest, _progress(folder))
    if len(run.conventions) > 1:
        sets = " / ".join(run.conventions)
        note("mixed_conventions", f"records of {len(run.conventions)} convention sets in one run: {sets}.")
    return run


def _one_stack(columns: SpectralColumns, stack: str | None) -> SpectralColumns:
    """Records of one stack of blocks: layer 0 of an encoder is not layer 0 of its decoder."""
    found = sorted({cell.decode() for cell in columns.texts["stack"].tolist()})
    chosen = [name for name in found if stack is None or name == stack or stack in name.split(".")]
    if len(chosen) == 1 or not found:
        return columns if len(found) < 2 else columns.take(columns.texts["stack"] == chosen[0].encode())
    names = ", ".join(f"`{name}`" for name in found)
    raise _Unusable("several_stacks", f"its records are of the stacks {names}; choose one of them with --stack.")


def _one_evaluation(columns: SpectralColumns, loader: int | None) -> tuple[SpectralColumns, str]:
    """Records of one dataloader, the first evaluation at each step, at known steps where there are any."""
    ints, notes = columns.ints, []
    loaders = np.unique(ints["loader"]).tolist()
    if loader is not None and loaders not in ([], [-1]):
        columns = columns.take(ints["loader"] == loader)
    elif len(loaders) > 1:
        columns = columns.take(ints["loader"] == loaders[0])
        notes.append(f"records of the dataloaders {loaders}; {loaders[0]} is used. Choose with --loader.")
    again = columns.ints["ordinal"] > 0
    if again.any():
        columns = columns.take(~again)
        notes.append("evaluated more than once at a step; the first time counts.")
    unknown = columns.ints["step"] < 0
    if unknown.any() and not unknown.all():
        columns = columns.take(~unknown)
        notes.append(f"{int(unknown.sum())} record(s) of unknown step left out.")
    return columns, " ".join(notes)


def _with_numbers(columns: SpectralColumns) -> tuple[SpectralColumns, str]:
    """Records that say of some tokens what their spectrum is; the others are windows lost."""
    lost = (columns.ints["width"] < 1) | np.isin(columns.texts["status"], _LOST)
    if not lost.any():
        return columns, ""
    kept = columns.take(~lost)
    windows = set(columns.ints["step"][lost].tolist()) - set(kept.ints["step"].tolist())
    reasons = ", ".join(sorted({cell.decode() for cell in columns.texts["status"][lost].tolist()}))
    return kept, f"{int(lost.sum())} record(s) without a number ({reasons}); {len(windows)} window(s) lost."


def _run_files(root: Path) -> Sequence[Path]:
    if root.is_file():
        return [root] if root.name == RUN_FILE else [root.parent / RUN_FILE]
    return _below(root, RUN_FILE)


def _below(root: Path, name: str) -> list[Path]:
    """Files of that name, without those of earlier runs that a fresh run moved to ``previous/``."""
    return [file for file in root.rglob(name) if "previous" not in file.relative_to(root).parts]


def _one_stage(columns: SpectralColumns, stage: str | None) -> tuple[SpectralColumns, str]:
    found = set(columns.texts["stage"].tolist())
    if stage is not None:
        return columns.take(columns.texts["stage"] == stage.encode()), ""
    if len(found) <= 1:
        return columns, ""
    chosen = next((name for name in _STAGE_ORDER if name in found), sorted(found)[0])
    names = ", ".join(sorted(name.decode() for name in found))
    note = f"records of several stages ({names}); `{chosen.decode()}` is used. Choose with --stage."
    return columns.take(columns.texts["stage"] == chosen), note


def _losses(folder: Path, run_id: str, loader: int | None) -> tuple[tuple[LossRecord, ...], list[Problem]]:
    file = folder / LOSSES_FILE
    if not file.exists():
        return (), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = read_losses(file)
    problems = [Problem(str(folder), "skipped_lines", str(warning.message)) for warning in caught]
    own = [record for record in read.records if record.run_id == run_id and not record.ordinal]
    first = min((record.loader for record in own if record.loader is not None), default=None)
    wanted = (None, first if loader is None else loader)
    return tuple(record for record in own if record.loader in wanted), problems


def _progress(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / PROGRESS_FILE).read_text())
    except (OSError, ValueError):
        return {}  # no sweep, or a file caught half-written: costs a digest and a duration, no number
    return content if isinstance(content, dict) and isinstance(content.get("data", {}), dict) else {}


def _ordered(cells: NDArray[np.bytes_], order: tuple[str, ...]) -> tuple[str, ...]:
    found = [cell.decode() for cell in set(cells.tolist())]
    return tuple(sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name)))


def _index(cells: NDArray[np.bytes_], names: tuple[str, ...]) -> NDArray[np.intp]:
    index = np.zeros(len(cells), dtype=np.intp)
    for position, name in enumerate(names):
        index[cells == name.encode()] = position
    return index
