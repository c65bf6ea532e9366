"""A package that is not there is one sentence with the command that brings it, whatever the verb."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_spectral.cli import main
from lightning_spectral.text.packages import install_command, is_installed, why_missing
from tests.analysis.synthetic import write_study

# a package is hidden from imports and from find_spec, as if it had never been installed
HIDE = """
import importlib.machinery, sys
hidden = sys.argv[1].split(",")
real = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
from lightning_spectral.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("jinja2", ["report", "RUNS", "--out", "page"], "`jinja2` is not installed: `pip install jinja2`"),
        ("matplotlib", ["report", "RUNS", "--out", "page"], "`pip install matplotlib`"),
        ("scipy", ["fit", "RUNS"], "`pip install scipy`"),
        ("rich", ["fit", "RUNS"], "`pip install rich`"),
        ("yaml", ["pretrain", "--config", "debug"], "`PyYAML` is not installed: `pip install PyYAML`"),
        ("pyarrow", ["records", "RUNS", "--out", "a.parquet"], "`pip install pyarrow`"),
        ("litgpt", ["pretrain", "--config", "debug"], "recipes need litgpt.*`pip install litgpt`"),
        ("torch", ["sweep", "pocket_demo", "--dry-run"], "recipes need .*`pip install torch`"),
        ("wandb", ["pretrain", "--config", "debug", "--logger_name", "wandb"], "`logger_name: wandb`.*spectral.wandb"),
        ("mlflow", ["pretrain", "--config", "debug", "--logger_name", "mlflow"], "`pip install mlflow`"),
    ],
)
def test_one_sentence_names_package_and_command(package: str, words: list[str], said: str, tmp_path: Path) -> None:
    if "RUNS" in words:
        write_study(tmp_path / "RUNS", {"muon": 0.9}, (64, 128, 256), layers=1, steps=(0, 20))
    command = [sys.executable, "-W", "ignore", "-c", HIDE, package, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lightning-spectral {words[0]}: ")
    assert re.search(said, line), line


def test_a_module_that_a_package_lacks_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'json.nothing'", name="json.nothing")

    monkeypatch.setattr("lightning_spectral.cli.schema.main", lacks)
    with pytest.raises(ModuleNotFoundError, match=r"json.nothing"):
        main(["schema", "recipe"])


def test_commands() -> None:
    assert install_command("yaml") == "pip install PyYAML"
    assert install_command("submitit.core") == "pip install 'lightning-spectral[slurm]'"
    assert why_missing("x.y") == "the package `x` is not installed: `pip install x`."
    assert is_installed("json")
    assert not is_installed("no_such_package")


@pytest.mark.parametrize("verb", ["fit", "report", "records", "sweep", "memory"])
def test_a_place_that_cannot_be_made_is_named(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``/proc`` takes no folders, from nobody."""
    write_study(tmp_path / "runs", {"muon": 0.9}, (64, 128, 256), layers=1, steps=(0, 20))
    words = {
        "sweep": ["debug", "--axis", "seed=0,1"],
        "memory": ["one-step", "--d", "8", "--n-items", "16"],
    }.get(verb, [str(tmp_path / "runs")])
    assert main([verb, *words, "--out", "/proc/nothing/here.csv"]) in (1, 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lightning-spectral {verb}: `/proc/nothing")
    assert "No such file or directory" in said
