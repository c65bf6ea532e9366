"""The notebooks run from the first cell to the last, and show what the tab and the report draw."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.records import POOLED, read_spectral
from lightning_spectral.records.looks import BUCKET_COLORS
from lightning_spectral.report.notebook import curve, show
from lightning_spectral.tensorboard import answers
from lightning_spectral.tensorboard.reader import RunReader
from tests.analysis.synthetic import write_one, write_study

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = ROOT / "examples" / "notebooks"
run_cells = runpy.run_path(str(ROOT / "tools" / "run_notebooks.py"))["run_cells"]


def outputs_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """All outputs of a notebook, run now, where it lies."""
    monkeypatch.chdir(NOTEBOOKS)
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [output for outputs in run_cells(notebook, name) for output in outputs]


def kept(name: str) -> list[dict]:
    """The outputs in the file."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def printed(outputs: list[dict]) -> str:
    return "".join("".join(output.get("text", [])) for output in outputs)


@pytest.mark.filterwarnings("ignore")
def test_quickstart(monkeypatch) -> None:
    outputs = outputs_of("quickstart", monkeypatch)
    assert "did you mean `train.max_steps`?" in printed(outputs)
    shown = next(output["data"] for output in outputs if "image/png" in output.get("data", {}))
    assert "<svg" in "".join(shown["text/html"])
    assert all(
        f'<td style="text-align: left">{bucket}</td>' in "".join(shown["text/html"]) for bucket in ("head", "tail")
    )


@pytest.mark.parametrize("name", ["reading_a_run", "a_law_from_a_table"])
def test_what_is_kept_in_the_file_is_what_comes_out(name, monkeypatch) -> None:
    """But for pictures, which another version of matplotlib draws otherwise."""
    outputs = outputs_of(name, monkeypatch)
    assert printed(outputs) == printed(kept(name)) != ""
    for new, old in zip(outputs, kept(name), strict=True):
        tables = ["".join(output.get("data", {}).get("text/html", [])).partition("<table>")[2] for output in (new, old)]
        assert tables[0] == tables[1]


def test_all_notebooks_are_tested_and_in_the_documentation() -> None:
    tests = Path(__file__).read_text()
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f'"{path.stem}"' in tests
        assert path.name in (ROOT / "docs" / "examples.md").read_text()


def test_a_notebook_shows_the_numbers_and_colours_of_the_tab(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 128, layers=3)
    reader = RunReader(folder)
    reader.refresh()
    tab = answers.curves(reader, "train", "post", "hard_rank")
    (run,) = load_runs([folder]).runs
    for bucket, own in tab["buckets"].items():
        steps, medians = curve(run, "hard_rank", "post", bucket)
        assert steps.tolist() == tab["steps"]
        np.testing.assert_array_equal(medians, own["median"])
    view = show(folder)
    drawn = [line for line in view.figure.axes[0].lines if len(np.asarray(line.get_xdata())) == len(tab["steps"])]
    assert [line.get_color() for line in drawn] == list(BUCKET_COLORS.values())
    assert view.table is not None
    last = [r for r in read_spectral(folder).records if r.step == tab["steps"][-1] and r.bucket == POOLED]
    assert view.table.rows[0][2] == pytest.approx(float(np.median([r.hard_rank for r in last])), rel=1e-12)


def test_many_runs_get_a_panel_a_bucket_and_an_unknown_site_is_named(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.3}, (64, 128), layers=2)
    view = show(tmp_path)
    assert view.table is None
    assert len(view.figure.axes) == 2 * 4
    assert len({line.get_color() for line in view.figure.axes[0].lines}) == 2  # one an optimizer
    with pytest.raises(ValueError, match="no run has ranks of the site `pre`; sites measured: post"):
        show(tmp_path, site="pre")
