"""From text to cached tokens: a tokenizer, two token arrays and one count per id, built once per (text, settings).

The cache folder of one corpus holds ``tokenizer.json``, ``tokenizer_config.json`` (litgpt reads both), ``train.npy``,
``validation.npy``, ``train_seams.npy`` and ``validation_seams.npy`` (int64, where text of the other split lay between),
``counts.npy`` (int64, one entry per id, training split only) and ``about.json``, which has the size and a digest of
each. It appears under its final name only when complete. One process builds, others wait for it; text
is read as a stream, in memory that does not grow with it; an interrupted build goes on from what it has finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lightning_spectral.data.corpus import Block, Corpus, blocks, joined
from lightning_spectral.data.encode import Encoder, check_num_proc, encoded_units, train_tokenizer
from lightning_spectral.data.files import digest_of
from lightning_spectral.text import one_line, parse_json, write_text

CACHE_VARIABLE = "LIGHTNING_SPECTRAL_CACHE"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
SMALLEST_VOCAB = 257  # every byte, and the end-of-text token

_LAYOUT = 2  # raise when the cache's content changes meaning


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

    def seams(self, name: str) -> NDArray[np.int64]:
        """Places in the tokens ``train`` or ``validation`` where the text does not go on from the token before.

        Raises:
            ValueError: If an earlier version of this package, which did not keep them, made the cache.
        """
        try:
            places: NDArray[np.int64] = np.load(self.folder / f"{name}_seams.npy")
        except FileNotFoundError:
            raise ValueError(
                f"the token cache `{self.folder}` does not say where held-out text was taken out, which `documents: "
                "apart` needs to know: delete it, and it is built again."
            ) from None
        return places

    def end_of_document(self) -> int | None:
        """The token between two documents, if there is one."""
        return Encoder(self.folder).end_of_text

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
    corpus: Corpus,
    *,
    vocab_size: int,
    tokenizer_dir: Path | None = None,
    cache_dir: Path | None = None,
    report: Callable[[str], None] | None = None,
    num_proc: int = 1,
) -> TokenCache:
    """Tokenizer, tokens and counts of a corpus, from the cache if an earlier run left them there.

    Args:
        corpus: The text.
        vocab_size: Ids of the byte-level BPE that is trained on the training blocks; not used with ``tokenizer_dir``.
        tokenizer_dir: Folder of an existing tokenizer, as litgpt lays it out.
        cache_dir: Default: :func:`default_cache_dir`.
        report: Told now and then how far a long build is, and that another process is being waited for.
        num_proc: Processes that encode; the cache is the same with any number of them.

    Raises:
        ValueError: If the text is empty or unreadable, ``vocab_size`` is too small for a byte-level tokenizer,
            ``num_proc`` is no integer >= 1, or the cache cannot be written.
        FileNotFoundError: If ``tokenizer_dir`` holds no tokenizer.
    """
    check_num_proc(num_proc)
    if tokenizer_dir is None and vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"`vocab_size` must be >= {SMALLEST_VOCAB} (256 bytes, one end of text), got {vocab_size}.")
    key = _key(corpus, vocab_size, tokenizer_dir)
    folder = (cache_dir or default_cache_dir()) / "tokens" / key
    found = _opened(folder, None)
    if found is not None:
        return found
    say = report or (lambda _: None)
    try:
        _make_private(folder.parent)
        with _only_builder(folder, say):
            found = _opened(folder, None)  # another process may have built it by now
            if found is not None:
                return found
            started = time.perf_counter()
            partial = folder.with_name(f"{key}.partial")
            partial.mkdir(exist_ok=True)
            _build(partial, corpus, vocab_size, tokenizer_dir, say, num_proc)
            shutil.rmtree(folder, ignore_errors=True)  # one that failed its check
            os.replace(partial, folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is None:
            raise  # the text's own
        raise ValueError(
            f"cannot write the token cache `{folder.parent}`: {one_line(error)}. Free space there, or set "
            f"`{CACHE_VARIABLE}` to a folder that can be written."
        ) from error
    built = _opened(folder, time.perf_counter() - started)
    assert built is not None
    return built


def _make_private(folder: Path) -> None:
    """What is read from a cache is trained on: others must not be able to write it."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)  # of two builders both come here


@contextmanager
def _only_builder(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that the system frees when its holder dies."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        say(f"another process is building the token cache `{folder}`: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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


def _opened(folder: Path, seconds: float | None) -> TokenCache | None:
    """The cache, if it is there and whole; one that fails its check is named and will be built again."""
    try:
        about = parse_json((folder / "about.json").read_bytes())
        if not {"train.npy", "validation.npy", "counts.npy"} <= set(about["files_written"]):
            raise ValueError("`about.json` does not name its arrays")
        for name, (size, digest) in about["files_written"].items():
            file = folder / name
            if file.stat().st_size != size or digest_of(file) != digest:
                raise ValueError(f"`{name}` is not what was written")
        return TokenCache(folder, about["vocab_size"], about["num_documents"], seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if folder.is_dir():
            warnings.warn(
                f"the token cache `{folder}` is damaged ({one_line(error)}) and is built again.", stacklevel=3
            )
        return None


def _build(
    folder: Path,
    corpus: Corpus,
    vocab_size: int,
    tokenizer_dir: Path | None,
    say: Callable[[str], None],
    num_proc: int,
) -> None:
    if tokenizer_dir is None:
        if not (folder / "tokenizer_config.json").exists():
            # the tokenizer, like the counts, must not see what is held out
            train_tokenizer(folder, (block.text for block in _blocks(corpus, "\n\n") if not block.held_out), vocab_size)
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copy(tokenizer_dir / name, folder)
    encode = Encoder(folder)
    counter = _Counter()
    units = encoded_units(folder, _blocks(corpus, encode.separator, counter), encode, say, num_proc)
    num_train, num_validation, counts = _assemble(folder, units, encode)
    if num_train == 0 or not counter.has_text:
        raise ValueError(f"`data`: there is no text in {corpus.where}.")
    np.save(folder / "counts.npy", counts)
    for unit in folder.glob("unit-*"):
        unit.unlink()
    about = {
        "layout": _LAYOUT,
        "vocab_size": len(counts),
        "num_documents": counter.documents,
        "num_chars": counter.chars,
        "num_train_tokens": num_train,
        "num_validation_tokens": num_validation,
        "files": corpus.names,
        "files_written": {file.name: [file.stat().st_size, digest_of(file)] for file in sorted(folder.iterdir())},
    }
    write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")


@dataclass
class _Counter:
    """Documents and characters that a stream has passed on."""

    documents: int = 0
    chars: int = 0
    has_text: bool = False

    def over(self, pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        first = self.documents
        for number, piece in pieces:
            self.documents = first + number + 1
            self.chars += len(piece)
            self.has_text = self.has_text or not (piece == "" or piece.isspace())
            yield number, piece


def _blocks(corpus: Corpus, separator: str, counter: _Counter | None = None) -> Iterator[Block]:
    """Blocks of the training files, with every 18th held out, or with the held-out files' blocks after them."""
    counter = counter or _Counter()
    text = joined(counter.over(corpus.pieces()), separator)
    yield from blocks(text, hold_out=not corpus.has_held_out, separator=separator)
    if corpus.has_held_out:
        text = joined(counter.over(corpus.pieces(held_out=True)), separator)
        yield from (Block(block.text, True) for block in blocks(text, hold_out=False, separator=separator))


def _assemble(
    folder: Path, units: Iterable[dict[str, NDArray[Any]]], encode: Encoder
) -> tuple[int, int, NDArray[np.int64]]:
    """Write ``train.npy`` and ``validation.npy``; returns their lengths and the counts of the training tokens."""
    counts = np.zeros(encode.vocab_size, dtype=np.int64)
    lengths = {"train": 0, "validation": 0}
    seams: dict[str, list[NDArray[np.int64]]] = {name: [] for name in lengths}
    raw = {name: (folder / f"unit-{name}.raw") for name in lengths}
    with raw["train"].open("wb") as train, raw["validation"].open("wb") as validation:
        for unit in units:
            for name, out in (("train", train), ("validation", validation)):
                unit[name].tofile(out)
                seams[name].append(unit[f"{name}_seams"] + lengths[name])
                lengths[name] += len(unit[name])
            largest = 1 + max((int(unit[name].max()) for name in lengths if len(unit[name])), default=0)
            counts = np.pad(counts, (0, max(0, largest - len(counts))))
            counts += np.bincount(unit["train"], minlength=len(counts))
    for name, length in lengths.items():
        np.save(folder / f"{name}_seams.npy", np.concatenate([np.zeros(0, dtype=np.int64), *seams[name]]))
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(encode.dtype)), "fortran_order": False}
        with (folder / f"{name}.npy").open("wb") as out, raw[name].open("rb") as content:
            np.lib.format.write_array_header_1_0(out, {**header, "shape": (length,)})
            shutil.copyfileobj(content, out, 1 << 22)
    return lengths["train"], lengths["validation"], counts
