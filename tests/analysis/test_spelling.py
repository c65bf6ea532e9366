"""Tables as people write them give the numbers that they mean, or a sentence."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_spectral.analysis.cells import number_of, read_sheet
from lightning_spectral.analysis.conditions import condition
from lightning_spectral.analysis.spelling import as_python_writes, bare, column_of
from lightning_spectral.analysis.study import fit_points
from lightning_spectral.analysis.tidy import read_columns, read_points_csv
from lightning_spectral.cli import main

NAMES = ("optimizer", "width", "seed", "value")
WIDTHS = (1536, 3072, 6144, 12288)


def rows(value: Callable[[float], str] = "{:.4f}".format, width: Callable[[int], str] = str) -> list[list[str]]:
    """value = 2 width^.5 of Muon, 3 width^.25 of AdamW."""
    laws = {"Muon": (2, 0.5), "AdamW": (3, 0.25)}
    return [[name, width(w), "0", value(a * w**b)] for name, (a, b) in laws.items() for w in WIDTHS]


def text(cells: list[list[str]], sign: str = ",", names: tuple[str, ...] = NAMES) -> str:
    return "\n".join(sign.join(row) for row in [list(names), *cells]) + "\n"


def quoted(cells: list[list[str]]) -> list[list[str]]:
    return [[f'"{cell}"' for cell in row] for row in cells]


def german(number: float) -> str:
    return f"{number:,.4f}".translate(str.maketrans(",.", ".,"))


FORMS = {
    "plain": text(rows()),
    "thousands": text(quoted(rows(width="{:,}".format))),
    "thousands in both": text(quoted(rows("{:,.4f}".format, "{:,}".format))),
    "narrow blanks between thousands": text(rows(width=lambda w: f"{w:,}".replace(",", "\u202f"))),
    "blanks between thousands": text(rows(width=lambda w: f"{w:,}".replace(",", " "))),
    "apostrophes between thousands": text(rows(width=lambda w: f"{w:,}".replace(",", "'"))),
    "decimal commas": text(rows(lambda v: f"{v:.4f}".replace(".", ",")), ";"),
    "decimal commas and points between thousands": text(rows(german, lambda w: f"{w:,}".replace(",", ".")), ";"),
    "decimal commas in quotes": text(quoted(rows(lambda v: f"{v:.4f}".replace(".", ",")))),
    "scientific": text(rows("{:.9e}".format, "{:.4E}".format)),
    "minus of typography": text(rows(lambda v: f"{v * 1e9:.0f}e\u22129")),
    "capitals": text(rows(), names=("Optimizer", "Width", "Seed", "Value")),
    "units": text(rows(), names=("Optimizer", "Width (D)", "seed", "Value [modes]")),
    "blanks around": text([[f" {cell} " for cell in row] for row in rows()], names=(" optimizer ", *NAMES[1:])),
    "bars": text(rows(), "|"),
    "blanks": text(rows(), "   "),
    "tabs": text(rows(), "\t"),
    "a comma in a name": text(rows(), ";", ("optimizer", "width", "seed", "value (a, b)")),
    "comments above": "# ours, of Monday\n# all of it\n\n" + text(rows()),
    "names in a comment": "# " + text([[*row[1:]] for row in rows() if row[0] == "Muon"], names=NAMES[1:]),
    "a comma at the end of rows": text([[*row, ""] for row in rows()]).replace("value,", "value"),
    "old line ends": text(rows()).replace("\n", "\r"),
    "a mark of UTF-8": "\ufeff" + text(rows()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_is_the_same_law(form: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(FORMS[form].encode())
    table, problems = read_points_csv(path)
    assert not problems
    fits = {fit.series: fit for fit in fit_points(table).fits}
    for name, beta, a in (("Muon", 0.5, 2), ("AdamW", 0.25, 3)):
        fit = fits.get((name,)) or fits.get(())
        if len(fits) == 2 or name == "Muon":
            assert fit is not None
            # four decimals of a value of 18 or more
            assert fit.beta == pytest.approx(beta, abs=1e-5)
            assert math.exp(fit.ln_a) == pytest.approx(a, rel=1e-4)
            assert (fit.x_min, fit.x_max) == (1536, 12288)
            assert fit.status == "ok"


def test_a_share_in_percent_is_that_share(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text(rows(lambda v: f"{v:.4f} %")))
    (_, muon) = sorted(fit_points(read_points_csv(path)[0]).fits, key=lambda fit: fit.series)
    assert math.exp(muon.ln_a) == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["1,024"], {}),  # a thousand, or one
        (["1,024", "2.5"], {"1,024": "1024"}),
        (["1,024", "1,024,000"], {"1,024": "1024", "1,024,000": "1024000"}),
        (["1,024", "0,5"], {"1,024": "1.024", "0,5": "0.5"}),
        (["1.024", "2,5"], {"1.024": "1024", "2,5": "2.5"}),
        (["1.024", "2.048"], {}),  # as Python has it
        (["2,5", "2.5"], {}),  # both signs begin decimals: nothing is to be believed
        (["0.9,0.95", "8,16,32", "1.2.3", "2024.01.05", "1/16", "3\u20134", "-"], {}),  # no numbers
        (["12,5%", "AdamW, slow"], {"12,5%": "12.5e-2"}),
        (["\u22121.5", "1e\u22123"], {"\u22121.5": "-1.5", "1e\u22123": "1e-3"}),
        (["Muon 10 000", "10 000"], {"10 000": "10000"}),
    ],
)
def test_what_a_comma_is_the_table_says(cells: list[str], read: dict[str, str]) -> None:
    assert as_python_writes(cells) == read


@pytest.mark.parametrize(
    ("cell", "number"),
    [("70M", 7e7), ("1.4b", 1.4e9), ("300 B", 3e11), ("15T", 1.5e13), ("0.5k", 500.0), ("M", None), ("5e3k", None)],
)
def test_multiples(cell: str, number: float | None) -> None:
    assert number_of(cell) == number


def test_tokens_in_billions(tmp_path: Path) -> None:
    path, sizes = tmp_path / "p.csv", ("70M", "160M", "410M", "1B", "2.8B")
    law = {
        (n, d): 1.7 + 400 / float(number_of(n) or 0) ** 0.34 + 410 / float(number_of(d) or 0) ** 0.28
        for n in sizes
        for d in ("1B", "4B", "16B", "64B", "300B")
    }
    path.write_text("Params,Tokens,Loss (nats)\n" + "".join(f"{n},{d},{y!r}\n" for (n, d), y in law.items()))
    ((one, two, y),) = read_columns([path], ["params", "tokens", "loss"], [])[0].values()
    assert (one[0], two[-1], len(y)) == (7e7, 3e11, 25)
    assert main(["fit", str(path), "--x", "params,tokens", "--y", "loss", "--model", "floor", "--format", "csv"]) == 0


def test_names_but_for_capitals_blanks_and_units() -> None:
    assert bare(" FFN hidden-dim [units] ") == "ffn_hidden_dim"
    assert column_of("loss", ["Loss (nats)", "x"]) == "Loss (nats)"
    assert column_of("loss", ["loss", "Loss"]) == "loss"
    assert column_of("loss", ["Loss", "LOSS"]) == "loss"  # which of them?
    assert condition("Optimizer=a")({"optimizer": "a"})


def test_two_columns_that_may_be_the_width_are_no_width(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("Width,width (D),value\n1,2,3\n")
    assert read_sheet(path).names == ("Width", "width (D)", "value")
    with pytest.raises(ValueError, match="has no column `width`"):
        read_points_csv(path)


def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('# ours\n\nwidth,value\n64,1\n\n"128",x\n256,3\n512,4\n')
    (problem,) = read_points_csv(path)[1]
    assert problem.message == f"`{path}` line 6: `x` in column `value` is not a number; it was left out."


def test_labels_with_blanks_behind_are_one_series(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "optimizer,width,value\n" + "".join(f"{'Muon ' if w > 9 else 'Muon'},{w},{w}\n" for w in (8, 16, 32))
    )
    assert {point.series for point in read_points_csv(path)[0].points} == {("Muon",)}


def test_seeds_as_pandas_writes_them_are_the_same_seeds(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    cells = [
        f"{name},{w},{s}{end},{w**0.5 * (1 + s)}"
        for name, end in (("a", ""), ("b", ".0"))
        for w in WIDTHS
        for s in (0, 1)
    ]
    path.write_text("optimizer,width,seed,value\n" + "\n".join([*cells, "b,64,first,1"]) + "\n")
    assert {point.seed for point in read_points_csv(path)[0].points} == {"0", "1", "first"}


def test_a_packed_table_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress(text(rows()).encode()))
    assert main(["fit", str(path), "--out", str(tmp_path / "out")]) == 0
