"""What goes wrong inside the process under test, and what it has left behind when it ends.

File operations in the run's folder are counted by Python's audit hooks: "at operation n" is then the same moment in
every run, and an operation can be made to fail as on a file system that is read-only.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.faults import jobs

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir", "os.link", "os.utime", "os.chmod"}


class Operations:
    """Counts what changes files in a folder, and does something at one of the operations.

    Args:
        folder: Only what is below it counts.
        act: Called with the number of the operation, before it is carried out; may raise.
    """

    def __init__(self, folder: Path, act: Callable[[int], None] = lambda number: None) -> None:
        self.count, self._folder, self._act = 0, f"{folder}/", act
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = arguments[2] & _WRITES if event == "open" and isinstance(arguments[2], int) else event in _CHANGES
        if changes and isinstance(arguments[0], (str, os.PathLike)) and self._folder in os.fspath(arguments[0]):
            self.count += 1
            self._act(self.count - 1)


def install(kind: str, arguments: dict[str, Any], folder: Path) -> Operations:
    """Make the fault happen in this process."""
    return Operations(folder, _AGENTS.get(kind, _nothing)(**arguments))


def _nothing(**_: Any) -> Callable[[int], None]:
    return lambda number: None


def _signal(*, at: int, name: str, again: int = 0) -> Callable[[int], None]:
    moments = {at, at + again}

    def act(number: int) -> None:
        if number in moments:
            os.kill(os.getpid(), signal.Signals[name])

    return act


def _read_only(*, at: int, for_operations: int) -> Callable[[int], None]:
    def act(number: int) -> None:
        if at <= number < at + for_operations:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    return act


def _file_limit(*, num_bytes: int) -> Callable[[int], None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    return lambda number: None


def _clock(*, at: int, seconds: float) -> Callable[[int], None]:
    right, back = time.time, [0.0]
    time.time = lambda: right() - back[0]  # type: ignore[assignment]

    def act(number: int) -> None:
        if number == at:
            back[0] = seconds

    return act


def _solve(*, call: int, error: str) -> Callable[[int], None]:
    """An eigensolve fails: for want of memory, or because it does not converge."""
    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory"),
        "memory": MemoryError(),
        "converge": torch.linalg.LinAlgError("the algorithm failed to converge"),
    }
    calls, eigvalsh = [0], torch.linalg.eigvalsh

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 == call:
            raise errors[error]
        return eigvalsh(*args, **options)

    torch.linalg.eigvalsh = failing
    return lambda number: None


def _nan(*, call: int) -> Callable[[int], None]:
    """From one optimizer step on a weight is NaN."""
    calls, step = [0], torch.optim.AdamW.step

    def poisoned(optimizer: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 == call:
            largest = max(optimizer.param_groups[0]["params"], key=lambda parameter: parameter.numel())
            with torch.no_grad():
                largest.view(-1)[0] = torch.nan
        return step(optimizer, *args, **options)

    torch.optim.AdamW.step = poisoned  # type: ignore[method-assign]
    return lambda number: None


def _rank(*, how: str, step: int) -> Callable[[int], None]:
    jobs.ODD.update(how=how, step=step)
    return lambda number: None


_AGENTS: dict[str, Callable[..., Callable[[int], None]]] = {
    "signal at an operation": _signal,
    "torn": _signal,
    "read-only": _read_only,
    "file limit": _file_limit,
    "clock goes back": _clock,
    "solve fails": _solve,
    "NaN": _nan,
    "odd rank": _rank,
}


def left_behind(folder: Path) -> list[str]:
    """Hooks, threads and open files that a job has not taken away."""
    left = [f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("spectral")]
    gc.collect()
    for module in [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]:
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            ours = [hook for hook in hooks.values() if type(hook).__module__.startswith("lightning_spectral")]
            left += [f"hook {type(hook).__name__} on {type(module).__name__}" for hook in ours]
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/") and not target.endswith(".npy"):  # tokens stay mapped
            left.append(f"open file {target}")
    return left
