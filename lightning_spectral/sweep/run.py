"""Keep the workers busy until every run of a sweep is finished or has failed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep.launchers import LOG_FILE, RESTARTS, Launcher, LocalLauncher
from lightning_spectral.sweep.plan import Job, Plan

_POLL_S: Final = 0.5
_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass
class Running:
    """One job in a slot.

    Attributes:
        job: The job.
        slot: Where it runs.
        handle: The launcher's handle.
        started: Monotonic time of the start.
        first_step: Step at which it went on.
        moving: Monotonic time and step of the first progress seen: starting a process takes as long as many steps.
    """

    job: Job
    slot: str
    handle: Any
    started: float
    first_step: int
    moving: tuple[float, int] | None = None


@dataclass
class SweepProgress:
    """What the live table shows.

    Attributes:
        total: Runs of the sweep.
        skipped: Runs that were finished before.
        done: Runs finished now, with the seconds each took.
        failed: Run id -> reason.
        diverged: Runs that are done, now or before, with a loss that is no number.
        running: Jobs in their slots.
        waiting: Jobs without a slot yet.
        note: What is going on before the first run.
        restarts: Run id -> how often it was taken up again after its worker had been killed.
    """

    total: int
    skipped: int
    done: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    note: str = ""
    restarts: dict[str, int] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)


def run_all(
    found: Plan, launcher: Launcher, show: Callable[[SweepProgress], None], *, poll_s: float = _POLL_S
) -> SweepProgress:
    """Run what is to do; a failure is recorded and does not stop the rest.

    A run whose worker is killed (a lost node, a full memory) is taken up again from its last checkpoint, twice at most.

    ``KeyboardInterrupt`` stops the running workers (they resume at the next start) and is raised again.
    """
    to_do = found.to_do()
    finished = sum(state.has_ended for state in found.states.values())
    diverged = [run_id for run_id, state in found.states.items() if state.name == "diverged"]
    board = SweepProgress(len(found.jobs), finished, waiting=list(to_do), diverged=diverged)
    free = list(launcher.slots)
    started = time.monotonic()
    for job in to_do:
        if found.states[job.run_id].name == "new":  # perhaps again, under another recipe: that cost is not this run's
            (Path(job.folder) / PROGRESS_FILE).unlink(missing_ok=True)
    try:
        if to_do:
            board.note = "preparing tokenizer and tokens, once for all runs"
            show(board)
            prepare(to_do[0])  # writes no state: a run that has not started keeps its own
            board.note = ""
        while board.waiting or board.running:
            while free and board.waiting:
                board.running.append(_start(launcher, board.waiting.pop(0), free.pop(0)))
            show(board)
            time.sleep(poll_s)
            free += _ended_slots(board, launcher)
    except KeyboardInterrupt:
        for run in board.running:
            launcher.stop(run.handle)
        raise
    finally:
        sweep.write_summary(found, time.monotonic() - started if to_do else 0.0)
    show(board)
    return board


def _ended_slots(board: SweepProgress, launcher: Launcher) -> list[str]:
    """Slots of the jobs that have ended, which are noted as done or failed, or wait again."""
    slots = []
    for run in list(board.running):
        code = launcher.poll(run.handle)
        if code is None:
            continue
        board.running.remove(run)
        slots.append(run.slot)
        state = sweep.state_of(run.job)
        if state.has_ended:
            if state.name == "diverged":
                board.diverged.append(run.job.run_id)
            board.done[run.job.run_id] = time.monotonic() - run.started
        elif code in _KILLED and board.restarts.get(run.job.run_id, 0) < RESTARTS:
            board.restarts[run.job.run_id] = board.restarts.get(run.job.run_id, 0) + 1
            board.waiting.append(run.job)
        else:
            board.failed[run.job.run_id] = reason_of(run.job, code)
    return slots


def _start(launcher: Launcher, job: Job, slot: str) -> Running:
    sweep.write_state(job, "running")
    before = sweep.read_json(Path(job.folder) / PROGRESS_FILE)
    handle = launcher.start(job, slot)
    return Running(job, slot, handle, time.monotonic(), int(before.get("step", 0)))


def prepare(job: Job) -> None:
    """Build what all runs share, once; what goes wrong here shows again, with its reason, in the first run."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    launcher = LocalLauncher(1, gpus=[])
    process = launcher.start(job, launcher.slots[0], "--prepare")
    process.join()


def reason_of(job: Job, code: int) -> str:
    """Why a worker ended without finishing."""
    state = sweep.state_of(job)
    if state.name == "failed" and state.detail:
        return state.detail
    how = how_it_ended(code)
    sweep.write_state(job, "failed", f"the worker ended with {how}")
    log = Path(job.folder) / LOG_FILE
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"the worker ended with {how}: {last.strip()}"


def how_it_ended(code: int) -> str:
    """``exit code 1``; of a killed process the signal, and what it usually means."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    likely = {"SIGKILL": "the system often kills for want of memory", "SIGTERM": "somebody or the batch system asked"}
    hint = f": {likely[name]}" if name in likely else ""
    return f"signal {name}{hint}"
