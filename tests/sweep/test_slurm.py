"""The SLURM launcher, on submitit's own stand-in for a cluster (the `slurm` extra)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lightning_spectral.sweep import launchers as sweep_launchers
from lightning_spectral.sweep.plan import Job

pytest.importorskip("submitit", reason="an optional extra: pip install 'lightning-spectral[slurm]'")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_jobs_end_with_their_codes_and_a_killed_one_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_spectral.sweep.slurm import SlurmLauncher

    program = "import os, sys, time; print(os.getppid(), flush=True); time.sleep({wait}); sys.exit({code})"
    monkeypatch.setattr(sweep_launchers, "command_of", lambda job: [sys.executable, "-c", program.format(**job.labels)])
    launcher = SlurmLauncher(3, gpus=0, cluster="local")
    assert launcher.slots == ["slurm#0", "slurm#1", "slurm#2"]
    wanted = {
        "good": {"code": "0", "wait": "0"},
        "bad": {"code": "3", "wait": "0"},
        "killed": {"code": "0", "wait": "90"},
    }
    jobs = [Job(name, str(tmp_path / name), "", {}, labels, "") for name, labels in wanted.items()]
    for job in jobs:
        Path(job.folder).mkdir()
    handles = [launcher.start(job, slot) for job, slot in zip(jobs, launcher.slots, strict=True)]
    log, deadline = tmp_path / "killed" / sweep_launchers.LOG_FILE, time.monotonic() + 90
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int(log.read_text()), signal.SIGKILL)  # the task itself, as a node that is lost
    while any(launcher.poll(handle) is None for handle in handles) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [launcher.poll(handle) for handle in handles] == [0, 3, 1]


def test_without_a_cluster_it_is_said() -> None:
    with pytest.raises(ValueError, match="this machine has no `sbatch`"):
        sweep_launchers.LAUNCHERS["slurm"](None)
