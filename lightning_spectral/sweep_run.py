"""Keep the workers busy until every run of a sweep is finished or has failed, and say how it goes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lightning_spectral import sweep
from lightning_spectral.sweep import Job, Plan
from lightning_spectral.sweep_launchers import LOG_FILE, Launcher, LocalLauncher, command_of

_POLL_S: Final = 0.5


@dataclass
class Running:
    """One job in a slot."""

    job: Job
    slot: str
    handle: Any
    started: float
    first_step: int


@dataclass
class Board:
    """What the live table shows.

    Attributes:
        total: Runs of the sweep.
        skipped: Runs that were finished before.
        done: Runs finished now, with the seconds each took.
        failed: Run id -> reason.
        running: Jobs in their slots.
        waiting: Jobs without a slot yet.
    """

    total: int
    skipped: int
    done: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)


def run_all(found: Plan, launcher: Launcher, show: Callable[[Board], None], *, poll_s: float = _POLL_S) -> Board:
    """Run what is to do; a failure is recorded and does not stop the rest.

    ``KeyboardInterrupt`` stops the running workers (they resume at the next start) and is raised again.
    """
    to_do = found.to_do()
    finished = sum(state.name == "finished" for state in found.states.values())
    board = Board(len(found.jobs), finished, waiting=list(to_do))
    free = list(launcher.slots)
    try:
        if to_do:
            prepare(to_do[0])
        while board.waiting or board.running:
            while free and board.waiting:
                job, slot = board.waiting.pop(0), free.pop(0)
                before = sweep.read_json(Path(job.folder) / sweep.PROGRESS_FILE)
                (Path(job.folder) / sweep.STATE_FILE).unlink(missing_ok=True)
                handle = launcher.start(job, slot)
                board.running.append(Running(job, slot, handle, time.monotonic(), int(before.get("step", 0))))
            show(board)
            time.sleep(poll_s)
            for run in list(board.running):
                code = launcher.poll(run.handle)
                if code is None:
                    continue
                board.running.remove(run)
                free.append(run.slot)
                if sweep.state_of(run.job).name == "finished":
                    board.done[run.job.run_id] = time.monotonic() - run.started
                else:
                    board.failed[run.job.run_id] = reason_of(run.job, code)
    except KeyboardInterrupt:
        for run in board.running:
            launcher.stop(run.handle)
        raise
    finally:
        sweep.write_summary(found)
    show(board)
    return board


def prepare(job: Job) -> None:
    """Build what all runs share, once; what goes wrong here shows again, with its reason, in the first run."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    environment = LocalLauncher(1, gpus=[]).environment("cpu#0")
    with (Path(job.folder) / LOG_FILE).open("ab") as log:
        subprocess.run(command_of(job, "--prepare"), stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)


def reason_of(job: Job, code: int) -> str:
    """Why a worker ended without finishing."""
    state = sweep.state_of(job)
    if state.name == "failed" and state.detail:
        return state.detail
    sweep.write_state(job, "failed", f"the worker ended with exit code {code}")
    log = Path(job.folder) / LOG_FILE
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"the worker ended with exit code {code}: {last.strip()}"


def table(board: Board) -> list[str]:
    """The live table."""
    seconds = list(board.done.values())
    lines = [
        f"{board.skipped + len(board.done)} of {board.total} runs finished ({board.skipped} before), "
        f"{len(board.running)} running, {len(board.waiting)} waiting, {len(board.failed)} failed; "
        f"left: {duration(remaining(board))}"
        + (f" (a run takes {duration(sum(seconds) / len(seconds))})" if seconds else "")
    ]
    width = max((len(run.job.run_id) for run in board.running), default=0)
    for run in board.running:
        step, num_steps, losses = progress_of(run)
        share = f"{step:>6}/{num_steps}" if num_steps else "starting"
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        lines.append(f"  {run.job.run_id:<{width}}  {share:>12}  {duration(left_of(run)):>8} left  {shown}")
    lines += [f"  FAILED {run_id}: {reason}" for run_id, reason in board.failed.items()]
    return lines


def progress_of(run: Running) -> tuple[int, int, dict[str, float]]:
    """(step, steps of the run, losses) as the run itself says."""
    content = sweep.read_json(Path(run.job.folder) / sweep.PROGRESS_FILE)
    return int(content.get("step", 0)), int(content.get("num_steps", 0)), dict(content.get("losses", {}))


def left_of(run: Running) -> float | None:
    """Seconds that a running job still needs, from its own pace."""
    step, num_steps, _ = progress_of(run)
    elapsed, advanced = time.monotonic() - run.started, step - run.first_step
    return elapsed * (num_steps - step) / advanced if advanced > 0 and num_steps else None


def remaining(board: Board) -> float | None:
    """Seconds until the sweep is done, or ``None`` while nothing is known."""
    if not (board.running or board.waiting):
        return 0.0
    own = [left_of(run) for run in board.running]
    paces = list(board.done.values()) or [
        time.monotonic() - run.started + left for run, left in zip(board.running, own, strict=True) if left is not None
    ]
    if not paces:
        return None
    mean = sum(paces) / len(paces)
    work = sum(left if left is not None else mean for left in own) + mean * len(board.waiting)
    return work / max(1, len(board.running))


def duration(seconds: float | None) -> str:
    """``75`` -> ``1:15``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Screen:
    """Redraws the table in place on a terminal; elsewhere prints a line when something has happened."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._lines = 0
        self._last: tuple[int, int] = (-1, -1)

    def __call__(self, board: Board) -> None:
        """Show the board."""
        lines = table(board)
        if self._live:
            self._stream.write(f"\x1b[{self._lines}A\x1b[J" if self._lines else "")
            self._stream.write("\n".join(lines) + "\n")
            self._lines = len(lines)
        elif (len(board.done), len(board.failed)) != self._last:
            self._last = (len(board.done), len(board.failed))
            self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()
