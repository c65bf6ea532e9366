"""What a recipe says of machines: devices, accelerator, strategy; checked without importing Lightning.

Names that Lightning registers are read from its sources; whether a device is there is asked of the system, as far as
it can say that surely none is.
"""

from __future__ import annotations

import ast
import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from lightning_spectral.text import did_you_mean
from lightning_spectral.text.packages import is_installed, why_missing
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.sources import file_of, is_missing, tree_of

_OURS: Final = ("auto", "fsdp1", "fsdp2", "hsdp:2", "tp:2")
_LIGHTNING: Final = "lightning.pytorch"


@dataclass(frozen=True)
class Spread:
    """How many processes share one copy of the data's stream and of the weights.

    Attributes:
        kind: ``fsdp1``, ``fsdp2``, ``hsdp``, ``tp``, or empty for any other strategy.
        number: Replicas of ``hsdp``, slices of ``tp``; else 1.
    """

    kind: str = ""
    number: int = 1

    def data_parallel(self, world_size: int) -> int:
        """Ranks with data of their own.

        Raises:
            RecipeError: If the number does not divide the processes.
        """
        if world_size % self.number:
            raise RecipeError(
                f"`strategy: {self.kind}:{self.number}` does not divide {world_size} process(es): change it, or "
                "`devices` and `num_nodes`."
            )
        return world_size // self.number if self.kind == "tp" else world_size


def spread_of(wanted: Any) -> Spread:
    """What ``strategy:`` of a recipe says about it.

    Raises:
        RecipeError: If the number behind the colon is missing or none.
    """
    kind, _, number = str(wanted).partition(":") if isinstance(wanted, str) else ("", "", "")
    if kind in ("fsdp1", "fsdp2") and not number:
        return Spread(kind)
    if kind not in ("hsdp", "tp"):
        return Spread()
    if not number.isdigit() or int(number) < 1:
        what = "replicas" if kind == "hsdp" else "slices"
        raise RecipeError(f"`strategy: {wanted}` needs a number of {what}, such as `{kind}:2`.")
    return Spread(kind, int(number))


def check_devices(wanted: Any) -> None:
    """Refuse what is no number of devices.

    Raises:
        RecipeError: With the value seen.
    """
    is_count = isinstance(wanted, int) and not isinstance(wanted, bool) and (wanted >= 1 or wanted == -1)
    if not is_count and wanted != "auto":
        raise RecipeError(f"`devices` must be auto or a whole number >= 1, got {wanted}.")


def check_strategy(wanted: Any) -> None:
    """Refuse a strategy that neither Lightning nor this package has.

    Raises:
        RecipeError: With the nearest there is.
    """
    if isinstance(wanted, dict):
        path = wanted.get("class_path")
        if not isinstance(path, str) or "." not in path or is_missing(path):
            raise RecipeError(f"`strategy` names the class `{path}`, which does not exist; give the full class path.")
        return
    if str(wanted).startswith("deepspeed") and not is_installed("deepspeed"):
        raise RecipeError(f"`strategy: {wanted}`: {why_missing('deepspeed')}")
    known = [*_OURS, *strategy_names()]
    if not spread_of(wanted).kind and wanted not in known:
        raise RecipeError(f"`strategy` is {wanted}; {did_you_mean(wanted, known, otherwise='there are')}")


def check_accelerator(wanted: Any) -> None:
    """Refuse an accelerator that Lightning does not know.

    Raises:
        RecipeError: With the nearest there is.
    """
    known = ["auto", "gpu", *accelerator_names()]
    if not isinstance(wanted, str) or wanted not in known:
        raise RecipeError(f"`accelerator` is {wanted}; {did_you_mean(wanted, known, otherwise='there are')}")


def refuse_absent(accelerator: str, is_absent: Callable[[str], bool]) -> None:
    """Refuse an accelerator of which this machine has no kind; ``auto`` is whatever there is.

    Args:
        accelerator: A name that is known.
        is_absent: Says so of one kind.

    Raises:
        RecipeError: With the remedy.
    """
    if accelerator != "auto" and all(map(is_absent, ["cuda", "mps"] if accelerator == "gpu" else [accelerator])):
        raise RecipeError(f"`accelerator` is {accelerator}, and this machine has none: use `auto` or `cpu`.")


def surely_absent(kind: str) -> bool:
    """Whether the system itself says that there is none; torch has the last word."""
    if kind == "mps":
        return sys.platform != "darwin"
    if kind == "tpu":
        return find_spec("torch_xla") is None
    if kind != "cuda" or not sys.platform.startswith("linux"):
        return False
    if Path("/dev/kfd").exists():  # AMD's driver
        return False
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")  # of NVIDIA's driver: without it torch has no device
        return False
    return True


@lru_cache(maxsize=1)
def strategy_names() -> list[str]:
    """Names under which Lightning registers its strategies."""
    modules = [*_modules_in(f"{_LIGHTNING}.strategies"), f"{_LIGHTNING}._graveyard.tpu"]
    found = [name for module in modules for name in _registered(module, "register_strategies", "strategy_name")]
    return sorted({*found})


@lru_cache(maxsize=1)
def accelerator_names() -> list[str]:
    """Names under which Lightning registers its accelerators."""
    found: set[str] = set()
    for module in _modules_in(f"{_LIGHTNING}.accelerators"):
        for function in _functions(module, "name"):
            returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
            found |= {str(value.value) for value in returned if isinstance(value, ast.Constant)}
    return sorted(found)


def _modules_in(package: str) -> list[str]:
    home = file_of(package)
    return [f"{package}.{file.stem}" for file in sorted(home.parent.glob("[!_]*.py"))] if home else []


def _functions(module: str, name: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree_of(module) or ast.Module([], [])):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield node


def _registered(module: str, function: str, attribute: str) -> Iterator[str]:
    """Names given to ``register(name, cls, ...)`` in a function: as text, as first of a row, or as the class's own."""
    for node in _functions(module, function):
        for part in ast.walk(node):
            if isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "register" and part.args:
                yield from _text(part.args[0])
                if isinstance(part.args[0], ast.Attribute) and part.args[0].attr == attribute:
                    yield from _attribute(module, attribute)
            elif isinstance(part, ast.Tuple) and part.elts:
                yield from _text(part.elts[0])


def _attribute(module: str, name: str) -> Iterator[str]:
    for node in ast.walk(tree_of(module) or ast.Module([], [])):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            yield from _text(node.value)


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
        yield node.value
