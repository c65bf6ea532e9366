"""Small parts of the optimizers by their values, without a run: what only several ranks or rare settings reach."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral.models.placement import Block, Shard
from lightning_spectral.models.views import Rectangle
from lightning_spectral.optim import SOAP, Muon, MuonH, NorMuon, gradients
from lightning_spectral.optim.checkpoint import make_uniform, saved_to_param_layout
from lightning_spectral.optim.dion import DionRule
from lightning_spectral.optim.gradients import global_norm
from lightning_spectral.optim.matrices import Matrix
from lightning_spectral.optim.matrix_rule import faded
from lightning_spectral.optim.migrate import _source, translated
from lightning_spectral.optim.normuon import normalize_neurons
from lightning_spectral.optim.weights import _mix


def member(param: torch.Tensor, **shard: Any) -> Any:
    shape = tuple(param.shape)
    return SimpleNamespace(param=param, shard=Shard(shape, tuple((0, size) for size in shape), **shard))


def test_the_norm_over_two_groups_of_replicas_counts_every_entry_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of four ranks of DDP sees it, whose experts are replicated on two; the other pair holds equal ones."""
    everywhere, pair = SimpleNamespace(size=4), SimpleNamespace(size=2)
    monkeypatch.setattr(gradients.dist, "get_world_size", lambda group: group.size)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda value, group: value.mul_(group.size))
    gradients_of = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])]
    shards: list[dict[str, Any]] = [{"group": everywhere}, {"group": pair}, {"group": pair, "cut_over": (pair,)}]
    members = [member(torch.zeros(len(g)), **shard) for g, shard in zip(gradients_of, shards, strict=True)]
    grads = {id(one.param): gradient for one, gradient in zip(members, gradients_of, strict=True)}
    # the last lies in two halves, each as long as this one
    assert float(global_norm(members, grads)) == pytest.approx((9 + 2 * 25 + 2 * 100) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("part", [{"span": (5, 11)}, {"box": ((1, 3), (0, 4))}], ids=["FSDP1", "a box"])
def test_a_whole_state_is_cut_for_the_part_that_is_here(part: dict[str, Any]) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    expected = whole.flatten()[5:11] if "span" in part else whole[1:3]
    shard = Shard((3, 4), part.get("box"), part.get("span"))
    assert torch.equal(saved_to_param_layout(whole, torch.zeros_like(expected), shard), expected)
    assert torch.equal(saved_to_param_layout(expected, torch.zeros_like(expected), shard), expected)  # cut already


@pytest.mark.parametrize(("style", "scale"), [("ema", 1.0), ("heavy_ball", 4.0)])
def test_the_first_moment_of_adamw_becomes_the_momentum_at_its_size(style: str, scale: float) -> None:
    """A sum with the factor 0.75 is four times the mean."""
    one = SimpleNamespace(group={"momentum_style": style, "momentum": 0.75})
    state = {"step": 7.0, "exp_avg": torch.tensor([1.0, -3.0]), "exp_avg_sq": torch.ones(2)}
    found = translated(state, one, ["momentum_buffer"], "adamw")
    assert found["step"] == 7.0
    assert torch.equal(found["momentum_buffer"], torch.tensor([scale, -3 * scale]))


def test_only_matrices_whose_gradient_has_faded_are_damped() -> None:
    update = torch.ones(2, 3, 4)
    damped = faded(update.clone(), torch.tensor([1.0, 0.25]).view(2, 1, 1))
    assert torch.equal(damped, update * torch.tensor([1.0, 0.25]).view(2, 1, 1))
    assert torch.equal(faded(update.clone(), None), update)


@pytest.mark.parametrize(
    ("precision", "held", "products"),
    [
        ("auto", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.float32),
        ("fp64", torch.float32, torch.float64),
        ("auto", torch.float64, torch.float64),
    ],
)
def test_dion_multiplies_in_fp32_at_least(precision: str, held: torch.dtype, products: torch.dtype) -> None:
    assert DionRule().dtype({"precision": precision}, held, torch.device("cpu")) == products


@pytest.mark.parametrize(
    ("shape", "normalize", "dim"),
    [((6, 4), "long_side", 1), ((4, 4), "long_side", 1), ((4, 6), "long_side", 0), ((4, 6), "rows", 1)],
)
def test_normuon_gives_every_neuron_the_same_length(shape: tuple[int, int], normalize: str, dim: int) -> None:
    """With no memory, in the first step: rows, or the columns of a wide matrix; a square one has rows."""
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    same: dict[str, Any] = {"lr_scale": "none", "weight_decay": 0.0, "moment_beta": 0.0, "orthogonalize": "identity"}
    optimizer = NorMuon(layer, lr=1.0, normalize=normalize, **same)
    layer.weight.grad = torch.arange(1.0, 1 + before.numel(), dtype=torch.float64).view(shape) ** 2
    optimizer.step()
    lengths = (layer.weight.detach() - before).norm(dim=dim)
    assert optimizer.state[layer.weight]["neuron_moment"].count_nonzero() == shape[1 - dim]
    torch.testing.assert_close(lengths, lengths.mean().expand(shape[1 - dim]), rtol=1e-6, atol=0)  # fp32 moments


def test_a_row_as_small_as_normuons_epsilon_is_halved() -> None:
    """``1e-8`` is added to the root of the second moment, arXiv:2510.05491."""
    rows = torch.tensor([[[1.0, -1.0], [1e-8, 1e-8]]], dtype=torch.float64)
    normalize_neurons(rows, [torch.zeros(2, dtype=torch.float64)], beta=0.0)
    assert float(rows[0, 1].norm() / rows[0, 0].norm()) == pytest.approx(0.5, rel=1e-7)


def test_the_coin_of_stochastic_rounding_is_murmurs() -> None:
    def finalizer(x: int) -> int:  # fmix32 of MurmurHash3, Austin Appleby
        x ^= x >> 16
        x = x * 0x85EBCA6B & 0xFFFFFFFF
        x ^= x >> 13
        x = x * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    some = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF, 123_456_789]
    as_int32 = torch.tensor([x - (1 << 32) if x >> 31 else x for x in some], dtype=torch.int32)
    assert [int(x) & 0xFFFFFFFF for x in _mix(as_int32)] == [finalizer(x) for x in some]


def test_the_basis_of_soap_is_renewed_every_tenth_step() -> None:
    assert inspect.signature(SOAP).parameters["basis_every"].default == 10  # as in arXiv:2409.11321


def test_betas_from_zero_on_are_allowed() -> None:
    layer = nn.Linear(3, 3)
    assert Muon(layer, betas=(0, 0.5)).param_groups[0]["betas"] == (0, 0.5)
    for betas in ((-0.1, 0.5), (0.5, 1.0), (0.5,)):
        with pytest.raises(ValueError, match="`betas` must be two numbers in"):
            Muon(layer, betas=betas)


def test_the_matrices_that_are_updated_one_by_one() -> None:
    attention = nn.MultiheadAttention(6, 2, bias=True)
    optimizer = Muon(attention, split="projections")
    views = optimizer.matrix_views
    assert set(views) == {id(attention.in_proj_weight), id(attention.out_proj.weight)}
    assert [view.shape for view in views[id(attention.in_proj_weight)]] == [(6, 6)] * 3


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_of_muonh_has_its_length_however_long_the_orthogonalised_update_is(steps: int) -> None:
    """One Newton-Schulz step leaves a matrix of rank one shorter than 1; its step is as long as any other."""
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    optimizer = MuonH(layer, lr=0.1, orthogonalize="muon", steps=steps, precision="fp64")
    left, right = torch.tensor([1.0, 2.0, 2.0]).double() / 3, torch.tensor([1.0, -1.0, 1.0, 1.0]).double() / 2
    layer.weight.grad = torch.outer(left, right)
    optimizer.step()
    radius = before.norm()
    moved = before / radius - 0.1 * torch.outer(left, right)
    torch.testing.assert_close(layer.weight.detach(), radius * moved / moved.norm(), rtol=1e-6, atol=1e-7)


def test_groups_of_ours_say_their_rule() -> None:
    ours, muon, plain = {"algorithm": "muon"}, {"ns_steps": 5}, {"lr": 0.1}
    assert [_source(groups) for groups in ([ours, ours], [muon, plain], [plain])] == ["ours", "muon", "adamw"]
    assert _source([ours, plain]) == "adamw"  # a group that somebody has added says nothing of the sort


@pytest.mark.parametrize(("rows", "whole"), [((0, 3), True), ((1, 3), False)])
def test_a_matrix_is_whole_where_all_its_entries_are(rows: tuple[int, int], whole: bool) -> None:
    block = Block(Rectangle(rows, (0, 5)), offset=0, stride=5, transposed=False)
    one: Any = Matrix(None, None, SimpleNamespace(shape=(3, 5)), (block,), {}, None)
    assert (one.numel, one.is_whole) == (15, whole)


def test_states_of_one_flat_buffer_get_the_same_arrays_of_one_type() -> None:
    params = {"a": torch.zeros(3), "b": torch.zeros(2)}
    states = {
        "a": {"step": torch.tensor(4.0), "momentum": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)},
        "b": {"step": torch.tensor(4.0), "moment": torch.tensor([5.0, 6.0])},
    }
    make_uniform(states, params)
    arrays = {key: {n: v.tolist() for n, v in state.items() if n != "step"} for key, state in states.items()}
    assert arrays == {
        "a": {"momentum": [1, 2, 3], "moment": [0, 0, 0]},
        "b": {"moment": [5, 6], "momentum": [0, 0]},
    }
    assert {v.dtype for state in states.values() for n, v in state.items() if n != "step"} == {torch.float32}
    assert all(state["step"].ndim == 0 and float(state["step"]) == 4 for state in states.values())
