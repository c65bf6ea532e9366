"""Folders of tokens that ``litdata.optimize(..., item_loader=TokensLoader())`` wrote, as litgpt's own modules do.

``index.json`` lists the chunks in order. A chunk is the number of its items and their offsets, 32 bits each, and then
the ids of all of them; it is memory-mapped behind that header, and litdata itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.text import is_name, one_line, parse_json

INDEX: Final = "index.json"
_TYPES: Final = {2: np.uint16, 4: np.int32, 8: np.int64}  # by bytes: ids are not negative
_HELD_OUT: Final = ("val", "validation", "test")


def litdata_folders(path: str | Path) -> tuple[tuple[Path, ...], tuple[Path, ...]] | None:
    """Folders to train on and to hold out: ``path`` itself, or its ``train`` and ``val``; ``None`` if neither is."""
    root = Path(path)
    if (root / INDEX).is_file():
        return (root,), ()
    if (root / "train" / INDEX).is_file():
        held_out = next((root / name for name in _HELD_OUT if (root / name / INDEX).is_file()), None)
        return (root / "train",), () if held_out is None else (held_out,)
    return None


def open_chunks(folder: Path) -> list[NDArray[Any]]:
    """The ids of every chunk, memory-mapped, each of shape (num_tokens,).

    Raises:
        ValueError: If a chunk is missing or cut, or the folder holds something else than plain tokens.
    """
    try:
        index = parse_json((folder / INDEX).read_bytes())
        chunks, config = [dict(chunk) for chunk in index["chunks"]], dict(index["config"])
        kind = str(config["data_format"][0]).split(":")[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"`{folder / INDEX}` is not litdata's: {one_line(error)}") from error
    if kind not in ("no_header_tensor", "no_header_numpy") or not all(chunk.get("dim") for chunk in chunks):
        raise ValueError(
            f"`{folder}` holds litdata items of the kind `{kind}`, not tokens: write it with "
            "`litdata.optimize(..., item_loader=TokensLoader())`."
        )
    for name in ("compression", "encryption"):
        if config.get(name):
            raise ValueError(f"the chunks of `{folder}` have {name} (`{config[name]}`): write them without.")
    for chunk in chunks:
        if not is_name(chunk.get("filename")) or type(chunk["dim"]) is not int or chunk["dim"] < 1:
            raise ValueError(f"`{folder / INDEX}` is not litdata's: it has a chunk {one_line(chunk)[:200]}.")
    return [_open_chunk(folder / chunk["filename"], chunk["dim"]) for chunk in chunks]


def _open_chunk(file: Path, num_tokens: int) -> NDArray[Any]:
    try:
        size = file.stat().st_size
        header = 4 * (int(np.fromfile(file, dtype=np.uint32, count=1)[0]) + 2)
    except (OSError, IndexError) as error:
        raise ValueError(f"`{file}` cannot be read: {one_line(error)}") from error
    kind = _TYPES.get((size - header) // num_tokens)
    if kind is None or header + num_tokens * np.dtype(kind).itemsize != size:
        raise ValueError(f"`{file}` has {size:,} bytes, which is not {num_tokens:,} tokens. Was the download cut?")
    return np.memmap(file, dtype=kind, mode="r", offset=header, shape=(num_tokens,))
