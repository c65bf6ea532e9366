"""Which block of tokens goes to which rank in which micro-batch: a pure function of the seed and the position.

# B blocks per micro-batch, T tokens per sequence, G blocks per optimizer step (over all ranks)

One endless stream of blocks, a new permutation per epoch, is cut into optimizer steps of G blocks; each rank takes its
G / world part of every step. So the blocks of a step do not depend on the world size or on the micro-batch size, no
block is dropped at an epoch's end, and a run resumes by starting at a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_spectral.data.shards import TokenSequence

_SCANNED_AT_ONCE = 1 << 24  # tokens


class TokenBlocks(Dataset[Tensor]):
    """Non-overlapping sequences of T inputs and the token after each: items of shape (T + 1,), int64.

    A split shorter than one sequence is one shorter item; a split of fewer than two tokens has none.

    Args:
        tokens: Ids, memory-mapped or in memory.
        seq_length: T.
        end_of_text: Id that ends a document, if no sequence may reach into the next one; what of a document is left
            after its last whole sequence is in none then.
        seams: Places where the text does not go on from the token before; no sequence reaches across them either, where
            ``end_of_text`` is given.
    """

    def __init__(
        self,
        tokens: NDArray[Any] | TokenSequence,
        seq_length: int,
        end_of_text: int | None = None,
        seams: NDArray[np.int64] | None = None,
    ) -> None:
        self._tokens = tokens
        self._starts = None if end_of_text is None else starts_in_documents(tokens, seq_length, end_of_text, seams)
        self.seq_length = max(1, min(seq_length, len(tokens) - 1)) if self._starts is None else seq_length

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self.seq_length) if self._starts is None else len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.seq_length if self._starts is None else int(self._starts[index])
        return torch.from_numpy(self._tokens[start : start + self.seq_length + 1].astype(np.int64))


def starts_in_documents(
    tokens: NDArray[Any] | TokenSequence, seq_length: int, end_of_text: int, seams: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """First token of every sequence of ``seq_length`` inputs and a target more that lies in one document.

    A document's end is its last token: it may be a target, never the token before another document's. A seam ends a
    document that has no such token.
    """
    ends = [
        first + np.flatnonzero(tokens[first : first + _SCANNED_AT_ONCE] == end_of_text)
        for first in range(0, len(tokens), _SCANNED_AT_ONCE)
    ]
    last = [len(tokens) - 1, *([] if seams is None else seams - 1)]  # of what has no end of its own
    bounds = np.unique(np.concatenate([[-1], *ends, last])).astype(np.int64)
    num_of_document = (np.diff(bounds) - 1) // seq_length
    before = np.cumsum(num_of_document) - num_of_document
    place = np.arange(int(num_of_document.sum())) - np.repeat(before, num_of_document)
    return np.repeat(bounds[:-1] + 1, num_of_document) + seq_length * place


class StepBatches(Sampler[list[int]]):
    """Micro-batches of one rank, from position ``start`` on.

    Args:
        num_blocks: Blocks in the training split.
        seed: Sets the order, nothing else does.
        global_batch: G, a multiple of ``world_size * micro_batch``.
        micro_batch: B.
        num_steps: Optimizer steps in the whole run.
        rank: This rank.
        world_size: Data-parallel ranks.

    Raises:
        ValueError: If there is no block, or the batch sizes do not divide.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(
                f"`num_blocks` must be >= 1, got {num_blocks}: the training text is shorter than one block."
            )
        if global_batch % (world_size * micro_batch):
            raise ValueError(
                f"`global_batch` must be a multiple of world_size * micro_batch = {world_size} * {micro_batch}, "
                f"got {global_batch}."
            )
        self.start = 0
        self.accumulation = global_batch // (world_size * micro_batch)
        self._num_steps = num_steps
        self._micro_batch = micro_batch
        self._global_batch = global_batch
        self._first_of_rank = rank * (global_batch // world_size)
        self._num_blocks = num_blocks
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_blocks))

    def __len__(self) -> int:
        """Micro-batches of the whole run, whatever ``start`` is: Lightning counts from the beginning of the run."""
        return self._num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for position in range(self.start, len(self)):
            step, micro = divmod(position, self.accumulation)
            first = step * self._global_batch + self._first_of_rank + micro * self._micro_batch
            yield [self._block(place) for place in range(first, first + self._micro_batch)]

    def _block(self, place: int) -> int:
        epoch, offset = divmod(place, self._num_blocks)
        return int(self._order(epoch)[offset])


class ResumableLoader(DataLoader[Tensor]):
    """Train loader that knows how far it is, in the form that Lightning saves and restores.

    Args:
        dataset: The blocks.
        batches: Their order.
        num_workers: Worker processes.
    """

    def __init__(self, dataset: TokenBlocks, batches: StepBatches, num_workers: int = 0) -> None:
        super().__init__(dataset, batch_sampler=batches, num_workers=num_workers)
        self._batches = batches
        self._handed_out = 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        self._handed_out = self._batches.start
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Micro-batches handed out, and how many make an optimizer step."""
        return {"position": self._handed_out, "accumulation": self._batches.accumulation}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the saved position.

        Raises:
            ValueError: If a step now takes another number of micro-batches and nothing has converted the position
                (:class:`~lightning_spectral.training.checkpoints.StepCheckpoint` does, between two steps).
        """
        if state["accumulation"] != self._batches.accumulation:
            raise ValueError(
                f"the checkpoint was made with {state['accumulation']} micro-batches per step on each rank, this run "
                f"has {self._batches.accumulation}: scale `train.micro_batch_size` so that global_batch_size / "
                "(devices * micro_batch_size) stays the same."
            )
        self._batches.start = state["position"]
