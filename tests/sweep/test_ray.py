"""The Ray launcher on a local Ray (the `ray` extra)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from lightning_spectral.sweep import launchers as sweep_launchers
from lightning_spectral.sweep.plan import Job

ray = pytest.importorskip("ray", reason="an optional extra: pip install 'lightning-spectral[ray]'")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # Ray's own
def test_jobs_run_as_tasks_of_a_local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit({code})"
    monkeypatch.setattr(
        sweep_launchers, "command_of", lambda job: [sys.executable, "-c", program.format(code=job.labels["code"])]
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        launcher = sweep_launchers.RayLauncher()
        assert launcher.slots == ["ray#0", "ray#1"]
        jobs = [Job(f"r{code}", str(tmp_path / f"r{code}"), "", {}, {"code": code}, "") for code in ("0", "3")]
        for job in jobs:
            Path(job.folder).mkdir()
        handles = [launcher.start(job, slot) for job, slot in zip(jobs, launcher.slots, strict=True)]
        deadline = time.monotonic() + 120
        while any(launcher.poll(handle) is None for handle in handles) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [launcher.poll(handle) for handle in handles] == [0, 3]
        assert (tmp_path / "r0" / sweep_launchers.LOG_FILE).read_text() == "1\n"
    finally:
        ray.shutdown()
