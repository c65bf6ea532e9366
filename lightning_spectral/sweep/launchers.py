"""Where the runs of a sweep go: processes on this machine (one a CPU core or one a GPU), a Ray cluster, or SLURM."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from lightning_spectral.sweep.plan import JOB_FILE, Job, write_json

K = TypeVar("K")
T = TypeVar("T")
LOG_FILE: Final = "sweep_worker.log"
PARENT: Final = "LIGHTNING_SPECTRAL_PARENT"
_WORKER: Final = "lightning_spectral.sweep.worker"
RESTARTS: Final = 2  # of a run or a call whose worker is killed
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What a run imports, torch and Lightning with it: 5 to 10 seconds, which workers forked from one process share.
PRELOADED: Final = [
    _WORKER,
    *(
        f"lightning_spectral.{name}"
        for name in (
            "training.pretrain",
            "data.modules",
            "callbacks.spectral_rank",
            "callbacks.tail_token_probe",
            "callbacks.weight_spectrum",
            "optim",
            "sweep.monitor",
        )
    ),
]


class Launcher(Protocol):
    """Starts jobs in slots."""

    slots: list[str]

    def start(self, job: Job, slot: str) -> Any:
        """Start a job and return a handle for it."""

    def poll(self, handle: Any) -> int | None:
        """Exit code of a job, ``None`` while it runs."""

    def stop(self, handle: Any) -> None:
        """End a job; it resumes at the next start of the sweep."""


def command_of(job: Job) -> list[str]:
    """Command line of a worker; writes its job file."""
    return [sys.executable, "-m", _WORKER, _write_job(job)]


def _write_job(job: Job) -> str:
    return str(write_json(Path(job.folder) / JOB_FILE, asdict(job)))


def run_worker(argv: Sequence[str]) -> int:
    """One run of a sweep, in a process of its own; its exit code."""
    # a strategy with several processes starts this command line again
    sys.argv, sys.modules["__main__"].__spec__ = [_WORKER, *argv], find_spec(_WORKER)
    from lightning_spectral.sweep import worker as sweep_worker

    return sweep_worker.main(list(argv))


def _begin(work: Callable[[Sequence[str]], int], argv: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    os.setsid()  # stopped with all its children
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()  # of the process that this one was forked from, which is older than the command
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    sys.exit(work(argv))


def _end_with_the_sweep() -> None:
    """A run that outlived its sweep would be started a second time by the next one."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.killpg(os.getpgrp(), signal.SIGTERM)


class LocalLauncher:
    """Processes on this machine: one a GPU if there are any, else one-thread workers.

    On a CPU under Linux they are forked from one process that has imported everything; a process that may have looked
    at a GPU must not be forked, there each starts anew.

    Args:
        workers: Processes at a time; by default one a GPU, or one a CPU core.
        gpus: Names for ``CUDA_VISIBLE_DEVICES``; ``None`` asks ``nvidia-smi``.
        work: What a process does with its arguments; returns the exit code.
    """

    def __init__(
        self,
        workers: int | None = None,
        gpus: list[str] | None = None,
        work: Callable[[Sequence[str]], int] = run_worker,
    ) -> None:
        self._work = work
        self.gpus = visible_gpus() if gpus is None else gpus
        self._context = self._start_context()
        count = workers or len(self.gpus) or len(os.sched_getaffinity(0))
        self.slots = [self.gpus[k % len(self.gpus)] + f"#{k}" if self.gpus else f"cpu#{k}" for k in range(count)]

    def start(self, job: Job, slot: str, *more: str) -> BaseProcess:
        """See :class:`Launcher`; ``more`` are arguments of the worker."""
        process: BaseProcess = self._context.Process(  # type: ignore[attr-defined]
            target=_begin,
            args=(self._work, [_write_job(job), *more], str(Path(job.folder) / LOG_FILE), self.environment(slot)),
            name=job.run_id,
        )
        process.start()
        return process

    def poll(self, handle: BaseProcess) -> int | None:
        """See :class:`Launcher`."""
        return handle.exitcode

    def stop(self, handle: BaseProcess) -> None:
        """See :class:`Launcher`."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if handle.exitcode is None:
                _signal_group(handle, number)
                handle.join(timeout=20)

    def environment(self, slot: str) -> dict[str, str]:
        """Ours, with one GPU and its share of the CPU's threads, unless they are set, or one thread."""
        if not self.gpus:
            return {**os.environ, **dict.fromkeys(_THREADS, "1")}
        threads = max(1, len(os.sched_getaffinity(0)) // len(self.slots))
        return {**dict.fromkeys(_THREADS, str(threads)), **os.environ, "CUDA_VISIBLE_DEVICES": slot.partition("#")[0]}

    def _start_context(self) -> multiprocessing.context.BaseContext:
        if self.gpus or sys.platform != "linux":
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with _one_thread():
            forkserver.ensure_running()
        return context


def _signal_group(handle: BaseProcess, number: int) -> None:
    assert handle.pid is not None
    try:
        os.killpg(handle.pid, number)
    except ProcessLookupError:  # it has no group of its own yet, or has just ended
        os.kill(handle.pid, number)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is started inside has one thread: a process with more must not be forked."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cluster() -> tuple[Any, int, int]:
    """Ray, connected; how many GPUs it has, and how many tasks it takes: one a GPU, or one a CPU.

    Raises:
        ValueError: If Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("`--launcher ray` needs Ray: pip install 'lightning-spectral[ray]'.") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    return ray, gpus, gpus or max(1, int(resources.get("CPU", 1)))


def calls_on_ray(calls: Mapping[K, Callable[[], T]], workers: int | None = None) -> Iterator[tuple[K, T | Exception]]:
    """Make calls as tasks of a Ray cluster; (key, result, or what its worker died of) as each is done.

    A call whose worker dies is made again, twice at most. What it reads and writes must be on shared storage.

    Args:
        calls: What can be pickled, by key.
        workers: Tasks at a time; by default as many as the cluster takes.
    """
    ray, gpus, count = _cluster()
    options: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    task = ray.remote(max_retries=RESTARTS, **options)(_call_in)
    waiting, running = list(calls.items()), dict[Any, K]()
    while waiting or running:
        while waiting and len(running) < (workers or count):
            key, call = waiting.pop(0)
            running[task.remote(os.getcwd(), call)] = key
        (done, *_), _ = ray.wait(list(running))
        key = running.pop(done)
        try:
            yield key, ray.get(done)
        except Exception as error:  # of the call, or of a worker or node that died
            yield key, error


def _call_in(folder: str, call: Callable[[], T]) -> T:
    os.chdir(folder)  # names of files are relative to it
    return call()


class RayLauncher:
    """Tasks on a Ray cluster, or on a local Ray when there is no address; the run folders must be on shared storage.

    Args:
        workers: Tasks at a time; by default as many as the cluster has GPUs, or CPUs.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._ray, self._gpus, count = _cluster()
        self.slots = [f"ray#{k}" for k in range(workers or count)]

    def start(self, job: Job, slot: str) -> Any:
        """See :class:`Launcher`."""
        options = {"num_gpus": 1} if self._gpus else {"num_cpus": 1}
        threads = {} if self._gpus else dict.fromkeys(_THREADS, "1")
        log = str((Path(job.folder) / LOG_FILE).absolute())
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
        task = self._ray.remote(max_retries=0, **options)(run_in_task)
        return task.remote(command_of(job), log, os.getcwd(), {**threads, "PYTHONPATH": path})

    def poll(self, handle: Any) -> int | None:
        """See :class:`Launcher`."""
        done, _ = self._ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(handle))
        except (self._ray.exceptions.RayTaskError, self._ray.exceptions.TaskCancelledError):
            return 1
        except self._ray.exceptions.RayError:  # a worker or a node that died
            return -signal.SIGKILL

    def stop(self, handle: Any) -> None:
        """See :class:`Launcher`."""
        self._ray.cancel(handle, force=True)


def run_in_task(command: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """Run a worker where a cluster has put it; returns its exit code."""
    environment = {**os.environ, **environment, PARENT: str(os.getpid())}
    with open(log, "ab") as file:
        done = subprocess.run(  # noqa: S603 - `command_of`
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            check=False,
            start_new_session=True,
        )
    return done.returncode


def end_with_the_parent() -> None:
    """In a worker with :data:`PARENT`: end, with all of its own, when that process does.

    A task that is killed leaves its worker behind, which would train on beside the one that takes the run up again.
    """
    parent = os.environ.pop(PARENT, "")
    if parent:
        threading.Thread(target=_wait_for, args=(int(parent),), daemon=True).start()


def _wait_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _slurm_launcher(workers: int | None) -> Launcher:
    from lightning_spectral.sweep.slurm import SlurmLauncher

    return SlurmLauncher(workers)


def visible_gpus() -> list[str]:
    """GPUs of this machine, without importing torch."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip() and name.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(k) for k, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


# name on the command line -> launcher
LAUNCHERS: Final[dict[str, Callable[[int | None], Launcher]]] = {
    "local": LocalLauncher,
    "ray": RayLauncher,
    "slurm": _slurm_launcher,
}
