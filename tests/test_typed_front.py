"""What a type checker, an editor and a packager see of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_spectral
from lightning_spectral import functional

ROOT = Path(__file__).parent.parent

STRANGER = """\
from lightning_spectral import Muon, SpectralRankCallback, __version__
from lightning_spectral.callbacks import TailTokenProbe
from lightning_spectral.data import TextFiles
from lightning_spectral.functional import soft_rank

reveal_type(Muon)
reveal_type(TailTokenProbe)
reveal_type(TextFiles)
reveal_type(soft_rank)
reveal_type(SpectralRankCallback)
reveal_type(__version__)
"""
WRONG = """\
from lightning_spectral import Muon, NoSuchThing
from lightning_spectral.callbacks import NoSuchCallback
from lightning_spectral.data import NoSuchData

Muon([], lrr=1.0)
"""


def mypy(folder: Path, *files: str) -> str:
    """Strict, in a stranger's folder; the package is found as an installed one would be."""
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={ROOT / '.mypy_cache' / 'stranger'}", *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # mypy reads torch: a minute of CPU without a cache
def test_a_strangers_script_is_typed_and_a_misspelled_name_is_an_error(tmp_path):
    (tmp_path / "good.py").write_text(STRANGER)
    (tmp_path / "wrong.py").write_text(WRONG)
    said = mypy(tmp_path, "good.py", "wrong.py")
    assert not re.search(r"^good.py:\d+: error", said, re.MULTILINE), said
    revealed = dict(re.findall(r'^good.py:(\d+): note: Revealed type is "(.*)"$', said, re.MULTILINE))
    assert [revealed[str(line)].rpartition(" -> ")[2] for line in range(6, 12)] == [
        "lightning_spectral.optim.muon.Muon",
        "lightning_spectral.callbacks.tail_token_probe.TailTokenProbe",
        "lightning_spectral.data.modules.TextFiles",
        "torch._tensor.Tensor",
        "lightning_spectral.callbacks.spectral_rank.SpectralRankCallback",
        "str",
    ]
    assert 'wrong.py:1: error: Module "lightning_spectral" has no attribute "NoSuchThing"' in said
    assert 'has no attribute "NoSuchCallback"' in said
    assert 'has no attribute "NoSuchData"' in said
    assert 'Unexpected keyword argument "lrr" for "Muon"' in said


@pytest.mark.parametrize("package", ["", "callbacks", "data"])
def test_lazy_names_are_those_that_a_type_checker_is_told(package):
    file = ROOT / "lightning_spectral" / package / "__init__.py"
    tree = ast.parse(file.read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"  # type: ignore[attr-defined]
    )
    assert set(listed) - {"__version__"} <= typed
    # visible to a checker, it would make every name an Any
    assert not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)


def test_one_version():
    assert version("lightning-spectral") == lightning_spectral.__version__
    assert 'version = "' not in (ROOT / "pyproject.toml").read_text().partition("[tool.ruff]")[0].replace(
        "target-version", ""
    )


def test_every_public_function_is_listed_with_one_line():
    lines = re.findall(r"^\* (``.*)", functional.__doc__, re.MULTILINE)
    described = {name for line in lines for name in re.findall(r"``(\w+)``", line.partition(": ")[0])}
    last = {name for name in functional.__all__ if name not in described}
    assert last <= {"RANK_METRICS"}, last
    assert described <= set(functional.__all__)
    for name in functional.__all__:
        assert getattr(functional, name) is not None
        assert getattr(functional, name).__doc__
