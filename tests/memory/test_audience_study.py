"""Records over runs: means, t intervals, and the rare tokens' share against raw momentum's."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_spectral.cli import main
from lightning_spectral.memory.audience_study import interval, table
from lightning_spectral.training.recipe import load


def records(tail, rule):
    return [
        {"run_id": "r", "step": 20, "kind": "mlp.proj", "rule": rule, "bucket": bucket, "gain": gain, "loss": 5.0,
         "num_tokens": 9, "num_matrices": 1, "held_out": True}
        for bucket, gain in (("head", 2.0), ("mid", 1.0), ("tail", tail))
    ]  # fmt: skip


def test_the_table_compares_with_raw_momentum():
    runs = [("Muon", [*records(tail, "polar"), *records(2 * tail, "momentum")]) for tail in (0.5, 1.0, 1.5)]
    made = table(runs)
    place = next(number for number, row in enumerate(made.rows) if row[3] == "polar")
    *_, per_head, excess, number = made.rows[place]
    low, high = stats.t.interval(0.95, 2, 0.5, stats.sem([0.25, 0.5, 0.75]))
    assert per_head == pytest.approx([0.5, low, high])
    assert made.cells()[place][-3] == f"0.5 [{low:.3g}, {high:.3g}]"
    assert excess[0] == pytest.approx(-0.5)  # momentum has twice the TAIL gain at the same HEAD gain
    assert number == 3


def test_intervals_are_student_s():
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx([2.5, low, high])
    assert interval([1.5]) == [1.5]
    assert interval([]) is None


def test_the_command_reads_all_runs_below_a_folder(tmp_path, capsys):
    for name in ("a", "b", "previous"):
        (tmp_path / name).mkdir()
        rows = [*records(1.0, "polar"), *records(1.0, "momentum")]
        (tmp_path / name / "audience.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["memory", "audience", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["memory", "audience", str(tmp_path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["optimizer"], row["rule"]) for row in rows} == {(n, r) for n in "ab" for r in ("polar", "momentum")}
    assert rows[0]["tail"] == [1.0]
    assert "| a | 20 | mlp.proj | polar |" in (tmp_path / "audience.md").read_text()
    (tmp_path / "empty").mkdir()
    assert main(["memory", "audience", str(tmp_path / "empty")]) == 2
    assert "audience.jsonl" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_is_one():
    path = Path(__file__).parents[2] / "recipes/memory/audience.yaml"
    assert load(str(path)) is not None
