"""Collectives give the sums that they should, and give up when a rank is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_spectral.probe import collectives
from lightning_spectral.probe.agreement import MissingRankError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def sums(rank: int, world: int) -> tuple[list[float], list[float], list[object]]:
    mine, reduced = torch.full((3,), rank + 1.0), torch.full((3,), rank + 1.0)
    collectives.all_reduce(mine)
    collectives.reduce(reduced, 1)
    return mine.tolist(), reduced.tolist(), collectives.all_gather_object({"rank": "r" * (10 * rank)})


def test_they_add_and_gather() -> None:
    first, second = run_ranks(sums, 2)
    assert first[0] == second[0] == [3.0] * 3
    assert second[1] == [3.0] * 3
    assert first[2] == second[2] == [{"rank": ""}, {"rank": "r" * 10}]


def never_comes(rank: int, world: int, file: str) -> tuple[str, float]:
    collectives.LIMIT_S = 1.0
    dist.barrier()
    if rank == 1:
        while not Path(file).exists():  # alive, but elsewhere
            time.sleep(0.05)
        dist.all_reduce(torch.ones(4))  # late: what the other has given up ends, so that both can leave the group
        return "", 0.0
    began = time.monotonic()
    try:
        collectives.all_reduce(torch.ones(4))
    except MissingRankError as error:
        return str(error), time.monotonic() - began
    finally:
        Path(file).touch()
    return "finished", 0.0


def test_a_rank_that_never_comes_is_waited_for_within_the_limit(tmp_path: Path) -> None:
    (said, waited), _ = run_ranks(never_comes, 2, str(tmp_path / "done"))
    assert "did not finish" in said
    assert 0.9 < waited < 5
