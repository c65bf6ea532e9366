"""Layers in turns, and states on the host, over two ranks: the numbers of the plain way."""

from __future__ import annotations

import pytest
import torch

from lightning_spectral.probe.grouping import pooled_only
from lightning_spectral.probe.memory_plan import MemoryPlan
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import SpectralProbe
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
LAYERS = 5


def windows(rank: int, world_size: int, plan: MemoryPlan | None) -> list[list[tuple[int, str, int, float | None]]]:
    """Three windows of the same weights: layer, status, tokens and hard rank of each result."""
    model = tiny.Module(intermediate_size=64, n_layer=LAYERS).gpt
    probe = SpectralProbe(model, pooled_only(), ProbeOptions(num_jackknife_groups=2))
    if plan is not None:
        probe.hold(plan)
    found = []
    for turn in range(3):
        probe.turn = turn
        probe.begin()
        probe.start(seed=0)
        ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(10 * turn + rank))
        model(ids)
        probe.collect()
        results = probe.end().sites
        found.append(
            [(r.layer, r.measurement.status, r.measurement.num_tokens, r.measurement.hard_rank) for r in results]
        )
    return found


@pytest.fixture(scope="module")
def plain():
    return run_ranks(windows, 2, None)[0]


@pytest.mark.parametrize("turns", [2, 3])
def test_layers_in_turns_are_reduced_and_shared_by_both_owners(plain, turns):
    first, second = run_ranks(windows, 2, MemoryPlan(1.0, 1.0, turns=turns))
    assert first == second
    for turn, (window, whole) in enumerate(zip(first, plain, strict=True)):
        expected = {
            layer: (layer, status, tokens, rank) if layer % turns == turn % turns else (layer, "not_in_turn", 0, None)
            for layer, status, tokens, rank in whole
        }
        assert {result[0]: result for result in window} == expected


def test_states_on_the_host_are_added_over_ranks(plain):
    first, second = run_ranks(windows, 2, MemoryPlan(1.0, 1.0, on_host=True))
    assert first == second
    for window, whole in zip(first, plain, strict=True):
        assert [result[:3] for result in window] == [result[:3] for result in whole]
        for result, other in zip(window, whole, strict=True):
            assert result[3] == pytest.approx(other[3], rel=1e-6)
