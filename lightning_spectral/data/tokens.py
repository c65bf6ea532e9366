"""From text to cached tokens: a tokenizer, two token arrays and one count per id, built once per (text, settings).

The cache folder of one corpus holds ``tokenizer.json``, ``tokenizer_config.json`` (litgpt reads both), ``train.npy``,
``validation.npy``, ``counts.npy`` (int64, one entry per id, training split only) and ``about.json``. It appears under
its final name only when complete, so an interrupted build leaves nothing that a later run could mistake for a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.data.corpus import Corpus, Split, documents, split_blocks

CACHE_VARIABLE = "LIGHTNING_SPECTRAL_CACHE"
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
SMALLEST_VOCAB = 257  # every byte, and the end-of-text token

_LAYOUT = 1  # raise when the cache's content changes meaning
_ENCODE_BLOCKS = 256


@dataclass(frozen=True)
class TokenCache:
    """A finished cache folder.

    Attributes:
        folder: Where it lies.
        vocab_size: Number of token ids, V.
        num_documents: Documents read.
        seconds: Wall time of the build; ``None`` when an earlier run built it.
    """

    folder: Path
    vocab_size: int
    num_documents: int
    seconds: float | None

    @property
    def train(self) -> NDArray[Any]:
        """Training tokens, memory-mapped, shape (num_tokens,)."""
        tokens: NDArray[Any] = np.load(self.folder / "train.npy", mmap_mode="r")
        return tokens

    @property
    def validation(self) -> NDArray[Any]:
        """Held-out tokens, memory-mapped, shape (num_tokens,)."""
        tokens: NDArray[Any] = np.load(self.folder / "validation.npy", mmap_mode="r")
        return tokens

    @property
    def counts(self) -> NDArray[np.int64]:
        """Occurrences of each id in the training tokens, shape (V,)."""
        counts: NDArray[np.int64] = np.load(self.folder / "counts.npy")
        return counts

    def __str__(self) -> str:
        state = "reused" if self.seconds is None else f"built in {self.seconds:.1f} s"
        return (
            f"tokenizer ({self.vocab_size} ids), tokens ({len(self.train):,} train, {len(self.validation):,} held out) "
            f"and counts {state}: {self.folder}"
        )


def default_cache_dir() -> Path:
    """``$LIGHTNING_SPECTRAL_CACHE``, else ``~/.cache/lightning_spectral``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lightning_spectral")


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of the token frequencies, in nats: the loss of a model that knows them and nothing else."""
    seen = counts[counts > 0] / counts.sum()
    return float(-(seen * np.log(seen)).sum())


def prepare_tokens(
    corpus: Corpus, *, vocab_size: int, tokenizer_dir: Path | None = None, cache_dir: Path | None = None
) -> TokenCache:
    """Tokenizer, tokens and counts of a corpus, from the cache if an earlier run left them there.

    Args:
        corpus: The text.
        vocab_size: Ids of the byte-level BPE that is trained on the training blocks; not used with ``tokenizer_dir``.
        tokenizer_dir: Folder of an existing tokenizer, as litgpt lays it out.
        cache_dir: Default: :func:`default_cache_dir`.

    Raises:
        ValueError: If the text is empty or unreadable, or ``vocab_size`` is too small for a byte-level tokenizer.
        FileNotFoundError: If ``tokenizer_dir`` holds no tokenizer.
    """
    if tokenizer_dir is None and vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"`vocab_size` must be >= {SMALLEST_VOCAB} (256 bytes, one end of text), got {vocab_size}.")
    key = _key(corpus, vocab_size, tokenizer_dir)
    folder = (cache_dir or default_cache_dir()) / "tokens" / key
    if (folder / "about.json").is_file():
        return _open(folder, None)
    started = time.perf_counter()
    partial = folder.with_name(f"{key}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _build(partial, corpus, vocab_size, tokenizer_dir)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _open(folder, time.perf_counter() - started)


def _key(corpus: Corpus, vocab_size: int, tokenizer_dir: Path | None) -> str:
    digest = hashlib.sha256(f"{_LAYOUT}:{corpus.fingerprint()}:".encode())
    if tokenizer_dir is None:
        digest.update(f"bpe:{vocab_size}".encode())
    else:
        files = [tokenizer_dir / name for name in TOKENIZER_FILES if (tokenizer_dir / name).is_file()]
        if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in files):
            raise FileNotFoundError(
                f"no tokenizer in `{tokenizer_dir}`: it needs `tokenizer.json` or `tokenizer.model`; leave "
                "`tokenizer_dir` empty to train one on the text."
            )
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _open(folder: Path, seconds: float | None) -> TokenCache:
    about = json.loads((folder / "about.json").read_text())
    return TokenCache(folder, about["vocab_size"], about["num_documents"], seconds)


def _publish(partial: Path, folder: Path) -> None:
    try:
        os.replace(partial, folder)
    except OSError:  # another process was first: its cache has the same content
        if not (folder / "about.json").is_file():
            raise


def _build(folder: Path, corpus: Corpus, vocab_size: int, tokenizer_dir: Path | None) -> None:
    texts = list(documents(corpus))
    if not any(text.strip() for text in texts):
        raise ValueError(f"the {len(corpus.files)} file(s) at `{corpus.files[0]}` hold no text.")
    if tokenizer_dir is None:
        # the tokenizer, like the counts, must not see what is held out
        _train_tokenizer(folder, split_blocks(texts, "\n\n"), vocab_size)
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copy(tokenizer_dir / name, folder)
    encode = Encoder(folder)
    split = split_blocks(texts, encode.separator)
    train, validation = encode(split.train), encode(split.validation)
    known = max(encode.vocab_size, 1 + int(max(train.max(initial=0), validation.max(initial=0))))
    np.save(folder / "train.npy", train)
    np.save(folder / "validation.npy", validation)
    np.save(folder / "counts.npy", np.bincount(train, minlength=known).astype(np.int64))
    about = {
        "layout": _LAYOUT,
        "vocab_size": known,
        "num_documents": len(texts),
        "num_chars": split.num_chars,
        "num_train_tokens": len(train),
        "num_validation_tokens": len(validation),
        "files": [str(file) for file in corpus.files[:8]],
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _train_tokenizer(folder: Path, split: Split, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split.train, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "add_bos_token": False}, indent=2) + "\n")


class Encoder:
    """Text blocks to ids with whatever backend litgpt finds in a tokenizer folder."""

    def __init__(self, folder: Path) -> None:
        from litgpt.tokenizer import Tokenizer

        self._tokenizer = Tokenizer(folder)
        self._fast = self._tokenizer.backend == "huggingface"
        processor = self._tokenizer.processor
        self.vocab_size = (
            processor.get_vocab_size(with_added_tokens=True) if self._fast else int(self._tokenizer.vocab_size)
        )
        # documents are told apart by the tokenizer's own end-of-text token, where it has one that text can spell
        end = (
            processor.id_to_token(self._tokenizer.eos_id) if self._fast and self._tokenizer.eos_id is not None else None
        )
        self.separator = end or "\n\n"

    def __call__(self, blocks: list[str]) -> NDArray[Any]:
        """Ids of the blocks, one after the other."""
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        parts = [np.zeros(0, dtype=kind)]
        for first in range(0, len(blocks), _ENCODE_BLOCKS):
            chunk = blocks[first : first + _ENCODE_BLOCKS]
            if self._fast:
                rows = [row.ids for row in self._tokenizer.processor.encode_batch_fast(chunk, add_special_tokens=False)]
            else:
                rows = self._tokenizer.processor.encode(chunk)
            parts += [np.asarray(row, dtype=kind) for row in rows]
        return np.concatenate(parts)
