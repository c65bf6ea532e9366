"""Text that is tokens already: ``.bin`` shards of the modded-nanogpt and llm.c format, 1-D ``.npy``, litdata folders.

A ``.bin`` shard is 256 int32 (magic, version, number of tokens, zeros) and then that many ids: uint16 after 20240520
and 1, uint32 after 20240801 and 7 (llm.c's shards for Llama 3). Shards are memory-mapped and read as one long sequence
of ids; nothing is copied, whatever their size.
"""

from __future__ import annotations

import bisect
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.data.encode import Encoder
from lightning_spectral.data.files import ABOUT_DATA, COMPRESSED, digest_of, files_below, find_files, reader_of
from lightning_spectral.data.litdata_folder import INDEX, litdata_folders, open_chunks
from lightning_spectral.text import one_line, whole_file

MAGIC = 20240520
VERSION = 1
FORMATS = {(MAGIC, VERSION): np.uint16, (20240801, 7): np.uint32}  # by magic number and version
HEADER_BYTES = 1024
SUFFIXES = (".bin", ".npy")

_HOLD_OUT = 18  # without a validation shard, the last 18th of the tokens
_CHUNK = 1 << 24


class TokenSequence:
    """The ids of several arrays as one sequence: ``len`` and slices, each slice a copy.

    Args:
        parts: 1-D arrays of ids, in order.
        start: First id to show.
        stop: One past the last.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], start: int = 0, stop: int | None = None) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()
        total = self._ends[-1] if self._ends else 0
        self._start, self._stop = start, total if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: slice) -> NDArray[Any]:
        first, last, step = index.indices(len(self))
        if step != 1:
            raise IndexError(f"a token sequence is sliced with step 1, got {step}.")
        first, last = first + self._start, max(first, last) + self._start
        pieces = []
        part = bisect.bisect_right(self._ends, first)
        while first < last:
            begin = self._ends[part] - len(self._parts[part])
            end = min(last, self._ends[part])
            pieces.append(self._parts[part][first - begin : end - begin])
            first, part = end, part + 1
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)

    @property
    def seams(self) -> NDArray[np.int64]:
        """First ids of its arrays, as places in the sequence."""
        starts = np.array([0, *self._ends[:-1]], dtype=np.int64) - self._start
        return starts[(starts >= 0) & (starts < len(self))]

    def split(self, at: int) -> tuple[TokenSequence, TokenSequence]:
        """The first ``at`` ids and the rest."""
        middle = self._start + at
        return TokenSequence(self._parts, self._start, middle), TokenSequence(self._parts, middle, self._stop)


@dataclass(frozen=True)
class TokenShards:
    """Shards with the same interface as a token cache.

    Attributes:
        train_files: Shards to train on.
        held_out_files: Shards to validate on; if empty, the last 18th of the training tokens.
        vocab_size: Number of token ids, V.
        folder: Where the tokenizer lies, if there is one.
        cache_dir: Where counts are kept.
    """

    train_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]
    vocab_size: int
    folder: Path | None
    cache_dir: Path

    @property
    def train(self) -> TokenSequence:
        """Training ids."""
        return self._split[0]

    @property
    def validation(self) -> TokenSequence:
        """Held-out ids."""
        return self._split[1]

    def seams(self, name: str) -> NDArray[np.int64]:
        """Places in the tokens ``train`` or ``validation`` where a shard begins, which may not go on from the last."""
        return (self.train if name == "train" else self.validation).seams

    def end_of_document(self) -> int | None:
        """The token with which the tokenizer ends a document, if there is one."""
        return None if self.folder is None else Encoder(self.folder).end_of_document

    def has_no_ends(self, end_of_document: int) -> bool:
        """Whether the training ids are one document as far as they say: one shard without a token that ends it."""
        starts = range(0, len(self.train), _CHUNK)
        return len(self.train.seams) < 2 and not any(
            bool((self.train[first : first + _CHUNK] == end_of_document).any()) for first in starts
        )

    @cached_property
    def _split(self) -> tuple[TokenSequence, TokenSequence]:
        """Training and held-out ids; every shard is opened once."""
        trained = TokenSequence(_opened(self.train_files))
        if self.held_out_files:
            return trained, TokenSequence(_opened(self.held_out_files))
        return trained.split(len(trained) - len(trained) // _HOLD_OUT)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Occurrences of each id in the training tokens, shape (V,); counted once, then kept in ``cache_dir``.

        Raises:
            ValueError: If a shard, also a held-out one, holds an id of ``vocab_size`` or more, or a negative one.
        """
        digest = hashlib.sha256(f"{self.vocab_size}:{len(self.train)}:".encode())
        for file in (*self.train_files, *self.held_out_files):
            digest.update(_digest_of(file).encode())
        kept = self.cache_dir / "counts" / f"{digest.hexdigest()[:20]}.npy"
        found = _kept_counts(kept, self.vocab_size, len(self.train))
        if found is not None:
            return found
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for ids in self._chunks(self.train):
            counts += np.bincount(ids, minlength=self.vocab_size)
        for _ in self._chunks(self.validation):  # checked, not counted
            pass
        try:
            with whole_file(kept) as partial, partial.open("wb") as file_:
                np.save(file_, counts)
        except OSError as error:  # the next run counts again
            warnings.warn(f"the counts cannot be kept in `{kept.parent}`: {one_line(error)}.", stacklevel=2)
        return counts

    def _chunks(self, tokens: TokenSequence) -> Iterator[NDArray[Any]]:
        for first in range(0, len(tokens), _CHUNK):
            ids = tokens[first : first + _CHUNK]
            if int(ids.min()) < 0:
                raise ValueError(f"the shards hold the id {int(ids.min())}: ids of tokens are not negative.")
            if int(ids.max()) >= self.vocab_size:
                raise ValueError(
                    f"the shards hold the id {int(ids.max())}, `vocab_size` is {self.vocab_size}: set it to the number "
                    "of ids of the tokenizer that made them."
                )
            yield ids

    def __str__(self) -> str:
        files = len(self.train_files) + len(self.held_out_files)
        return f"tokens ({len(self.train):,} train, {len(self.validation):,} held out) in {files} shard(s)"


def _kept_counts(file: Path, vocab_size: int, num_tokens: int) -> NDArray[np.int64] | None:
    """Counts of an earlier run, if they are whole: one for each id, and of all tokens together."""
    try:
        counts: NDArray[np.int64] = np.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError):
        counts = np.zeros(0, dtype=np.int64)
    is_whole = getattr(counts, "dtype", None) == np.int64 and counts.shape == (vocab_size,)
    if is_whole and counts.sum() == num_tokens and counts.min() >= 0:
        return counts
    warnings.warn(f"the counts in `{file}` are damaged and are taken again.", stacklevel=3)
    return None


def names_tokens(path: str | Path) -> bool:
    """Whether a path, glob or folder is of tokens rather than text, by its names alone.

    Args:
        path: A file or glob that ends in one of :data:`SUFFIXES`, a folder that holds such files and no text, or one of
            litdata's.
    """
    where = Path(path)
    if where.suffix in SUFFIXES:
        return True
    if not where.is_dir():
        return False
    if litdata_folders(where) is not None:
        return True
    files = [file for file in files_below(where) if file.is_file()]
    return any(file.suffix in SUFFIXES for file in files) and not any(
        reader_of(file) for file in files if not ABOUT_DATA.fullmatch(file.name)
    )


def find_shards(path: str | Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Training and held-out shards behind a path, glob or folder, or folders of litdata; the split is in their names.

    Raises:
        FileNotFoundError: If there is none.
    """
    folders = litdata_folders(path)
    if folders is not None:
        return folders
    found = find_files(path, suffixes=SUFFIXES)
    return found.train, found.held_out


def _opened(paths: Sequence[Path]) -> list[NDArray[Any]]:
    return [part for path in paths for part in (open_chunks(path) if path.is_dir() else [open_shard(path)])]


def _digest_of(path: Path) -> str:
    """Of a litdata folder that of its index and chunks."""
    if not path.is_dir():
        return digest_of(path)
    return "".join(digest_of(file) for file in [path / INDEX, *sorted(path.glob("*.bin"))])


def open_shard(file: Path) -> NDArray[Any]:
    """The ids of a shard, memory-mapped, shape (num_tokens,).

    Raises:
        ValueError: If it is cut, of another format, or not 1-D.
    """
    try:
        if file.suffix.lower() in COMPRESSED:
            raise ValueError("it is compressed, and shards are memory-mapped: unpack it.")
        if file.suffix.lower() == ".npy":
            tokens: NDArray[Any] = np.load(file, mmap_mode="r")
        else:
            tokens = _open_bin(file)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"`{file}` is not a token shard: {one_line(error)}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"`{file}` holds {tokens.dtype} of shape {tokens.shape}, not a 1-D array of token ids.")
    if tokens.dtype.kind == "u" and tokens.dtype.itemsize == 8:  # beside int64 numpy would make floats of it
        return tokens.view(tokens.dtype.str.replace("u", "i"))
    return tokens


def _open_bin(file: Path) -> NDArray[Any]:
    size = file.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"it has {size} bytes, its header alone takes {HEADER_BYTES}. Was the download cut?")
    magic, version, num_tokens = np.fromfile(file, dtype=np.int32, count=3).tolist()
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        known = " or ".join(f"{one[0]} and {one[1]} ({np.dtype(kind).name} ids)" for one, kind in FORMATS.items())
        raise ValueError(f"its magic number and version are {magic} and {version}, known are {known}.")
    held, rest = divmod(size - HEADER_BYTES, np.dtype(dtype).itemsize)
    if held != num_tokens or rest:
        raise ValueError(f"its header says {num_tokens:,} tokens, its size is that of {held:,}. Was the download cut?")
    if not num_tokens:
        return np.zeros(0, dtype=dtype)  # nothing to map
    return np.memmap(file, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
