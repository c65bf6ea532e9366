from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest

from lightning_spectral.analysis.study import fit_points
from lightning_spectral.analysis.tidy import fit_table, read_points_csv, write_atomic, write_csv

TEXT = """run_id,optimizer,bucket,metric,ffn_hidden_dim,value
a1,AdamW,tail,hard_rank,768,154.70499999999998
a2,AdamW,tail,hard_rank,1536,270.1
a3,AdamW,tail,hard_rank,3072,330.9
m1,Muon,tail,hard_rank,768,
m2,Muon,tail,hard_rank,1536,many
m3,Muon,tail,hard_rank,3072
"""
BY = ["optimizer", "bucket", "metric"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "points.csv"
    path.write_text(TEXT)
    return path


def test_rows_become_points_and_bad_lines_are_named(file: Path) -> None:
    table, problems = read_points_csv(file, x="ffn_hidden_dim", y="value", by=BY)
    assert [(p.series[0], p.x, p.source) for p in table.points[:3]] == [
        ("AdamW", 768, "a1"),
        ("AdamW", 1536, "a2"),
        ("AdamW", 3072, "a3"),
    ]
    assert math.isnan(table.points[3].value)
    assert [problem.message.split("line ")[1][:1] for problem in problems] == ["6", "7"]
    assert table.points[0].rank == 154.70499999999998


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "width"}, "no column `width` .--x.; it has: run_id, optimizer"),
        ({"y": "rank"}, "no column `rank` .--y."),
        ({"by": ["color"]}, "no column `color` .--by."),
        ({"seed": "seed"}, "no column `seed` .--seed."),
    ],
)
def test_missing_columns(file: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_points_csv(file, **({"x": "ffn_hidden_dim", "y": "value", "by": BY} | options))


@pytest.mark.parametrize("content", [b"", b"x,value\n", b"x,value\n?,?\n", b"\xff\xfe\x00,\x9d\n"])
def test_empty_foreign_and_binary_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.csv"):
        read_points_csv(path, x="x", y="value", by=[])


PLAIN = "run_id,o,width,value\n" + "".join(f"a{w},a,{w},{w}\n" for w in (128, 256, 512))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (PLAIN, ""),
        ("\ufeff" + PLAIN, ""),
        (PLAIN.replace("\n", "\r\n"), ""),
        (PLAIN.replace(",", ";"), ""),
        (PLAIN.replace(",", "\t"), ""),
        (PLAIN.replace(",", ", "), ""),
        (PLAIN.replace("a,", '"a",'), ""),
        (PLAIN.replace("\n", ",extra\n"), ""),
        (PLAIN[:-1], "ends without a line break"),
        (PLAIN + "a9,a\n", "line 5 has another number of cells"),
        (PLAIN + "a9,a,9,8,7\n", "line 5 has another number of cells"),
        (PLAIN + "a9,a,9,eight\n", "line 5: `eight` in column `value` is not a number"),
    ],
)
def test_tables_of_other_programs(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(content.encode())
    table, problems = read_points_csv(path, x="width", y="value", by=["o"])
    assert [(p.series, p.x, p.value, p.source) for p in table.points] == [
        (("a",), w, w, f"a{w}") for w in (128, 256, 512)
    ]
    assert len(problems) == (1 if problem else 0)
    assert all(problem in found.message for found in problems)


def test_an_open_quotation_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(PLAIN.replace("a256,", '"a256,'))
    with pytest.raises(ValueError, match="no whole table"):
        read_points_csv(path, x="width", y="value", by=["o"])


def test_the_table_of_fits_has_the_promised_columns(file: Path, tmp_path: Path) -> None:
    table, problems = read_points_csv(file, x="ffn_hidden_dim", y="value", by=BY)
    header, rows = fit_table(BY, fit_points(table, problems=problems).fits)
    assert header[:11] == [*BY, "beta", "ln_a", "ci_low", "ci_high", "r2", "n", "status", "method"]
    written = write_csv(tmp_path / "deep" / "fits.csv", header, rows)
    with written.open() as handle:
        back = list(csv.DictReader(handle))
    assert back[0]["status"] == "ok"
    assert float(back[0]["beta"]) == rows[0][3]  # every digit survives
    assert (back[1]["beta"], back[1]["status"]) == ("", "refused:missing_values")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "report.html", b"whole")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"ha")
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_bar_is_given_by_its_two_ends(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("width,value,err_low,err_high\n1,10,7,13\n2,20,15,25\n4,40,36,44\n")
    points, _ = read_points_csv(table, spread="err_low,err_high")
    assert [point.spread for point in points.points] == [3.0, 5.0, 4.0]
    with pytest.raises(ValueError, match="end of a bar"):
        read_points_csv(table, spread="err_high")
    with pytest.raises(ValueError, match="`err_top`"):
        read_points_csv(table, spread="err_low,err_top")
