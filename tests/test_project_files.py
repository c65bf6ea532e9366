"""What stands in several files of the project says the same in all of them."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import lightning_spectral
from tests.test_lock import PROJECT, ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
GATE = (ROOT / ".ci" / "run").read_text()


def test_one_version():
    assert PROJECT["dynamic"] == ["version"]  # read from `__version__`
    assert lightning_spectral.__version__ == CITATION["version"]


def test_the_papers_are_cited_and_linked():
    assert {reference["url"] for reference in CITATION["references"]} == set(PROJECT["urls"].values())
    readme = (ROOT / "README.md").read_text()
    assert all(url in readme for url in PROJECT["urls"].values())


def test_hooks_before_a_commit_are_commands_of_the_gate():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    assert entries == ["ruff check", "ruff format --check", "mypy", "lint-imports"]
    assert all(f"\n{entry}\n" in GATE for entry in entries)


def test_contributing_names_files_that_exist():
    names = re.findall(r"`((?:\.ci|tools|tests|lightning_spectral)/[\w./]+)`|\]\((\w+\.md)", CONTRIBUTING)
    paths = [Path(name or link) for name, link in names]
    assert {Path(".ci/run"), Path("tools/lock.sh"), Path("ARCHITECTURE.md")} <= set(paths)
    assert all((ROOT / path).exists() for path in paths)
    assert "\n## Where to add things\n" in (ROOT / "ARCHITECTURE.md").read_text()
    assert len(CONTRIBUTING.splitlines()) <= 80  # one page
