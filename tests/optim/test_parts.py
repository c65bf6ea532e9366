"""Small parts of the optimizers by their values, without a run: what only several ranks or rare settings reach."""

from __future__ import annotations

import inspect
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral import optim
from lightning_spectral.models.placement import Block, Shard
from lightning_spectral.models.views import Rectangle
from lightning_spectral.optim import SOAP, Muon, MuonH, NorMuon, gradients, matrices
from lightning_spectral.optim.checkpoint import make_uniform, saved_to_param_layout
from lightning_spectral.optim.dion import DionRule
from lightning_spectral.optim.factors import orthonormal_columns
from lightning_spectral.optim.gradients import global_norm
from lightning_spectral.optim.matrices import Matrix, spans_of
from lightning_spectral.optim.matrix_rule import faded
from lightning_spectral.optim.migrate import _source, translated
from lightning_spectral.optim.normuon import normalize_neurons
from lightning_spectral.optim.owners import find_owners
from lightning_spectral.optim.routing import route
from lightning_spectral.optim.weights import _mix, _noise


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


def murmur(x: int) -> int:
    """MurmurHash3's finalizer as it is published, on 32 bits."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


@pytest.mark.parametrize(
    ("box", "span", "step", "index"),
    [(((3, 5), (2, 9)), None, 7, 4), (None, (12, 40), 1, 0), (((0, 0),), None, 100_000, 900)],
)
def test_random_bits_are_a_published_hash_of_step_parameter_and_place(
    box: Any, span: Any, step: int, index: int
) -> None:
    """The same in every version: a run that goes on under a newer one rounds as it would have."""
    member: Any = SimpleNamespace(index=index, shard=SimpleNamespace(box=box, span=span))
    lows = [low for low, _ in box] if box else [span[0]]
    begin = sum((low + 1) * 31**place for place, low in enumerate(lows))
    seed = (index * 7_919 + begin * 104_729 + 12_345) % 2**31
    mixed = murmur((step * 1_000_003 + seed) % 2**32)
    golden_ratio = 0x9E3779B9  # 2^32 over it, as in many hashes: -1,640,531,527
    expected = [murmur((place * golden_ratio + mixed) % 2**32) & 0xFFFF for place in range(50)]
    found = _noise(50, torch.tensor(float(step)), member, torch.device("cpu"))
    assert found.tolist() == expected


DEFAULTS: dict[str, dict[str, Any]] = {
    "AdaMuon": {"lr": 1e-3, "moment_beta": 0.95},
    "AdamW": {"lr": 1e-3},
    "Dion": {
        "lr": 1e-3, "rank_fraction": 0.25, "power_iterations": 1, "orthogonal_right": False, "rank_rms_match": False,
    },
    "Dion2": {"lr": 1e-3, "fraction": 0.25, "orthogonalize": "polar_express", "steps": None},
    "Muon": {"lr": 1e-3},
    "MuonH": {"lr": 1e-2},
    "NorDion2": {
        "lr": 1e-3, "fraction": 0.25, "moment_beta": 0.95, "orthogonalize": "polar_express", "steps": None,
    },
    "NorMuon": {"lr": 1e-3, "moment_beta": 0.95, "normalize": "rows"},
    "SOAP": {"lr": 1e-3, "moment_beta": 0.95, "basis_every": 10},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_stay_what_they_are(name: str) -> None:
    """A changed default changes every training that does not name it."""
    parameters = inspect.signature(getattr(optim, name).__init__).parameters.items()
    assert {key: one.default for key, one in parameters if one.default is not one.empty} == DEFAULTS[name]


def test_muonh_leaves_a_zero_matrix_finite_and_small() -> None:
    """Without a radius of its own it takes a step of the length ``lr``, once."""
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    layer.weight.data.zero_()
    layer.weight.grad = torch.eye(3, dtype=torch.float64)
    MuonH(layer, lr=0.1, precision="fp64").step()
    # q = |0 - lr O'|^2 with its floor of 1/4 under the root: the step is lr O' / root, of a radius of one
    root = max(0.25, 1 - 1 + 0.1 * 0.1) ** 0.5
    assert float(layer.weight.detach().norm()) == pytest.approx(0.1 / root, rel=1e-6)


@pytest.mark.parametrize("columns", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_spans_are_the_places_that_lie_in_the_rectangles(columns: int, length: int) -> None:
    """By counting: value ``i`` lies at row ``i // columns``, column ``i % columns``."""
    ranges = list(itertools.combinations(range(5), 2))
    for rows, cols in itertools.product(ranges, [(a, b) for a, b in ranges if b <= columns]):
        spans = spans_of([Rectangle(rows, cols)], columns, length)
        inside = [i for i in range(length) if rows[0] <= i // columns < rows[1] and cols[0] <= i % columns < cols[1]]
        assert [i for low, high in spans for i in range(low, high)] == inside
        assert all(high > low for low, high in spans)
        assert all(second[0] > first[1] for first, second in itertools.pairwise(spans))  # as few as can be


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 10)
        self.out = nn.Linear(10, 31, bias=False)
        self.last = nn.Linear(10, 31, bias=False)


class Declares(Silent):
    def get_output_embeddings(self) -> nn.Module:
        return self.out


@pytest.mark.parametrize(("model", "head"), [(Silent(), "last"), (Declares(), "out")])
def test_where_a_model_says_what_its_head_is_its_last_layer_is_none(model: nn.Module, head: str) -> None:
    roles = {one.named.name: one.role for one in route(find_owners(model), None)}
    other = {"last": "out", "out": "last"}[head]
    assert roles == {"embed.weight": "embedding", f"{head}.weight": "head", f"{other}.weight": "matrix"}


def test_values_along_the_first_rows_are_ranges_that_do_not_touch() -> None:
    rectangles = [Rectangle((0, 2), (0, 4)), Rectangle((2, 3), (0, 1)), Rectangle((3, 4), (1, 3))]
    assert spans_of(rectangles, columns=4, length=14) == ((0, 9), (13, 14))
    assert spans_of(rectangles[2:], columns=4, length=13) == ()


@pytest.mark.parametrize("lr_ratio", [1.0, 3.0])
def test_muonh_brings_a_matrix_back_to_its_sphere_and_steps_by_its_own_rate(lr_ratio: float) -> None:
    """Something else made the weight longer; one step ends at the radius that it began with."""
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    optimizer = MuonH(layer, lr=0.01, orthogonalize="svd", nesterov=False, precision="fp64")
    optimizer.param_groups[0]["lr_ratio"] = lr_ratio
    grad = torch.outer(torch.tensor([1.0, 2.0, 2.0]).double(), torch.tensor([1.0, -1.0, 1.0, 1.0]).double())
    radius = layer.weight.detach().norm()
    for factor in (1.0, 1.1):
        with torch.no_grad():
            layer.weight.mul_(factor)
        before = layer.weight.detach().clone()
        layer.weight.grad = grad.clone()
        optimizer.step()
        moved = before / radius - 0.01 * lr_ratio * grad / grad.norm()
        torch.testing.assert_close(layer.weight.detach(), radius * moved / moved.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [3, 9, 16, 23])
def test_orthonormal_columns_do_not_depend_on_what_else_is_in_the_batch(rows: int) -> None:
    """LAPACK's rounding follows the alignment of a matrix; rows of zeros align each one of a batch."""
    tall_BMR = torch.randn(5, rows, 3, generator=torch.Generator().manual_seed(rows))
    made_BMR = orthonormal_columns(tall_BMR)
    assert made_BMR.shape == tall_BMR.shape
    torch.testing.assert_close(made_BMR.mT @ made_BMR, torch.eye(3).expand(5, 3, 3), rtol=0, atol=1e-6)
    for made_MR, tall_MR in zip(made_BMR, tall_BMR, strict=True):
        assert torch.equal(made_MR, orthonormal_columns(tall_MR.clone().unsqueeze(0))[0])


def test_the_routing_table_is_seen_where_nobody_configured_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Lightning's own loggers are; where somebody did, nothing is added."""
    package = logging.getLogger("lightning_spectral")
    for handlers, seen in (([], True), ([logging.NullHandler()], False)):
        monkeypatch.setattr(package, "handlers", handlers)
        monkeypatch.setattr(package, "propagate", False)  # pytest's own handlers are at the root
        monkeypatch.setattr(package, "level", logging.NOTSET)
        package.manager._clear_cache()
        Muon(nn.Sequential(nn.Linear(64, 64)))
        assert ("matrix" in capsys.readouterr().err) is seen
    monkeypatch.undo()
    package.manager._clear_cache()


@pytest.mark.parametrize("bf16", ["", "nearest", "compensated"])
def test_matrices_that_lie_across_move_as_those_alone(monkeypatch: pytest.MonkeyPatch, bf16: str) -> None:
    """An accelerator stacks 6 x 10 and 10 x 6; also where a weight does not lie in order, and telemetry looks on."""

    def moved(together: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
        monkeypatch.setattr(matrices, "_saves_launches", lambda device: together)
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(*side, bias=False) for side in [(6, 10), (10, 6), (6, 10), (10, 6), (7, 7)])
        model[1].weight = nn.Parameter(model[1].weight.detach().T.contiguous().T)
        model.to(torch.bfloat16 if bf16 else torch.float32)
        optimizer = Muon(model, precision="fp64", lr=0.01, **({"bf16_weights": bf16} if bf16 else {}))
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.observe_next_step()
            optimizer.step()
        runs = optimizer._matrix_step[1]._runs_of[1]  # type: ignore[index]
        assert sorted(len(run) for run in runs) == ([1, 4] if together else [1, 2, 2])
        return [p.detach().float() for p in model.parameters()], optimizer.observed

    (one, seen), (other, seen_alone) = moved(True), moved(False)
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if bf16 else 1e-7)
    assert seen.keys() == seen_alone.keys()
    for name, telemetry in seen.items():
        torch.testing.assert_close(telemetry.momentum_spectrum, seen_alone[name].momentum_spectrum)
        torch.testing.assert_close(telemetry.update_spectrum, seen_alone[name].update_spectrum)
