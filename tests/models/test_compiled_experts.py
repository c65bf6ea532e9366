"""Experts whose matrices are one tensor, inside and outside of a compiled region."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral import observe, read_spectral
from tests.models import tiny


class Experts(nn.Module):
    """Every token goes to every expert; the matrices of all are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(0.1 * torch.randn(2, 16, 24))
        self.down_proj = nn.Parameter(0.1 * torch.randn(2, 24, 16))

    def forward(self, x):
        return torch.matmul(torch.matmul(x, self.up_proj).relu(), self.down_proj).mean(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.experts = nn.LayerNorm(16), nn.Linear(16, 16), Experts()

    def forward(self, x):
        x = x + self.mix(x.mean(0, keepdim=True))
        return x + self.experts(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.layers = nn.Embedding(tiny.VOCAB, 16), nn.ModuleList(Block() for _ in range(2))

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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo, about inputs that are no leaves
@pytest.mark.parametrize("what", ["whole", "block", "experts"])
def test_compiled_experts_say_that_they_are_not_seen(tmp_path, what):
    model = Net()
    if what == "whole":
        model = torch.compile(model, backend="eager", fullgraph=True)
    for layer in model.layers:
        if what == "block":
            layer.compile(backend="eager", fullgraph=True)
        elif what == "experts":
            layer.experts.compile(backend="eager", fullgraph=True)
    records = records_of(model, tmp_path)
    assert [(r.module, r.status, r.num_tokens) for r in records] == [
        (f"layers.{n}.experts.down_proj", "no_forward", 0) for n in (0, 1)
    ]
    assert all("inside a compiled region" in r.reason for r in records)
