"""Is a run that goes on still the run that was started? Two recipes key by key, and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lightning_spectral import records
from lightning_spectral.probe.run_folder import package_versions
from lightning_spectral.text import read_yaml
from lightning_spectral.training.document import RecipeError

# keys that may differ between two starts of one run: where it lies, what it runs on, what it prints
MAY_DIFFER: Final = (
    *("out_dir", "resume", "devices", "num_nodes", "sweep", "smoke", "logger_name", "log"),
    *("train.max_time", "train.save_interval", "train.log_interval", "train.micro_batch_size"),
)
_PLACES: Final = ("dirpath", "path")
_SHOWN: Final = 6
_PACKAGE: Final = "lightning-spectral"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``optimizer.init_args.lr: 0.003 -> 0.1`` for every key in which two recipes differ."""
    one, two = _flat(old), _flat(new)
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [f"{name}: {one.get(name, 'not set')} -> {two.get(name, 'not set')}" for name in names]


def shown(found: list[str]) -> str:
    """The first differences as one line."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def check_resumed(text: str, out_dir: Path, recipe_file: str, *, accept_changes: bool) -> list[str]:
    """What changed since the run in ``out_dir`` was started, our own version included.

    Args:
        text: The recipe as YAML.
        out_dir: The run folder.
        recipe_file: Name of the recipe in it.
        accept_changes: Return the changes instead of refusing them.

    Raises:
        RecipeError: If something did and ``accept_changes`` is not set.
    """
    file = out_dir / recipe_file
    found = differences(read_yaml(file.read_text()), read_yaml(text)) if file.is_file() else []
    found += _version_change(out_dir)
    if found and not accept_changes:
        raise RecipeError(
            f"the run in `{out_dir}` was started under another recipe ({shown(found)}): give it another `out_dir`, "
            "start anew with `--resume false`, or go on under the new one with --accept-changes."
        )
    return found


def _version_change(out_dir: Path) -> list[str]:
    try:
        old = records.read_run(out_dir).versions.get(_PACKAGE)
    except (OSError, ValueError):
        return []
    new = package_versions().get(_PACKAGE)
    return [f"{_PACKAGE} itself: {old} -> {new}"] if old and new and old != new else []


def _flat(tree: Any, name: str = "") -> dict[str, str]:
    if isinstance(tree, Mapping):
        parts = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        parts = [(str(place), value) for place, value in enumerate(tree)]
    else:
        return {} if tree is None or name.rpartition(".")[2] in _PLACES else {name: repr(tree)}
    out: dict[str, str] = {}
    for key, value in parts:
        place = f"{name}.{key}" if name else key
        out |= {} if place in MAY_DIFFER else _flat(value, place)
    return out
