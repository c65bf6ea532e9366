"""The Ray launcher on a local Ray (the `ray` extra)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lightning_spectral import records
from lightning_spectral.sweep import launchers as sweep_launchers
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep import run as sweep_run
from lightning_spectral.sweep.plan import Job
from tests.tiny import tiny_tree, write_recipe

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


def _worker_of(folder: Path) -> int | None:
    """Id of the process that trains in a folder."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lightning_spectral.sweep.worker" in words and any(word.startswith(bytes(folder)) for word in words):
            return int(status.parent.name)
    return None


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_run_whose_ray_worker_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["train"].update(max_steps=120, save_interval=10)
    tree["callbacks"] = [{"class_path": "TailTokenProbe", "init_args": {"every_n_steps": 10}}]
    found = sweep.plan(write_recipe(tmp_path, tree), axes=["seed=0"], out_dir=tmp_path / "out")
    folder, killed = Path(found.jobs[0].folder), []

    def kill_once(board: sweep_run.SweepProgress) -> None:
        if not killed and len(list((folder / "checkpoints").glob("step-*.ckpt"))):
            worker = _worker_of(folder)
            if worker is not None:
                killed.append(worker)
                os.kill(_parent_of(worker), signal.SIGKILL)  # the task of Ray, not what it runs

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        board = sweep_run.run_all(found, sweep_launchers.RayLauncher(), kill_once, poll_s=0.05)
    finally:
        ray.shutdown()
    assert killed
    assert board.restarts == {found.jobs[0].run_id: 1}
    assert list(board.done) == [found.jobs[0].run_id]
    assert not Path(f"/proc/{killed[0]}").exists() or _worker_of(folder) is None  # it did not train on alone
    steps = {record.step for record in records.read_spectral(folder).records}
    assert steps == {*range(0, 120, 10), 119}
    assert not (folder / "previous").exists()
