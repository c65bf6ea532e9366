"""Exchanges among ranks end in bounded time, and alike on every rank that came."""

from __future__ import annotations

import time

import pytest

from lightning_spectral.probe.agreement import Agreement, MissingRankError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def told(rank: int, world_size: int) -> list[list[dict[str, int]]]:
    first, second = Agreement("same"), Agreement("same")
    return [
        first.exchange("a", {"rank": rank}),
        second.exchange("a", {"rank": 10 * rank}),
        first.exchange("b", {"rank": rank + 1}),
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_hears_every_rank(world_size):
    ranks = range(world_size)
    expected = [[{"rank": n} for n in ranks], [{"rank": 10 * n} for n in ranks], [{"rank": n + 1} for n in ranks]]
    assert run_ranks(told, world_size) == [expected] * world_size


def test_one_process_needs_no_store():
    assert Agreement("alone").exchange("a", {"x": 1}) == [{"x": 1}]


def late(rank: int, world_size: int, late_rank: int) -> tuple[str, float]:
    agreement = Agreement("late", limit_s=0.5)
    if rank == late_rank:
        time.sleep(4.5)  # longer than the limit and the others' grace
    began = time.monotonic()
    with pytest.raises(MissingRankError) as caught:
        agreement.exchange("a", {})
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("late_rank", [0, 1])
@pytest.mark.slow
def test_a_late_rank_is_named_and_follows_the_decision(late_rank):
    results = run_ranks(late, 3, late_rank)
    assert {message for message, _ in results} == {f"rank(s) {late_rank} did not come to it in time"}
    assert results[late_rank][1] < 0.5
    assert max(seconds for _, seconds in results) < 4.5


def absent(rank: int, world_size: int) -> float:
    if rank == 1:
        time.sleep(1.0)
        return 0.0
    began = time.monotonic()
    with pytest.raises(MissingRankError, match=r"rank\(s\) 1 did not come"):
        Agreement("absent", limit_s=0.3).exchange("a", {})
    return time.monotonic() - began


def test_a_rank_that_never_comes_costs_the_limit():
    assert 0.3 <= run_ranks(absent, 2)[0] < 1.0
