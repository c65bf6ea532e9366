from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.cli import main
from lightning_spectral.report import page as report
from lightning_spectral.report.figures import FIGURES
from tests.analysis.synthetic import write_study
from tests.analysis.test_tables import published


def test_a_report_with_pictures_and_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # all figures are drawn in tests/analysis/test_report.py; here one stands for them
    monkeypatch.setattr(report, "draw_all", lambda scene: {"scaling_laws": FIGURES["scaling_laws"].draw(scene)})
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, widths=(128, 256, 512))
    out = tmp_path / "out"
    argv = ["report", str(tmp_path / "runs"), "--out", str(out), "--png", "--to-tensorboard", str(tmp_path / "tb")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "WARNING No seeds are told apart" in shown
    assert (out / "figures" / "scaling_laws.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tb").iterdir())
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "fits.csv", "points.csv", "comparisons.csv", "matched_loss.csv", "runs.csv"} <= names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["points.csv"], "there is nothing at `points.csv`"),
        (["runs", "--site", "gate"], "no run measured `--site gate`"),
        (["runs", "--metrics", "mean_rank"], "unknown metric `mean_rank`"),
        (["nothing"], "there is nothing at `nothing`"),
    ],
)
def test_bad_input(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "runs", {"muon": 0.9}, widths=(128,), steps=(0, 10))
    assert main(["report", *argv]) == 2
    assert message in capsys.readouterr().err


def test_only_refused_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert "no run could be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_published_table_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path / "published.csv")
    assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "agree to the last bit" in shown
    assert {p.stem for p in (tmp_path / "report" / "figures").iterdir()} >= {"scaling_laws", "betas", "asymmetry"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "a table of 24 points" in page
    assert main(["report", str(path), "--drop-duplicates", "--out", str(tmp_path / "clean")]) == 0
    assert "both were left out" in capsys.readouterr().out
