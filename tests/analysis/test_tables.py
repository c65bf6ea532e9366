"""Columns of tables known without options, conditions on rows, copied runs left out, the committed study refitted."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_spectral.analysis import cells
from lightning_spectral.analysis.cells import read_sheet
from lightning_spectral.analysis.conditions import condition
from lightning_spectral.analysis.fits import fit_series
from lightning_spectral.analysis.health import without_duplicates
from lightning_spectral.analysis.study import fit_points
from lightning_spectral.analysis.tables import as_of_runs, differing, one_table, recognised
from lightning_spectral.analysis.tidy import cell_text, points_table, read_points_csv, write_csv
from lightning_spectral.cli import main
from tests.analysis.synthetic import power_law_points, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# the mixed model's intervals are over seeds as well: CHANGELOG names the change


def number(text: str) -> float:
    return float(text) if text else math.nan


def published(path: Path) -> Path:
    """A table as the paper's repository has them, one run copied."""
    lines = ["optimizer,dion_rank_fraction,ffn_hidden_dim,frequency_bucket,bucket,metric,value,err_low,err_high"]
    for optimizer, rank, slope in (("AdamW", "", 0.4), ("Dion", "1/2", 0.8), ("Dion", "1/16", 0.5)):
        for width in (768, 1536, 3072, 6144):
            for metric, factor in (("soft_rank", 2.0), ("hard_rank", 1.0)):
                wobble = 1 + 0.02 * math.sin(width * slope + factor)
                value = factor * width**slope * wobble
                if (optimizer, rank, width) == ("Dion", "1/2", 6144):  # what AdamW has at 3072
                    value = factor * 3072**0.4 * (1 + 0.02 * math.sin(3072 * 0.4 + factor))
                lines.append(f"{optimizer},{rank},{width},tail,TAIL,{metric},{value!r},{value * 0.9!r},{value * 1.1!r}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_our_own_tables_need_no_option() -> None:
    names = ["optimizer", "site", "bucket", "metric", "layer", "width", "seed", "value", "spread"]
    for rows in ("num_rows", "num_tokens"):
        found = recognised([*names, rows, "steps", "run_id"])
        assert (found.x, found.by, found.seed, found.rows) == ("width", tuple(names[:5]), "seed", rows)


@pytest.mark.parametrize("study", ["pocket_study", "pocket_tokens"])
def test_a_committed_study_is_refitted_from_its_points(study: str) -> None:
    found, problems = read_points_csv(RESULTS / study / "points.csv")
    assert not problems
    fits = {fit.series: fit for fit in fit_points(found).fits}
    with (RESULTS / study / "fits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(fits)
    for row in rows:
        fit = fits[tuple(row[name] for name in found.by)]
        same = row["method"] == fit.method
        assert same or (row["method"], fit.method) == ("ols_seed_means", "mixed")
        for name in ("beta", "ln_a", "r2", "theil_sen", "loo_low", "loo_high", "boot_high"):
            assert getattr(fit, name) == pytest.approx(number(row[name]), rel=1e-9, nan_ok=True)
        # An end near zero is a small difference of large numbers: its error is a share of the interval's width. The
        # Student quantiles of scipy 1.15 (Python 3.10) and of 1.17 differ by 2e-11.
        ends = {"seed_low": fit.seed_high - fit.seed_low}
        if same:
            ends.update(ci_low=fit.ci_high - fit.ci_low, ci_high=fit.ci_high - fit.ci_low)
        for name, width in ends.items():
            assert getattr(fit, name) / width == pytest.approx(number(row[name]) / width, rel=0, abs=1e-10, nan_ok=True)


def test_a_column_that_tells_repeated_rows_apart_is_named(tmp_path: Path) -> None:
    path = published(tmp_path / "p.csv")
    assert not read_points_csv(path)[1]  # known without options
    problems = read_points_csv(path, by=["optimizer", "metric"])[1]
    assert "the column `dion_rank_fraction` tells them apart" in problems[0].message


def test_two_columns_that_tell_repeated_rows_apart_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    cells = [f"{w},{m},{t},{w + t}" for w in (64, 128, 256) for m in ("fc", "proj") for t in (1, 2, 3)]
    path.write_text("width,module,t,l1\n" + "\n".join(cells) + "\n")
    (problem,) = read_points_csv(path, y="l1")[1]
    assert problem.message.endswith("and width; `module` and `t` tell them apart (--by, --seed).")
    assert not read_points_csv(path, y="l1", by=["module", "t"])[1]


def test_rows_are_kept_by_conditions(tmp_path: Path) -> None:
    path = published(tmp_path / "p.csv")
    found, _ = read_points_csv(path, where=["optimizer!=Dion", "ffn_hidden_dim>=1536"])
    assert {(p.series[0], p.x) for p in found.points} == {("AdamW", x) for x in (1536.0, 3072.0, 6144.0)}
    with pytest.raises(ValueError, match=r"there is no column `optimiser` \(--where optimiser=Dion\)"):
        read_points_csv(path, where=["optimiser=Dion"])
    with pytest.raises(ValueError, match=r"`Dion` is no condition"):
        condition("Dion")
    assert condition("lr=3e-3")({"lr": "0.003"})
    assert not condition("lr!=3e-3")({"lr": "0.003"})
    with pytest.raises(ValueError, match=r"`--where lr<low` compares numbers, and 'low' is none"):
        condition("lr<low")({"lr": "1"})


def test_both_points_of_a_copied_run_are_left_out(tmp_path: Path) -> None:
    found, _ = read_points_csv(published(tmp_path / "p.csv"))
    kept, problems = without_duplicates(found)
    gone = {(p.series[0], p.x) for p in found.points} - {(p.series[0], p.x) for p in kept.points}
    assert gone == {("AdamW", 3072.0)}  # at 6144, Dion 1/16 is left
    assert len(found.points) - len(kept.points) == 4
    assert all("both were left out" in problem.message for problem in problems)


def test_a_table_becomes_what_a_report_draws(tmp_path: Path) -> None:
    found = as_of_runs(read_points_csv(published(tmp_path / "p.csv"))[0], "value")
    assert found.by == ("optimizer", "dion_rank_fraction", "site", "bucket", "metric", "layer")
    assert {p.series[2:] for p in found.points} == {
        ("post", "tail", "soft_rank", "median"),
        ("post", "tail", "hard_rank", "median"),
    }
    alone = as_of_runs(table(power_law_points(0.5)), "loss")
    assert alone.by[0] == "series"
    assert {p.series for p in alone.points} == {("all", "post", "pooled", "loss", "median")}


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "\tx"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(tmp_path: Path, text: str) -> None:
    assert cell_text(text) == f"'{text}"
    points = table(power_law_points(0.5, series=(text,)), ("optimizer",))
    path = write_csv(tmp_path / "p.csv", *points_table(points))
    assert f"'{text}" in path.read_text()
    assert cell_text(-0.25) == "-0.25"
    assert cell_text("AdamW") == "AdamW"


def two_tables(tmp_path: Path) -> tuple[Path, Path]:
    """Dion's points at two ranks, and again one of the runs, its last bits rounded otherwise, with a larger model."""
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    lines = ["run_id,model_scale,optimizer,dion_rank_fraction,ffn_hidden_dim,metric,value"]
    lines += [f"d{r}_{w},160m,Dion,1/{r},{w},hard_rank,{w**0.5 / r!r}" for r in (2, 16) for w in (256, 512, 1024)]
    one.write_text("\n".join(lines) + "\n")
    lines = ["run_id,model_scale,optimizer,ffn_hidden_dim,metric,value"]
    lines += [f"large_{w},350m,Dion,{w},hard_rank,{w**0.8!r}" for w in (256, 512, 1024)]
    two.write_text("\n".join(lines) + "\n")
    return one, two


def test_tables_with_other_labels_are_read_together(tmp_path: Path) -> None:
    one, two = two_tables(tmp_path)
    assert differing([read_sheet(one).rows, read_sheet(two).rows]) == ["model_scale"]
    assert differing([read_sheet(one).rows]) == []
    joined = one_table([read_points_csv(path)[0] for path in (one, two)])
    assert joined.by == ("optimizer", "dion_rank_fraction", "metric")
    assert [p.series[1] for p in joined.points] == ["1/2"] * 3 + ["1/16"] * 3 + [""] * 3


def test_a_run_in_two_tables_is_one_point(tmp_path: Path) -> None:
    points = read_points_csv(two_tables(tmp_path)[0])[0]
    again = replace(points, points=tuple(replace(p, value=p.value * (1 + 2e-16)) for p in points.points))
    assert one_table([points, again]).points == points.points
    other = replace(points, points=tuple(replace(p, value=p.value * 1.01) for p in points.points))
    assert len(one_table([points, other]).points) == 2 * len(points.points)
    # within a table, equal rows stay: that they are repeated is said of them
    assert len(one_table([replace(points, points=points.points * 2)]).points) == 2 * len(points.points)
    nameless = replace(points, points=tuple(replace(p, source="") for p in points.points))
    assert len(one_table([nameless, nameless]).points) == 2 * len(points.points)


@pytest.mark.parametrize(
    ("cell", "number_of_it"),
    [("1e3", 1000.0), (" 2 ", 2.0), ("1_16", None), ("a", None), ("1,5", None), ("-inf", -math.inf), (True, 1.0)],
)
def test_what_number_a_cell_says(cell: object, number_of_it: float | None) -> None:
    assert cells.number_of(cell) == number_of_it
    assert cells.finite(cell) == (number_of_it if number_of_it is not None and math.isfinite(number_of_it) else None)


@pytest.mark.parametrize("cell", ["", "  ", None, "nan"])
def test_a_blank_cell_is_nan_and_no_finite_number(cell: object) -> None:
    value = cells.number_of(cell)
    assert value is not None
    assert math.isnan(value)
    assert cells.finite(cell) is None
    assert not condition("lr<1")({"lr": "" if cell is None else str(cell)})


def test_labels_that_look_like_numbers_stay_apart() -> None:
    assert not condition("rank=116")({"rank": "1_16"})
    assert condition("rank=116")({"rank": "116.0"})


def test_groups_of_ones_own_keep_their_letters(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "width,bucket,metric,value\n" + "".join(f"{w},{b},HARD,{w}\n" for w in (1, 2) for b in ("Code", "code", "ALL"))
    )
    found = as_of_runs(read_points_csv(path)[0], "value")
    assert {p.series[2:4] for p in found.points} == {(b, "hard_rank") for b in ("Code", "code", "pooled")}


def test_a_table_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    text_of = cells.text_of
    monkeypatch.setattr(cells, "text_of", lambda path: seen.append(Path(path).name) or text_of(path))
    files = [str(path) for path in two_tables(tmp_path)]
    for verb in (["report", "--out", str(tmp_path / "r")], ["fit"], ["compare"]):
        seen.clear()
        assert main([verb[0], *files, *verb[1:]]) == 0
        assert sorted(seen) == ["one.csv", "two.csv"]


def test_a_table_of_ours_keeps_errors_plain_ranks_and_sequences_of_its_runs(tmp_path: Path) -> None:
    points = power_law_points(0.5, seeds=2, noise=0.05)
    known = [replace(p, error=0.3, raw=0.9 * p.value * p.x**-0.1, num_sequences=32.0, layers=()) for p in points]
    path = write_csv(
        tmp_path / "p.csv", *points_table(table([replace(p, series=("a",)) for p in known], ("optimizer",)))
    )
    (fit,) = fit_points(read_points_csv(path)[0]).fits
    of_runs = fit_series([replace(p, series=("a",)) for p in known])
    assert (fit.beta, fit.ci_low, fit.raw_beta) == (of_runs.beta, of_runs.ci_low, of_runs.raw_beta)
    assert fit.raw_beta == pytest.approx(fit.beta - 0.1)
    # errors of .3 at every point: an interval over what would otherwise be a scatter of .05
    assert fit.std_err > 3 * fit_series([replace(p, error=math.nan) for p in known]).std_err
