"""What the host of a GPU would wait for, told without one: fake tensors refuse to say a value."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.functional.coefficients import coefficient_rows
from lightning_spectral.functional.same_shape import same_shape_runs
from lightning_spectral.optim import (
    SOAP,
    AdaMuon,
    AdamW,
    Dion,
    Dion2,
    Muon,
    MuonH,
    NorDion2,
    NorMuon,
    gradients,
    matrix_rule,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Shortcuts that a CPU takes by looking at a value are not taken; coefficients are computed once, before."""
    for name in ("polar_express", "muon"):
        coefficient_rows(name)
    for module in (sys.modules["lightning_spectral.functional.orthogonalize"], matrix_rule, gradients):
        monkeypatch.setattr(module, "answers_at_once", lambda tensor: False)


KINDS = {
    "adamw": lambda m: AdamW(m),
    "adamuon": lambda m: AdaMuon(m),
    "dion": lambda m: Dion(m),
    "dion2": lambda m: Dion2(m),
    "muon": lambda m: Muon(m),
    "muon, clipped": lambda m: Muon(m, max_grad_norm=1.0),
    "muon, stochastic bf16": lambda m: Muon(m, bf16_weights="stochastic"),
    "muon, compensated bf16": lambda m: Muon(m, bf16_weights="compensated"),
    "muon, lion": lambda m: Muon(m, fallback="lion"),
    "like torch": lambda m: Muon.like_torch(m),
    "muonh": lambda m: MuonH(m),
    "nordion2": lambda m: NorDion2(m),
    "normuon": lambda m: NorMuon(m),
}


class Launches(TorchDispatchMode):
    """Counts what would be kernels: no views, no bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.name.endswith(("detach", "empty", "empty_like", "new_empty")):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def model_of(layers: int, dtype: torch.dtype = torch.float32, width: int = 32) -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(50, width, dtype=dtype)
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(n, m, dtype=dtype), "down": nn.Linear(m, n, dtype=dtype)})
        for n, m in [(width, 2 * width)] * layers
    )
    return model


def step(kind: str, layers: int = 2) -> list[str]:
    with FakeTensorMode():
        model = model_of(layers, torch.bfloat16 if "bf16" in kind else torch.float32)
        optimizer = KINDS[kind](model)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            with Launches() as seen:
                optimizer.step()
    return seen.names


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # to see that two are the same
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_one_device_never_waits(kind):
    """A value that the host asks for is an error of the fake tensor."""
    assert step(kind)


def test_a_look_at_nonfinite_gradients_waits_once(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: waits.append(tensor) or 0.0)
    with FakeTensorMode():
        model = model_of(2)
        optimizer = Muon(model, nonfinite="skip", max_grad_norm=1.0)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert len(waits) == 1


def soap_waits(monkeypatch) -> list[str]:
    """What the host asks of tensors that would lie on a device, as it is asked; matrices are 0-d only in steps."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, ask=ask, name=name: waits.append(name) or ask(tensor))
    return waits


def random_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_soap_waits_for_the_numbers_of_its_steps_once(monkeypatch):
    model = model_of(5)
    optimizer = SOAP(model, basis_every=2)
    waits = soap_waits(monkeypatch)
    random_step(model, optimizer)
    assert waits == ["tolist", "tolist"]  # up and down projections
    for _ in range(3):
        random_step(model, optimizer)
    assert waits == ["tolist", "tolist"]


def test_soap_asks_again_after_its_state_was_loaded_or_cleared():
    model, same = model_of(1), model_of(1)
    same.load_state_dict(model.state_dict())
    optimizer, other = SOAP(model, basis_every=2), SOAP(same, basis_every=2)
    torch.manual_seed(0)
    for _ in range(3):
        random_step(model, optimizer)
    torch.manual_seed(0)
    random_step(same, other)
    other.state.clear()  # a first step again, with a basis of its own
    random_step(same, other)
    assert [int(state["count"]) for state in other.state.values() if "count" in state] == [1, 1]
    assert all(p.isfinite().all() for p in same.parameters())
    same.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (same, other)):
        torch.manual_seed(1)
        random_step(one, its)  # the fourth: the basis is renewed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "at_most"), [("muon", 40), ("dion", 60), ("muon, stochastic bf16", 130)])
def test_launches_grow_by_a_few_a_matrix(kind, at_most):
    """What one more matrix and its bias cost in kernels: counted 52 (dion) and 118 (stochastic rounding)."""
    few, many = len(step(kind, layers=2)), len(step(kind, layers=6))
    assert (many - few) / 8 < at_most


def launches_on_an_accelerator(
    sides: Sequence[tuple[int, int]], optimizer: Callable[[nn.Module], torch.optim.Optimizer] = Muon
) -> list[str]:
    """Of one step on layers of these inputs and outputs; meta tensors go the way of a GPU's."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(*side, bias=False) for side in sides)
    its = optimizer(model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with Launches() as seen:
            its.step()
    return [name for name in seen.names if not name.startswith("prim::")]


@pytest.mark.parametrize("layers", [1, 6])
def test_on_an_accelerator_the_two_projections_of_an_mlp_are_one_chain(layers):
    """Two launches turn the matrices that lie across on their way in and out; torch's digits need two chains."""
    one_shape = len(launches_on_an_accelerator([(128, 512)] * 2 * layers))
    mlp = [(128, 512), (512, 128)] * layers
    assert len(launches_on_an_accelerator(mlp)) == one_shape + 2
    assert len(launches_on_an_accelerator(mlp, Muon.like_torch)) > 1.5 * one_shape


def test_on_an_accelerator_more_matrices_of_a_shape_are_not_more_launches():
    assert len(launches_on_an_accelerator([(128, 512)] * 12)) == len(launches_on_an_accelerator([(128, 512)] * 3)) <= 41


@pytest.mark.parametrize(("layers", "sums_of_products"), [(2, 5 * 2), (6, 2 + 2 * 5)], ids=["one by one", "in pairs"])
def test_two_steps_share_a_gram_matrix_where_products_outweigh_launches(layers, sums_of_products):
    """Five steps of two sums each, or one alone and two pairs of five: fewer passes over the long side."""
    assert launches_on_an_accelerator([(768, 3072)] * layers).count("aten::baddbmm") == sums_of_products


def test_a_gpu_takes_all_matrices_of_a_shape_in_one_chain_of_launches():
    """It multiplies a dozen of them in the time it takes to launch one; a CPU has no use for it at this width."""
    dozen = [torch.empty(768, 3072, dtype=torch.bfloat16, device="meta") for _ in range(12)]
    assert same_shape_runs(dozen) == [list(range(12))]
    assert same_shape_runs(dozen, device=torch.device("cpu")) == [[i] for i in range(12)]
    large = [torch.empty(2048, 8192, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    assert same_shape_runs(large) == [[0], [1, 2]]  # two fill 64 MiB; as even as can be
