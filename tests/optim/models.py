"""A language model small enough for the gate, with every kind of parameter, and a training loop without luck in it."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + torch.tanh(query * key) * value
        return x + self.proj(torch.relu(self.fc(x)).square())


class TinyLM(nn.Module):
    VOCABULARY, WIDTH = 31, 10
    MATRICES = tuple(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "fc", "proj"))

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(self.VOCABULARY, self.WIDTH)
        self.blocks = nn.ModuleList(Block(self.WIDTH) for _ in range(2))
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x.to(block.qkv.weight.dtype))
        return self.head(x.to(self.head.weight.dtype))

    def loss(self, step: int) -> torch.Tensor:
        return loss_of(self, step)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """Predict a permuted copy of the input; the same batch for the same step on every rank."""
    ids = torch.randint(0, TinyLM.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1000 + step))
    targets = (ids * 7 + 3) % TinyLM.VOCABULARY
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
