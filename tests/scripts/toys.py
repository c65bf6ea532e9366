"""What the scripts share: a LLaMA-shaped toy, its data, and a module that notes its own losses and rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

V, T, D, WIDTH = 64, 16, 16, 32
BUCKETS = ("head", "mid", "tail")


class MLP(nn.Module):
    def __init__(self, d: int = D, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)))


class Block(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(d), MLP(d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, d: int = D, n: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(n))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class LM(nn.Module):
    def __init__(self, d: int = D, n: int = 2) -> None:
        super().__init__()
        self.model, self.lm_head = Decoder(d, n), nn.Linear(d, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


class Lit(pl.LightningModule):
    """A script: ``loss`` is what most of them change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = self.make()

    def make(self) -> nn.Module:
        return LM()

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-1]), ids[:, 1:])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    row_ids: Tensor | None = None  # of the rows of the forward under way, where a script says so

    def counted(self, rows: Tensor) -> Tensor:
        """The rows that are tokens, for scripts with padding."""
        return rows

    def watched(self) -> nn.Module | None:
        """The down projection whose inputs the harness compares with the records."""
        model = getattr(getattr(self, "net", None), "model", None)
        return model.layers[0].mlp.down_proj if isinstance(model, Decoder) else None


class Tokens(Lit):
    """The plain language model, with the tokens of its rows."""

    def loss(self, ids: Tensor) -> Tensor:
        self.row_ids = ids[:, :-1]
        return cross_entropy(self.net(ids[:, :-1]), ids[:, 1:])


def ids(n: int = 64, t: int = T + 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = 1.0 / torch.arange(1, V + 1).float()
    return torch.multinomial(p, n * t, replacement=True, generator=generator).view(n, t)


def counts() -> Tensor:
    return torch.bincount(ids().flatten(), minlength=V)


def loader(n: int = 64, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(ids(n), batch_size=batch_size, **options)  # type: ignore[arg-type]
