"""Experts whose matrices are one tensor, inside and outside of a compiled region."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral import observe, read_spectral
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny
from tests.models.architectures import QUICK, SLOW, release


class Experts(nn.Module):
    """Every token goes to every expert; the matrices of all are one tensor."""

    def __init__(self, width) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(0.1 * torch.randn(2, 16, width))
        self.down_proj = nn.Parameter(0.1 * torch.randn(2, width, 16))

    def forward(self, x):
        return torch.matmul(torch.matmul(x, self.up_proj).relu(), self.down_proj).mean(0)


class Block(nn.Module):
    def __init__(self, width) -> None:
        super().__init__()
        self.norm, self.mix, self.experts = nn.LayerNorm(16), nn.Linear(16, 16), Experts(width)

    def forward(self, x):
        x = x + self.mix(x.mean(0, keepdim=True))
        return x + self.experts(self.norm(x))


class Net(nn.Module):
    def __init__(self, width=24) -> None:
        super().__init__()
        self.tok, self.layers = nn.Embedding(tiny.VOCAB, 16), nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, ids):
        x = self.tok(ids.flatten())
        for layer in self.layers:
            x = layer(x)
        return x


def records_of(model, tmp_path):
    torch._dynamo.reset()
    with observe(model, 1, out=tmp_path) as probe:
        model(tiny.ids()).square().mean().backward()
        probe.step()
    return read_spectral(tmp_path).records


def test_eager_experts_are_measured(tmp_path):
    records = records_of(Net(), tmp_path)
    assert [(r.module, r.status, r.num_tokens, r.width) for r in records] == [
        (f"layers.{n}.experts.down_proj", "few_tokens", 48, 24) for n in (0, 1)
    ]


def compiled(model, what):
    if what == "whole":
        model = torch.compile(model, backend="eager", fullgraph=True)
    for layer in model.layers:
        if what == "block":
            layer.compile(backend="eager", fullgraph=True)
        elif what == "experts":
            layer.experts.compile(backend="eager", fullgraph=True)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo, about inputs that are no leaves
@pytest.mark.parametrize("what", ["whole", "block", "experts"])
def test_compiled_experts_show_the_rows_of_eager_ones(tmp_path, what):
    torch.manual_seed(0)
    model = Net()
    eager = records_of(model, tmp_path / "eager")
    records = records_of(compiled(model, what), tmp_path / "compiled")
    assert [(r.module, r.status, r.num_tokens, r.width) for r in records] == [
        (r.module, r.status, r.num_tokens, r.width) for r in eager
    ]
    assert [r.hard_rank for r in records] == pytest.approx([r.hard_rank for r in eager], rel=1e-6)  # fp32 products


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_experts_whose_widths_are_equal_say_what_to_do(tmp_path):
    model = Net(width=16)
    records = records_of(compiled(model, "whole"), tmp_path / "compiled")
    assert [(r.module, r.status, r.num_tokens) for r in records] == [
        (f"layers.{n}.experts.down_proj", "no_forward", 0) for n in (0, 1)
    ]
    assert all("whose two widths are equal" in r.reason for r in records)
    for layer in model.layers:  # the remedy
        layer.experts = torch.compiler.disable(layer.experts)
    records = records_of(torch.compile(model, backend="eager"), tmp_path / "disabled")
    assert [(r.status, r.num_tokens, r.width) for r in records] == [("few_tokens", 48, 16)] * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_window_of_compiled_experts_compiles_once_and_changes_nothing():
    torch.manual_seed(0)
    model, plain = Net(), None
    for hooked in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True)
        recorder = Recorder(model, find_stacks(model)) if hooked else None
        outs = []
        for window in (False, True, False, True, True):
            if recorder is not None and window:
                recorder.start()
            model.zero_grad()
            run(tiny.ids()).square().mean().backward()
            outs.append([p.grad.clone() for p in model.parameters()])
            if recorder is not None and window:
                (call,) = recorder.collect()
                assert {key: len(rows) for key, rows in call.rows.items()} == {
                    f"layers.{n}.experts.down_proj.post": 48 for n in (0, 1)
                }
        if recorder is not None:
            recorder.remove()
            assert counter.frame_count == 2  # with and without a window
        plain = plain or outs
        for one, other in zip(plain, outs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class GatedExperts(Experts):
    """Gate and up projection have the same two widths."""

    def __init__(self, width) -> None:
        super().__init__(width)
        self.gate_proj = nn.Parameter(0.1 * torch.randn(2, 16, width))

    def forward(self, x):
        hidden = torch.matmul(x, self.gate_proj).sigmoid() * torch.matmul(x, self.up_proj)
        return torch.matmul(hidden, self.down_proj).mean(0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_gate_and_up_projection_are_not_told_apart():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net()
    for layer in model.layers:
        layer.experts = GatedExperts(24)
    calls = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        recorder = Recorder(model, find_stacks(model, sites=["pre", "post"]))
        recorder.start()
        run(tiny.ids()).square().mean().backward()
        calls += recorder.collect()
        recorder.remove()
    eager, compiled = calls
    for n in (0, 1):
        down, gate = f"layers.{n}.experts.down_proj.post", f"layers.{n}.experts.gate_proj.pre"
        assert len(eager.rows[gate]) == len(eager.rows[down]) == 48
        assert torch.allclose(eager.rows[down], compiled.rows[down], atol=1e-6)  # fp32 in another order
        assert torch.equal(eager.places[down], compiled.places[down])
        assert compiled.unseen[gate].startswith("gate and up projections cannot be told apart")


def _family(model):
    torch._dynamo.reset()
    calls = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        recorder = Recorder(model, find_stacks(model))
        recorder.start()
        run(tiny.ids()).logits.square().mean().backward()
        calls += recorder.collect()
        recorder.remove()
    return calls


@pytest.mark.skipif(release("transformers") < (5,), reason="experts of one tensor")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Mixtral", pytest.param("Qwen2-MoE", marks=pytest.mark.slow)])
def test_experts_of_hugging_face_compiled_whole(name):
    torch.manual_seed(0)
    eager, compiled = _family({**QUICK, **SLOW}[name][0]())
    assert set(eager.rows) == set(compiled.rows)
    for key, rows in eager.rows.items():
        order, other = (torch.argsort(call.places[key], stable=True) for call in (eager, compiled))
        assert torch.equal(eager.places[key][order], compiled.places[key][other])
        assert torch.allclose(rows[order], compiled.rows[key][other], atol=1e-6)  # fp32 products in another order
