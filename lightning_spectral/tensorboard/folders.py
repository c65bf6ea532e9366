"""Run folders below a TensorBoard logdir."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final

from lightning_spectral.records import EIGENVALUES_FOLDER, RUN_FILE, SPECTRAL_FILE
from lightning_spectral.text import PREVIOUS, folders_below

# what a run folder holds beside its records: nothing in these is a run of its own
_NOT_LOOKED_INTO: Final = {EIGENVALUES_FOLDER, PREVIOUS, "checkpoints", "final"}
_LEVELS_ABOVE: Final = 3  # `out/run/logs/tensorboard/version_0` belongs to the run folder `out/run`
RESCAN_SECONDS: Final = 2.0


def roots_of(logdir: str, logdir_spec: str = "") -> dict[str, Path]:
    """Local folders that TensorBoard was pointed at, by the prefix of their runs' names.

    Args:
        logdir: ``--logdir``; may be empty.
        logdir_spec: ``--logdir_spec``, as in ``a:/runs/a,b:/runs/b`` or ``/runs/a,/runs/b``.
    """
    if logdir:
        return {} if "://" in logdir else {"": Path(logdir).expanduser()}
    roots = {}
    for part in filter(None, logdir_spec.split(",")):
        name, colon, path = part.partition(":")
        if "://" in part:
            continue
        roots[name if colon else path or name] = Path(path if colon else name).expanduser()
    return roots


def find_runs(roots: dict[str, Path]) -> dict[str, Path]:
    """Name -> folder of every run at or below the roots; where there is none, of the run that a root lies in."""
    found: dict[str, Path] = {}
    for prefix, root in roots.items():
        below = {_name(prefix, root, folder): folder for folder in _below(root)}
        found |= below or _around(prefix, root)
    return {name: found[name] for name in sorted(found, key=_naturally)}


def _naturally(name: str) -> list[str | int]:
    """Numbers in a name by their value, as TensorBoard orders runs: width 64 before width 128."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+)", name))]


def prefix_of(roots: dict[str, Path], name: str, folder: Path) -> str:
    """What TensorBoard's names of the event files in a run folder begin with; empty if it holds the whole logdir."""
    whole = roots.get("")
    return "" if whole is not None and whole.absolute().is_relative_to(folder.absolute()) else name


class FoundRuns:
    """:func:`find_runs`, looked for again when the last look is older than :data:`RESCAN_SECONDS`."""

    def __init__(self, roots: dict[str, Path]) -> None:
        self._roots = roots
        self._found: dict[str, Path] = {}
        self._looked_at = -float("inf")

    def __call__(self) -> dict[str, Path]:
        """Name -> folder."""
        if time.monotonic() - self._looked_at > RESCAN_SECONDS:
            self._found = find_runs(self._roots)
            self._looked_at = time.monotonic()
        return self._found


def _below(root: Path) -> list[Path]:
    return [folder for folder in folders_below(root, _NOT_LOOKED_INTO) if _holds_run(folder)]


def _holds_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (RUN_FILE, SPECTRAL_FILE))


def _around(prefix: str, root: Path) -> dict[str, Path]:
    for folder in list(root.absolute().parents)[:_LEVELS_ABOVE]:
        if (folder / RUN_FILE).is_file() and (folder / SPECTRAL_FILE).is_file():
            return {_name(prefix, folder, folder): folder}
    return {}


def _name(prefix: str, root: Path, folder: Path) -> str:
    below = folder.relative_to(root).as_posix()
    if below == ".":
        return prefix or root.resolve().name
    return f"{prefix}/{below}" if prefix else below
