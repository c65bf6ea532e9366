from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.cli import main


def test_models_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_law_in_two_variables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hoffmann's form with known parameters and 0.2 % of noise: every interval holds its own."""
    true = {"E": 1.69, "A": 406.4, "a": 0.34, "B": 410.7, "b": 0.28}
    rng, lines = np.random.default_rng(1), ["family,params,tokens,loss"]
    for n in np.geomspace(1e7, 1e10, 7):
        for d in np.geomspace(1e8, 1e11, 7):
            loss = true["E"] + true["A"] * n ** -true["a"] + true["B"] * d ** -true["b"]
            lines.append(f"x,{n!r},{d!r},{loss * float(np.exp(0.002 * rng.standard_normal()))!r}")
    (tmp_path / "losses.csv").write_text("\n".join(lines).replace("np.float64(", "").replace(")", "") + "\n")
    given = ["fit", str(tmp_path / "losses.csv"), "--x", "params,tokens", "--y", "loss", "--by", "family"]
    assert main([*given, "--model", "floor", "--format", "csv", "--out", str(tmp_path / "out")]) == 0
    header, row = (line.split(",") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(header, row, strict=True))
    for name, value in true.items():
        low, high = (float(cells[f"{name}_{end}"]) for end in ("low", "high"))
        assert low < value < high, name
        assert high - low < 0.5 * value, name
    assert (cells["family"], cells["n"]) == ("x", "49")
    assert float(cells["rms_ln"]) == pytest.approx(0.002, rel=0.3)
    assert (tmp_path / "out" / "laws.csv").exists()
    assert main(given) == 2
    assert "--model floor" in capsys.readouterr().err


def test_rows_left_out_and_far_off_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, rng = ["n,d,loss", "0,1,2", "1e8,,3"], np.random.default_rng(0)
    for k, n in enumerate(np.geomspace(1e7, 1e10, 6)):
        for m, d in enumerate(np.geomspace(1e8, 1e11, 6)):
            loss = (1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28) * np.exp(0.002 * rng.standard_normal())
            lines.append(f"{float(n)},{float(d)},{float(loss) * (1.5 if (k, m) == (0, 0) else 1)}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    assert main(["fit", str(tmp_path / "t.csv"), "--x", "n,d", "--y", "loss", "--model", "floor"]) == 0
    said = capsys.readouterr().out
    assert "1 of 36 rows lie more than 6 robust standard deviations off the law; without them E = 1.6" in said
    assert "2 rows without a positive number in each of these columns were left out" in said
