"""Text blocks to ids: the tokenizer that is trained or taken, and a text of any size encoded in pieces.

A *unit* is about 40 MB of text. Its ids are written to a file of their own as soon as they are known, so that an
interrupted build encodes none of it again; several processes may encode several units at a time, and the memory is that
of the units under way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.data.corpus import Block
from lightning_spectral.text import whole_file, write_text
from lightning_spectral.text.arguments import require_count
from lightning_spectral.text.processes import end_with_the_parent

END_OF_TEXT = "<|endoftext|>"
UNIT_BLOCKS = 2_048  # blocks (40 MB of text) that an interrupted build need not encode again

_ENCODE_BLOCKS = 256  # blocks that the tokenizer gets at once
_TOKENIZER_CHARS = 200_000_000  # a tokenizer is trained on no more text than this, from the beginning
_REPORT_S = 10.0

_KEPT = ("train", "validation", "train_seams", "validation_seams")
_Tokens = dict[str, NDArray[Any]]
_Part = list[tuple[str, bool]]  # text of a block, and whether the text goes on from the block before it in the part


def check_num_proc(num_proc: object) -> None:
    """Raise a ``ValueError`` unless ``num_proc`` is a number of processes that can tokenise: an integer >= 1."""
    require_count("num_proc", num_proc, "1 tokenises in one process, more are useful up to the number of CPU cores")


def encoded_units(
    folder: Path, stream: Iterator[Block], encode: Encoder, say: Callable[[str], None], num_proc: int = 1
) -> Iterator[_Tokens]:
    """Training and held-out tokens of one unit of blocks after the other; a finished unit is read, not encoded.

    With them the places in each, its *seams*, where the text does not go on from the token before, since a block of the
    other lay between.

    Args:
        folder: Where units are kept, and the tokenizer lies.
        stream: The blocks.
        encode: The tokenizer.
        say: Told now and then how far it is.
        num_proc: Processes that encode, beside the one that reads.
    """
    told, began, chars = time.monotonic(), time.monotonic(), 0
    with _workers(folder, encode, num_proc) as submit:
        for size, tokens in _in_order(folder, stream, submit, num_proc):
            yield tokens
            chars += size
            if time.monotonic() - told > _REPORT_S:
                told = time.monotonic()
                rate = chars / 1e6 / (told - began)
                say(f"tokenising: {chars / 1e6:,.0f} million characters so far, {rate:.1f} million a second.")


def _in_order(
    folder: Path, stream: Iterator[Block], submit: Callable[..., Future[None]], num_proc: int
) -> Iterator[tuple[int, _Tokens]]:
    """Characters and tokens of each unit, in the order of the text; at most ``num_proc`` of them under way."""
    waiting: deque[tuple[int, Path, Future[None] | None]] = deque()
    number, before = 0, None
    while unit := list(islice(stream, UNIT_BLOCKS)):
        file, size = folder / f"unit-{number:06d}.npz", sum(len(block.text) for block in unit)
        parts: dict[bool, _Part] = {False: [], True: []}
        for block in unit:
            parts[block.held_out].append((block.text, block.held_out == before))
            before = block.held_out
        waiting.append((size, file, None if _is_whole(file) else submit(file, *parts.values())))
        number += 1
        if len(waiting) >= num_proc:
            yield _finished(*waiting.popleft())
    while waiting:
        yield _finished(*waiting.popleft())


def _is_whole(file: Path) -> bool:
    """Whether an earlier build left this unit, and every byte of it is what was written (a zip has checksums)."""
    try:
        with file.open("rb") as content, np.load(content) as kept:
            return all(kept[name].ndim == 1 for name in _KEPT)
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, BadZipFile):
        return False


def _finished(size: int, file: Path, under_way: Future[None] | None) -> tuple[int, _Tokens]:
    if under_way is not None:
        under_way.result()
    with np.load(file) as kept:
        return size, {name: kept[name] for name in _KEPT}


@contextmanager
def _workers(folder: Path, encode: Encoder, num_proc: int) -> Iterator[Callable[..., Future[None]]]:
    """A function that encodes a unit into its file: here, or in processes that have loaded the tokenizer once."""
    if num_proc == 1:

        def here(file: Path, *parts: _Part) -> Future[None]:
            done: Future[None] = Future()
            _encode_unit(encode, file, *parts)
            done.set_result(None)
            return done

        yield here
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_proc, context, initializer=_begin, initargs=(folder,)) as pool:
            yield lambda file, *parts: pool.submit(_encode_in_worker, file, *parts)
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of the {num_proc} processes that tokenise was killed, perhaps since memory ran out: start again, and "
            "what is done is not done again; a smaller `num_proc` takes less memory."
        ) from error


_of_worker: dict[str, Encoder] = {}


def _begin(folder: Path) -> None:
    end_with_the_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    _of_worker["encode"] = Encoder(folder)


def _encode_in_worker(file: Path, *parts: _Part) -> None:
    _encode_unit(_of_worker["encode"], file, *parts)


def _encode_unit(encode: Encoder, file: Path, train: _Part, validation: _Part) -> None:
    kept: dict[str, NDArray[Any]] = {}
    for name, part in (("train", train), ("validation", validation)):
        rows = encode.rows([text for text, _ in part])
        firsts = np.cumsum([0, *(len(row) for row in rows)])[:-1]
        kept[name] = np.concatenate([np.zeros(0, dtype=encode.dtype), *rows])
        kept[f"{name}_seams"] = firsts[[not goes_on for _, goes_on in part]].astype(np.int64)
    with whole_file(file) as partial, partial.open("wb") as content:
        np.savez(content, **kept)  # type: ignore[arg-type]


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE on the beginning of a text and write it as litgpt reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def beginning() -> Iterator[str]:
        chars = 0
        for text in texts:
            yield text
            chars += len(text)
            if chars >= _TOKENIZER_CHARS:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(beginning(), trainer)
    with whole_file(folder / "tokenizer.json") as partial:  # on disk before the file that says so
        tokenizer.save(str(partial))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    # last: with it the tokenizer is whole
    write_text(folder / "tokenizer_config.json", json.dumps({**about, "add_bos_token": False}, indent=2) + "\n")


class Encoder:
    """Text blocks to ids with whatever backend litgpt finds in a tokenizer folder.

    Attributes:
        vocab_size: Number of token ids, V.
        end_of_document: The token with which it ends a document, if it has one.
        end_of_text: The same, if it can be spelled in a text; ``None`` otherwise.
        separator: What stands between two documents of a text.
        dtype: Of the ids.
    """

    def __init__(self, folder: Path) -> None:
        from litgpt.tokenizer import Tokenizer

        self._tokenizer = Tokenizer(folder)
        self._fast = self._tokenizer.backend == "huggingface"
        processor = self._tokenizer.processor
        self.vocab_size = (
            processor.get_vocab_size(with_added_tokens=True) if self._fast else int(self._tokenizer.vocab_size)
        )
        # documents are told apart by the tokenizer's own end-of-text token, where it has one that text can spell
        self.end_of_document = _only(self._tokenizer.eos_id)
        end = None if self.end_of_document is None or not self._fast else processor.id_to_token(self.end_of_document)
        spelled = bool(end) and self.end_of_document in processor.encode(end, add_special_tokens=False).ids
        self.end_of_text = self.end_of_document if spelled else None
        self.separator = end if end and spelled else "\n\n"
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    def __call__(self, blocks: list[str]) -> NDArray[Any]:
        """Ids of the blocks, one after the other."""
        return np.concatenate([np.zeros(0, dtype=self.dtype), *self.rows(blocks)])

    def rows(self, blocks: list[str]) -> list[NDArray[Any]]:
        """Ids of each block."""
        parts: list[NDArray[Any]] = []
        for first in range(0, len(blocks), _ENCODE_BLOCKS):
            chunk = blocks[first : first + _ENCODE_BLOCKS]
            if self._fast:
                rows = [row.ids for row in self._tokenizer.processor.encode_batch_fast(chunk, add_special_tokens=False)]
            else:
                rows = self._tokenizer.processor.encode(chunk)
            parts += [np.asarray(row, dtype=self.dtype) for row in rows]
        return parts


def _only(token_id: int | list[int] | None) -> int | None:
    """The first of several ids that end a text; ``None`` for none, or one that a tokenizer says it lacks (-1)."""
    first = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return first if isinstance(first, int) and first >= 0 else None
