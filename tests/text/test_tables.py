"""One table in five formats, and no verb that prints one by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.cli import VERBS, main
from lightning_spectral.text.tables import FORMATS, Column, Table, render

TABLE = Table(
    ["bucket", Column("soft rank", ".2f", "soft_rank"), Column("loss", ".3f"), Column("n", lambda n: f"{n:,}"), "note"],
    [
        ["pooled", 49.54123456789, np.float64(5.0761), 12345, "a | b"],
        ["head", math.nan, None, np.int64(7), "50 % & x_y"],
    ],
    "last window",
)
NAMES = ["bucket", "soft_rank", "loss", "n", "note"]


def test_a_person_sees_aligned_numbers_and_a_dash_for_what_there_is_not():
    assert render(TABLE).splitlines() == [
        "last window",
        "bucket  soft rank   loss       n  note",
        "pooled      49.54  5.076  12,345  a | b",
        "head            -      -       7  50 % & x_y",
    ]


def test_json_and_csv_keep_every_digit():
    assert json.loads(render(TABLE, "json")) == [
        dict(zip(NAMES, ["pooled", 49.54123456789, 5.0761, 12345, "a | b"], strict=True)),
        dict(zip(NAMES, ["head", None, None, 7, "50 % & x_y"], strict=True)),
    ]
    rows = list(csv.reader(io.StringIO(render(TABLE, "csv"))))
    assert rows == [
        NAMES,
        ["pooled", "49.54123456789", "5.0761", "12345", "a | b"],
        ["head", "", "", "7", "50 % & x_y"],
    ]


def test_markdown_and_latex_escape_their_own_signs():
    markdown = render(TABLE, "markdown").splitlines()
    assert markdown[2:4] == ["| bucket | soft rank | loss | n | note |", "| --- | ---: | ---: | ---: | --- |"]
    assert markdown[4] == r"| pooled | 49.54 | 5.076 | 12,345 | a \| b |"
    latex = render(TABLE, "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrl}"
    assert latex[4] == r"head & - & - & 7 & 50 \% \& x\_y \\"


def test_a_narrow_terminal_wraps_and_a_pipe_does_not():
    assert max(len(line) for line in render(TABLE, width=30).splitlines()) <= 30
    wide = Table(["x"], [["y" * 5_000]])
    assert "y" * 5_000 in render(wide)


def test_an_empty_table_has_its_head():
    assert render(Table(["a", "b"], [])).split() == ["a", "b"]
    assert json.loads(render(Table(["a"], []), "json")) == []
    assert render(Table(["a", "b"], []), "csv") == "a,b"


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="must be one of table, json, csv, markdown, latex, got yaml"):
        render(TABLE, "yaml")


@pytest.mark.parametrize("verb", ["pretrain", "measure", "sweep", "plan", "fit", "compare"])
def test_every_verb_with_a_table_has_format(verb, capsys):
    assert verb in VERBS
    with suppress(SystemExit):  # argparse's own way to end after its help
        main([verb, "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--format" in said
    assert all(name in said for name in FORMATS)


@pytest.mark.parametrize("style", FORMATS)
def test_what_a_program_reads_has_nothing_around_it(style, tmp_path, capsys):
    table = tmp_path / "points.csv"
    table.write_text("width,value\n" + "".join(f"{w},{2 * w**0.5}\n" for w in (64, 128, 256, 512)))
    assert main(["fit", str(table), "--format", style]) == 0
    out = capsys.readouterr().out
    if style == "json":
        assert json.loads(out)[0]["beta"] == pytest.approx(0.5)
    if style == "csv":
        (row,) = csv.DictReader(io.StringIO(out))
        assert float(row["beta"]) == pytest.approx(0.5)
    if style == "latex":
        assert out.startswith(r"\begin{tabular}")
        assert out.endswith("\\end{tabular}\n")
    if style == "markdown":
        assert all(line.startswith("|") for line in out.splitlines())
    if style == "table":
        assert "0.500" in out


def test_tables_are_not_aligned_by_hand():
    """A width in a format string (``{x:>11}``) in a verb is a second way to print tables."""
    for file in (Path(main.__code__.co_filename).parent).glob("*.py"):
        if file.stem not in ("__init__", "pages"):
            assert not re.search(r"\{[^{}]*:[<>^]\d+\}", file.read_text()), file
