"""What a run of a sweep says while it goes: step, losses, cost, and a digest of the data it really saw."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_spectral.sweep.cost import with_cost
from lightning_spectral.sweep.plan import read_json, write_json

_EVERY_S = 1.0
_BITS = 2**128


class SweepMonitor(pl.Callback):
    """Writes one small JSON file: progress for the live table, digests to prove that runs saw the same data.

    The digest of the training data is a sum of one hash for each (step, micro-batch, tokens): it depends on the order,
    and a resumed run ends with the same digest as an uninterrupted one.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._train = 0
        self._batches = 0
        self._validation = 0
        self._validation_done = ""
        self._losses: dict[str, float | None] = {}
        self._last: Tensor | None = None
        self._written = 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._train = (self._train + _digest(batch, self._batches)) % _BITS
        self._batches += 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._last = loss.detach() if isinstance(loss, Tensor) else None
        if time.monotonic() - self._written >= _EVERY_S:
            self._write(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and not self._validation_done:
            self._validation = (self._validation + _digest(batch, batch_idx)) % _BITS

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validation_done = self._validation_done or f"{self._validation:032x}"
        if "val_loss" in trainer.callback_metrics:
            self._losses["validation"] = _number(trainer.callback_metrics["val_loss"])
        self._write(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "train": f"{self._train:032x}",
            "batches": self._batches,
            "validation": self._validation_done,
            "losses": dict(self._losses),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train = int(state_dict["train"], 16)
        self._batches = state_dict["batches"]
        self._validation_done = state_dict["validation"]
        self._losses = dict(state_dict["losses"])

    def _write(self, trainer: pl.Trainer) -> None:
        self._written = time.monotonic()
        if self._last is not None:  # asked for now: each time waits for the device
            self._losses["train"] = _number(self._last)
        if not trainer.is_global_zero:
            return
        content = {
            "step": trainer.global_step,
            "num_steps": trainer.max_steps,
            "losses": self._losses,
            "data": {"train": f"{self._train:032x}", "batches": self._batches, "validation": self._validation_done},
        }
        write_json(self.path, {**content, **with_cost(read_json(self.path))})


def _number(loss: Tensor) -> float | None:
    value = float(loss)
    return value if math.isfinite(value) else None


def _digest(batch: Any, place: int) -> int:
    ids = batch[0] if isinstance(batch, (list, tuple)) else batch
    if isinstance(ids, dict):
        ids = ids.get("input_ids")
    if not isinstance(ids, Tensor):
        return 0
    content = ids.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=16, salt=place.to_bytes(8, "little")).digest(), "little")
