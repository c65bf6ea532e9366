"""What only sharded training can get wrong: global norms, one rank's NaN, collectives, owners, memory, dtypes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_spectral.models.placement import Shard, Shards, local
from lightning_spectral.models.views import Rectangle, Views
from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon
from lightning_spectral.optim.exchange import choose_owners
from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import KINDS, STRATEGIES, Weights, distance, fresh_model, run, train
from tests.optim.models import TinyLM
from tests.optim.models import train as train_tiny

pytestmark = pytest.mark.distributed


def clipped_run(rank: int, world_size: int, strategy: str) -> Weights:
    KINDS["clipped"] = lambda params: Muon(params, lr=1e-2, precision="fp32", max_grad_norm=0.05)
    return run(rank, world_size, strategy, "clipped", 5)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_max_grad_norm_is_global(strategy):
    expected = clipped_run(0, 1, "single")
    start = {name: p.detach().clone() for name, p in fresh_model().named_parameters()}
    for weights in run_ranks(clipped_run, 2, strategy):
        assert distance(weights, expected, start) < 1e-5  # fp32, another order of summation


def clipped_beside_local(rank: int, world_size: int) -> tuple[float, float]:
    """(factor of the clipped gradient, the one of the whole gradient of all ranks) with a module of this rank alone."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"shared": nn.Linear(6, 6, bias=False), "alone": nn.Linear(6, 6, bias=False)})
    wrapped = nn.parallel.DistributedDataParallel(pair["shared"])
    optimizer = AdamW(pair, max_grad_norm=0.01)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
    pair["alone"](wrapped(x)).square().mean().backward()
    squares: list[Any] = [None] * world_size
    dist.all_gather_object(squares, float(pair["alone"].weight.grad.norm() ** 2))
    norm = (float(pair["shared"].weight.grad.norm() ** 2) + sum(squares)) ** 0.5
    optimizer.step()
    first = optimizer.state[pair["shared"].weight]["exp_avg"] / (1 - 0.9)
    return float(first.norm() / pair["shared"].weight.grad.norm()), 0.01 / (norm + 1e-6)


def test_modules_of_one_rank_count_in_the_norm_of_all():
    found = run_ranks(clipped_beside_local, 2)
    for factor, expected in found:
        assert factor == pytest.approx(expected, rel=1e-5)
    assert found[0][0] == found[1][0]  # the shared module is clipped alike


def one_nan(rank: int, world_size: int, policy: str) -> tuple[bool, str]:
    KINDS["guarded"] = lambda params: Muon(params, nonfinite=policy)
    trained = STRATEGIES["fsdp2"]("guarded")
    train(trained, 1)
    before = trained.weights()
    if rank == 1:
        next(trained.model.parameters()).grad._local_tensor[0, 0] = float("nan")
    message = ""
    try:
        trained.optimizer.step()
    except RuntimeError as error:
        message = str(error)
    after = trained.weights()
    return all(torch.equal(before[name], after[name]) for name in before), message


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_nan_on_one_rank_is_a_decision_of_all(policy):
    for unchanged, message in run_ranks(one_nan, 2, policy):
        assert unchanged
        assert ("NaN or Inf" in message) == (policy == "raise")


def counted_step(rank: int, world_size: int, kind: str) -> dict[str, int]:
    trained = STRATEGIES["fsdp2"](kind)
    train(trained, 2)
    calls: dict[str, int] = {}

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    collectives = ("all_to_all_single", "all_to_all", "all_reduce", "broadcast", "all_gather", "all_gather_object")
    for name in (*collectives, "all_gather_into_tensor", "reduce_scatter_tensor", "barrier"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    trained.optimizer.step()
    return calls


# Dion's square matrices travel whole, the others as factors: state, right factor, twice left and right, the end.
CALLS = {"muon": (2, 1), "normuon": (2, 1), "dion": (2 + 7, 2)}


@pytest.mark.parametrize("kind", CALLS)
def test_a_few_exchanges_and_a_small_sum_for_each_kind_a_step_for_the_whole_model(kind):
    exchanges, sums = CALLS[kind]
    for calls in run_ranks(counted_step, 2, kind):
        assert calls == {"all_to_all_single": exchanges, "all_reduce": sums}


def shard_tiny(model: TinyLM) -> TinyLM:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def odd_models(rank: int, world_size: int) -> None:
    """Frozen and unused parameters, tied weights, two dtypes, more ranks than rows."""
    model = TinyLM()
    model.head.weight = model.embed.weight
    model.blocks[0].qkv.weight.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    model = shard_tiny(model)
    optimizer = NorMuon(model, lr=1e-2)
    train_tiny(model, optimizer, 2)
    assert not optimizer.state[model.blocks[0].qkv.weight]
    model.blocks[0].qkv.weight.requires_grad_(True)
    train_tiny(model, optimizer, 2)
    assert optimizer.state[model.blocks[0].qkv.weight]["step"] == 2
    assert optimizer.state[model.unused.weight]["step"] == 0
    for p in model.parameters():
        assert bool(torch.isfinite(p.full_tensor()).all())
    small = nn.Linear(5, 2, bias=False)
    fully_shard(small)
    optimizer = Dion(small, lr=0.1)
    small(torch.ones(1, 5)).sum().backward()
    before = small.weight.full_tensor().clone()
    optimizer.step()
    assert not torch.equal(before, small.weight.full_tensor())


def test_frozen_unused_tied_and_tiny_parameters():
    run_ranks(odd_models, 4)


def owned_spectra(rank: int, world_size: int) -> list[str]:
    trained = STRATEGIES["fsdp2"]("muon")
    trained.optimizer.observe_next_step()
    train(trained, 1)
    return sorted(trained.optimizer.observed)


def test_every_matrix_is_observed_on_exactly_one_rank():
    seen = run_ranks(owned_spectra, 2)
    expected = [name for name, p in fresh_model().named_parameters() if p.ndim == 2 and "transformer.h" in name]
    assert sorted(seen[0] + seen[1]) == sorted(expected)
    assert seen[0]
    assert seen[1]


def one_gradient_missing(rank: int, world_size: int, strategy: str, everywhere: bool) -> str:
    trained = STRATEGIES[strategy]("normuon")
    train(trained, 1)
    matrix = next(p for name, p in trained.model.named_parameters() if "qkv" in name)
    if rank == 1 or everywhere:
        matrix.grad = None
    before = local(matrix).clone()
    try:
        trained.optimizer.step()
    except RuntimeError as error:
        return str(error)
    assert torch.equal(before, local(matrix))
    return ""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_gradient_that_only_some_ranks_have_is_an_error_on_all(strategy):
    for message in run_ranks(one_gradient_missing, 2, strategy, False):
        assert "`grad is None` on ranks [1]" in message
    assert run_ranks(one_gradient_missing, 2, strategy, True) == ["", ""]


def test_owners_are_holders_and_balanced():
    def held(low: int, high: int) -> tuple[Rectangle, ...]:
        return (Rectangle((low, high), (0, 3)),) if high > low else ()

    holdings = [[held(0, 10), held(0, 10), held(0, 5), ()], [held(10, 20), held(10, 20), held(5, 20), held(0, 8)]]
    owners = choose_owners(holdings, [4.0, 4.0, 1.0, 1.0])
    assert sorted(owners[:2]) == [0, 1]
    assert owners[3] == 1  # rank 0 holds nothing of it
    whole = nn.Linear(3, 2).weight
    assert Shards().of(whole) == Shard((2, 3), ((0, 2), (0, 3)))
    assert Shards().of(whole).rectangles(Views((2, 3))) == [(Rectangle((0, 2), (0, 3)), 0)]


class _Replicated(nn.parallel.DistributedDataParallel):
    """What users derive must be found as well."""


def looks_at_the_heap(rank: int, world_size: int) -> list[int]:
    """Walks over the heap when an optimizer is built, and until three steps and a save later."""
    looks = []
    found = gc.get_objects

    def counted(*args):
        looks.append(args)
        return found(*args)

    gc.get_objects = counted
    model = _Replicated(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)))
    optimizer = Muon(model.module)
    built = len(looks)
    assert all(member.shard.group is not None for member in optimizer._members())
    model(torch.ones(2, 8)).sum().backward()
    for _ in range(3):
        optimizer.step()
    optimizer.state_dict()
    return [built, len(looks)]


def test_one_look_at_the_heap_when_an_optimizer_is_built_and_none_in_a_step():
    assert run_ranks(looks_at_the_heap, 2) == [[1, 1], [1, 1]]
