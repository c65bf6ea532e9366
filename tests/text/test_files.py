"""Files are replaced whole, and what an earlier run left is moved aside, never lost."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from lightning_spectral.text import set_aside, whole_file, write_text


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    write_text(tmp_path / "a" / "x.txt", "old")

    def fails(path):
        with whole_file(path) as partial:
            partial.write_text("ne")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fails(tmp_path / "a" / "x.txt")
    assert (tmp_path / "a" / "x.txt").read_text() == "old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.txt"]
    write_text(tmp_path / "a" / "x.txt", "new")
    assert (tmp_path / "a" / "x.txt").read_text() == "new"
    assert (tmp_path / "a" / "x.txt").stat().st_mode & stat.S_IROTH  # not private, as a temporary file would be


def test_earlier_results_are_numbered(tmp_path):
    assert set_aside(tmp_path, ["run.json", "logs"]) is None
    for number in ("001", "002"):
        (tmp_path / "run.json").write_text(number)
        (tmp_path / "logs").mkdir()
        (tmp_path / "mine.txt").write_text("stays")
        assert set_aside(tmp_path, ["run.json", "logs", "final"]) == tmp_path / "previous" / number
        assert (tmp_path / "previous" / number / "run.json").read_text() == number
        assert {path.name for path in tmp_path.iterdir()} == {"previous", "mine.txt"}
    assert (tmp_path / "previous" / "001" / "run.json").read_text() == "001"


def test_an_earlier_run_keeps_its_id(tmp_path):
    for place in ("run-a", "run-a_"):
        (tmp_path / "run.json").write_text("x")
        assert set_aside(tmp_path, ["run.json"], "run-a") == tmp_path / "previous" / place


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """A live writer's part, another machine's and anybody's own file stay."""
    pid = os.fork()
    if pid == 0:
        with whole_file(tmp_path / "run.json"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = tmp_path.glob(".run.json.*.partial")
    alive = tmp_path / left.name.replace(f".{pid}.", f".{os.getppid()}.")
    elsewhere = tmp_path / left.name.replace(".run.json.", ".run.json.elsewhere-")
    foreign = tmp_path / ".notes.partial"
    for path in (alive, elsewhere, foreign):
        path.touch()
    pid = os.fork()
    if pid == 0:
        write_text(tmp_path / "other.json", "{}")
        os._exit(0)
    os.waitpid(pid, 0)
    assert sorted(tmp_path.glob(".*")) == sorted([alive, elsewhere, foreign])


def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: a file that another thread makes meanwhile would be open to everybody."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask})"))
    for mode in ("x", "w"):
        with whole_file(tmp_path / "a") as partial, partial.open("w") as file:
            file.write(mode)
    monkeypatch.undo()
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "b", "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~before
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o640
