"""560 matrices on 64 ranks, as rank 0 of a fake group sees them: the timetable is made once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_spectral.functional.coefficients import coefficient_rows
from lightning_spectral.models.views import Rectangle
from lightning_spectral.optim import Dion, Muon, exchange, low_rank, matrices
from lightning_spectral.optim.exchange import choose_owners, orthogonalization_cost
from tests.distributed.harness import run_ranks

RANKS, MATRICES = 64, 560
MAKERS = {"matrices": lambda m: Muon(m), "factors": lambda m: Dion(m, rank_fraction=1 / 64)}


def second_step(rank: int, world_size: int, kind: str) -> tuple[dict[str, int], float]:
    """(how often the second step called what makes timetables, ms to read the finished one)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    model = nn.ModuleList(nn.Linear(64, 128, bias=False) for _ in range(MATRICES))
    for layer in model:
        layer.weight = nn.Parameter(DTensor.from_local(torch.randn(2, 64), mesh, [Shard(0)], run_check=False))
        layer.weight.grad = DTensor.from_local(torch.randn(2, 64), mesh, [Shard(0)], run_check=False)

    def known(found: list[Any], group: Any) -> Any:  # a fake group cannot be asked
        holdings = [[(Rectangle((2 * r, 2 * r + 2), (0, 64)),) for _ in found] for r in range(RANKS)]
        return holdings, choose_owners(holdings, [orthogonalization_cost(m.shape) for m in found])

    coefficient_rows("polar_express")  # they are computed with the same word
    exchange.ask_holdings = low_rank.ask_holdings = known
    torch.Tensor.tolist, said = lambda tensor: [RANKS] * tensor.numel(), torch.Tensor.tolist  # what the ranks answer
    optimizer = MAKERS[kind](model)
    optimizer.step()
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    for owner, name in (
        (exchange.Exchange, "_pack"),
        (low_rank.LowRankExchange, "_leg"),
        (exchange, "spans_of"),
        (low_rank, "spans_of"),
        (matrices, "spans_of"),
        (exchange, "in_buckets"),
        (matrices, "same_shape_runs"),
    ):
        count(owner, name)
    optimizer.step()
    torch.Tensor.tolist = said
    plan = optimizer._matrix_step[1]
    begin = time.process_time()
    for timetable in plan._low_rank:
        for bucket in timetable.buckets:
            timetable.leg(bucket, True, timetable.left_size)
    for timetable in plan._exchanges:
        for bucket in timetable.buckets:
            [message.size for side in (bucket.inward, bucket.outward) for messages in side for message in messages]
    assert sum(len(timetable.matrices) for timetable in (*plan._low_rank, *plan._exchanges)) == MATRICES
    assert bool(plan._low_rank) == (kind == "factors")
    ended = 1e3 * (time.process_time() - begin)
    dist.destroy_process_group()
    return calls, ended


@pytest.mark.distributed
@pytest.mark.parametrize("kind", MAKERS)
def test_the_timetable_of_560_matrices_on_64_ranks_is_made_once(kind):
    ((calls, milliseconds),) = run_ranks(second_step, 1, kind, init=False, timeout_s=120)
    assert calls == {}
    assert milliseconds < 1
