"""Where the runs of a sweep go: processes on this machine (one a CPU core or one a GPU), or a Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from lightning_spectral.sweep import JOB_FILE, Job, write_json

LOG_FILE: Final = "sweep_worker.log"
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Launcher(Protocol):
    """Starts jobs in slots."""

    slots: list[str]

    def start(self, job: Job, slot: str) -> Any:
        """Start a job and return a handle for it."""

    def poll(self, handle: Any) -> int | None:
        """Exit code of a job, ``None`` while it runs."""

    def stop(self, handle: Any) -> None:
        """End a job; it resumes at the next start of the sweep."""


def command_of(job: Job, *more: str) -> list[str]:
    """Command line of a worker; writes its job file."""
    from dataclasses import asdict

    path = write_json(Path(job.folder) / JOB_FILE, asdict(job))
    return [sys.executable, "-m", "lightning_spectral.sweep_worker", str(path), *more]


class LocalLauncher:
    """Processes on this machine: one a GPU if there are any, else one-thread workers.

    Args:
        workers: Processes at a time; by default one a GPU, or one a CPU core.
        gpus: Names for ``CUDA_VISIBLE_DEVICES``; ``None`` asks ``nvidia-smi``.
    """

    def __init__(self, workers: int | None = None, gpus: list[str] | None = None) -> None:
        self.gpus = visible_gpus() if gpus is None else gpus
        count = workers or len(self.gpus) or len(os.sched_getaffinity(0))
        self.slots = [self.gpus[k % len(self.gpus)] + f"#{k}" if self.gpus else f"cpu#{k}" for k in range(count)]

    def start(self, job: Job, slot: str) -> subprocess.Popen[bytes]:
        """See :class:`Launcher`."""
        command = command_of(job)
        with (Path(job.folder) / LOG_FILE).open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment(slot), start_new_session=True
            )

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """See :class:`Launcher`."""
        return handle.poll()

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        """See :class:`Launcher`."""
        if handle.poll() is None:
            os.killpg(handle.pid, signal.SIGTERM)
            try:
                handle.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(handle.pid, signal.SIGKILL)
                handle.wait()

    def environment(self, slot: str) -> dict[str, str]:
        """One GPU, or one thread."""
        if self.gpus:
            return {**os.environ, "CUDA_VISIBLE_DEVICES": slot.partition("#")[0]}
        return {**os.environ, **dict.fromkeys(_THREADS, "1")}


class RayLauncher:
    """Tasks on a Ray cluster, or on a local Ray when there is no address; the run folders must be on shared storage.

    Args:
        workers: Tasks at a time; by default as many as the cluster has GPUs, or CPUs.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("`--launcher ray` needs Ray: pip install 'lightning-spectral[ray]'.") from None
        self._ray = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        count = workers or self._gpus or max(1, int(resources.get("CPU", 1)))
        self.slots = [f"ray#{k}" for k in range(count)]

    def start(self, job: Job, slot: str) -> Any:
        """See :class:`Launcher`."""
        options = {"num_gpus": 1} if self._gpus else {"num_cpus": 1}
        threads = {} if self._gpus else dict.fromkeys(_THREADS, "1")
        log = str((Path(job.folder) / LOG_FILE).absolute())
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
        task = self._ray.remote(max_retries=0, **options)(_run_in_task)
        return task.remote(command_of(job), log, os.getcwd(), {**threads, "PYTHONPATH": path})

    def poll(self, handle: Any) -> int | None:
        """See :class:`Launcher`."""
        done, _ = self._ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(handle))
        except Exception:  # a lost node or a cancelled task: the run resumes next time
            return 1

    def stop(self, handle: Any) -> None:
        """See :class:`Launcher`."""
        self._ray.cancel(handle, force=True)


def _run_in_task(command: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    with open(log, "ab") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, **environment}, check=False
        )
    return done.returncode


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
LAUNCHERS: Final[dict[str, Callable[[int | None], Launcher]]] = {"local": LocalLauncher, "ray": RayLauncher}
