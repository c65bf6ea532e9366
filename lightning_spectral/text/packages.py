"""Packages that are not installed, and what brings them, in a sentence; the commit that this one is of."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from lightning_spectral.text import parse_json

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


def source_commit(root: Path | None = None) -> str | None:
    """The git commit (40 hex digits) of the sources that run; ``None`` where nothing says it. Edits are not seen.

    Args:
        root: The folder of the repository; default: the one around this package. Where it is none, what pip wrote down
            of an installation from a repository counts.
    """
    folder = Path(__file__).resolve().parents[2] if root is None else root
    try:
        if 'name = "lightning-spectral"' in (folder / "pyproject.toml").read_text() and (folder / ".git").is_dir():
            return _checked_out(folder / ".git")
    except OSError:
        pass  # installed, or copied into somebody's own repository
    try:
        noted = distribution("lightning-spectral").read_text("direct_url.json") if root is None else None
        return _hex(parse_json(noted)["vcs_info"]["commit_id"]) if noted else None
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _checked_out(git: Path) -> str | None:
    """What ``HEAD`` is: a commit, or a branch whose commit is in a file of its own or among the packed ones."""
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return _hex(head)
        branch = head.removeprefix("ref: ")
        if (git / branch).is_file():
            return _hex((git / branch).read_text().strip())
        packed = (line.split(" ", 1) for line in (git / "packed-refs").read_text().splitlines() if " " in line)
        return next((_hex(commit) for commit, name in packed if name == branch), None)
    except (OSError, ValueError):
        return None


def _hex(text: object) -> str | None:
    return text if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{40}", text) else None
