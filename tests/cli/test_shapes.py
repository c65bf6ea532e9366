from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.cli import main


def test_models_are_compared_and_runs_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, x = np.random.default_rng(0), np.geomspace(1e8, 1e10, 12)
    lines = ["optimizer,width,value"]
    for name, end in (("a", 1.7), ("b", 2.1)):
        values = (end + 400 * x**-0.34) * np.exp(rng.normal(0, 0.002, 12))
        lines += [f"{name},{width!r},{value!r}" for width, value in zip(x.tolist(), values.tolist(), strict=True)]
    (tmp_path / "losses.csv").write_text("\n".join(lines) + "\n")
    assert main(["fit", str(tmp_path / "losses.csv"), "--model", "all"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    best = [row for row in rows if len(row) > 2 and row[1] == "floor"]
    assert [row[0] for row in best] == ["a", "b"]
    assert all(row[-1] == "0.0" for row in best)
    assert main(["compare", str(tmp_path / "losses.csv"), "--separate", "0.001"]) == 0
    assert "times as many runs separate slopes by 0.001 (power 80 %" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "losses.csv"), "--separate", "-1"]) == 2
