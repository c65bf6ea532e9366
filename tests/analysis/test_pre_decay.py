"""The state before the learning rate decays stands beside the final one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_spectral.analysis.caveats import caveats_of, decay_sentences
from lightning_spectral.analysis.health import flags_of
from lightning_spectral.analysis.points import default_by, points_of_runs, pre_decay
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.runs import RunSet
from lightning_spectral.analysis.study import Fitted, comparisons_of, finished_only, fit_points
from tests.analysis.synthetic import recipe, write_one, write_study

TAIL = ("post", "tail", "hard_rank", "median")


def fitted_of(root: Path, last: int = 1) -> tuple[Fitted, RunSet]:
    runs = load_runs([root])
    table = points_of_runs(runs, last=last)
    before = points_of_runs(runs, by=default_by(runs), last=last, until_step=pre_decay(runs))
    return fit_points(table, before=before), runs


def test_both_states_and_the_change_between_them(tmp_path: Path) -> None:
    # beta goes from 0.7 to its end on a straight line: at step 80 of 100 it is 0.7 + 0.8 (end - 0.7)
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.2}, seeds=(0, 1, 2), noise=1e-3, recipes=True)
    fitted, runs = fitted_of(tmp_path)
    fits = {fit.series: fit for fit in fitted.fits}
    adamw = fits[("adamw", *TAIL)]
    assert adamw.beta == pytest.approx(0.2, abs=0.01)
    assert adamw.before_beta == pytest.approx(0.3, abs=0.01)
    assert adamw.before_low < adamw.before_beta < adamw.before_high
    assert adamw.before_step == 80
    assert adamw.layer_low <= adamw.beta <= adamw.layer_high
    found = {(c.kind, c.a, c.b): c for c in comparisons_of(fitted) if tuple(c.where.values())[-4:] == TAIL}
    changes = [c for c in comparisons_of(fitted) if c.kind == "decay_change" and c.where.get("bucket") == "tail"]
    change = next(
        c
        for c in changes
        if c.where == {"optimizer": "adamw", **dict(zip(("site", "bucket", "metric", "layer"), TAIL, strict=True))}
    )
    assert change.estimate == pytest.approx(-0.1, abs=0.01)
    assert change.separated
    assert found["slope_difference", "adamw", "muon"].estimate == pytest.approx(-0.7, abs=0.01)
    assert found["slope_difference_pre_decay", "adamw", "muon"].estimate == pytest.approx(-0.56, abs=0.01)
    assert found["slope_difference", "adamw", "muon"].method == "mixed_of_ln_ratio"
    (_, sentence) = decay_sentences(fitted)
    assert sentence.startswith("muon: before decay beta 0.86 [")
    assert "(step 80), after 0.90 [" in sentence
    assert any(sentence in text for text in caveats_of(fitted, runs))


def test_where_there_is_no_state_before(tmp_path: Path) -> None:
    write_one(tmp_path / "a", "muon", 0.9, 128, steps=(0, 100), hparams=recipe())  # untrained is not "before"
    write_one(tmp_path / "b", "muon", 0.9, 128, steps=(0, 20, 40), hparams=recipe())  # stopped before the decay
    write_one(tmp_path / "c", "muon", 0.9, 128, steps=(0, 40, 100))  # no recipe
    write_one(tmp_path / "c", "muon", 0.9, 256, steps=(0, 40, 100))
    write_one(tmp_path / "d", "muon", 0.9, 128, steps=(0, 40, 100))  # one run has no slope that a decay could change
    for name in "abcd":
        assert pre_decay(load_runs([tmp_path / name])) == {}
    said = {name: " ".join(caveats_of(*fitted_of(tmp_path / name))) for name in "abcd"}
    assert "no window lies before it" in said["a"]
    assert "All windows lie before the learning-rate decay (step 80)" in said["b"]
    assert "Not finished: muon_128_0 (last window at step 40 of 100)" in said["b"]
    assert "no run records a schedule" in said["c"]
    assert "no run records a schedule" not in said["d"]


def test_a_checkpoint_of_unknown_step_has_no_state_before_a_decay(tmp_path: Path) -> None:
    for width in (128, 256, 512):
        write_one(tmp_path, "muon", 0.9, width, steps=(5,))
    for file in tmp_path.rglob("spectral.jsonl"):
        text = file.read_text()
        assert '"step": 5' in text
        file.write_text(text.replace('"step": 5', '"step": null'))
    fitted, runs = fitted_of(tmp_path)
    assert len(runs.runs) == 3
    assert decay_sentences(fitted) == []
    assert all(math.isnan(fit.before_beta) for fit in fitted.fits)


def test_windows_that_mix_states_are_flagged(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9}, (128, 256, 512), recipes=True)
    runs = load_runs([tmp_path])

    def flags(last: int) -> tuple[str, ...]:
        return flags_of([p for p in points_of_runs(runs, last=last).points if p.series == ("muon", *TAIL)])

    assert flags(1) == ()
    assert flags(2) == ("across_decay",)
    assert flags(6) == ("untrained_window", "across_decay")


def test_runs_on_their_way_are_left_out_where_others_have_arrived(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9}, (128, 256), recipes=True)
    write_one(tmp_path, "muon", 0.9, 512, steps=(0, 40), hparams=recipe(kind="muon"))
    write_one(tmp_path, "muon", 0.9, 1024, steps=(0, 40))  # says not how long it is
    runs = finished_only(load_runs([tmp_path]))
    assert [run.width for run in runs.runs] == [128, 256, 1024]
    (problem,) = runs.problems
    assert "`muon_512_0` was left out: its last window is at step 40 of 100" in problem.message
    alone = load_runs([tmp_path / "muon_512_0"])
    assert finished_only(alone) == alone
