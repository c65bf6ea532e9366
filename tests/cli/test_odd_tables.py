"""Whatever stands in a table of points, `fit`, `compare`, `power` and `report` end in numbers or in a sentence."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_spectral.cli import main

HEADER = ["optimizer", "bucket", "metric", "layer", "width", "seed", "value", "spread", "num_tokens", "steps", "run_id"]
ODD = [
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1e-320",
    "abc",
    '"',
    "\x00",
    "\u202e",
    "=1+1",
    "1,2",
    "1_000",
]


def odd_table(draw: random.Random) -> str:
    """A whole study with a few cells, rows or columns that are not as they should be."""
    rows = [
        [
            *(kind, "tail", "hard_rank", "median", str(width), str(seed)),
            *(repr(width**slope * math.exp(draw.gauss(0, 0.05))), "1.0", "9000", "100", f"{kind}_{width}_{seed}"),
        ]
        for kind, slope in (("AdamW", 0.4), ("Muon", 0.9))
        for width in (128, 256, 512, 1024)
        for seed in (0, 1)
    ]
    table = [list(HEADER), *rows]
    for _ in range(draw.randint(1, 6)):
        place, column = draw.randrange(len(table)), draw.randrange(len(HEADER))
        if (kind := draw.random()) < 0.5:
            table[place][column : column + 1] = [draw.choice(ODD)]
        elif kind < 0.6:
            table[place] = table[place][:column]
        elif kind < 0.7:
            table = [row[:column] + row[column + 1 :] for row in table]
        elif kind < 0.8:
            table.append(list(table[place]))
        elif kind < 0.9:
            cell = draw.choice(ODD)
            table[1:] = [[*row[:column], cell, *row[column + 1 :]] for row in table[1:]]
        else:
            table = table[:1] + table[place : place + 3]
    return "\n".join(",".join(row) for row in table) + "\n"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), method=st.sampled_from(["auto", "ols", "weighted", "theil_sen", "bootstrap"]))
def test_odd_tables_end_in_numbers_or_a_sentence(
    seed: int, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "points.csv"
    path.write_text(odd_table(random.Random(seed)))
    for words in (["fit", "--model", "all", "--method", method], ["compare"], ["power", "--amount", ".3"]):
        code = main([words[0], str(path), *words[1:]])
        assert code in (0, 1, 2)
        assert (code == 2) == capsys.readouterr().err.startswith(f"lightning-spectral {words[0]}: ")


def test_a_report_of_a_table_without_optimizers(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("model,width,value\n" + "".join(f"mine,{w},{w**0.5!r}\n" for w in (128, 256, 512, 1024)))
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "mine" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_no_width_or_infinite_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    good = "".join(f"{w},{w**0.5!r}\n" for w in (128, 256, 512, 1024))
    path.write_text("width,value\n" + good + "0,3\n-128,3\ninf,3\n,3\n2048,inf\n")
    assert main(["fit", str(path)]) == 0
    found = capsys.readouterr()
    assert "0.500" in found.out
    for text in ("`0` in column `width` is no positive number", "`-128` in", "`inf` in column `width`", "`` in column"):
        assert text in found.err
    assert "`inf` in column `value` is infinite" in found.err
