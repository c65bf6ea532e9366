"""One run in one folder: a live run is never disturbed, a dead one never stands in the way, nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.run_lock import LOCK_FILE, RunLock
from lightning_spectral.records import SPECTRAL_FILE, RunInfo, read_run, read_spectral
from tests.records_factory import spectral


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


def _on_full_disk(folder: Path, run_folder: RunFolder, *steps: int) -> None:
    """Append records of these steps while no file of the folder can grow by more than 100 bytes."""
    size = (folder / SPECTRAL_FILE).stat().st_size if (folder / SPECTRAL_FILE).exists() else 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        for step in steps:
            with pytest.raises(OSError, match="File too large"):
                run_folder.append_spectral([spectral(step=step)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_refuses_is_written_with_the_next_records(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, info("run"), resume=False, writes=True, locks=True)
    folder.append_spectral([spectral(step=0)])
    whole = (tmp_path / SPECTRAL_FILE).read_bytes()
    _on_full_disk(tmp_path, folder, 1, 2)
    assert (tmp_path / SPECTRAL_FILE).read_bytes() == whole  # no half of a line
    folder.append_spectral([spectral(step=3)])
    report = read_spectral(tmp_path)
    assert [record.step for record in report.records] == [0, 1, 2, 3]
    assert not report.skipped


def test_what_waits_is_written_at_the_end_and_else_counted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, info("run"), resume=False, writes=True, locks=True)
    _on_full_disk(tmp_path, folder, 0, 1)
    folder.close()
    assert [record.step for record in read_spectral(tmp_path).records] == [0, 1]
    _on_full_disk(tmp_path, folder, 2, 3)
    (tmp_path / SPECTRAL_FILE).rename(tmp_path / "elsewhere")
    (tmp_path / SPECTRAL_FILE).mkdir()  # a folder in the file's place
    folder.reopen()
    with pytest.raises(OSError, match="2 records are lost"):
        folder.close()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_bound_on_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_spectral.probe.run_folder._WAITING_AT_MOST", 2)
    folder = RunFolder(tmp_path, info("run"), resume=False, writes=True, locks=True)
    _on_full_disk(tmp_path, folder, 0, 1, 2)
    with pytest.warns(UserWarning, match="1 records are lost"):
        folder.close()
    assert [record.step for record in read_spectral(tmp_path).records] == [0, 1]


def test_files_of_spectra_wait_and_travel_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_spectral.probe.run_folder._WAITING_BYTES", 10)
    around, tmp_path = tmp_path, tmp_path / "run"
    folder = RunFolder(tmp_path, info("run"), resume=False, writes=True, locks=True)
    (tmp_path / "eigenvalues").write_text("in the way")
    for number in range(3):
        with pytest.raises(FileExistsError):
            folder.write_file(f"eigenvalues/{number}.safetensors", b"12345")
    waiting = folder.waiting
    assert {name: waiting[name] for name in waiting if name != "run_id"} == {
        "eigenvalues/0.safetensors": b"12345", "eigenvalues/1.safetensors": b"12345",
    }  # fmt: skip
    with pytest.raises(OSError, match="3 files of eigenvalues are lost"):
        folder.close()

    (tmp_path / "eigenvalues").unlink()
    later = RunFolder(tmp_path, info("later"), resume=True, writes=True)
    for foreign in (
        "../a.safetensors",
        "eigenvalues/../a.safetensors",
        "eigenvalues/a.py",
        "run.json",
        "/a.safetensors",
    ):
        later.take_back({**waiting, foreign: b"evil"})
    written = sorted(path.relative_to(around).as_posix() for path in around.rglob("*.safetensors"))
    assert [path.removeprefix("run/eigenvalues/") for path in written] == ["0.safetensors", "1.safetensors"]
    assert not later.waiting
    (tmp_path / "eigenvalues" / "0.safetensors").write_bytes(b"newer")
    later.take_back(waiting)
    assert (tmp_path / "eigenvalues" / "0.safetensors").read_bytes() == b"newer"
    (tmp_path / "eigenvalues" / "0.safetensors").unlink()
    later.take_back({**waiting, "run_id": "another"})
    assert not (tmp_path / "eigenvalues" / "0.safetensors").exists()
    later.write_file("eigenvalues/3.safetensors", b"larger than what may wait")
    assert (tmp_path / "eigenvalues" / "3.safetensors").exists()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    """Each process takes the lock of a dead one, or sees that another was faster; never two."""
    dead = dead_pid()
    for _ in range(30):
        lock(tmp_path, pid=dead)
        readers = []
        start, go = os.pipe()
        for _ in range(6):
            ours, theirs = os.pipe()
            if os.fork() == 0:
                os.close(go)
                os.read(start, 1)  # until all are there
                os.write(theirs, b"1" if RunLock(tmp_path).acquire() else b"0")
                os.close(theirs)
                time.sleep(0.05)  # alive while the others look
                os._exit(0)
            os.close(theirs)
            readers.append(ours)
        os.close(start)
        os.close(go)
        got = [os.read(reader, 1) for reader in readers]
        for reader in readers:
            os.close(reader)
            os.wait()
        assert got.count(b"1") == 1


def test_only_its_own_lock_is_released(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    assert held.acquire()
    lock(tmp_path, host="elsewhere")  # taken over after an hour of silence
    held.release()
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("resume", [True, "first"])
def test_a_torn_description_does_not_end_a_run(tmp_path: Path, resume: bool | str) -> None:
    folder = RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True)
    folder.append_spectral([spectral(run_id="first", step=0)])
    folder.close()
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text()[:30])
    with pytest.warns(UserWarning, match="is not a run description: .* It is written anew"):
        resumed = RunFolder(tmp_path, info("second"), resume=resume, writes=True, locks=True)
    assert resumed.run_id == read_run(tmp_path).run_id == "first"
    resumed.append_spectral([spectral(run_id="first", step=0), spectral(run_id="first", step=1)])
    assert [record.step for record in read_spectral(tmp_path).records] == [0, 1]


def test_a_folder_that_cannot_be_opened_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_spectral.records.write_run", full)
        with pytest.raises(OSError, match="No space"):
            RunFolder(tmp_path, info("first"), resume=False, writes=True, locks=True)
    assert not (tmp_path / LOCK_FILE).exists()
