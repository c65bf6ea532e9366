"""Runs as jobs of a SLURM cluster, by the package submitit; the run folders must be on shared storage.

What a job may use is said as everywhere under SLURM: ``SBATCH_PARTITION``, ``SBATCH_ACCOUNT``, ``SBATCH_TIMELIMIT`` in
the environment. A job that dies, or that the cluster takes away, is a run that goes on at the next start of the sweep.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from lightning_spectral.sweep import launchers
from lightning_spectral.sweep.plan import Job

DEFAULT_JOBS: Final = 16
MINUTES: Final = 24 * 60
_ENDED_BADLY: Final = 1


class SlurmLauncher:
    """One SLURM job per run.

    Args:
        workers: Jobs at a time.
        gpus: GPUs of a job.
        cluster: ``slurm``; ``local`` runs them as processes here, for a try.
    """

    def __init__(self, workers: int | None = None, *, gpus: int = 1, cluster: str = "slurm") -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise ValueError("`--launcher slurm` needs submitit: pip install 'lightning-spectral[slurm]'.") from None
        self._submitit, self._gpus, self._cluster = submitit, gpus, cluster
        if cluster == "slurm" and submitit.AutoExecutor.which() != "slurm":
            raise ValueError("`--launcher slurm` needs SLURM, and this machine has no `sbatch`: use `local` or `ray`.")
        self.slots = [f"slurm#{k}" for k in range(workers or DEFAULT_JOBS)]

    def start(self, job: Job, slot: str) -> Any:
        """See :class:`~lightning_spectral.sweep.launchers.Launcher`."""
        folder = Path(job.folder).absolute()
        executor = self._submitit.AutoExecutor(str(folder / "slurm"), cluster=self._cluster)
        executor.update_parameters(timeout_min=MINUTES, name=job.run_id, gpus_per_node=self._gpus, tasks_per_node=1)
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
        log = str(folder / launchers.LOG_FILE)
        return executor.submit(launchers.run_in_task, launchers.command_of(job), log, os.getcwd(), {"PYTHONPATH": path})

    def poll(self, handle: Any) -> int | None:
        """See :class:`~lightning_spectral.sweep.launchers.Launcher`."""
        if not handle.done():
            return None
        try:
            return int(handle.result())
        except Exception:  # killed, out of time, or its node was lost: the run resumes next time
            return _ENDED_BADLY

    def stop(self, handle: Any) -> None:
        """See :class:`~lightning_spectral.sweep.launchers.Launcher`."""
        handle.cancel()
