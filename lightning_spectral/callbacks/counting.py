"""Token counts of a whole dataset before step 1, where reading it cannot be noticed by the training.

That is so for data that lies in memory as tensors or lists: indexing it draws no random number and moves no cursor. For
anything else ids are counted as they flow (``probe.token_counts``); a loader is never iterated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_spectral.probe.adapters import ids_in
from lightning_spectral.probe.observer import Observer

MAX_ITEMS = 100_000  # of a larger dataset, as many items evenly over it


def count_ahead(observer: Observer, trainer: pl.Trainer) -> None:
    """Count the training data if it can be read unnoticed; every rank must call it."""
    assert observer.stream is not None
    loaders = trainer.train_dataloader
    items = list(_items(loaders)) if isinstance(loaders, DataLoader) else []
    observer.count_ahead([ids for item in items for ids in ids_in(item)])


def _items(loader: DataLoader[Any]) -> Iterator[Any]:
    if not is_stateless(loader.dataset):
        return
    size = len(loader.dataset)  # type: ignore[arg-type]
    step = max(size // MAX_ITEMS, 1)
    for index in range(0, size, step):
        item = loader.dataset[index]
        yield item[None] if isinstance(item, Tensor) else item


def is_stateless(dataset: Any) -> bool:
    """Whether items can be read without a trace: tensors and lists of them, and views of such."""
    if isinstance(dataset, Subset):
        return type(dataset) is Subset and is_stateless(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return type(dataset) is ConcatDataset and all(is_stateless(part) for part in dataset.datasets)
    return type(dataset) in (Tensor, TensorDataset, list, tuple)
