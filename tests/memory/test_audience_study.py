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
    lines = table(runs)
    polar = next(line for line in lines if "| polar |" in line)
    cells = [cell.strip() for cell in polar.strip("|").split("|")]
    share = stats.t.interval(0.95, 2, 0.5, stats.sem([0.25, 0.5, 0.75]))
    assert cells[-3] == f"0.5 [{share[0]:.3g}, {share[1]:.3g}]"
    assert cells[-2].startswith("-0.5 ")  # momentum has twice the TAIL gain at the same HEAD gain
    assert polar.endswith("| 3 |")


def test_intervals_are_student_s():
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == f"{2.5:.3g} [{low:.3g}, {high:.3g}]"
    assert interval([1.5]) == "1.5"
    assert interval([]) == "-"


def test_the_command_reads_all_runs_below_a_folder(tmp_path, capsys):
    for name in ("a", "b", "previous"):
        (tmp_path / name).mkdir()
        rows = [*records(1.0, "polar"), *records(1.0, "momentum")]
        (tmp_path / name / "audience.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["memory", "audience", str(tmp_path)]) == 0
    assert "| a | 20 | mlp.proj | polar |" in capsys.readouterr().out
    assert (tmp_path / "audience.md").exists()
    (tmp_path / "empty").mkdir()
    assert main(["memory", "audience", str(tmp_path / "empty")]) == 2
    assert "audience.jsonl" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_is_one():
    path = Path(__file__).parents[2] / "recipes/memory/audience.yaml"
    assert load(str(path)) is not None
