"""Weights & Biases: scalars, pictures in the buckets' own colours, and the records as an artifact.

python examples/wandb_offline.py [TEXT]     # WANDB_MODE=online to send them at once, else `wandb sync wandb/offline-*`
"""

import os
import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_spectral import TailTokenProbe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte


class Pythia(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=256, max_position_embeddings=64, **size))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    offline = os.environ.get("WANDB_MODE", "offline") == "offline"
    folder = Path("out/examples/wandb")
    folder.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(project="spectral", name="pythia-tiny", save_dir=folder, offline=offline)
    probe = TailTokenProbe(every_n_steps=10, counts="stream", dirpath=str(folder / "records"))
    trainer = Trainer(max_steps=20, callbacks=[probe], logger=logger, log_every_n_steps=1, enable_checkpointing=False)
    trainer.fit(Pythia(), DataLoader(sequences, batch_size=16))
    logger.experiment.finish()
