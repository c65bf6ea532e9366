"""Runs that differ in nothing but the learning rate are set side by side on what they have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.learning_rates import learning_rate_sweeps, learning_rate_table
from lightning_spectral.analysis.points import points_of_runs
from lightning_spectral.analysis.reading import load_runs
from tests.analysis.synthetic import recipe, write_one


def write_sweep(root: Path) -> None:
    for width in (128, 256, 512, 1024):
        for seed in (0, 1):
            write_one(root, "AdamW", 0.3, width, seed, hparams=recipe(3e-3))
            write_one(root, "Muon", 0.9, width, seed, hparams=recipe(0.02, kind="muon"))
    for width in (128, 256, 1024):
        write_one(root, "AdamW lr x3", -0.2, width, hparams=recipe(9e-3))


def test_learning_rates_are_compared_where_all_of_them_were_run(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    runs = load_runs([tmp_path])
    (sweep,) = learning_rate_sweeps(runs)
    assert (sweep.name, sweep.widths, sweep.seeds) == ("AdamW", (128, 256, 1024), ("0",))
    assert [(point.rate, point.series) for point in sweep.points] == [(3e-3, ("AdamW",)), (9e-3, ("AdamW lr x3",))]
    table = points_of_runs(runs, last=1)
    fits = [point.fit(table.groups(), ("post", "tail", "hard_rank", "median")) for point in sweep.points]
    # seed 0 at 3 widths only, by hand
    values = {
        point.x: point.value
        for point in table.points
        if point.series == ("AdamW", "post", "tail", "hard_rank", "median") and point.seed == "0"
    }
    slope = np.polyfit(np.log([128, 256, 1024]), np.log([values[x] for x in (128, 256, 1024)]), 1)[0]
    assert fits[0] is not None
    assert fits[0].beta == pytest.approx(slope, rel=1e-9)
    assert fits[0].n == 3
    header, rows = learning_rate_table([sweep], table)
    assert len(rows) == 2 * 4 * 2
    assert all(len(row) == len(header) for row in rows)
    losses = sweep.points[0].loss(128)
    assert losses == pytest.approx(next(run for run in runs.runs if run.run_id == "AdamW_128_0").losses[-4].loss)


@pytest.mark.parametrize("change", ["other architecture", "no recipe", "no common width"])
def test_what_is_no_learning_rate_sweep(tmp_path: Path, change: str) -> None:
    other = {"other architecture": {**recipe(9e-3), "architecture": {"activation": "gelu"}}, "no recipe": {}}
    for width in (128, 256):
        write_one(tmp_path, "AdamW", 0.3, width, hparams=recipe(3e-3))
        wide = width * 4 if change == "no common width" else width
        write_one(tmp_path, "AdamW lr x3", 0.3, wide, hparams=other.get(change, recipe(9e-3)))
    assert learning_rate_sweeps(load_runs([tmp_path])) == []
    assert learning_rate_table([], points_of_runs(load_runs([tmp_path])))[1] == []
