"""Every snippet of the README runs; every command it shows exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_spectral.cli import VERBS
from tests.callbacks import tiny

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
@pytest.mark.filterwarnings("ignore")
def test_python_snippets_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {"model": tiny.Module(), "train_loader": tiny.loader(), "named_model": tiny.Module()})


def test_commands_name_verbs_and_files_that_exist():
    commands = re.findall(r"lightning-spectral ([a-z-]+)", "\n".join(code for kind, code in BLOCKS if kind == "bash"))
    assert commands
    assert set(commands) <= set(VERBS)
    root = Path(__file__).parent.parent
    for recipe in re.findall(r"lightning-spectral pretrain --config (\S+)", README):
        assert (root / "recipes" / f"{recipe.removeprefix('recipes/').removesuffix('.yaml')}.yaml").exists()
    for picture in re.findall(r"\]\(((?:docs|examples|recipes)[^\s)]*|[A-Z]+\.md)\)", README):
        assert (root / picture).exists()
