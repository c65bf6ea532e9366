"""A run of two processes, killed twenty times at random moments, is the run that nobody killed.

pytest -m nightly tests/training/test_many_kills.py
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_spectral import records
from tests.tiny import tiny_tree, write_recipe

KILLS, STEPS = 20, 600


def command(recipe: Path) -> list[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *ranks, "-m", "lightning_spectral", "pretrain", "--config", str(recipe)]


def recipe(folder: Path) -> Path:
    folder.mkdir()
    tree = tiny_tree(folder)
    tree["train"].update(max_steps=STEPS, save_interval=10, micro_batch_size=2)
    tree["eval"]["interval"] = 50
    tree["callbacks"] = [{"class_path": "TailTokenProbe", "init_args": {"every_n_steps": 7}}]
    tree |= {"devices": 2, "strategy": "ddp", "resume": "auto"}
    return write_recipe(folder, tree)


def family(pid: int) -> list[int]:
    """A process and its descendants: torchrun gives each rank a session, so that a group is not enough."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def newest(folder: Path) -> str:
    return max((path.name for path in (folder / "run" / "checkpoints").glob("step-*.ckpt")), default="")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(recipe(whole)), check=True, capture_output=True)
    again, rng, kills = recipe(killed), random.Random(0), 0
    while kills < KILLS:
        before, began = newest(killed), time.monotonic()
        with (tmp_path / "output.txt").open("w") as output:
            process = subprocess.Popen(command(again), start_new_session=True, stdout=output, stderr=output)
        # every other time while it starts or resumes, else once it has saved something new: any moment must do
        starting = kills % 2 == 1
        while process.poll() is None and newest(killed) == before and not (starting and time.monotonic() - began > 3):
            time.sleep(0.01)
        time.sleep(rng.random() * (5 if starting else 0.3))
        if process.poll() is not None:
            assert process.returncode == 0, (tmp_path / "output.txt").read_text()
            break
        ranks = family(process.pid)
        kill(rng.sample(ranks[1:], 1) if kills % 4 == 3 and ranks[1:] else ranks)  # now and then one rank alone
        process.wait()
        kills += 1
    subprocess.run(command(again), check=True, capture_output=True)
    assert kills >= KILLS // 2, "the run was over before it could be killed"
    for read in (records.read_spectral, records.read_losses):
        ours = {r.key: r for r in read(killed / "run").records}  # type: ignore[operator]
        theirs = {r.key: r for r in read(whole / "run").records}  # type: ignore[operator]
        assert ours.keys() == theirs.keys()
        for key, record in ours.items():
            values = [
                (r.num_tokens, getattr(r, "hard_rank", None), getattr(r, "loss", None)) for r in (record, theirs[key])
            ]
            assert values[0] == values[1], key
    weights = [torch.load(folder / "run" / "final" / "lit_model.pth", weights_only=True) for folder in (whole, killed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not list((killed / "run").glob("**/*.partial"))
