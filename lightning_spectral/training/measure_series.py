"""Many checkpoints in one call: one run folder a model, its steps in order, what is measured already skipped.

Interrupted at any moment it goes on where it was; a checkpoint that cannot be read is named at the end and does not
keep the others. Models can be measured side by side: in processes of this machine, or wherever a ``Spread`` puts them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning_spectral import records
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.text import one_line
from lightning_spectral.text.processes import end_with_the_parent
from lightning_spectral.training.checkpoint_names import folders_of, progress_of
from lightning_spectral.training.measure import asked, measure_checkpoint

Outcomes = list[tuple[Path, str]]  # of the checkpoints of a model: each, and why it was not measured
# Makes one call a model, side by side: (model, its outcomes, or what its worker died of) as each is done.
Spread = Callable[[Mapping[Path, Callable[[], Outcomes]]], Iterator[tuple[Path, Outcomes | Exception]]]


@dataclass
class SeriesResult:
    """What became of the checkpoints.

    Attributes:
        folders: Run folders with records, one a model.
        measured: Checkpoints that were measured in this call.
        skipped: How many had been measured before.
        failed: Checkpoints that could not be, with the reason.
    """

    folders: list[Path] = field(default_factory=list)
    measured: list[Path] = field(default_factory=list)
    skipped: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


def measure_series(
    checkpoints: Sequence[Path],
    corpus: Corpus,
    out: Path,
    *,
    workers: int = 1,
    spread: Spread | None = None,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> SeriesResult:
    """Measure checkpoints on one text.

    Args:
        checkpoints: From :func:`~lightning_spectral.training.checkpoint_names.find_checkpoints`.
        corpus: The text.
        out: Folder of the run folders.
        workers: Processes of this machine side by side, one model each.
        spread: Puts the models elsewhere, instead of ``workers``.
        report: Told of every checkpoint that is done.
        options: Of :func:`~lightning_spectral.training.measure.measure_checkpoint`.

    Raises:
        ValueError: If a run folder holds records of another model or text, or of other settings.
    """
    say = report or (lambda _: None)
    folders = folders_of(checkpoints, out)
    result = SeriesResult()
    waiting: list[tuple[Path, Path]] = []
    now = asked(corpus, **options)
    for folder, members in folders.items():
        _refuse_other_records(folder, members, now)
        done = _steps_in(folder)
        for member in members:
            known = progress_of(member).step
            if known in done or (len(members) == 1 and done):
                result.skipped += 1
            else:
                waiting.append((member, folder))
    if result.skipped:
        say(f"{result.skipped} of {len(checkpoints)} checkpoint(s) are measured already.")
    by_folder: dict[Path, list[Path]] = {}
    for member, folder in waiting:
        by_folder.setdefault(folder, []).append(member)
    curves = frozenset(folder for folder, members in folders.items() if len(members) > 1)
    measure = partial(_measure_members, corpus=corpus, options=options, curves=curves)
    if spread is None and workers > 1 and len(by_folder) > 1:
        spread = partial(_in_processes, workers=workers)
    for folder, outcomes in _outcomes(by_folder, measure, spread):
        for member, reason in outcomes:
            say(f"{member}: {reason or f'records in `{folder}`'}")
            if reason:
                result.failed.append((member, reason))
            else:
                result.measured.append(member)
    # a worker that died early leaves a folder without records
    result.folders = [folder for folder in folders if (folder / records.SPECTRAL_FILE).is_file()]
    return result


def _outcomes(
    by_folder: Mapping[Path, list[Path]], measure: Callable[[Path, list[Path]], Outcomes], spread: Spread | None
) -> Iterator[tuple[Path, Outcomes]]:
    """(folder, what became of its members), as each is done; one member after another where nothing spreads them."""
    if spread is None:
        for folder, members in by_folder.items():
            for member in members:
                yield folder, measure(folder, [member])
        return
    for folder, found in spread({folder: partial(measure, folder, members) for folder, members in by_folder.items()}):
        if isinstance(found, Exception):  # what it had not measured is measured by the next call
            found = [(folder, f"its worker died ({one_line(found) or type(found).__name__}): call again.")]
        yield folder, found


def _in_processes(
    calls: Mapping[Path, Callable[[], Outcomes]], workers: int
) -> Iterator[tuple[Path, Outcomes | Exception]]:
    """A :data:`Spread` over processes of this machine, each with its share of the threads."""
    count = min(workers, len(calls))
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // count)
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(threads,)) as pool:
        futures = {pool.submit(call): folder for folder, call in calls.items()}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()  # type: ignore[misc]  # an Exception


def _begin(threads: int) -> None:
    import torch

    end_with_the_parent()
    torch.set_num_threads(threads)


def _measure_members(
    folder: Path,
    members: Sequence[Path],
    *,
    corpus: Corpus,
    options: dict[str, Any],
    curves: frozenset[Path] = frozenset(),
) -> Outcomes:
    """Each member and why it could not be measured; empty if it was, also by a worker that died after it."""
    outcomes, done = [], _steps_in(folder)
    if folder in curves:  # a run at several steps; the name of one of them would tell it from its family
        options = {**options, "labels": {}}
    for member in members:
        step = progress_of(member).step
        if step is not None and step in done:
            outcomes.append((member, ""))
            continue
        try:
            measure_checkpoint(member, corpus, folder, resume=True, **options)
            outcomes.append((member, ""))
        except (ValueError, FileNotFoundError) as error:
            outcomes.append((member, one_line(error)))
    return outcomes


def _refuse_other_records(folder: Path, members: Sequence[Path], now: dict[str, str]) -> None:
    """Records of one folder are of one model and one text, measured alike."""
    try:
        hparams = records.read_run(folder).hparams
    except FileNotFoundError:
        return
    for name, value in now.items():
        before = hparams.get("asked", now).get(name)
        if before != value:
            raise ValueError(
                f"`{folder}` holds records of another `{name}` ({before}, now {value}): give another `--out`."
            )
    kept, named = Path(hparams.get("checkpoint", members[0])), members[0].absolute()
    if len(members) > 1:
        kept, named = kept.parent, named.parent
    if os.path.realpath(kept) != os.path.realpath(named):
        raise ValueError(f"`{folder}` holds records of `{kept}`, not of `{named}`: give another `--out`.")


def _steps_in(folder: Path) -> set[int | None]:
    """Steps whose records are whole: the losses are written last."""
    try:
        return {record.step for record in records.read_losses(folder).records}
    except FileNotFoundError:
        return set()
