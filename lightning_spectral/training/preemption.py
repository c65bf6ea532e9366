"""A batch system takes the machine away: every rank saves at the same finished step, and stops.

SLURM sends SIGUSR1 some time before the end if asked to (``--signal=USR1@120``), and SIGTERM. Which ranks get a signal,
and at which step, differs; so a rank that got one writes into the process group's store at which step all stop. A step
needs every rank's gradients, so no rank is more than one step ahead, and all read the note before that step. Nothing is
exchanged but one look into the store per optimizer step: no collective, no wait for the device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_spectral.probe.agreement import default_store

_KEY = "lightning_spectral/stop"
_STEPS_AHEAD = 2
_WORLD_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")  # torchrun's; MPI's and LSF's
_RANK_NAMES = (*_WORLD_RANKS, "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")


class PreemptedError(SIGTERMException):
    """The run was saved and stopped because a signal asked for it.

    Attributes:
        name: Of the signal.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while a run trains, and says at which step all ranks stop.

    With one process SIGTERM stays Lightning's, which also ends a validation.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._told = False
        self._before: dict[int, Any] = {}

    def install(self, world_size: int) -> None:
        """Take over the signals; only the main thread can."""
        self._noted, self._told = None, False
        if threading.current_thread() is not threading.main_thread():
            return
        wanted = [signal.SIGUSR1] if under_slurm() else []
        wanted += [signal.SIGTERM] if world_size > 1 else []
        for number in wanted:
            self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back to whom they belonged to."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def due(self, step: int, world_size: int) -> str | None:
        """Name of the signal for which all ranks stop now, after ``step`` optimizer steps; equal on all of them."""
        if world_size == 1:
            return None if self._noted is None else signal.Signals(self._noted).name
        store = default_store()
        if self._noted is not None and not self._told:
            self._told = True
            store.compare_set(_KEY, "", f"{step + _STEPS_AHEAD} {signal.Signals(self._noted).name}")
        if not store.check([_KEY]):
            return None
        at, name = store.get(_KEY).decode().split()
        return name if step >= int(at) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number


def under_slurm() -> bool:
    """Whether SLURM started this process, and Lightning takes ranks from it."""
    return bool(SLURMEnvironment.detect())


def was_requeued() -> bool:
    """Whether SLURM starts this job again: then it is the same run."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0) > 0


def first_rank() -> bool:
    """Whether this process is rank 0, before ``fit`` launches any other: torchrun's, srun's or Lightning's own rule.

    Where Lightning launches the ranks itself, each node's first process knows its node's number at most.
    """
    env = {name: int(value) for name, value in os.environ.items() if name in _RANK_NAMES and value.isdigit()}
    for name in _WORLD_RANKS:
        if name in env:
            return env[name] == 0
    if env.get("NODE_RANK", env.get("GROUP_RANK", 0)):
        return False
    return env.get("LOCAL_RANK", env.get("SLURM_PROCID", 0)) == 0


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    job_id = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}" if array else job
    try:
        command = ["scontrol", "requeue", job_id]  # the id is SLURM's own
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        rank_zero_info(f"SLURM job {job_id} is requeued and will go on from here.")
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM job {job_id} could not be requeued ({error}): submit the same command again.")
