"""Folders of runs: each once, links followed as far as people make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.analysis.load import rows
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.tensorboard.folders import find_runs
from lightning_spectral.text import folders_below
from tests.analysis.synthetic import write_study


def _names(root: Path) -> list[str]:
    return [folder.relative_to(root).as_posix() for folder in folders_below(root)]


def test_every_folder_once_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/deep/er", "a", "previous/old", ".hidden/x"):
        (tmp_path / name).mkdir(parents=True)
    assert _names(tmp_path) == [".", "a", "b", "b/deep", "b/deep/er"]
    assert list(folders_below(tmp_path / "nowhere")) == [tmp_path / "nowhere"]


def test_a_link_is_looked_at_and_one_level_below_it(tmp_path: Path) -> None:
    (tmp_path / "disk/sweep/run/deeper").mkdir(parents=True)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/all").symlink_to(tmp_path / "disk/sweep")
    (tmp_path / "runs/again").symlink_to(tmp_path / "runs")  # round and round
    (tmp_path / "runs/latest").symlink_to(tmp_path / "runs/mine")  # there under its own name
    (tmp_path / "runs/broken").symlink_to(tmp_path / "nowhere")
    assert _names(tmp_path / "runs") == [".", "mine", "all", "all/run"]


@pytest.mark.parametrize("whole", [False, True])
def test_linked_runs_are_read_by_every_reader(tmp_path: Path, whole: bool) -> None:
    write_study(tmp_path / "study", {"muon": 0.9}, (64, 128), layers=1, steps=(0, 20))
    (tmp_path / "links").mkdir()
    if whole:
        (tmp_path / "links/study").symlink_to(tmp_path / "study")
    else:
        for run in (tmp_path / "study").iterdir():
            (tmp_path / "links" / run.name).symlink_to(run)
    assert len(load_runs([tmp_path / "links"]).runs) == len(load_runs([tmp_path / "study"]).runs) == 2
    assert len(rows(tmp_path / "links")) == len(rows(tmp_path / "study")) > 0
    assert len(find_runs({"": tmp_path / "links"})) == 2
