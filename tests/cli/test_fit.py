from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_spectral.cli import main
from tests.analysis.synthetic import write_study


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def points_csv(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["run_id,optimizer,bucket,metric,ffn_hidden_dim,value"]
    lines += [
        f"{o}_{d},{o},{b},{m},{d},{float(rng.lognormal(4, 1))!r}"
        for o in ("AdamW", "Muon")
        for d in (768, 1536, 2304, 3072)
        for b in ("head", "tail")
        for m in ("soft_rank", "hard_rank")
    ]
    path = tmp_path / "points.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_refit_of_a_published_table_is_an_independent_ols(points_csv: Path, tmp_path: Path) -> None:
    by = ["optimizer", "bucket", "metric"]
    code = main(
        ["fit", str(points_csv), "--x", "ffn_hidden_dim", "--y", "value", "--by", ",".join(by), "--out", str(tmp_path)]
    )
    assert code == 0
    table = rows_of(points_csv)
    fits = rows_of(tmp_path / "fits.csv")
    assert len(fits) == 8
    for fit in fits:
        own = [row for row in table if all(row[name] == fit[name] for name in by)]
        line = stats.linregress(
            np.log([float(r["ffn_hidden_dim"]) for r in own]), np.log([float(r["value"]) for r in own])
        )
        half = stats.t.ppf(0.975, 2) * line.stderr
        found = [float(fit[name]) for name in ("beta", "ln_a", "ci_low", "ci_high", "r2")]
        expected = [line.slope, line.intercept, line.slope - half, line.slope + half, line.rvalue**2]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert (fit["n"], fit["status"], fit["method"]) == ("4", "ok", "ols")


def test_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, noise=0.005)
    assert main(["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    fits = {
        (row["optimizer"], row["bucket"], row["metric"], row["layer"]): row
        for row in rows_of(tmp_path / "out/fits.csv")
    }
    assert len(fits) == 2 * 4 * 2 * 4
    muon = fits["muon", "tail", "hard_rank", "median"]
    # the median of the last five windows of six is that of step 60, 60 % of the way from 0.7 to 0.9
    assert float(muon["beta"]) == pytest.approx(0.82, abs=0.01)
    assert float(muon["null_beta"]) == pytest.approx(0.7, abs=0.01)
    assert muon["status"] == "ok"
    assert len(rows_of(tmp_path / "out/points.csv")) == 2 * 4 * 4 * 2 * 4
    shown = capsys.readouterr().out
    assert "one width left out" in shown
    for text in (
        "untrained",
        "layers",
        "over widths (Student's t), not over seeds",
        "No state before the learning-rate decay",
    ):
        assert text in shown
    assert "layer_00" not in shown


def test_runs_and_what_was_measured_are_kept_by_conditions(tmp_path: Path) -> None:
    """Before, `--where` was taken and had no effect on run folders."""
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, noise=0.005)
    words = ["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    chosen = ["optimizer!=adamw", "width>128", "bucket=tail", "metric=hard_rank", "layer=median"]
    assert main([*words, *(word for text in chosen for word in ("--where", text))]) == 0
    (fit,) = rows_of(tmp_path / "out/fits.csv")
    assert [fit[name] for name in ("optimizer", "bucket", "metric", "n")] == ["muon", "tail", "hard_rank", "3"]
    assert float(fit["null_beta"]) == pytest.approx(0.7, abs=0.02)
    assert {row["width"] for row in rows_of(tmp_path / "out/points.csv")} == {"256", "512", "1024"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "optimizer=sgd"], "no run passes `--where optimizer=sgd`: `optimizer` is adamw, muon"),
        (["--where", "bucket=rare"], "no point passes `--where bucket=rare`: `bucket` is head, mid, pooled, tail"),
        (["--where", "optimiser=muon"], "there is no column `optimiser` (--where optimiser=muon); did you mean"),
        (["--by", "optimizer,bucket,metric", "--where", "layer=median"], "there is no column `layer`"),
        (["--x", "width"], "`--x` is for tables, and run folders were given"),
        (["--drop-duplicates"], "`--drop-duplicates` is for tables, and run folders were given"),
    ],
)
def test_an_option_that_nothing_can_be_done_with_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, widths=(128, 256, 512), noise=0.005)
    assert main(["fit", str(tmp_path / "runs"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "width,value,value\n1,2,3\n", "has the column `value` more than once"),
        ("t.csv", "", "`{path}` is empty"),
        ("t.csv", "\n", "`{path}` is empty"),
        ("t.csv", "width,value,caf\xe9\n1,2,3\n".encode("latin-1"), "`{path}` is not a text file in UTF-8"),
        ("t.xlsx", b"PK", "`{path}` is neither a run folder nor a .csv or .tsv table"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "compare", "report"])
def test_a_table_that_cannot_be_read_is_named(
    verb: str, name: str, content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([verb, str(path), "--out", str(tmp_path / "out")]) == 2
    assert message.replace("{path}", str(path)) in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "sign"), [(".csv", ";"), (".tsv", "\t")])
def test_tables_with_other_separators(points_csv: Path, suffix: str, sign: str, tmp_path: Path) -> None:
    path = tmp_path / f"other{suffix}"
    path.write_text(points_csv.read_text().replace(",", sign))
    for file, out in ((points_csv, "a"), (path, "b")):
        assert main(["fit", str(file), "--out", str(tmp_path / out)]) == 0
        assert main(["report", str(file), "--out", str(tmp_path / f"report_{out}")]) == 0
    for table in ("fits.csv", "points.csv"):
        assert (tmp_path / "a" / table).read_text() == (tmp_path / "b" / table).read_text()


def test_options_of_runs_are_refused_for_tables(points_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--last", "2"], ["--until-step", "10"], ["--ranks", "raw"], ["--metrics", "soft_rank"]):
        for verb in ("fit", "compare", "report"):
            assert main([verb, str(points_csv), *words]) == 2
            assert f"`{words[0]}` is for run folders, and tables were given" in capsys.readouterr().err


def test_by_without_layer_is_one_row_a_series(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, noise=0.005)
    by = "optimizer,bucket,metric"
    assert main(["fit", str(tmp_path / "runs"), "--by", by, "--out", str(tmp_path / "out")]) == 0
    assert len(rows_of(tmp_path / "out/fits.csv")) == 4 * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "there is nothing at `nowhere`"),
        (["nowhere.csv", "--x", "d"], "nowhere.csv"),
        (["."], "no run folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_all_refused_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, widths=(128, 256))
    assert main(["fit", str(tmp_path / "runs")]) == 1
    assert "refused:fewer_than_3_widths" in capsys.readouterr().out


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["fit", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_neither_torch_nor_lightning_is_imported(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.4}, widths=(128, 256, 512))
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'torchmetrics', 'litgpt'): sys.modules[name] = None\n"
        "from lightning_spectral.cli import main\n"
        f"runs, out = {str(tmp_path / 'runs')!r}, {str(tmp_path / 'out')!r}\n"
        "import lightning_spectral.report.page\n"
        "sys.exit(main(['fit', runs, '--out', out]) or main(['compare', runs, '--out', out]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_problems_of_a_kind_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    path.write_text("width,value\n" + "".join(f"{w},{w}\n" for w in (1, 2, 4)) + "8,?\n" * 40)
    assert main(["fit", str(path)]) == 0
    shown = capsys.readouterr().err
    assert shown.count("is not a number") == 6
    assert "34 more of this kind (skipped lines), 40 in all" in shown


def test_what_is_said_of_widths_is_said_of_the_column_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("params,loss\n" + "".join(f"{n}M,{n**-0.1}\n" for n in (70, 160, 410)))
    assert main(["fit", str(path), "--x", "params", "--y", "loss"]) == 0
    said = capsys.readouterr().out
    assert "the intervals are over values of `params` (Student's t), not over seeds" in said
    assert "Few values of `params`: 3." in said


def test_what_is_refused_is_said_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.csv").write_text("optimizer,width,value\na,64,1\na,128,2\n")
    (tmp_path / "negative.csv").write_text("optimizer,width,value\na,64,-1\na,128,2\na,256,3\n")
    said = {}
    for name in ("two", "negative"):
        assert main(["fit", str(tmp_path / f"{name}.csv")]) == 1
        said[name] = capsys.readouterr().err
    assert "REFUSED fewer_than_3_widths: a slope with an interval takes three widths or more" in said["two"]
    assert "REFUSED non_positive_values: a value or a width is zero or negative" in said["negative"]
    assert "--where 'value>0'" in said["negative"]
    assert main(["fit", str(tmp_path / "negative.csv"), "--where", "value>0"]) == 1
    assert "fewer_than_3_widths" in capsys.readouterr().err  # the remedy was taken
