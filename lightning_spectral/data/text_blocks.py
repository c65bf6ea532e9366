"""What all data modules have in common: text in, fixed-length token blocks out, in litgpt's ``DataModule`` form."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_spectral.data.batches import ResumableLoader, StepBatches, TokenBlocks
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.data.encode import check_num_proc
from lightning_spectral.data.shards import TokenShards
from lightning_spectral.data.tokens import TokenCache, prepare_tokens

Documents = Literal["packed", "apart"]
_MOSTLY = 0.5


class TextBlocks(DataModule):  # type: ignore[misc]
    """Token blocks of a text corpus; subclasses say which text.

    Args:
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader; blocks are memory-mapped, so 0 is usually fastest.
        cache_dir: Where tokenizer, tokens and counts are kept. Default: ``$LIGHTNING_SPECTRAL_CACHE``, else
            ``~/.cache/lightning_spectral``.
        num_proc: Processes that tokenise the text, once.
        documents: ``packed`` cuts sequences from the stream of all documents, wherever they end, as the paper's data
            and litgpt's are; ``apart`` lets none reach from one document into the next, nor across a place where
            held-out text was taken out or a shard begins: what of a document is left after its last whole sequence is
            not used, and no sequence is padded.

    Raises:
        ValueError: If ``num_proc`` is no integer >= 1, or ``documents`` is neither of the two.
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        num_proc: int = 1,
        documents: Documents = "packed",
    ) -> None:
        super().__init__()
        check_num_proc(num_proc)
        if documents not in get_args(Documents):
            raise ValueError(f"`documents` must be one of {list(get_args(Documents))}, got {documents!r}.")
        self.num_proc, self.documents = num_proc, documents
        self._vocab_size = vocab_size
        self._seed = seed
        self._num_workers = num_workers
        self._cache_dir = cache_dir
        self._tokenizer_dir: Path | None = None
        self._cache: TokenCache | TokenShards | None = None
        self._seq_length = 128
        self._micro_batch = 1
        self._global_batch: int | None = None
        self._num_steps: int | None = None

    @abstractmethod
    def corpus(self) -> Corpus:
        """The text."""

    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        *,
        tokenizer_dir: Path | None = None,
        global_batch_size: int | None = None,
        num_steps: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Settle what only the run knows.

        Args:
            tokenizer: Not used: a loaded tokenizer does not say from which files; give ``tokenizer_dir``.
            batch_size: Blocks per micro-batch on each rank.
            max_seq_length: Input tokens per block, T.
            tokenizer_dir: Tokenizer to use instead of training one.
            global_batch_size: Blocks per optimizer step over all ranks. Default: one micro-batch on each rank.
            num_steps: Optimizer steps of the run. Default: one pass over the text.
            seed: Order of the blocks, if the data module's own ``seed`` is ``None``.
            **kwargs: None are known.

        Raises:
            ValueError: If a tokenizer is given without its folder.
        """
        if tokenizer is not None and tokenizer_dir is None:
            raise ValueError(
                f"{type(self).__name__} trains and caches its own tokenizer; to use another, say where its files lie: "
                "`connect(tokenizer_dir=...)`."
            )
        self._tokenizer_dir = tokenizer_dir or self._tokenizer_dir
        self._micro_batch = batch_size
        self._seq_length = max_seq_length or self._seq_length
        self._global_batch = global_batch_size
        self._num_steps = num_steps
        if self._seed is None:
            self._seed = seed

    def prepare_data(self) -> None:
        """Build the cache, or say that it is reused."""
        if self._cache is None:
            rank_zero_info(str(self.cache))

    @property
    def cache(self) -> TokenCache | TokenShards:
        """Tokenizer, tokens and counts of this corpus."""
        if self._cache is None:
            self._cache = prepare_tokens(
                self.corpus(),
                vocab_size=self._vocab_size,
                tokenizer_dir=self._tokenizer_dir,
                cache_dir=self._cache_dir,
                report=rank_zero_info,
                num_proc=self.num_proc,
            )
        return self._cache

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Occurrences of each id in the training tokens, shape (V,)."""
        return self.cache.counts

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.cache.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """Litgpt's tokenizer over the cached files."""
        if self.cache.folder is None:
            raise ValueError(f"{type(self).__name__} was given tokens and no tokenizer: set `tokenizer_dir`.")
        return Tokenizer(self.cache.folder)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer's files, if there is a tokenizer."""
        return self.cache.folder

    @property
    def num_train_blocks(self) -> int:
        """Blocks in one pass over the training text."""
        return len(self._train_blocks())

    def train_dataloader(self) -> ResumableLoader:
        """Blocks of shape (B, T + 1), this rank's part of every optimizer step."""
        blocks = self._train_blocks()
        rank, world_size = self._place()
        global_batch = self._global_batch or self._micro_batch * world_size
        if len(blocks) < global_batch:
            rank_zero_warn(
                f"the training text gives {len(blocks)} blocks of {self._seq_length} tokens, fewer than the "
                f"{global_batch} of one optimizer step: a step sees blocks more than once."
            )
        batches = StepBatches(
            len(blocks),
            seed=self._seed or 0,
            global_batch=global_batch,
            micro_batch=self._micro_batch,
            num_steps=self._num_steps or max(1, len(blocks) // global_batch),
            rank=rank,
            world_size=world_size,
        )
        return ResumableLoader(blocks, batches, self._num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Held-out blocks in text order, every world-th of them on each rank."""
        blocks = self._blocks("validation")
        if not len(blocks) and len(self.cache.validation) > 1:
            rank_zero_warn(
                f"`documents` is `apart`, and no document of the held-out text has more than {self._seq_length} "
                "tokens: nothing is validated on. Set a smaller `train.max_seq_length`, or `packed`."
            )
        rank, world_size = self._place()
        share = len(blocks) // world_size  # the same number on every rank, so that none waits in a reduction
        indices = [rank + world_size * place for place in range(share)] if share else range(len(blocks))
        return DataLoader(blocks, batch_size=self._micro_batch, sampler=indices, num_workers=self._num_workers)

    def _train_blocks(self) -> TokenBlocks:
        tokens = self.cache.train
        blocks = self._blocks("train")
        if len(tokens) <= self._seq_length:
            raise ValueError(
                f"the training text has {len(tokens)} tokens, too few for one block of {self._seq_length} and "
                "the token after it: give more text or a smaller `train.max_seq_length`."
            )
        used = len(blocks) * self._seq_length
        if not used:
            raise ValueError(
                f"no document of the training text has more than {self._seq_length} tokens, and `documents` is "
                "`apart`: set a smaller `train.max_seq_length`, or `packed`."
            )
        if used < _MOSTLY * len(tokens):
            rank_zero_warn(
                f"`documents` is `apart`: whole sequences of {self._seq_length} tokens hold {used:,} of "
                f"{len(tokens):,} training tokens. A smaller `train.max_seq_length` uses more of them, `packed` all."
            )
        return blocks

    def _blocks(self, name: Literal["train", "validation"]) -> TokenBlocks:
        tokens = self.cache.train if name == "train" else self.cache.validation
        if self.documents == "packed":
            return TokenBlocks(tokens, self._seq_length)
        return TokenBlocks(tokens, self._seq_length, self._end_of_document, self.cache.seams(name))

    @cached_property
    def _end_of_document(self) -> int:
        """The token that ends a document.

        Raises:
            ValueError: If there is none, or none that these tokens have.
        """
        found, folder = self.cache.end_of_document(), self.cache.folder
        if found is None:
            missing = "there is no tokenizer" if folder is None else f"the tokenizer in `{folder}` has none to use here"
            raise ValueError(
                f"`documents` is `apart`, which needs the token that ends a document, and {missing}: set "
                "`tokenizer_dir` to a tokenizer with one, or `documents` to `packed`."
            )
        if isinstance(self.cache, TokenShards) and self.cache.has_no_ends(found):
            raise ValueError(
                f"`documents` is `apart`, and the {len(self.cache.train):,} training tokens hold no token {found}, "
                f"with which the tokenizer in `{folder}` ends a document: give the tokenizer that made them, or "
                "`packed`."
            )
        return found

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        place = trainer.distributed_sampler_kwargs or {}  # under tensor parallelism several ranks have the same data
        return place.get("rank", trainer.global_rank), place.get("num_replicas", trainer.world_size)
