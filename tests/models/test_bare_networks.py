"""Networks whose matrices are bare parameters: what is found, and rows against what the module itself computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_spectral import observe, read_spectral
from lightning_spectral.models.bare_networks import _width_of
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from lightning_spectral.records import SPECTRAL_FILE, SpectralRecord
from tests.models import tiny

D, WIDTH, E = 32, 64, 4


class Keeps(nn.Module):
    """A network that keeps what it multiplies with its down projection, as an oracle."""

    def keep(self, hidden):
        self.__dict__.setdefault("kept", []).append(hidden.detach())
        return hidden


class FlatExperts(Keeps):
    """DBRX: the matrices of all experts one below another."""

    def __init__(self):
        super().__init__()
        self.moe_num_experts = E
        self.w1, self.v1, self.w2 = (nn.Parameter(0.1 * torch.randn(E * WIDTH, D)) for _ in range(3))

    def forward(self, x, expert):
        w1, v1, w2 = (w.view(E, WIDTH, D)[expert] for w in (self.w1, self.v1, self.w2))
        return self.keep(F.silu(x.matmul(w1.t())) * x.matmul(v1.t())).matmul(w2)


class Experts(nn.Module):
    """Token n goes to expert n modulo E."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        flat, out = x.flatten(0, -2), torch.zeros_like(x).flatten(0, -2)
        for expert in range(E):
            out[expert::E] = self.mlp(flat[expert::E], expert)
        return out.view(x.shape)


class SpeedrunMLP(Keeps):
    """As in modded-nanogpt: two matrices, cast to the activations' type."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Parameter(0.1 * torch.randn(WIDTH, D)), nn.Parameter(0.1 * torch.randn(WIDTH, D))

    def forward(self, x):
        return F.linear(self.keep(F.linear(x, self.c_fc.type_as(x)).relu().square()), self.c_proj.T.type_as(x))


class EinsumMLP(SpeedrunMLP):
    """Weights first."""

    def forward(self, x):
        hidden = torch.einsum("fd,btd->btf", self.c_fc, x).relu()
        return torch.einsum("fd,btf->btd", self.c_proj, self.keep(hidden))


class Packed(Keeps):
    """MXFP4: two numbers a byte, a scale for each 32; the forward unpacks and multiplies."""

    def __init__(self):
        super().__init__()
        self.num_experts = E
        for name, num_in, num_out in (("gate_up_proj", D, 2 * WIDTH), ("down_proj", WIDTH, D)):
            blocks = torch.randint(0, 256, (E, num_out, num_in // 32, 16), dtype=torch.uint8)
            setattr(self, f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
            scales = nn.Parameter(torch.full((E, num_out, num_in // 32), 120, dtype=torch.uint8), requires_grad=False)
            setattr(self, f"{name}_scales", scales)
        self.down_proj_bias = nn.Parameter(torch.zeros(E, D))

    def unpacked(self, name, expert):
        blocks, scales = getattr(self, f"{name}_blocks")[expert], getattr(self, f"{name}_scales")[expert]
        pairs = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).float() - 7.5
        return (pairs * torch.exp2(scales[..., None].float() - 127)).flatten(1)

    def forward(self, x, expert):
        gate, up = (x @ self.unpacked("gate_up_proj", expert).T).chunk(2, -1)
        return F.linear(self.keep(F.silu(gate) * up), self.unpacked("down_proj", expert)) + self.down_proj_bias[expert]


class Kernel(torch.autograd.Function):
    """Numbers that no function of torch makes."""

    @staticmethod
    def forward(ctx, x, first, second):
        hidden = torch.from_numpy(x.detach().numpy() @ first.numpy().T)
        return torch.from_numpy(hidden.numpy()[:, :WIDTH] @ second.numpy().T)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


class KernelExperts(Packed):
    """A kernel that is given packed numbers and shows nothing."""

    def forward(self, x, expert):
        return Kernel.apply(x, self.unpacked("gate_up_proj", expert), self.unpacked("down_proj", expert))


class Handle:
    """A tensor that is none of torch's, as triton's kernels keep theirs."""


class Opaque(nn.Module):
    """gpt-oss after loading with triton: the matrices are attributes of another library's."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.down_proj = E, Handle()
        self.down_proj_bias = nn.Parameter(torch.zeros(E, D))

    def forward(self, x):
        return x + self.down_proj_bias.sum(0)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.attn_out, self.mlp = nn.LayerNorm(D), nn.Linear(D, D), mlp

    def forward(self, x):
        x = x + self.attn_out(x.mean(1, keepdim=True))
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.tok, self.layers = nn.Embedding(tiny.VOCAB, D), nn.ModuleList(Block(make()) for _ in range(2))

    def forward(self, ids):
        x = self.tok(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def recorded(model, **options):
    recorder = Recorder(model, find_stacks(model), **options)
    recorder.start()
    model(tiny.ids(3, 8)).square().mean().backward()
    (call,) = recorder.collect()
    notes = dict(recorder.notes)
    recorder.remove()
    assert not notes
    return call


@pytest.mark.parametrize("kind", [FlatExperts, Packed])
def test_experts_in_one_tensor_show_the_rows_of_their_tokens(kind):
    model = Net(lambda: Experts(kind()))
    (stack,) = find_stacks(model).stacks
    assert [(site.width, site.is_routed) for site in stack.sites] == [(WIDTH, True)] * 2
    call = recorded(model)
    for site, layer in zip(stack.sites, model.layers, strict=True):
        assert torch.equal(call.rows[site.key], torch.cat(layer.mlp.mlp.kept))
        order = torch.tensor([n for expert in range(E) for n in range(expert, 24, E)])
        tokens = tiny.ids(3, 8).flatten()  # equal tokens of a sequence are equal rows here
        assert torch.equal(tokens[call.places[site.key]], tokens[order])


@pytest.mark.parametrize("kind", [SpeedrunMLP, EinsumMLP])
@pytest.mark.parametrize("site", ["post", "pre"])
def test_a_network_of_two_parameters_shows_all_rows_in_order(kind, site):
    model = Net(kind)
    found = find_stacks(model, sites=[site])
    name = "c_proj" if site == "post" else "c_fc"
    assert [s.name for s in found.sites] == [f"layers.{n}.mlp.{name}" for n in (0, 1)]
    assert not any(s.is_routed for s in found.sites)
    recorder = Recorder(model, found)
    recorder.start()
    model(tiny.ids(3, 8))
    (call,) = recorder.collect()
    recorder.remove()
    for s, layer in zip(found.sites, model.layers, strict=True):
        rows = call.rows[s.key].relu().pow(2 if kind is SpeedrunMLP else 1) if site == "pre" else call.rows[s.key]
        assert torch.equal(rows, layer.mlp.kept[0].flatten(0, 1))
        assert call.places[s.key].tolist() == list(range(24))


def test_a_share_of_the_rows_of_a_network_of_two_parameters():
    model = Net(SpeedrunMLP)
    call = recorded(model, token_fraction=0.5)
    for n, layer in enumerate(model.layers):
        key = f"layers.{n}.mlp.c_proj.post"
        assert len(call.rows[key]) == 12
        assert torch.equal(call.rows[key], layer.mlp.kept[0].flatten(0, 1)[call.places[key]])


def test_parameters_that_share_a_storage_are_told_apart():
    model = Net(SpeedrunMLP)
    for layer in model.layers:
        flat = torch.cat([layer.mlp.c_fc.detach().flatten(), layer.mlp.c_proj.detach().flatten()])
        layer.mlp.c_fc = nn.Parameter(flat[: WIDTH * D].view(WIDTH, D))
        layer.mlp.c_proj = nn.Parameter(flat[WIDTH * D :].view(WIDTH, D))
    call = recorded(model)
    for n, layer in enumerate(model.layers):
        assert torch.equal(call.rows[f"layers.{n}.mlp.c_proj.post"], layer.mlp.kept[0].flatten(0, 1))


def test_low_rank_and_attention_parameters_are_no_network():
    class Attention(SpeedrunMLP):
        pass

    class LowRankLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_out = nn.Parameter(torch.zeros(4, D)), nn.Parameter(torch.zeros(D, 4))

    for kind in (Attention, LowRankLinear):
        with pytest.raises(ValueError, match="No feed-forward network"):
            find_stacks(Net(kind))


def records_of(model, path):
    with observe(model, 1, out=path) as probe:
        model(tiny.ids()).square().mean().backward()
        probe.step()
    return read_spectral(path).records


def test_a_kernel_on_packed_experts_is_a_status_and_a_note(tmp_path):
    model = Net(lambda: Experts(KernelExperts()))
    (note,) = find_stacks(model).notes
    assert "packed numbers" in note
    assert "`no_forward`" in note
    assert "dequantize=True" in note
    records = records_of(model, tmp_path)
    assert [(r.module, r.status, r.num_tokens) for r in records] == [
        (f"layers.{n}.mlp.mlp.down_proj_blocks", "no_forward", 0) for n in (0, 1)
    ]
    assert all("a kernel of its own" in r.reason for r in records)


def test_unpacked_experts_are_measured(tmp_path):
    records = records_of(Net(lambda: Experts(Packed())), tmp_path)
    assert [(r.module, r.status, r.num_tokens, r.width) for r in records] == [
        (f"layers.{n}.mlp.mlp.down_proj_blocks", "few_tokens", 24, WIDTH) for n in (0, 1)
    ]


def test_experts_that_torch_cannot_see_are_named():
    class Mixed(Net):
        def __init__(self):
            super().__init__(SpeedrunMLP)
            self.layers[1].mlp = Opaque()

    (note,) = find_stacks(Mixed()).notes
    assert note.startswith("1 of 2 blocks of `layers` are not measured: `mlp` (Opaque) keeps its experts where torch")
    assert "dequantize=True" in note
    with pytest.raises(ValueError, match=r"`layers\.0\.mlp` \(Opaque\) keeps its experts where torch cannot see them"):
        find_stacks(Net(Opaque))


@pytest.mark.parametrize("where", ["packed_matrices", "_Mode._owner"])
def test_what_goes_wrong_in_ours_is_a_note(monkeypatch, where):
    def fail(*_):
        raise RuntimeError("of ours")

    monkeypatch.setattr(f"lightning_spectral.models.parameter_taps.{where}", fail)
    model = Net(SpeedrunMLP)
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    model(tiny.ids()).mean().backward()
    (call,) = recorder.collect()
    assert not call.rows
    assert "of ours" in recorder.notes["hook_failed"]
    recorder.remove()


class BareExperts(nn.Module):
    """Every token through every expert; nothing around says which of the two widths is the residual one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up = nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(4, 32, 16) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "einsum":
            hidden = torch.einsum("nd,edh->enh", x, self.up).relu()
            return torch.einsum("enh,ehd->nd", hidden, self.down)
        return torch.bmm(torch.bmm(x.expand(4, *x.shape), self.up).relu(), self.down).mean(0)


class BareBlocks(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": BareExperts(way)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["experts"](x)
        return x


def _records(model: nn.Module, path: Path) -> list[SpectralRecord]:
    with warnings.catch_warnings(), observe(model, every_n_steps=1, out=path, background=False) as probe:
        warnings.simplefilter("ignore")
        model(torch.randn(300, 16)).square().mean().backward()
        probe.step()
    return list(read_spectral(path / SPECTRAL_FILE).records)


def test_without_norms_and_embedding_the_rows_tell_the_width(tmp_path: Path) -> None:
    records = _records(BareBlocks("bmm"), tmp_path)
    assert {(record.width, record.num_tokens, record.reason) for record in records} == {(32, 1200, "")}
    assert {record.status for record in records} == {"ok"}


def test_experts_that_cannot_be_followed_say_why(tmp_path: Path) -> None:
    records = _records(BareBlocks("einsum"), tmp_path)
    assert {record.status for record in records} == {"no_forward"}
    assert all("`einsum`" in record.reason and "`bmm(" in record.reason for record in records)


@pytest.mark.parametrize(
    ("down", "up", "residual", "width"),
    [
        ((32, 16), (16, 32), None, None),  # either side may be the residual one
        ((32, 16), (16, 32), 16, 32),
        ((32, 16), (16, 32), 32, 16),
        ((32, 16), (16, 64), None, 32),  # gate and up as one
        ((16, 32), (32, 32), None, 16),
        ((16, 16), (16, 16), None, 16),
        ((32, 16), (32, 48), None, 16),  # nothing fits: as before
    ],
)
def test_the_width_between_two_matrices(down, up, residual, width) -> None:
    assert _width_of((4, *down), (4, *up), residual) == width
