from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.cli import main
from tests.sweep.test_plan import BLOCK, RECIPE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")) + BLOCK)
    return path


def test_dry_run_lists_the_runs(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(file), "--axis", "seed=3", "--dry-run", "--train.max_steps", "7"]) == 0
    shown = capsys.readouterr().out
    assert "new optimizer-Plain_ffn_multiplier-1_seed-3" in " ".join(shown.split())
    assert f"4 runs, 4 to do, in {tmp_path / 'out'}" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no recipe `nowhere`"),
        (["RECIPE", "--workers", "0"], "`--workers` must be a whole number >= 1, got 0"),
        (["RECIPE", "--axis", "seed"], "write `key=a,b,c`"),
        (["RECIPE", "stray"], "`stray` is not an option"),
    ],
)
def test_bad_input(argv: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *(str(file) if word == "RECIPE" else word for word in argv)]) == 2
    assert message in capsys.readouterr().err
