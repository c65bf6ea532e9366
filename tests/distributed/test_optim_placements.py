"""HSDP, tensor and expert parallelism, cuts along columns, modules outside DDP: the update of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_spectral.optim import AdaMuon, AdamW, Dion, Dion2, Muon, NorMuon
from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import Weights, distance

pytestmark = pytest.mark.distributed
STEPS = 8
TOLERANCE = 1e-6  # of the update; fp64, but moments and factors are kept in fp32
KINDS: dict[str, Callable[..., Any]] = {
    "muon": lambda m: Muon(m, lr=1e-2, bucket_mib=0.005),  # several buckets
    "normuon": lambda m: NorMuon(m, lr=1e-2, split="projections"),
    "dion": lambda m: Dion(m, lr=1e-2, rank_fraction=0.5),
    "adamw": lambda m: AdamW(m, lr=1e-2),
    "adamuon": lambda m: AdaMuon(m, lr=1e-2),
    "dion2": lambda m: Dion2(m, lr=1e-2, fraction=0.5),
    "clipped": lambda m: Muon(m, lr=1e-2, max_grad_norm=0.02, nonfinite="raise"),
}


class Feed(nn.Module):
    """A fused attention projection (for its views), a feed-forward network and three experts; nothing is even."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 2, 1, 5
        self.qkv = nn.Linear(14, 20, bias=False)
        self.up = nn.Linear(20, 34, bias=False)
        self.down = nn.Linear(34, 14, bias=False)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(self.qkv(x))))) + self.experts(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.up_proj = nn.Parameter(torch.randn(3, 14, 10) / 4)
        self.down_proj = nn.Parameter(torch.randn(3, 10, 14) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bn,enm,emk->bk", x, self.up_proj, self.down_proj).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Feed() for _ in range(2))
        self.norm = nn.LayerNorm(14, bias=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def hsdp(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: Net, mesh: Any = None) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tensor_parallel_fsdp2(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def columns(model: Net) -> Net:
    """FSDP2 that cuts matrices along dimension 1, and experts along dimension 2."""
    for block in model.blocks:
        fully_shard(block, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    return fully_shard(model)


def ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


PLACEMENTS: dict[str, tuple[Callable[[Net], nn.Module], int]] = {
    "ddp": (ddp, 2),
    "hsdp": (hsdp, 4),
    "tp": (tensor_parallel, 2),
    "tp x fsdp2": (tensor_parallel_fsdp2, 4),
    "columns": (columns, 2),
}


def whole(param: Any) -> torch.Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(16, 14, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()


def run(rank: int, world_size: int, placement: str, kind: str) -> Weights:
    model = Net()
    placed = PLACEMENTS[placement][0](model) if placement else model
    optimizer = KINDS[kind](placed)
    train(placed, optimizer, STEPS // 2)
    if placement:  # state on its way through a state dict of its own kind
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = KINDS[kind](placed)
        optimizer.load_state_dict(state)
    train(placed, optimizer, STEPS // 2, STEPS // 2)
    return {name: whole(p) for name, p in model.named_parameters()}


def check(placement: str, kind: str) -> None:
    start = {name: p.detach().clone() for name, p in Net().named_parameters()}
    expected = run(0, 1, "", kind)
    for weights in run_ranks(run, PLACEMENTS[placement][1], placement, kind):
        assert distance(weights, expected, start) < TOLERANCE


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_normuon_equals_one_process(placement):
    check(placement, "normuon")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "normuon"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_optimizer_equals_one_process(placement, kind):
    check(placement, kind)


def full_state_elsewhere(rank: int, world_size: int, placement: str, kind: str) -> tuple[Weights, Weights]:
    """Save whole states under one placement, load them on one process."""
    model = Net()
    placed = PLACEMENTS[placement][0](model)
    optimizer = KINDS[kind](placed)
    train(placed, optimizer, 3)
    middle = {name: whole(p) for name, p in model.named_parameters()}
    state = optimizer.state_dict()
    state["state"] = {
        key: {name: whole(value) for name, value in of_param.items()} for key, of_param in state["state"].items()
    }
    train(placed, optimizer, 3, 3)
    alone = Net()
    alone.load_state_dict(middle)
    other = KINDS[kind](alone)
    other.load_state_dict(copy.deepcopy(state))  # torch keeps the tensors it is given
    train(alone, other, 3, 3)
    there = {name: whole(p) for name, p in model.named_parameters()}
    # and back: whole states into the placement
    again = Net()
    again.load_state_dict(middle)
    again_placed = PLACEMENTS[placement][0](again)
    back = KINDS[kind](again_placed)
    back.load_state_dict(state)
    train(again_placed, back, 3, 3)
    for name, p in again.named_parameters():
        assert torch.equal(whole(p), there[name]), name
    return there, {name: p.detach() for name, p in alone.named_parameters()}


@pytest.mark.parametrize(("placement", "kind"), [("tp x fsdp2", "normuon"), ("columns", "dion"), ("hsdp", "normuon")])
def test_states_go_to_one_process_and_back(placement, kind):
    start = {name: p.detach().clone() for name, p in Net().named_parameters()}
    for there, alone in run_ranks(full_state_elsewhere, PLACEMENTS[placement][1], placement, kind):
        assert distance(there, alone, start) < TOLERANCE


def expert_parallel(rank: int, world_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Experts divided among ranks, with gradients of their own: every rank updates its own ones, alone."""
    mesh = init_device_mesh("cpu", (world_size,))
    experts = nn.Module()
    experts.experts = Experts()
    torch.manual_seed(0)
    full = torch.randn(3, 14, 10)
    gradient = torch.randn(3, 14, 10)
    experts.experts.up_proj = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    experts.experts.down_proj = nn.Parameter(distribute_tensor(full.clone(), mesh, [Replicate()]))
    optimizer = Muon(experts, lr=0.1, precision="fp32", weight_decay=0.0)
    for p in experts.parameters():
        p.grad = distribute_tensor(gradient, mesh, p.placements)
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(output.numel())
        return original(output, *args, **kwargs)

    dist.all_to_all_single = counted
    optimizer.step()
    dist.all_to_all_single = original
    assert sum(sent) < 2 * 3 * 14 * 10 * 4  # the copies' results only: experts that are whole here do not travel
    return full, [whole(p) for p in experts.parameters()]


def test_experts_divided_among_ranks_do_not_travel():
    for full, (cut, copied) in run_ranks(expert_parallel, 2):
        torch.testing.assert_close(cut, copied, rtol=0, atol=1e-6)
        assert not torch.equal(cut, full)


def polar_cosine(before: torch.Tensor, layer: nn.Linear) -> float:
    u, _, v = torch.linalg.svd(layer.weight.grad)
    moved = before - layer.weight.detach()
    return float((moved * (u @ v)).sum() / moved.norm() / (u @ v).norm())


def local_modules(rank: int, world_size: int, ignore: bool) -> list[float]:
    """A module outside DDP, or one that DDP was told to ignore, beside shared ones."""
    torch.manual_seed(1)
    pair = nn.ModuleDict({"s": nn.Linear(16, 16), "l": nn.Linear(16, 16)})
    inside: nn.Module = pair["s"]
    if ignore:
        inside = nn.Sequential(pair["s"], pair["l"])
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inside, ["1.weight", "1.bias"])
    wrapped = DistributedDataParallel(inside)
    optimizer = Muon(pair, lr=1e-2, precision="fp32", orthogonalize="svd", weight_decay=0.0)
    before = {name: layer.weight.detach().clone() for name, layer in pair.items()}
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank))
    output = wrapped(x) if ignore else pair["l"](wrapped(x))
    output.square().mean().backward()
    optimizer.step()
    return [polar_cosine(before[name], layer) for name, layer in pair.items()]


@pytest.mark.parametrize("ignore", [False, True])
def test_modules_of_one_rank_get_their_own_update(ignore):
    for cosines in run_ranks(local_modules, 2, ignore):
        assert cosines == pytest.approx([1.0, 1.0], abs=1e-4)


def two_groups(rank: int, world_size: int) -> list[float]:
    """Two DDP modules over different process groups in one optimizer."""
    torch.manual_seed(2)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = nn.ModuleDict({"both": nn.Linear(16, 16), "pair": nn.Linear(16, 16)})
    first = DistributedDataParallel(pair["both"])
    second = DistributedDataParallel(pair["pair"], process_group=halves[rank // 2])
    optimizer = Muon(pair, lr=1e-2, precision="fp32", orthogonalize="svd", weight_decay=0.0)
    before = {name: layer.weight.detach().clone() for name, layer in pair.items()}
    second(first(torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)))).square().mean().backward()
    optimizer.step()
    return [polar_cosine(before[name], layer) for name, layer in pair.items()]


def test_two_ddp_groups_share_their_own_matrices():
    for cosines in run_ranks(two_groups, 4):
        assert cosines == pytest.approx([1.0, 1.0], abs=1e-4)


def partitioned(rank: int, world_size: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Muon, lr=1e-2)
    model(torch.ones(1, 8)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore")  # importing torch.distributed.optim warns of torch.jit
def test_an_optimizer_that_gives_every_rank_its_own_parameters_is_refused():
    for message in run_ranks(partitioned, 2):
        assert "use it alone under DDP, it divides the work itself" in message


def partial_sum(rank: int, world_size: int) -> str:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (world_size,))
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Partial()]))
    try:
        Muon(layer)
    except ValueError as error:
        return str(error)
    return ""


def test_a_partial_sum_is_refused_by_name():
    for message in run_ranks(partial_sum, 2):
        assert "`weight` of shape (4, 4) is placed as" in message
        assert "partial sum" in message
