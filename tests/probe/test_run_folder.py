"""One run in one folder: a live run is never disturbed, a dead one never stands in the way, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.run_lock import LOCK_FILE, RunLock
from lightning_spectral.records import RunInfo, read_run


def info(run_id: str) -> RunInfo:
    return RunInfo(run_id, "2026-01-01T00:00:00+00:00", "AdamW")


def lock(path: Path, **changes: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    import socket

    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": None, **changes}
    (path / LOCK_FILE).write_text(json.dumps(owner))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_holds_while_its_process_lives(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert not (tmp_path / LOCK_FILE).exists()
    assert second.acquire()


@pytest.mark.parametrize(
    ("owner", "age_s", "continues", "free"),
    [
        ({"pid": "dead"}, 0, False, True),
        ({"pid": "parent"}, 0, False, False),
        ({"pid": "parent"}, 0, True, False),
        ({"pid": "parent", "started": "1"}, 0, False, True),  # the id is another process's by now
        ({"pid": "me"}, 0, True, True),
        ({"host": "elsewhere"}, 10, False, False),
        ({"host": "elsewhere"}, 10, True, True),  # requeued on another machine
        ({"host": "elsewhere"}, 7_200, False, True),
    ],
)
def test_stale_locks(tmp_path: Path, owner: dict[str, object], age_s: float, continues: bool, free: bool) -> None:
    pids = {"dead": dead_pid(), "parent": os.getppid(), "me": os.getpid()}
    lock(tmp_path, **{key: pids.get(str(value), value) for key, value in owner.items()})
    before = time.time() - age_s
    os.utime(tmp_path / LOCK_FILE, (before, before))
    assert RunLock(tmp_path).acquire(continues=continues) is free


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_a_torn_lock_is_stale(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    assert RunLock(tmp_path).acquire()


def test_a_second_live_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True)
    lock(tmp_path, pid=os.getppid())
    with pytest.warns(UserWarning, match="records go to .*another run is writing there"):
        second = RunFolder(tmp_path, info("second"), resume=False, writes=True, locks=True)
    assert second.path == tmp_path / "runs" / "second"
    assert (read_run(tmp_path).run_id, read_run(second.path).run_id) == ("first", "second")
    second.close(finished=True, last_step=4)
    assert not (second.path / LOCK_FILE).exists()
    assert (read_run(second.path).finished, read_run(second.path).last_step) == (True, 4)


def test_an_earlier_run_is_moved_and_told(tmp_path: Path) -> None:
    RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True).close()
    with pytest.warns(UserWarning, match="held the run `first`: it was moved to"):
        RunFolder(tmp_path, info("second"), resume=False, writes=True, locks=True).close()
    assert read_run(tmp_path / "previous" / "first").run_id == "first"


@pytest.mark.parametrize(("resume", "expected"), [(True, "first"), ("first", "first")])
def test_a_resumed_run_goes_on(tmp_path: Path, resume: bool | str, expected: str) -> None:
    RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True).close()
    assert RunFolder(tmp_path, info("second"), resume=resume, writes=True, locks=True).run_id == expected
    assert not (tmp_path / "previous").exists()


def test_the_checkpoint_of_another_run_does_not_go_on_with_this_one(tmp_path: Path) -> None:
    RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True).close()
    with pytest.warns(UserWarning, match="it was moved to"):
        assert RunFolder(tmp_path, info("second"), resume="third", writes=True, locks=True).run_id == "second"


def test_an_evaluation_moves_nobody_aside(tmp_path: Path) -> None:
    RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True).close()
    with pytest.warns(UserWarning, match="that folder is of the run `first`"):
        test = RunFolder(tmp_path, info("test"), resume=False, writes=True, makes_room=False, locks=True)
    assert test.path == tmp_path / "runs" / "test"
    assert read_run(tmp_path).run_id == "first"
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x", info("dry"), resume=False, writes=False, locks=True)
    folder.close()
    assert not (tmp_path / "x").exists()
