"""Packages that are not installed: what brings them, in a sentence."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

# where the name of the import is not that of the package
_NAMES: Final = {"yaml": "PyYAML"}
_EXTRAS: Final = {"wandb": "wandb", "ray": "ray", "submitit": "slurm"}  # extras of this package


def install_command(module: str) -> str:
    """The ``pip`` command that brings what is imported as ``module``."""
    top = module.partition(".")[0]
    what = f"'lightning-spectral[{_EXTRAS[top]}]'" if top in _EXTRAS else _NAMES.get(top, top)
    return f"pip install {what}"


def why_missing(module: str) -> str:
    """One sentence with the package and the command."""
    top = module.partition(".")[0]
    return f"the package `{_NAMES.get(top, top)}` is not installed: `{install_command(module)}`."


def is_installed(module: str) -> bool:
    """Whether a package can be imported; it is not."""
    return find_spec(module) is not None
