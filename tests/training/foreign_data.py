"""A data module as a litgpt user writes one: nothing of ours in it."""

from __future__ import annotations

from typing import Any

import torch
from litgpt.data import DataModule
from torch import Tensor
from torch.utils.data import DataLoader


class RandomTokens(DataModule):  # type: ignore[misc]
    def __init__(self, vocab_size: int = 40, num_sequences: int = 24) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.num_sequences = num_sequences
        self.batch_size = 1
        self.length = 8

    def connect(
        self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        self.batch_size, self.length = batch_size, max_seq_length or self.length

    def _loader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, self.vocab_size, (self.num_sequences, self.length + 1), generator=generator)
        return DataLoader(rows, batch_size=self.batch_size)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._loader()
