"""LightningCLI: model, data, optimizer and probes from YAML or the command line.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --optimizer.lr 1e-3
"""

from pathlib import Path

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_spectral import SentenceParser


class Bytes(LightningDataModule):
    """A text, a token per byte.

    Args:
        path: The text.
        batch_size: Sequences in a batch.
    """

    def __init__(self, path: str, batch_size: int = 16) -> None:
        super().__init__()
        text = Path(path).read_bytes()
        self.sequences, self.batch_size = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65), batch_size
        self.token_counts = torch.bincount(self.sequences.flatten(), minlength=256)  # TailTokenProbe takes it from here

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sequences, self.batch_size)


class GPT2(LightningModule):
    """A small GPT-2.

    Args:
        width: Residual width; the FFN is four times as wide.
        depth: Blocks.
    """

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT2LMHeadModel(GPT2Config(256, 64, width, depth, 2, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits = self.gpt(batch[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


if __name__ == "__main__":
    # with the parser a mistake is answered with one sentence; without it, with the types that were tried
    LightningCLI(GPT2, Bytes, save_config_callback=None, parser_class=SentenceParser)
