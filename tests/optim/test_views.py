"""A parameter that holds several matrices is trained as the same matrices kept apart."""

import copy

import pytest
import torch
from torch import nn

from lightning_spectral.models.placement import Shard, blocks_of
from lightning_spectral.models.views import Views
from lightning_spectral.optim import SOAP, AdaMuon, Dion, Dion2, Muon, MuonH, NorDion2, NorMuon

SETTINGS: dict[str, tuple[type, dict[str, object]]] = {
    "muon": (Muon, {"lr": 0.1, "precision": "fp32", "lr_scale": "spectral"}),
    "normuon": (NorMuon, {"lr": 0.1, "precision": "fp32"}),
    "dion": (Dion, {"lr": 0.1, "rank_fraction": 1.0, "power_iterations": 60, "lr_scale": "spectral"}),
    "adamuon": (AdaMuon, {"lr": 0.1, "precision": "fp32"}),
    "dion2": (Dion2, {"lr": 0.1, "precision": "fp32", "fraction": 0.5}),
    "nordion2": (NorDion2, {"lr": 0.1, "precision": "fp32", "fraction": 0.5}),
    "muonh": (MuonH, {"lr": 0.1, "precision": "fp32"}),
    "soap": (SOAP, {"lr": 0.1, "basis_every": 2}),
}
KINDS = {kind: lambda params, made=made: made[0](params, **made[1]) for kind, made in SETTINGS.items()}
# Dion begins at random factors of its own for every matrix: with many power iterations they do not matter
TOLERANCE = {**dict.fromkeys(KINDS, 1e-6), "dion": 2e-3, "soap": 1e-5}


class Apart(nn.Module):
    """One Linear for every matrix."""

    def __init__(self, matrices: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m.shape[1], m.shape[0], bias=False) for m in matrices)
        with torch.no_grad():
            for layer, matrix in zip(self.layers, matrices, strict=True):
                layer.weight.copy_(matrix)


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn(3, 6, 10))


class Conv1D(nn.Module):
    """As Hugging Face's: (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10))


class Attention(nn.Module):
    """Fused projections of four query heads of size 3 that share two keys and values."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 3
        self.add_module(name, nn.Linear(7, 24, bias=False))


class GPTNeoXAttention(nn.Module):
    """Per head its query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.head_size = 2, 3
        self.query_key_value = nn.Linear(7, 18, bias=False)


class GptOssExperts(nn.Module):
    """Gate and up in turns, as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = True
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 10))


class DisentangledSelfAttention(nn.Module):
    """DeBERTa's: per head its query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 2, 3
        self.in_proj = nn.Linear(7, 18, bias=False)


class CodeGenAttention(nn.Module):
    """Four blocks of queries, values and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = 4, 3
        self.qkv_proj = nn.Linear(7, 36, bias=False)


class LatentAttention(nn.Module):
    """Per head a key of four and a value of two, from a latent vector; queries with and without position."""

    def __init__(self, name: str, rows: int) -> None:
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 3, 4, 1, 2
        self.head_dim = self.qk_rope_head_dim  # as DeepSeek's configuration says it
        self.add_module(name, nn.Linear(7, rows, bias=False))


class ModernBertMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Wi = nn.Linear(6, 10, bias=False)


def convolutional(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3, bias=False), "hidden": layer})


# name -> (module, name of the parameter, split, the matrices of such a tensor)
CASES = {
    "experts": (lambda: Experts(False), "up_proj", "none", lambda t: list(t.unbind(0))),
    "transposed experts": (lambda: Experts(True), "up_proj", "none", lambda t: [m.mT for m in t.unbind(0)]),
    "Conv1D": (Conv1D, "weight", "none", lambda t: [t.mT]),
    "convolution": (
        lambda: convolutional(nn.Conv2d(8, 12, 3, bias=False)),
        "hidden.weight",
        "none",
        lambda t: [t.flatten(1)],
    ),
    "grouped convolution": (
        lambda: convolutional(nn.Conv2d(8, 12, 3, groups=2, bias=False)),
        "hidden.weight",
        "none",
        lambda t: list(t.flatten(1).chunk(2)),
    ),
    "transposed convolution": (
        lambda: convolutional(nn.ConvTranspose2d(8, 6, 2, bias=False)),
        "hidden.weight",
        "none",
        lambda t: [t.flatten(1).mT],
    ),
    "q, k, v": (lambda: Attention("qkv"), "qkv.weight", "projections", lambda t: list(t.split([12, 6, 6]))),
    "heads": (lambda: Attention("qkv"), "qkv.weight", "heads", lambda t: list(t.split(3))),
    "fused, whole": (lambda: Attention("qkv"), "qkv.weight", "none", lambda t: [t]),
    "interleaved q, k, v": (
        GPTNeoXAttention,
        "query_key_value.weight",
        "projections",
        lambda t: [torch.cat([t[s : s + 3], t[s + 9 : s + 12]]) for s in (0, 3, 6)],
    ),
    "interleaved gate and up": (
        GptOssExperts,
        "gate_up_proj",
        "projections",
        lambda t: [m.mT for one in t.unbind(0) for m in (one[:, ::2], one[:, 1::2])],
    ),
    "per head": (
        DisentangledSelfAttention,
        "in_proj.weight",
        "projections",
        lambda t: [torch.cat([t[s : s + 3], t[s + 9 : s + 12]]) for s in (0, 3, 6)],
    ),
    "four blocks": (
        CodeGenAttention,
        "qkv_proj.weight",
        "projections",
        lambda t: [torch.cat([b[s : s + 3] for b in t.chunk(4)]) for s in (0, 3, 6)],
    ),
    "keys and values": (lambda: Attention("kv_proj"), "kv_proj.weight", "projections", lambda t: list(t.chunk(2))),
    "latent keys and values": (
        lambda: LatentAttention("kv_b_proj", 18),
        "kv_b_proj.weight",
        "projections",
        lambda t: [torch.cat([t[s : s + n] for s in (b, b + 6, b + 12)]) for b, n in ((0, 4), (4, 2))],
    ),
    "latent queries by heads": (
        lambda: LatentAttention("q_b_proj", 15),
        "q_b_proj.weight",
        "heads",
        lambda t: list(t.chunk(3)),
    ),
    "input and gate": (ModernBertMLP, "Wi.weight", "projections", lambda t: list(t.chunk(2))),
    "in_proj": (
        lambda: nn.MultiheadAttention(6, 2, bias=False),
        "in_proj_weight",
        "projections",
        lambda t: list(t.chunk(3)),
    ),
}


def fused_and_apart(case, kind):
    """The fused parameter, its matrices as layers of their own, how to find them, and what makes both optimizers."""
    make_module, name, split, matrices_of = CASES[case]
    torch.manual_seed(0)
    module = make_module()
    fused = module.get_parameter(name)
    apart = Apart([m.detach().clone() for m in matrices_of(fused)])
    make, settings = SETTINGS[kind]
    return fused, apart, matrices_of, lambda: (make(module, **settings, split=split), make(apart, **settings))


def give_gradients(fused, apart, matrices_of, seed):
    fused.grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(seed))
    for layer, gradient in zip(apart.layers, matrices_of(fused.grad), strict=True):
        layer.weight.grad = gradient.contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_one_parameter_equals_its_matrices_kept_apart(case, kind):
    fused, apart, matrices_of, make = fused_and_apart(case, kind)
    optimizer, other = make()
    for step in range(4):
        give_gradients(fused, apart, matrices_of, step)
        if step == 2:  # state and its way through a checkpoint, in the middle
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer, _ = make()
            optimizer.load_state_dict(saved)
        optimizer.step()
        other.step()
    for layer, matrix in zip(apart.layers, matrices_of(fused), strict=True):
        error = ((layer.weight - matrix).norm() / layer.weight.norm()).detach()
        assert float(error) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["normuon", "adamuon", "soap"])
@pytest.mark.parametrize("case", CASES)
def test_state_of_every_matrix_lies_in_a_checkpoint_where_the_matrix_does(case, kind):
    fused, apart, matrices_of, make = fused_and_apart(case, kind)
    optimizer, other = make()
    give_gradients(fused, apart, matrices_of, 0)
    optimizer.step()
    other.step()
    saved, kept_apart = optimizer.state_dict(), other.state_dict()["state"]
    names = [one for group in saved["param_groups"] for one in group["param_names"]]
    state = saved["state"][names.index(CASES[case][1])]
    arrays = [key for key, value in state.items() if value.ndim > 0]
    assert len(arrays) >= 2  # the momentum and what the rule keeps beside it
    for key in arrays:
        for i, matrix in enumerate(matrices_of(state[key])):
            torch.testing.assert_close(matrix, kept_apart[i][key], rtol=1e-4, atol=1e-6)


def test_channels_last_weights_and_gradients_give_the_same():
    models = convolutional(nn.Conv2d(8, 12, 3, bias=False)), None
    other = copy.deepcopy(models[0]).to(memory_format=torch.channels_last)
    for model in (models[0], other):
        model["hidden"].weight.grad = torch.ones(12, 8, 3, 3) * torch.arange(72.0).view(1, 8, 3, 3).sin()
        model["hidden"].weight.grad += torch.arange(12.0).view(12, 1, 1, 1)
    other["hidden"].weight.grad = other["hidden"].weight.grad.to(memory_format=torch.channels_last)
    for model in (models[0], other):
        KINDS["muon"](model).step()
    torch.testing.assert_close(models[0]["hidden"].weight, other["hidden"].weight.contiguous(), rtol=0, atol=1e-6)


VIEWS = [
    Views((6, 10)),
    Views((6, 10), transposed=True),
    Views((4, 6, 10), 2, 4),
    Views((4, 6, 10), 2, 4, transposed=True),
    Views((6, 4, 2, 2)),
    Views((6, 4, 2, 2), 1, 2),
    Views((12, 5), parts=(((0, 4),), ((4, 8),), ((8, 12),))),
    Views((12, 5), parts=(((0, 2), (6, 8)), ((2, 4), (8, 10)), ((4, 6), (10, 12)))),
    Views((5, 12), transposed=True, parts=(((0, 2), (6, 8)), ((2, 6), (8, 12)))),
    Views((6, 2, 5), 1, transposed=True),
    Views((2, 5, 12), 2, 2, transposed=True, parts=(((0, 12, 2),), ((1, 12, 2),))),
    Views((11, 5), parts=(((0, 11, 3), (1, 5)), ((5, 6), (2, 11, 3)))),
]


@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_every_cut_of_a_parameter_finds_all_entries_of_every_matrix_once(views):
    whole = torch.arange(float(torch.Size(views.shape).numel())).view(views.shape)
    cuts = [[Shard(views.shape, tuple((0, n) for n in views.shape))]]
    cuts += [[Shard(views.shape, None, (low, low + 7)) for low in range(0, whole.numel() - 7, 7)]]
    last = cuts[-1][-1].span[1]
    cuts[-1].append(Shard(views.shape, None, (last, whole.numel())))
    for dim in range(min(2, len(views.shape)) if len(views.shape) != 3 or views.row_dims == 1 else 3):
        middle = views.shape[dim] // 2
        boxes = [[(0, n) for n in views.shape] for _ in range(2)]
        boxes[0][dim], boxes[1][dim] = (0, middle), (middle, views.shape[dim])
        cuts.append([Shard(views.shape, tuple(box)) for box in boxes])
    for shards in cuts:
        for view in views:
            gathered = torch.full(view.shape, float("nan"))
            for shard in shards:
                local = shard.cut(whole).reshape(-1).clone()
                for block in blocks_of(view, shard):
                    (r0, r1), (c0, c1) = block.target.rows, block.target.columns
                    assert gathered[r0:r1, c0:c1].isnan().all()
                    gathered[r0:r1, c0:c1] = block.of(local)
            assert torch.equal(gathered, view.of(whole))
