"""Every optimizer under DDP, FSDP1, FSDP2, HSDP, tensor and expert parallelism: the update of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_spectral.models.views import Rectangle
from lightning_spectral.optim import SOAP, AdaMuon, AdamW, Dion, Dion2, Muon, MuonH, NorDion2, NorMuon, matrices
from lightning_spectral.optim.low_rank import factor_bytes, whole_bytes
from lightning_spectral.optim.matrices import matrices_of_member
from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import Weights, distance

pytestmark = pytest.mark.distributed
STEPS = 20
# Of the update. Everything is fp64, so that no sign, order or eigenvector hangs on the order of a sum, but moments and
# factors are kept in fp32.
TOLERANCE = 1e-6
LAUNCHES_SAVED = "muon, transposed shapes together as on an accelerator"
KINDS: dict[str, Callable[..., Any]] = {
    "muon": lambda m: Muon(m, lr=1e-2, bucket_mib=0.005),  # several buckets
    LAUNCHES_SAVED: lambda m: Muon(m, lr=1e-2),
    "normuon": lambda m: NorMuon(m, lr=1e-2, split="projections"),
    "dion": lambda m: Dion(m, lr=1e-2, rank_fraction=0.5),  # matrices travel
    "dion, factors": lambda m: Dion(m, lr=1e-2, rank_fraction=0.1),
    "dion, orthogonal factors": lambda m: Dion(
        m, lr=1e-2, rank_fraction=0.1, orthogonal_right=True, power_iterations=2, bucket_mib=0.001
    ),
    "adamw": lambda m: AdamW(m, lr=1e-2),
    "adamuon": lambda m: AdaMuon(m, lr=1e-2),
    "dion2": lambda m: Dion2(m, lr=1e-2, fraction=0.5),
    "nordion2": lambda m: NorDion2(m, lr=1e-2, fraction=0.3),
    "muonh": lambda m: MuonH(m, lr=1e-2),
    "soap": lambda m: SOAP(m, lr=1e-3, basis_every=4),
    "clipped": lambda m: Muon(m, lr=1e-2, max_grad_norm=0.02, nonfinite="raise"),
}


class Feed(nn.Module):
    """Fused projections (for their views), a feed-forward network and three experts; nothing is even."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 2, 1, 5
        self.qkv = nn.Linear(14, 20, bias=False)
        self.up = nn.Linear(20, 34, bias=False)
        self.down = nn.Linear(34, 14, bias=False)
        self.experts = GptOssExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(self.qkv(x))))) + self.experts(x)


class GptOssExperts(nn.Module):
    """Gate and up in turns: under `split` each is every second column."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.gate_up_proj = nn.Parameter(torch.randn(3, 14, 22) / 4)
        self.down_proj = nn.Parameter(torch.randn(3, 11, 14) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.einsum("bn,enm->bem", x, self.gate_up_proj)
        return torch.einsum("bem,emk->bk", both[..., ::2].tanh() * both[..., 1::2], self.down_proj).tanh()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.up_proj = nn.Parameter(torch.randn(3, 14, 10) / 4)
        self.down_proj = nn.Parameter(torch.randn(3, 10, 14) / 4)


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


def fsdp1(model: Net) -> nn.Module:
    policy = ModuleWrapPolicy({Feed})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)


def fsdp2(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


PLACEMENTS: dict[str, tuple[Callable[[Net], nn.Module], int]] = {
    "ddp": (ddp, 2),
    "ddp, 4": (ddp, 4),
    "fsdp1": (fsdp1, 2),
    "fsdp1, 4": (fsdp1, 4),
    "fsdp2": (fsdp2, 2),
    "fsdp2, 4": (fsdp2, 4),
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


def weights_of(placed: nn.Module) -> Weights:
    if isinstance(placed, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(placed):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in placed.named_parameters()}
    return {name.removeprefix("module."): whole(p) for name, p in placed.named_parameters()}


def run(rank: int, world_size: int, placement: str, steps: int) -> dict[str, Weights]:
    """Every optimizer, each on a new model."""
    found = {}
    for kind, make in KINDS.items():
        together = bool(placement) and kind == LAUNCHES_SAVED
        with patch.object(matrices, "_saves_launches", return_value=together):
            found[kind] = trained(make, placement, steps)
    return found


def trained(make: Callable[..., Any], placement: str, steps: int) -> Weights:
    model = Net()
    placed = PLACEMENTS[placement][0](model) if placement else model
    optimizer = make(placed)
    train(placed, optimizer, steps // 2)
    if placement:  # state on its way through a state dict of its own kind
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = make(placed)
        optimizer.load_state_dict(state)
    train(placed, optimizer, steps // 2, steps // 2)
    return weights_of(placed)


@lru_cache(maxsize=2)
def alone(steps: int) -> dict[str, Weights]:
    return run(0, 1, "", steps)


def check(placement: str, steps: int) -> None:
    start = {name: p.detach().clone() for name, p in Net().named_parameters()}
    for found in run_ranks(run, PLACEMENTS[placement][1], placement, steps, timeout_s=500):
        errors = {kind: distance(found[kind], alone(steps)[kind], start) for kind in KINDS}
        assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("placement", ["fsdp2", "tp"])
def test_a_few_steps_of_every_optimizer_equal_one_process(placement):
    check(placement, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_optimizer_equals_one_process(placement):
    check(placement, STEPS)


def traffic(rank: int, world_size: int, placement: str, orthogonal: bool, power_iterations: int) -> tuple[int, int]:
    """(bytes that leave this rank for another in one step, bytes of all ranks by the formula)."""
    model = Net()
    placed = PLACEMENTS[placement][0](model)
    settings = {"orthogonal_right": orthogonal, "power_iterations": power_iterations}
    optimizer = Dion(placed, lr=1e-2, rank_fraction=0.1, **settings)
    train(placed, optimizer, 1)
    left = 0
    original = dist.all_to_all_single

    def counted(output: Any, entering: Any, arrives: Any, leaves: Any, group: Any = None, **options: Any) -> Any:
        nonlocal left
        here = dist.get_rank(group)
        left += entering.element_size() * sum(count for peer, count in enumerate(leaves) if peer != here)
        return original(output, entering, arrives, leaves, group=group, **options)

    plan = optimizer._matrix_step[1]
    assert plan._low_rank
    dist.all_to_all_single = counted
    plan._exchanges, exchanges = [], plan._exchanges  # what travels whole is not counted here
    optimizer.step()
    dist.all_to_all_single = original
    assert len(exchanges) <= 1
    expected = sum(
        factor_bytes(matrix, [of_rank[i] for of_rank in exchange.holdings], exchange.owners[i])
        for exchange in plan._low_rank
        for i, matrix in enumerate(exchange.matrices)
    )
    return left, expected


def ordinary_traffic(rank: int, world_size: int, placement: str) -> tuple[int, int, int]:
    """(bytes that leave this rank for another in one step of Muon; of all ranks by the formula; room to align them)."""
    model = Net()
    placed = PLACEMENTS[placement][0](model)
    optimizer = Muon(placed, lr=1e-2, precision="fp32", norm_eps=0.0)  # no extra state: directions and updates alone
    train(placed, optimizer, 1)
    left, original = 0, dist.all_to_all_single

    def counted(output: Any, entering: Any, arrives: Any, leaves: Any, group: Any = None, **options: Any) -> Any:
        nonlocal left
        here = dist.get_rank(group)
        left += entering.element_size() * sum(count for peer, count in enumerate(leaves) if peer != here)
        return original(output, entering, arrives, leaves, group=group, **options)

    dist.all_to_all_single = counted
    optimizer.step()
    dist.all_to_all_single = original
    expected = messages = 0
    for exchange in optimizer._matrix_step[1]._exchanges:
        for i, owner in enumerate(exchange.owners):
            held = {r: sum(part.numel for part in of_rank[i]) for r, of_rank in enumerate(exchange.holdings)}
            copies = {r for r, here in held.items() if here == exchange.matrices[i].numel}
            inward = {} if owner in copies else {r: n for r, n in held.items() if r != owner}
            outward = {r: n for r, n in held.items() if r != owner}
            expected += 4 * (sum(inward.values()) + sum(outward.values()))  # fp32: there, and back
            messages += sum(map(bool, inward.values())) + sum(map(bool, outward.values()))
    return left, expected, 16 * messages


@pytest.mark.parametrize("placement", ["ddp", "fsdp1", "fsdp2", "columns"])
def test_bytes_of_muon_are_those_of_the_formula(placement):
    """Each matrix goes to its owner once, if it is cut, and its update once to every rank that holds some of it."""
    counted = run_ranks(ordinary_traffic, PLACEMENTS[placement][1], placement)
    left, (_, expected, room) = sum(one for one, _, _ in counted), counted[0]
    assert len({(formula, align) for _, formula, align in counted}) == 1
    assert expected > 0
    assert expected <= left <= expected + room


@pytest.mark.parametrize(("orthogonal", "power_iterations"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("placement", ["fsdp2", "columns", "fsdp1", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_bytes_of_factors_are_those_of_the_formula(placement, orthogonal, power_iterations):
    counted = run_ranks(traffic, PLACEMENTS[placement][1], placement, orthogonal, power_iterations)
    assert len({expected for _, expected in counted}) == 1
    assert sum(left for left, _ in counted) == counted[0][1]


def test_the_formula_by_hand():
    """Two ranks with half of the rows each of 100 x 60, rank 4: the holder that is not the owner has 50 x 60."""
    layer = nn.Linear(60, 100, bias=False)
    optimizer = Dion(layer, rank_fraction=4 / 60)
    (matrix,) = matrices_of_member(optimizer._members()[0], optimizer.matrix_rules["dion"])
    halves = [(Rectangle((0, 50), (0, 60)),), (Rectangle((50, 100), (0, 60)),)]
    left, right = 50 * 4, 60 * 4
    kept = 0  # the right factor and the peak are kept with the first rows, which are the owner's
    expected = 60 * 4 + 2 * (left + right) + 4 + 3 + 2 * kept
    assert factor_bytes(matrix, halves, owner=0) == 4 * expected
    assert whole_bytes(matrix, halves, owner=0) == 4 * 3 * 50 * 60
    # m + n times r, and a few numbers: five times fewer than m times n
    assert factor_bytes(matrix, halves, owner=0) < whole_bytes(matrix, halves, owner=0) / 5


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
