"""The rows of several ranks at each layer's owner: an even sample, in messages whose number experts do not change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.stacks import Site
from lightning_spectral.probe.row_sample import RowSample
from lightning_spectral.probe.sync import reduce_, reduce_all_
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
WIDTH, PLACES = 6, 400


def site(layer: int, expert: int | None = None) -> Site:
    router = None if expert is None else nn.Identity()
    return Site(f"h.{layer}.{expert}", layer, "post", nn.Linear(WIDTH, 2), expert, "h", routed_by=router)


def layers_of(num_layers: int, num_experts: int) -> list[tuple[int, list[Site]]]:
    experts = [None] if num_experts == 1 else list(range(num_experts))
    return [(layer % 2, [site(layer, expert) for expert in experts]) for layer in range(num_layers)]


def call(layers: list[tuple[int, list[Site]]], seed: int) -> ForwardCall:
    """Every row holds its rank, place and layer; each expert has every n-th place."""
    rows, places = {}, {}
    for layer, (_, members) in enumerate(layers):
        for expert, member in enumerate(members):
            own = torch.arange(expert, PLACES, len(members))
            content = torch.stack([torch.full_like(own, seed), own, torch.full_like(own, layer)], 1).float()
            rows[member.key] = torch.cat([content, torch.zeros(len(own), WIDTH - 3)], 1)
            places[member.key] = own
    return ForwardCall("h", (4, 100), None, torch.arange(PLACES) // 100, 4, rows, places)


def counted(seen: Counter[str]) -> None:
    """Count every collective of this process."""

    def wrapped(name: str, run: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return run(*args, **kwargs)

        return counting

    for name in ("gather", "all_gather", "all_reduce", "reduce", "all_gather_object", "broadcast"):
        setattr(dist, name, wrapped(name, getattr(dist, name)))


def gathered(rank: int, world_size: int, limit: float, num_experts: int, empty_rank: int | None) -> Any:
    seen: Counter[str] = Counter()
    counted(seen)
    layers = layers_of(3, num_experts)
    sample = RowSample(limit, 1, seed=rank)
    if rank != empty_rank:
        one = call(layers, rank)
        own = [site for _, members in layers for site in members]
        sample.add(one, own, torch.zeros(PLACES).long(), one.sequences_P)
    owned = sample.gather(layers, None, world_size)
    found = {
        key: (rows.rows_ND[:, :3].tolist(), rows.sequences_N.tolist(), rows.seen_G.tolist())
        for key, rows in owned.items()
    }
    return found, dict(seen)


@pytest.mark.parametrize("num_experts", [1, 8])
@pytest.mark.parametrize("empty_rank", [None, 0, 1])
def test_all_rows_reach_the_owner_where_they_fit(num_experts: int, empty_rank: int | None) -> None:
    results = run_ranks(gathered, 2, 1e9, num_experts, empty_rank)
    for rank, (found, collectives) in enumerate(results):
        layers = layers_of(3, num_experts)
        assert set(found) == {s.key for owner, members in layers if owner == rank for s in members}
        for layer, (owner, members) in enumerate(layers):
            for expert, member in enumerate(members) if owner == rank else ():
                rows, sequences, seen = found[member.key]
                ranks = [r for r in (0, 1) if r != empty_rank]
                places = range(expert, PLACES, num_experts)
                assert rows == [[r, place, layer] for r in ranks for place in places]
                assert [s % (1 << 24) for s in sequences] == [place // 100 for _ in ranks for place in places]
                assert len(set(sequences)) == 4 * len(ranks)  # those of two ranks are never the same
                assert seen == [len(ranks) * len(places)]
        assert collectives == {"all_reduce": 1, "all_gather": 1, "gather": 2 * 3}  # two a layer, experts or not


def test_a_bounded_sample_is_even_over_ranks_and_the_same_places_in_every_layer() -> None:
    limit = 3 * 100 * WIDTH * 4  # a quarter of the rows of three layers
    found = {**(results := run_ranks(gathered, 2, limit, 1, None))[0][0], **results[1][0]}
    by_layer = [{tuple(row[:2]) for row in rows} for rows, _, _ in found.values()]
    assert by_layer[0] == by_layer[1] == by_layer[2]
    per_rank = [sum(row[0] == rank for row in by_layer[0]) for rank in (0, 1)]
    assert all(55 < kept <= 100 for kept in per_rank)  # binomial: 4 standard deviations of 90 of 400 are 33
    assert all(seen == [2 * PLACES] for _, _, seen in found.values())


def added(rank: int, world_size: int, num_states: int) -> Any:
    seen: Counter[str] = Counter()
    torch.manual_seed(rank)
    together, apart = ([filled(k) for k in range(num_states)] for _ in range(2))
    counted(seen)
    reduce_all_(together, 0)
    collectives = dict(seen)
    for state in apart:
        reduce_(state, 0)
    return collectives, [(a.scatter_GP, b.scatter_GP, a.sum_GD, b.sum_GD) for a, b in zip(together, apart, strict=True)]


def filled(index: int) -> Moments:
    state = empty_moments(2, 8 + index)
    generator = torch.Generator().manual_seed(index)
    update_(state, torch.randn(10, 8 + index, generator=generator), [4, 6])
    return state


def test_experts_are_added_in_as_many_messages_as_one_state() -> None:
    for num_states in (1, 6):
        results = run_ranks(added, 2, num_states)
        assert [collectives for collectives, _ in results] == [{"all_reduce": 1, "reduce": 2}] * 2
        for ours, theirs, our_sums, their_sums in results[0][1]:
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(our_sums, their_sums)
