"""Run folders on disk -> :class:`~lightning_spectral.analysis.runs.Run`, and a list of everything that was wrong."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightning_spectral.analysis.runs import Problem, Run, RunSet
from lightning_spectral.analysis.scan import SpectralColumns, scan_spectral
from lightning_spectral.records import (
    LOSSES_FILE,
    PROGRESS_FILE,
    RUN_FILE,
    SPECTRAL_FILE,
    LossRecord,
    read_losses,
    read_run,
)
from lightning_spectral.text import folders_below, parse_json, plain_file

_STAGE_ORDER: Final = (b"train", b"validation", b"measure", b"test", b"predict")
_LOST: Final = (b"no_forward", b"not_matched", b"solve_failed")


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
    file = plain_file(folder / SPECTRAL_FILE)
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
    columns, turns = _in_turn(columns)
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
    run = Run(folder, info, int(widths[0]), columns, losses, digest, _progress(folder), turns)
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
    if stack is not None and found == [""]:
        raise _Unusable("no_such_stack", f"its records name no stack of blocks: leave out `--stack {stack}`.")
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


def _in_turn(columns: SpectralColumns) -> tuple[SpectralColumns, int]:
    """Records of layers whose turn it was, and after how many windows each comes again."""
    waiting = columns.texts["status"] == b"not_in_turn"
    if not waiting.any():
        return columns, 1
    kept, layers = columns.take(~waiting), np.unique(columns.ints["layer"])
    together = [np.unique(kept.ints["layer"][kept.ints["step"] == step]) for step in np.unique(kept.ints["step"])]
    gaps = [int(np.diff(found).min()) for found in together if len(found) > 1]
    return kept, min(gaps, default=len(layers))


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
    return [folder / name for folder in folders_below(root) if os.path.lexists(folder / name)]


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
        content = parse_json(plain_file(folder / PROGRESS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}  # no sweep, or a file caught half-written: costs a digest and a duration, no number
    return content if isinstance(content, dict) and isinstance(content.get("data", {}), dict) else {}
