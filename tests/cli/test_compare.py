from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.cli import main
from tests.analysis.synthetic import write_study
from tests.cli.test_fit import rows_of


def test_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, seeds=(0, 1))
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "comparisons.csv")
    found = {
        row["kind"]: row
        for row in rows
        if row["bucket"] == "tail" and row["metric"] in ("hard_rank", "") and row["layer"] in ("median", "")
    }
    assert set(found) == {
        "slope_difference",
        "level_difference",
        "crossover_width",
        "asymmetry",
        "matched_loss",
        "matched_loss_slope",
    }
    slope = found["slope_difference"]
    assert (slope["a"], slope["b"]) == ("adamw", "muon")
    assert float(slope["estimate"]) == pytest.approx(-0.36, abs=0.03)
    assert float(slope["p"]) < 0.05  # two seeds: no interval is narrower than three quarters of their own t
    assert len(rows_of(tmp_path / "matched_loss.csv")) == 4 * 2 * 4 * 2
    shown = capsys.readouterr().out
    assert "p (Holm) is corrected" in shown
    assert "more comparisons (other buckets and metrics)" in shown
    assert "tail hard_rank" in shown
    assert "head" not in shown
    assert "note: Intervals are over widths" in shown


def test_architecture_effect(tmp_path: Path) -> None:
    widths = (128, 256, 384, 512, 768)
    for heads, extra in (("6", 0.02), ("12", 0.0)):
        write_study(tmp_path / "runs", {"muon": 0.9 + extra, "adamw": 0.3 + extra}, widths, labels={"heads": heads})
    assert main(["compare", str(tmp_path / "runs"), "--architecture", "heads", "--out", str(tmp_path)]) == 0
    effects = [r for r in rows_of(tmp_path / "comparisons.csv") if r["kind"] == "effect" and r["layer"] == "median"]
    assert len(effects) == 4 * 2
    assert all(float(row["ci_low"]) > 0 for row in effects)


def test_a_table_has_no_losses_and_no_such_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    path.write_text("o,width,value\n" + "".join(f"{o},{x},{x * k}\n" for k, o in enumerate("ab", 1) for x in (1, 2, 3)))
    assert main(["compare", str(path), "--by", "o", "--out", str(tmp_path)]) == 0
    assert main(["compare", str(path), "--by", "o", "--architecture", "heads"]) == 2
    assert "needs the column" in capsys.readouterr().err
