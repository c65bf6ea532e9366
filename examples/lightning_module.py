"""A LightningModule of your own, measured: its down projections are named by a glob, since no family knows them.

python examples/lightning_module.py [TEXT]
tensorboard --logdir out/examples
"""

import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import Muon, SpectralAlarm, TailTokenProbe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, length = self.norm1(x), x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.norm2(x))) ** 2)


class ByteModel(LightningModule):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Muon(self, lr=3e-3)  # matrices of the blocks by Muon, embedding, head and vectors by AdamW


if __name__ == "__main__":
    probe = TailTokenProbe(every_n_steps=10, counts="stream", modules=["blocks.*.down"], eigenvalues=True)
    alarm = SpectralAlarm(bucket="pooled", below=0.05, relative_to="width")  # 5 % of D
    trainer = Trainer(
        max_steps=30,
        callbacks=[probe, alarm],
        logger=TensorBoardLogger("out/examples", name="lightning_module"),
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    trainer.fit(ByteModel(), DataLoader(sequences, batch_size=16))
    print({name: round(float(value), 2) for name, value in trainer.callback_metrics.items()})
