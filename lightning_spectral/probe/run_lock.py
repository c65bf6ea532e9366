"""One run in one folder: a file that says which process is writing there.

The file holds host, process and the time at which that process began, and is touched whenever records are written. It
is stale where its process is gone: on this machine that can be seen, on another one it is assumed after an hour without
a touch.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_spectral.text import parse_json

LOCK_FILE = "run.lock"
_SILENT_S = 3_600.0  # a lock of another host that was not touched for so long is stale


class RunLock:
    """The right to write to a folder, while this process lives.

    Args:
        folder: The run folder; made if it does not exist.
        name: Of the file: who records and who trains hold locks of their own.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.path = folder / name
        self.held = False
        self._made: list[Path] = []

    def acquire(self, *, continues: bool = False) -> bool:
        """Take the folder; ``False`` if another run is alive there.

        Args:
            continues: The caller resumes the run that was here: a lock of another host, which a requeued job leaves, is
                then taken over.
        """
        folder = self.path.parent
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.path.parent):
            for _ in range(2):
                try:
                    descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    if _is_alive(self.path, continues=continues):
                        return False
                    self.path.unlink(missing_ok=True)
                    continue
                try:
                    with os.fdopen(descriptor, "w") as file:
                        json.dump(_me(), file)
                except OSError:  # a full disk
                    self.path.unlink(missing_ok=True)
                    raise
                self.held = True
                return True
            return False  # another machine's process was faster

    def touch(self) -> None:
        """Say that the run is alive."""
        if self.held:
            with suppress(OSError):  # a lock that somebody has removed is not made again, empty
                os.utime(self.path)

    def release(self) -> None:
        """Give the folder back."""
        if self.held:
            self.held = False
            if _owner(self.path) == _me():  # after an hour of silence another machine may have taken it
                with suppress(OSError):  # where it cannot be removed it is stale as soon as this process ends
                    self.path.unlink(missing_ok=True)
                    for made in self._made:
                        made.rmdir()  # nothing was written: not even the folder stays


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Between looking at a lock and taking it no other process of this machine comes in; leaves no file behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _owner(path: Path) -> Any:
    """What is in a lock; ``None`` if it is gone or incomplete."""
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError):
        return None


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _is_alive(path: Path, *, continues: bool) -> bool:
    owner = _owner(path)
    try:
        host, pid = owner["host"], int(owner["pid"])
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False  # incomplete, or gone by now
    if host != socket.gethostname():
        return not continues and age < _SILENT_S
    if continues and pid == os.getpid():
        return False  # this process goes on with a run that it has begun itself
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # gone, or no process id
        return False
    except PermissionError:
        pass  # somebody else's process
    return owner.get("started") in (None, _started(pid))


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, since ids are used again; ``None`` if the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
