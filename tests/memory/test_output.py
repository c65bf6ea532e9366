"""Results are never overwritten, survive interruptions, are continued and drawn again."""

import json

import pytest

from lightning_spectral.cli import main
from lightning_spectral.memory import output
from lightning_spectral.memory.fit import read_results
from lightning_spectral.memory.plan import Progress, Task, duration

ONE_STEP = ["one-step", "--d", "16", "24", "--n-items", "300", "--seeds", "2", "--rules", "sgd", "muon", "--no-figures"]


def memory(*arguments, out=None):
    return main(["memory", *arguments, *(["--out", str(out)] if out else []), *(["--device", "cpu"] if out else [])])


def outcome(rows):
    volatile = ("seconds", "update_spectrum")
    return [{key: value for key, value in row.items() if key not in volatile} for row in rows]


def test_a_second_command_moves_the_first_one_s_results(tmp_path, capsys):
    assert memory(*ONE_STEP, out=tmp_path) == 0
    first = (tmp_path / "results.jsonl").read_text()
    assert memory("theory", "--d", "32", "--n-items", "300", "--rules", "muon", out=tmp_path) == 0
    assert (tmp_path / "previous/001/results.jsonl").read_text() == first
    assert "previous/001" in capsys.readouterr().out
    assert memory("theory", "--d", "48", "--n-items", "300", "--rules", "muon", out=tmp_path) == 0
    assert {path.name for path in (tmp_path / "previous").iterdir()} == {"001", "002"}
    assert [row["kind"] for row in read_results(tmp_path)] == ["theory"]


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 7])
def test_resume_runs_exactly_what_is_missing(tmp_path, kept, monkeypatch):
    assert memory(*ONE_STEP, out=tmp_path / "whole") == 0
    whole = read_results(tmp_path / "whole")
    assert memory(*ONE_STEP, out=tmp_path / "cut") == 0
    lines = (tmp_path / "cut/results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/results.jsonl").write_text("".join(lines[:kept]))
    made = []
    written = output.write_rows
    monkeypatch.setattr(output, "write_rows", lambda folder, rows: written(folder, (made.append(1) or r for r in rows)))
    assert memory(*ONE_STEP, "--resume", out=tmp_path / "cut") == 0
    assert len(made) == 8 - kept // 2 * 2  # two rules a problem: one that was cut in the middle is made again
    assert outcome(read_results(tmp_path / "cut")) == outcome(whole)
    assert not (tmp_path / "cut/previous").exists()


def test_resume_adds_seeds(tmp_path):
    assert memory(*ONE_STEP, out=tmp_path) == 0
    assert memory(*ONE_STEP, "--seeds", "3", "--resume", out=tmp_path) == 0
    assert sorted(row["seed"] for row in read_results(tmp_path)) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_half_written_line_is_made_again(tmp_path):
    assert memory(*ONE_STEP, out=tmp_path) == 0
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[:-200])
    with pytest.warns(UserWarning, match="broken"):
        assert memory(*ONE_STEP, "--resume", out=tmp_path) == 0
    assert len(read_results(tmp_path)) == 8


def test_an_interrupted_command_keeps_rows_and_tables(tmp_path, monkeypatch, capsys):
    from lightning_spectral.memory import runs

    real, calls = runs.OneStep, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(runs, "OneStep", interrupted)
    assert memory(*ONE_STEP, out=tmp_path) == 130
    assert len(read_results(tmp_path)) == 4
    assert (tmp_path / "results.csv").exists()
    assert "--resume" in capsys.readouterr().out


def test_report_draws_what_is_there(tmp_path, capsys):
    assert memory(*ONE_STEP, out=tmp_path) == 0
    for path in tmp_path.glob("results.csv"):
        path.unlink()
    rows = (tmp_path / "results.jsonl").read_text()
    capsys.readouterr()
    assert memory("report", str(tmp_path)) == 0
    assert (tmp_path / "count_vs_d.png").exists()
    assert (tmp_path / "verdicts.md").exists()
    assert (tmp_path / "results.jsonl").read_text() == rows
    assert "muon" in capsys.readouterr().out


def test_report_names_a_folder_without_results(tmp_path, capsys):
    assert memory("report", str(tmp_path)) == 2
    assert "results.jsonl" in capsys.readouterr().err


def test_one_impossible_run_is_a_row_and_the_others_go_on(tmp_path, capsys):
    arguments = ["batch", "--d", "16", "--n-items", "300", "--seeds", "1", "--rules", "newton", "muon", "--no-figures"]
    assert memory(*arguments, "--batch-size", "8", "population", out=tmp_path) == 0
    rows = {(row["rule"], row["batch_size"]): row for row in read_results(tmp_path)}
    assert rows["newton", 8]["status"] == "singular"
    assert rows["newton", 8]["count"] is None
    assert "ridge" in rows["newton", 8]["reason"]
    assert rows["newton", None]["count"] > 0
    assert rows["muon", 8]["count"] > 0
    assert "could not be made" in capsys.readouterr().out


def test_flat_frequencies_are_sampled_where_they_are_allowed(tmp_path):
    arguments = ["batch", "--alpha", "0.9", "--allow-flat", "--d", "16", "--n-items", "300", "--seeds", "1"]
    assert memory(*arguments, "--batch-size", "8", "--rules", "muon", "--no-figures", out=tmp_path) == 0
    row = read_results(tmp_path)[0]
    assert 7 < row["expected_distinct"] < 8
    assert row["asymptotic_exponent"] is None


def test_deflation_rows_predict_their_own_draws(tmp_path):
    arguments = ["steps", "--d", "128", "--n-items", "4000", "--steps", "2", "--seeds", "2", "--rules", "muon"]
    assert memory(*arguments, "--batch-size", "256", "--no-figures", out=tmp_path) == 0
    rows = read_results(tmp_path)
    for row in rows:
        assert row["count"] == pytest.approx(row["predicted_count"], rel=0.06)
        assert row["asymptotic_exponent"] is None
        assert row["prediction_trusted"] is True
    assert len({row["predicted_count"] for row in rows}) == 4  # each seed its own


def test_theory_says_why_it_has_no_prediction(tmp_path, capsys):
    assert memory("theory", "--d", "32", "--n-items", "300", "--rules", "sign", "muon", out=tmp_path) == 0
    text = capsys.readouterr().out
    assert "no formula for sign" in text
    assert "d=32 is below 128" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["theory", "--d", "4096", "--alpha", "60", "--n-items", "30000", "--rules", "muon"], "`--alpha`"),
        (["theory", "--d", "32", "32"], "`--d`"),
        (
            ["steps", "--mode", "exact", "--step-scale", "1e30", "--d", "16", "--n-items", "99", "--seeds", "1"],
            "--step-scale",
        ),
    ],
)
def test_errors_name_field_and_value(arguments, named, tmp_path, capsys):
    assert memory(*arguments, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


@pytest.mark.parametrize("value", ["1.5", "pop"])
def test_the_parser_says_what_it_got(value, tmp_path, capsys):
    assert memory("one-step", "--batch-size", value, out=tmp_path) == 2
    assert f"`--batch-size` must be a whole number or `population`, got '{value}'" in capsys.readouterr().err


def test_progress_names_the_run_and_estimates_the_rest(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("lightning_spectral.memory.plan.time.perf_counter", lambda: clock[0])
    lines = []
    tasks = [Task(f"run {k}", frozenset({str(k)}), 1, 10.0 * 3**k, lambda: iter([])) for k in range(3)]
    progress = Progress(tasks, lines.append)
    progress.begin(0)
    clock[0] = 60.0
    progress.end(0)
    progress.begin(1)
    assert "run 1 of 3" in lines[0]
    assert "run 2 of 3: run 1; 60 s so far, about 12 min to go" in lines[1]  # 12 times the cost of the first minute
    clock[0] = 61.0
    progress.begin(2)
    assert len(lines) == 2  # a line every half minute where no terminal is


def test_durations():
    assert [duration(s) for s in (5, 200, 9000)] == ["5 s", "3 min", "2.5 h"]


def test_fields_are_listed(capsys):
    assert memory("fields") == 0
    assert "predicted_count" in capsys.readouterr().out


def test_rows_hold_json_only(tmp_path):
    assert output.finite({"a": float("nan"), "b": (1, float("inf"))}) == {"a": None, "b": [1, None]}
    output.write_rows(tmp_path, [{"kind": "x", "value": float("nan")}])
    assert json.loads((tmp_path / "results.jsonl").read_text()) == {"kind": "x", "value": None}
