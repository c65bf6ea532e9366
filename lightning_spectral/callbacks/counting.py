"""Token counts from the training data itself, without touching what the training will see."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_spectral.models.families import resolve
from lightning_spectral.probe import batch_formats as batches
from lightning_spectral.probe.options import ProbeOptions


def count_stream(
    trainer: pl.Trainer, pl_module: pl.LightningModule, options: ProbeOptions, num_batches: int | None
) -> Tensor:
    """Occurrences of each token id in one pass over a training dataloader of its own.

    Every rank counts all of it; the random states are put back, so that training sees what it would have seen.

    Raises:
        ValueError: If the model does not say how many ids it has, or a batch holds no ids that we recognise.
    """
    tapped = resolve(pl_module, sites=options.sites, modules=options.modules, embedding=options.embedding)
    vocab = getattr(tapped.embedding, "num_embeddings", None)
    if vocab is None:
        raise ValueError(f"`counts='stream'`: {type(tapped.embedding).__name__} has no `num_embeddings`; pass counts.")
    counts_V = torch.zeros(vocab, dtype=torch.int64)
    with _same_random_states():
        loader = trainer.fit_loop._data_source.dataloader()
        for batch in itertools.islice(loader, num_batches):
            counts_V += torch.bincount(_ids(batch).flatten().cpu(), minlength=vocab)
    rank_zero_info(f"TailTokenProbe: counted {int(counts_V.sum()):,} tokens of the training data.")
    return counts_V


def _ids(batch: Any) -> Tensor:
    ids = batches.ids(batch)
    if ids is None:
        raise ValueError(
            f"`counts='stream'` found no token ids in a batch of type {type(batch).__name__}: pass counts from a file."
        )
    mask = batches.padding_mask(batch, (ids.shape[0], ids.shape[1]))
    return ids if mask is None else ids[mask]


@contextmanager
def _same_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
