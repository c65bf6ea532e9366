"""All records under some paths as one table, for people who bring their own analysis."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from lightning_spectral.records import (
    LOSSES_FILE,
    RUN_FILE,
    SPECTRAL_FILE,
    WEIGHTS_FILE,
    read_losses,
    read_run,
    read_spectral,
    read_weights,
)
from lightning_spectral.text import PREVIOUS, did_you_mean, folders_below

# what can be loaded -> (file, its reader)
KINDS: Final = {
    "spectral": (SPECTRAL_FILE, read_spectral),
    "losses": (LOSSES_FILE, read_losses),
    "weights": (WEIGHTS_FILE, read_weights),
}


def load(paths: str | Path | Iterable[str | Path], kind: str = "spectral") -> Any:
    """Records of all run folders as a data frame: polars if it is installed, else pandas.

    One row per record: the run's optimizer, seed and labels (``label_NAME``), then the record's fields; ``renyi`` and
    the like as ``renyi_0.5``. Runs moved to ``previous/`` are left out.

    Args:
        paths: Run folders, folders that hold them at any depth, or patterns (``out/**``).
        kind: ``spectral``, ``losses`` or ``weights``.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the kind is unknown.
        ModuleNotFoundError: If neither polars nor pandas is installed.
    """
    found = rows(paths, kind)
    if find_spec("polars"):
        return import_module("polars").DataFrame(found, infer_schema_length=None)
    if find_spec("pandas"):
        return import_module("pandas").DataFrame(found)
    raise ModuleNotFoundError("`load` needs polars or pandas: pip install polars (or use `analysis.load.rows`).")


def rows(paths: str | Path | Iterable[str | Path], kind: str = "spectral") -> list[dict[str, Any]]:
    """The same as plain dictionaries, all with the same keys in the same order.

    Args:
        paths: As for :func:`load`.
        kind: As for :func:`load`.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of records `{kind}`; {did_you_mean(kind, KINDS, otherwise='choose')}")
    name, read = KINDS[kind]
    given = as_paths(paths)
    files = sorted({file for path in given for file in _files(str(path), name)})
    if not files:
        is_table = any(Path(path).suffix in (".csv", ".tsv") for path in given)
        more = "; a table is read with pandas or `fit`." if is_table else "."
        where = ", ".join(f"`{path}`" for path in given)
        raise FileNotFoundError(f"no `{name}` at or below {where}. Give the `out_dir` of a run or sweep{more}")
    found = [row for file in files for row in _rows_of(file, read)]
    keys = list(dict.fromkeys(key for row in found for key in row))
    return [{key: row.get(key) for key in keys} for row in found]


def as_paths(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """One path or several, as a list.

    Raises:
        TypeError: If they are something else.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths) if isinstance(paths, Iterable) else [paths]
    for path in given:
        if not isinstance(path, (str, Path)):
            raise TypeError(f"run folders are paths or patterns, got {path!r:.80} of type {type(path).__name__}.")
    return given


def _files(path: str, name: str) -> Iterator[Path]:
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
    for place in map(Path, glob.glob(path, recursive=True)):
        if place.is_dir():
            if PREVIOUS not in place.relative_to(fixed).parts:
                yield from (folder / name for folder in folders_below(place) if (folder / name).is_file())
        elif PREVIOUS in place.relative_to(fixed).parts:
            continue
        elif place.name in (name, RUN_FILE) and (place.parent / name).is_file():
            yield place.parent / name


def _rows_of(file: Path, read: Any) -> list[dict[str, Any]]:
    about: dict[str, Any] = {"folder": str(file.parent)}
    if (file.parent / RUN_FILE).is_file():
        info = read_run(file.parent)
        labels = {f"label_{name}": value for name, value in info.labels.items()}
        about |= {"optimizer": info.labels.get("optimizer") or info.optimizer, "seed": info.seed, **labels}
    return [{**about, **_flat(asdict(record))} for record in read(file).records]


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """``extra`` beside the fields, orders as columns of their own, conventions as JSON."""
    out: dict[str, Any] = {}
    for name, value in record.items():
        if name == "conventions":
            out[name] = json.dumps(value, sort_keys=True)
        elif isinstance(value, dict):
            out |= {key if name == "extra" else f"{name}_{key}": own for key, own in value.items()}
        else:
            out[name] = value
    return out
