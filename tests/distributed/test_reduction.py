from __future__ import annotations

import threading

import pytest
import torch

from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import covariance, empty_moments, update_
from lightning_spectral.functional.sample import sample
from lightning_spectral.metrics import SpectralRank
from lightning_spectral.probe.ranks_of import measure
from lightning_spectral.probe.sync import reduce_
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
WIDTH, GROUPS, ROWS = 24, 3, 400


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator) * torch.linspace(1, 4, WIDTH) + 5
    return rows, torch.randint(0, GROUPS, (ROWS,), generator=generator)


def share(rank: int, world_size: int) -> slice:
    """Uneven parts; the last of several ranks gets nothing."""
    cuts = [0, 250, ROWS, ROWS, ROWS][: world_size + 1] if world_size > 2 else [0, 300, ROWS]
    return slice(cuts[rank], cuts[rank + 1])


def reduced(rank: int, world_size: int, owner: int | None):
    rows, groups = data()
    part = share(rank, world_size)
    moments = empty_moments(GROUPS, WIDTH)
    update_(moments, rows[part], *sort_by_group(groups[part], GROUPS))
    reduce_(moments, owner)
    if owner not in (None, rank):
        return None
    return [(sample(moments, [g]), measure(moments, [g]).soft_rank, covariance(moments, g)) for g in range(GROUPS)]


@pytest.mark.parametrize("owner", [None, 1])
@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_and_empty_ranks_equal_one_process(world_size, owner):
    rows, groups = data()
    single = empty_moments(GROUPS, WIDTH)
    update_(single, rows, *sort_by_group(groups, GROUPS))
    for result in run_ranks(reduced, world_size, owner):
        if result is None:
            continue
        for group, (numbers, soft, covariance_DD) in enumerate(result):
            expected = sample(single, [group])
            assert numbers.num_tokens == expected.num_tokens
            for name in ("trace", "frobenius_sq", "quartic"):
                assert getattr(numbers, name) == pytest.approx(getattr(expected, name), rel=1e-6)  # fp32 products
            assert soft == pytest.approx(measure(single, [group]).soft_rank, rel=1e-6)
            torch.testing.assert_close(covariance_DD, covariance(single, group), rtol=1e-5, atol=1e-5)


def metric_on_ranks(rank: int, world_size: int):
    rows, _ = data()
    metric = SpectralRank(width=WIDTH)
    metric.update(rows[share(rank, world_size)])
    value = float(metric.compute()["hard_rank"])
    local_rows = float(metric.count_G.sum())  # compute() gives the local state back
    return value, local_rows


def test_the_metric_synchronises_and_restores():
    single = SpectralRank(width=WIDTH)
    single.update(data()[0])
    results = run_ranks(metric_on_ranks, 2)
    assert [value for value, _ in results] == pytest.approx([float(single.compute()["hard_rank"])] * 2, rel=1e-6)
    assert [rows for _, rows in results] == [300, 100]


def bad_row(rank: int, world_size: int):
    rows, groups = data()
    if rank == 1:
        rows[350] = torch.nan
        groups[350] = 2
    part = share(rank, world_size)
    moments = empty_moments(GROUPS, WIDTH)
    update_(moments, rows[part], *sort_by_group(groups[part], GROUPS))
    reduce_(moments)
    return [measure(moments, [group]).status for group in range(GROUPS)]


def test_nan_on_one_rank_is_a_status_everywhere_and_spoils_one_bucket():
    assert run_ranks(bad_row, 2) == [["few_tokens", "few_tokens", "nonfinite"]] * 2


def peak_memory(rank: int, world_size: int) -> float:
    """Extra resident memory while reducing, in states."""
    width = 1536
    moments = empty_moments(GROUPS, width)
    update_(moments, torch.randn(64, width) + rank, [20, 20, 24])
    reduce_(moments)  # gloo allocates its buffers once
    state = sum(t.numel() * t.element_size() for t in vars(moments).values())
    moments.shift_D += 0.1 * rank
    samples, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    reduce_(moments)
    done.set()
    watcher.join()
    return (max([*samples, before]) - before) / state


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("world_size", [2, 4])
def test_reduction_needs_at_most_three_and_a_half_states_whatever_the_number_of_ranks(world_size):
    assert max(run_ranks(peak_memory, world_size)) <= 3.5
