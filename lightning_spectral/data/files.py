"""Which files are text, which of them are held out, and which are left out and why.

A single file or the files of a glob or folder; compressed ones too. Names that say which split a file is of (``train``,
``validation``, ``test``) are honoured: test text is never trained on.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

READERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_POINTERS = (b"version https://git-lfs.github.com/spec/", b"/annex/objects/")
_POINTER_BYTES = 1 << 10
_PAGE = 1 << 16
_WHOLE_BELOW = 1 << 26  # smaller files are digested whole
_NUM_PAGES = 64

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "validate": "validation",
    "valid": "validation",
    "val": "validation",
    "development": "validation",
    "dev": "validation",
    "evaluation": "validation",
    "eval": "validation",
    "heldout": "validation",
    "held_out": "validation",
    "test": "test",
    "testing": "test",
}
# what download tools, `save_to_disk` and repositories put beside the data
ABOUT_DATA = re.compile(
    r"(readme|license|licence|notice|citation|changelog|requirements|contributing|dataset_infos?|dataset_dict|state|"
    r"config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|metadata)\.[a-z]+",
    re.IGNORECASE,
)
_SPLIT = re.compile(rf"(?:^|[./\\_-])({'|'.join(_SPLITS)})(?=$|[./\\_-])", re.IGNORECASE)


@dataclass(frozen=True)
class FoundFiles:
    """What a path, glob or folder holds.

    Attributes:
        train: Files to train on, sorted by name.
        held_out: Files whose name says ``validation``, or else ``test``; empty if no name says so.
        left_out: Files that are not read, each with the reason.
    """

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    left_out: tuple[tuple[Path, str], ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that is read, sorted by name."""
        return tuple(sorted((*self.train, *self.held_out)))

    def __str__(self) -> str:
        parts = [f"{len(self.train)} file(s) of training text"]
        if self.held_out:
            parts.append(f"held out: {_listed(file.name for file in self.held_out)}")
        if self.left_out:
            parts.append(f"left out: {_listed(f'{file.name} ({why})' for file, why in self.left_out)}")
        return "; ".join(parts)


def _refuse_address(path: str) -> None:
    if re.match(r"\w+://", path):
        raise FileNotFoundError(f"`{path}` is an address: download the file, and give its path.")


def find_files(path: str | Path, *, suffixes: Collection[str] = READERS) -> FoundFiles:
    """Files behind a path, a glob or a folder.

    Args:
        path: What to look at.
        suffixes: What counts as data; by default what the text readers know.

    Raises:
        FileNotFoundError: If nothing readable is there; it names what was left out. If a file is a link to nothing, or
            stands for one that was not downloaded.
        ValueError: If a named file has a suffix that no reader knows.
        PermissionError: If a folder cannot be read.
    """
    _refuse_address(str(path))
    text = str(Path(path).expanduser())
    if Path(text).is_file() or _leads_nowhere(Path(text)):
        refuse_placeholder(Path(text))
        if _data_suffix(Path(text)) not in suffixes:
            raise ValueError(f"`{text}` ends in `{Path(text).suffix}`; the readers know {', '.join(suffixes)}.")
        return FoundFiles((Path(text),))
    if Path(text).is_dir():
        root, candidates = Path(text), files_below(Path(text))
    else:
        candidates = _once(Path(file) for file in glob.glob(text, recursive=True))
        root = Path(re.split(r"[*?\[]", text)[0] + "x").parent  # the last folder that is not a pattern
    wants_markdown = re.search(r"\.md$", text) is not None
    readable, left_out = [], []
    present = set(candidates)
    for file in sorted(candidates):
        why = _why_left_out(file, suffixes, wants_markdown)
        if any(part.startswith(".") for part in (file.relative_to(root).parts if file.is_relative_to(root) else ())):
            why = ""  # `.cache`, `.git`, `.ipynb_checkpoints`: copies that nobody would call data
        elif why is None and file.suffix.lower() in COMPRESSED and file.with_suffix("") in present:
            why = f"`{file.stem}` is beside it"
        if why is None:
            refuse_placeholder(file)
            readable.append(file)
        elif why:
            left_out.append((file, why))
    found = _by_split(readable, root, left_out)
    if not found.train:
        not_used = [*((file, "held out by its name") for file in found.held_out), *found.left_out]
        seen = f" Left out there: {_listed(f'{file.name} ({why})' for file, why in not_used)}." if not_used else ""
        # `owner/name`, which is no path here
        hub = " A data set of the hub is `{class_path: HubText, init_args: {dataset: " + text + "}}`."
        is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not Path(text).parent.exists()
        raise FileNotFoundError(
            f"no text at `{path}`: give a {', '.join(suffixes)} file, a glob, or a folder that holds such files."
            f"{hub if is_hub_name else ''}{seen}"
        )
    return found


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and those below it, links to folders followed; what several names lead to comes once.

    Raises:
        PermissionError: If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        found += [Path(root, name) for name in names]
    return _once(found)


def _leads_nowhere(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def _once(names: Iterable[Path]) -> list[Path]:
    """Files, and links to none, by name; each under one of its names: its own before links to it."""
    files = [name for name in names if name.is_file() or _leads_nowhere(name)]
    ordered = sorted(files, key=lambda file: (os.path.realpath(file) != os.path.abspath(file), file))
    return sorted({os.path.realpath(file): file for file in reversed(ordered)}.values())


def refuse_placeholder(file: Path) -> None:
    """Refuse a file whose content is elsewhere: it must not count as data, nor be passed over.

    Raises:
        FileNotFoundError: If it is a link to nothing, or stands for a file that was not downloaded.
    """
    if _leads_nowhere(file):
        raise FileNotFoundError(f"`{file}` is a link to `{os.readlink(file)}`, which does not exist.")
    if file.stat().st_size < _POINTER_BYTES and file.read_bytes().startswith(_POINTERS):
        raise FileNotFoundError(
            f"`{file}` stands for a file that was not downloaded: `git lfs pull` (or `git annex get`)."
        )


def reader_of(file: Path) -> str | None:
    """``text``, ``json``, ``parquet`` or ``arrow``; ``None`` if no reader knows the file, compressed or not."""
    return READERS.get(_data_suffix(file))


def _data_suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def digest_of(file: Path) -> str:
    """SHA-256 of a file; above 64 MiB of its size and of 64 pages spread over it, first and last included.

    A page of 64 KiB in the middle of a large file that changes alone may go unnoticed; a cut or zero-filled file does
    not.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}:".encode())
    with file.open("rb") as content:
        if size <= _WHOLE_BELOW:
            while chunk := content.read(1 << 22):
                digest.update(chunk)
        else:
            for page in range(_NUM_PAGES):
                content.seek((size - _PAGE) * page // (_NUM_PAGES - 1))
                digest.update(content.read(_PAGE))
    return digest.hexdigest()


def _why_left_out(file: Path, suffixes: Collection[str], wants_markdown: bool) -> str | None:
    """``None`` if it is read, an empty reason for what nobody would call data."""
    if file.name.startswith("."):
        return ""
    if _data_suffix(file) not in suffixes:
        return f"no reader for `{file.suffix}`"
    if ABOUT_DATA.fullmatch(file.name) and file.suffix.lower() in (".txt", ".json"):
        return "describes the data"
    if file.suffix.lower() == ".md" and not wants_markdown:
        return "Markdown is read only where it is asked for, as `*.md`"
    return None


def _by_split(readable: list[Path], root: Path, left_out: list[tuple[Path, str]]) -> FoundFiles:
    by_split: dict[str, list[Path]] = {}
    for file in readable:
        relative = str(file.relative_to(root)) if file.is_relative_to(root) else file.name
        named = [_SPLITS[word.lower()] for word in _SPLIT.findall(relative)]
        by_split.setdefault(named[-1] if named else "", []).append(file)
    unnamed, train = by_split.get("", []), by_split.get("train", [])
    validation, test = by_split.get("validation", []), by_split.get("test", [])
    if train:
        left_out += [(file, "no split in its name, beside files of a train split") for file in unnamed]
    if validation:
        left_out += [(file, "test split") for file in test]
    return FoundFiles(tuple(train or unnamed), tuple(validation or test), tuple(sorted(left_out)))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
