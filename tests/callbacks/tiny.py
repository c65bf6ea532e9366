"""A LightningModule around a tiny litgpt model, its data, and a Trainer that writes nothing it need not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from tests.models import tiny

LENGTH = 16


class Module(pl.LightningModule):
    def __init__(self, mlp: str = "GptNeoxMLP", optimizer: str = "AdamW", **changes: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.gpt = tiny.litgpt(mlp, **changes)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.gpt(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.gpt(batch[:, :-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), lr=1e-3)


def data(num: int = 64, seed: int = 0) -> torch.Tensor:
    return tiny.ids(num, LENGTH + 1, seed)


def loader(num: int = 64, batch_size: int = 8, *, shuffle: bool = False, seed: int = 0) -> DataLoader:
    return DataLoader(data(num, seed), batch_size=batch_size, shuffle=shuffle)


def counts() -> torch.Tensor:
    return torch.bincount(data().flatten(), minlength=tiny.VOCAB)


def trainer(path: Any, callbacks: list[Any], **options: Any) -> pl.Trainer:
    defaults = {
        "max_steps": 4, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(default_root_dir=str(path), callbacks=callbacks, **{**defaults, **options})
