"""A machine that is taken away: all ranks stop after the same step, and a requeued job is the same run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_spectral import records
from lightning_spectral.training import checkpoints, preemption
from lightning_spectral.training.preemption import StopSignals
from tests.distributed.harness import run_ranks
from tests.tiny import tiny_tree, write_recipe


def _loop(rank: int, world_size: int, signalled: dict[int, int]) -> tuple[int, str | None]:
    """Optimizer steps with a collective in each; a rank of ``signalled`` gets SIGTERM in that step."""
    signals = StopSignals()
    signals.install(world_size)
    for step in range(1, 20):
        if signalled.get(rank) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        dist.barrier()
        name = signals.due(step, world_size)
        if name:
            return step, name
    return -1, None


@pytest.mark.distributed
@pytest.mark.parametrize("signalled", [{1: 3}, {0: 3}, {0: 3, 1: 4}, {0: 4, 1: 3}])
def test_all_ranks_stop_after_the_same_step(signalled: dict[int, int]) -> None:
    assert run_ranks(_loop, 2, signalled) == [(5, "SIGTERM")] * 2


@pytest.mark.distributed
def test_without_a_signal_nobody_stops() -> None:
    assert run_ranks(_loop, 2, {}) == [(-1, None)] * 2


def test_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.install(world_size=2)
    assert signal.getsignal(signal.SIGTERM) == signals._note
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),  # srun sets neither RANK nor LOCAL_RANK
        ({"SLURM_PROCID": "0"}, True),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),  # torchrun inside a job
        ({"NODE_RANK": "1"}, False),  # the first process of the second node, before Lightning starts its others
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"GROUP_RANK": "2"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),  # Lightning's launcher inside an interactive job
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
    ],
)
def test_who_is_first(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in preemption._RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert preemption.first_rank() is first


def test_the_job_is_requeued_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    preemption.requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    preemption.requeue()
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 77", "requeue 70_2"]


def _scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = folder / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preempted_slurm_job_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, monkeypatch)
    slurm = {"NTASKS": "1", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}
    for name, value in {**slurm, "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    tree = tiny_tree(tmp_path)
    tree["train"].update(max_steps=400, save_interval=100)
    tree["callbacks"] = [{"class_path": "SpectralRankCallback", "init_args": {"every_n_steps": 5}}]
    recipe = write_recipe(tmp_path, tree)
    command = [sys.executable, "-m", "lightning_spectral", "pretrain", "--config", str(recipe)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    file = tmp_path / "run" / records.SPECTRAL_FILE
    while first.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 6):
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    output = first.communicate()[0].decode()
    assert first.returncode == 143, output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    saved = checkpoints.newest_whole(tmp_path / "run")
    assert saved is not None
    assert not list((tmp_path / "run").glob("hpc_ckpt_*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [record.step for record in records.read_spectral(tmp_path / "run").records if record.layer == 0]
    assert steps == sorted({*range(0, 400, 5), 399})
    assert not (tmp_path / "run" / "previous").exists()
