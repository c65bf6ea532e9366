"""A plain PyTorch loop: one line around it, one in it. A model that no family knows is named by a glob.

python examples/pytorch_loop.py [TEXT]
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lightning_spectral import Muon, observe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte
counts = torch.bincount(sequences.flatten(), minlength=256)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteModel(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


model = ByteModel()
optimizer = Muon(model, lr=3e-3)
out = "out/examples/pytorch_loop"
with observe(model, every_n_steps=10, out=out, counts=counts, num_steps=20, modules=["blocks.*.down"]) as probe:
    for step in range(20):
        batch = sequences[torch.randint(len(sequences), (16,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in probe.step().items():
            if name == "spectral/hard_rank.pooled":
                print(f"step {step}: loss {loss.item():.2f}, hard rank {value:.1f}")
