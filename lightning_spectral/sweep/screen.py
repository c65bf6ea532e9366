"""How a sweep says what it does: a live table on a terminal, a line now and then in a log."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep.plan import Job
from lightning_spectral.sweep.run import Running, SweepProgress

EVERY_S: Final = 30.0  # between two lines in a log
_SHOWN_FAILURES: Final = 5


class ProgressDisplay:
    """Redraws the table in place on a terminal; elsewhere prints a line per finished run, and one every half a minute.

    Args:
        stream: Where to write; standard output by default.
        every_s: Seconds between two lines where there is no terminal.
    """

    def __init__(self, stream: Any = None, every_s: float = EVERY_S) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._every_s = every_s
        self._lines: list[str] = []
        self._ended: set[str] = set()
        self._said = -every_s
        self._note = ""

    def __call__(self, board: SweepProgress) -> None:
        """Show the board."""
        for run in board.running:
            step, _, _ = progress_of(run.job)
            if run.moving is None and step > run.first_step:
                run.moving = (time.monotonic(), step)
        news = [line for run_id, line in _endings(board) if run_id not in self._ended]
        self._ended |= {*board.done, *board.failed}
        if self._live:
            self._redraw(news, table(board))
        else:
            self._log(news, board)
        self._stream.flush()

    def _redraw(self, news: list[str], lines: list[str]) -> None:
        # a line that wraps would be two lines to the cursor
        columns = shutil.get_terminal_size().columns - 1
        lines = [line[:columns] for line in lines]
        if lines == self._lines and not news:
            return
        up = f"\x1b[{len(self._lines)}A\x1b[J" if self._lines else ""
        self._stream.write(up + "".join(f"{line}\n" for line in [*news, *lines]))
        self._lines = lines

    def _log(self, news: list[str], board: SweepProgress) -> None:
        over = not (board.running or board.waiting)
        due = time.monotonic() - self._said >= self._every_s
        lines = [*news, *(table(board)[:1] if over else table(board) if due or board.note != self._note else [])]
        if lines:
            self._stream.write("".join(f"{line}\n" for line in lines))
        if due or board.note != self._note:
            self._said, self._note = time.monotonic(), board.note


def table(board: SweepProgress) -> list[str]:
    """The live table: one line for the sweep, one for each running job, and the last failures."""
    seconds = list(board.done.values())
    first = (
        f"{board.skipped + len(board.done)} of {board.total} runs finished ({board.skipped} before), "
        f"{len(board.running)} running, {len(board.waiting)} waiting, {len(board.failed)} failed"
    )
    first += f", {len(board.diverged)} diverged" if board.diverged else ""
    if board.note:
        first += f"; {board.note}"
    elif board.running or board.waiting:
        first += f"; left: {duration(remaining(board))}"
        first += f" (a run takes {duration(sum(seconds) / len(seconds))})" if seconds else ""
    width = max((len(run.job.run_id) for run in board.running), default=0)
    lines = [first, *(f"  {run.job.run_id:<{width}}  {_progress(run)}" for run in board.running)]
    failures = list(board.failed.items())
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"  {len(failures) - _SHOWN_FAILURES} more failed (see sweep.json)")
    return lines + [f"  FAILED {run_id}: {reason}" for run_id, reason in failures[-_SHOWN_FAILURES:]]


def _progress(run: Running) -> str:
    step, num_steps, losses = progress_of(run.job)
    if not num_steps or (step <= run.first_step and run.moving is None):
        return f"{'starting':>11}  {duration(time.monotonic() - run.started):>7}"
    shown = "  ".join(f"{name} {'no number' if loss is None else f'{loss:.3f}'}" for name, loss in losses.items())
    left = "finishing" if step >= num_steps else f"{duration(left_of(run))} left"
    return f"{step:>5}/{num_steps:<5}  {left:>12}  {shown}"


def _endings(board: SweepProgress) -> list[tuple[str, str]]:
    """(run id, line) of every run that has ended."""
    out = []
    for run_id, seconds in board.done.items():
        end = ": diverged, its loss is no number" if run_id in board.diverged else ""
        out.append((run_id, f"done   {duration(seconds):>7}  {run_id}{end}"))
    return out + [(run_id, f"FAILED          {run_id}: {reason}") for run_id, reason in board.failed.items()]


def progress_of(job: Job) -> tuple[int, int, dict[str, float | None]]:
    """(step, steps of the run, losses) as the run itself says; ``None`` for a loss that is no number."""
    content = sweep.read_json(Path(job.folder) / PROGRESS_FILE)
    return int(content.get("step", 0)), int(content.get("num_steps", 0)), dict(content.get("losses", {}))


def left_of(run: Running) -> float | None:
    """Seconds that a running job still needs, from its own pace since it began to move."""
    step, num_steps, _ = progress_of(run.job)
    since, first = run.moving or (run.started, run.first_step)
    advanced = step - first
    return (time.monotonic() - since) * (num_steps - step) / advanced if advanced > 0 and num_steps else None


def remaining(board: SweepProgress) -> float | None:
    """Seconds until the sweep is done, or ``None`` while nothing is known."""
    if not (board.running or board.waiting):
        return 0.0
    now = time.monotonic()
    own = [left_of(run) for run in board.running]
    paces = list(board.done.values()) or [
        now - run.started + left for run, left in zip(board.running, own, strict=True) if left is not None
    ]
    if not paces:
        return None
    mean = sum(paces) / len(paces)
    work = mean * len(board.waiting)
    for run, left in zip(board.running, own, strict=True):
        work += left if left is not None else max(0.0, mean - (now - run.started))
    return work / max(1, len(board.running))


def duration(seconds: float | None) -> str:
    """``75`` -> ``1:15``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def cost_line(out_dir: Path) -> str:
    """What the sweep took, earlier starts included, from its ``sweep.json``; empty if nothing is recorded."""
    content = sweep.read_json(out_dir / sweep.SWEEP_FILE)
    known = [float(run["cpu_s"]) for run in content.get("runs", []) if run.get("cpu_s")]
    if not known:
        return ""
    total, mean = sum(known), sum(known) / len(known)
    wall = duration(content.get("wall_s", 0.0))
    return f"cost: {total:.0f} CPU-seconds in {len(known)} runs ({mean:.0f} a run); {wall} wall, all starts together"
