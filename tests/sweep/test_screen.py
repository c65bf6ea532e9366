"""What a person sees of a sweep, on a terminal and in a log, and what it cost."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep import cost as sweep_cost
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep import screen as sweep_screen
from lightning_spectral.sweep.plan import Job
from lightning_spectral.sweep.run import Running, SweepProgress
from lightning_spectral.sweep.screen import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def job_of(folder: Path, name: str = "run", **progress: Any) -> Job:
    if progress:
        sweep.write_json(folder / name / PROGRESS_FILE, progress)
    return Job(name, str(folder / name), "", {}, {}, "")


def running(job: Job, ago: float = 10.0) -> Running:
    return Running(job, "s0", None, time.monotonic() - ago, 0)


def test_a_log_gets_a_line_a_run_and_one_every_half_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(sweep_screen.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    screen = ProgressDisplay(stream)

    def said() -> list[str]:
        lines = stream.getvalue().splitlines()
        stream.seek(0)
        stream.truncate()
        return lines

    board = SweepProgress(3, 0, note="preparing tokenizer")
    screen(board)
    assert said() == ["0 of 3 runs finished (0 before), 0 running, 0 waiting, 0 failed; preparing tokenizer"]
    board.note = ""
    board.running = [Running(job_of(tmp_path), "s0", None, 100.0, 0)]
    screen(board)
    assert len(said()) == 2  # the runs have begun
    now[0] = 115.0
    screen(board)
    assert said() == []
    sweep.write_json(tmp_path / "run" / PROGRESS_FILE, {"step": 5, "num_steps": 9, "losses": {"train": 2.5}})
    now[0] = 131.0
    screen(board)
    lines = said()
    assert "5/9" in lines[1]
    assert "train 2.500" in lines[1]
    board.running, board.done = [], {"run": 31.0}
    screen(board)
    assert said() == [
        "done      0:31  run",
        "1 of 3 runs finished (0 before), 0 running, 0 waiting, 0 failed",
    ]


def test_a_terminal_is_redrawn_in_place_and_never_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    screen = ProgressDisplay(stream)
    board = SweepProgress(9, 0, running=[running(job_of(tmp_path, "long" * 20, step=3, num_steps=9))])
    screen(board)
    screen(board)  # nothing new: at most the clock moves
    board.failed = {f"r{k}": "out of memory" for k in range(9)}
    screen(board)
    text = stream.getvalue()
    shown = [line for part in text.split("\x1b[J") for line in part.splitlines()]
    assert all(len(line) < 60 for line in shown if "long" in line)
    assert "\x1b[2A\x1b[J" in text
    assert text.count("FAILED          r3: out of memory") == 1
    assert "4 more failed" in text


def test_a_run_starts_moves_and_finishes(tmp_path: Path) -> None:
    starting, ending = running(job_of(tmp_path, "a")), running(job_of(tmp_path, "b", step=9, num_steps=9))
    ending.moving = (time.monotonic() - 1, 1)
    lines = sweep_screen.table(SweepProgress(2, 0, running=[starting, ending]))
    assert "starting" in lines[1]
    assert "0:10" in lines[1]
    assert "finishing" in lines[2]


def test_the_pace_is_taken_from_where_a_run_began_to_move(tmp_path: Path) -> None:
    run = running(job_of(tmp_path, "a", step=30, num_steps=50), ago=100.0)
    run.moving = (time.monotonic() - 10.0, 10)  # 90 s to start, then 20 steps in 10 s
    assert sweep_screen.left_of(run) == pytest.approx(10.0, rel=0.05)
    waiting = [job_of(tmp_path, "b")]
    fresh = running(job_of(tmp_path, "c"), ago=15.0)
    board = SweepProgress(4, 0, done={"z": 40.0}, running=[fresh], waiting=waiting)
    assert sweep_screen.remaining(board) == pytest.approx(25.0 + 40.0, rel=0.05)


def test_cost_adds_up_over_starts(tmp_path: Path) -> None:
    earlier = {"process": "1@2", "cpu_s": 30.0, "wall_s": 40.0}
    sweep_cost.started()
    time.sleep(0.02)  # they are kept to the hundredth
    first = sweep_cost.with_cost({"starts": [earlier]})
    again = sweep_cost.with_cost(first)
    assert [start["process"].split("@")[0] for start in again["starts"]] == ["1", str(os.getpid())]
    assert 30.0 < first["cpu_s"] <= again["cpu_s"]
    assert again["cpu_s"] == pytest.approx(30.0 + sweep_cost.cpu_seconds(), abs=0.5)
    assert again["wall_s"] > 40.0
    runs = [{"cpu_s": 50.0}, {"cpu_s": 70.0}, {"cpu_s": None}]
    sweep.write_json(tmp_path / sweep.SWEEP_FILE, {"runs": runs, "wall_s": 75})
    line = sweep_screen.cost_line(tmp_path)
    assert line == "cost: 120 CPU-seconds in 2 runs (60 a run); 1:15 wall, all starts together"
    assert sweep_screen.cost_line(tmp_path / "nothing") == ""
