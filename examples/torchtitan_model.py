"""A model with torchtitan's names (`tok_embeddings`, `layers.0.feed_forward.w2`) in a Trainer.

python examples/torchtitan_model.py [TEXT]
"""

import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import TailTokenProbe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, bias=False, batch_first=True)
        self.feed_forward = FeedForward(dim, 3 * dim)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, dim: int = 32, n_layers: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(256, dim)
        self.layers = nn.ModuleDict({str(k): TransformerBlock(dim) for k in range(n_layers)})  # torchtitan: a dict
        self.norm, self.output = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    probe = TailTokenProbe(
        every_n_steps=10, counts="stream", modules=["*.feed_forward.w2"], embedding="*tok_embeddings"
    )
    trainer = Trainer(max_steps=20, callbacks=[probe], default_root_dir="out/examples/torchtitan", logger=False)
    trainer.fit(Lit(), DataLoader(sequences, batch_size=16))
    print({name: round(float(value), 2) for name, value in trainer.callback_metrics.items() if "hard" in name})
