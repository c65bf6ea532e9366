from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.points import default_by, points_of_runs
from lightning_spectral.analysis.reading import Choice, load_runs
from lightning_spectral.analysis.recipe_facts import is_whole
from lightning_spectral.analysis.trajectory import beta_trajectories, trailing_median
from lightning_spectral.records import (
    RUN_FILE,
    SPECTRAL_FILE,
    SpectralRecord,
    append_records,
    read_run,
    read_spectral,
    write_run,
)
from tests.analysis.synthetic import recipe, write_one, write_study


def test_point_is_median_of_windows_then_of_layers(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256, layers=3, noise=0.3)
    records = [r for r in read_spectral(folder).records if r.bucket == "tail"]
    by_layer = {k: [r.hard_rank for r in records if r.layer == k][-5:] for k in range(3)}
    medians = [float(np.median(by_layer[k])) for k in range(3)]
    table = points_of_runs(load_runs([tmp_path]), by=["optimizer", "bucket", "metric"], metrics=["hard_rank"])
    (point,) = [p for p in table.points if p.series == ("muon", "tail", "hard_rank")]
    assert point.value == pytest.approx(float(np.median(medians)), rel=1e-12)
    assert point.spread == pytest.approx(float(np.std(medians, ddof=1)), rel=1e-12)
    assert point.layers == pytest.approx(medians)
    assert point.steps == (20, 40, 60, 80, 100)
    early = points_of_runs(load_runs([tmp_path]), metrics=["hard_rank"], last=1, until_step=59)
    assert {p.steps for p in early.points} == {(40,)}


def test_layers_are_series_of_their_own(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 256, layers=2, sites=("pre", "post"))
    runs = load_runs([tmp_path])
    assert default_by(runs) == ("optimizer", "site", "bucket", "metric", "layer")
    table = points_of_runs(runs)
    assert {p.series[-1] for p in table.points} == {"median", "layer_00", "layer_01"}
    assert {p.series[1] for p in table.points} == {"pre", "post"}
    assert len(table.points) == 2 * 4 * 2 * 3
    # without `site` in `by`, the paper's site
    assert len(points_of_runs(runs, by=["bucket", "metric"]).points) == 4 * 2


def test_labels_that_differ_become_columns_but_width_and_seed_do_not(tmp_path: Path) -> None:
    for width in (128, 256):
        for heads in ("6", "12"):
            write_one(tmp_path, "muon", 0.9, width, labels={"heads": heads, "ffn_multiplier": str(width // 128)})
    assert load_runs([tmp_path]).series_labels == ("heads",)


def test_a_label_that_only_renames_the_width_is_no_column(tmp_path: Path) -> None:
    for width in (128, 256, 512):
        write_one(tmp_path, "muon", 0.9, width, labels={"size": f"w{width}"})
    assert load_runs([tmp_path]).series_labels == ()


def test_unknown_column_metric_and_last(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 256)
    runs = load_runs([tmp_path])
    with pytest.raises(ValueError, match="no column `color`"):
        points_of_runs(runs, by=["color", "metric"])
    with pytest.raises(ValueError, match="unknown metric `rank`"):
        points_of_runs(runs, metrics=["rank"])
    with pytest.raises(ValueError, match="`last` must be >= 1, got 0"):
        points_of_runs(runs, last=0)
    with pytest.raises(ValueError, match="needs one metric"):
        points_of_runs(runs, by=["optimizer"])


def test_every_bad_folder_is_named_and_the_good_ones_are_read(tmp_path: Path) -> None:
    good = write_study(tmp_path, {"muon": 0.9}, widths=(128, 256))
    (tmp_path / "no_records").mkdir()
    shutil.copy(good[0] / RUN_FILE, tmp_path / "no_records" / RUN_FILE)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / RUN_FILE).write_text("{half a des")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / RUN_FILE).write_text(json.dumps({"schema_version": 99}))
    shutil.copytree(good[0], tmp_path / "z_copy")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_run(empty, replace(read_run(good[0]), run_id="empty"))
    (empty / SPECTRAL_FILE).write_text("")
    mixed = write_one(tmp_path, "adamw", 0.5, 512)
    append_records(mixed / SPECTRAL_FILE, [replace(read_spectral(mixed).records[0], width=640, layer=9)])
    torn = write_one(tmp_path, "dion", 0.5, 512)
    (torn / SPECTRAL_FILE).write_bytes((torn / SPECTRAL_FILE).read_bytes()[:-30])
    foreign = write_one(tmp_path, "lion", 0.5, 512)
    append_records(foreign / SPECTRAL_FILE, [replace(read_spectral(foreign).records[0], run_id="other")])
    found = load_runs([tmp_path])
    assert {run.run_id for run in found.runs} == {"muon_128_0", "muon_256_0", "dion_512_0", "lion_512_0"}
    kinds = {(Path(problem.source).name, problem.kind, problem.refused) for problem in found.problems}
    assert kinds == {
        ("no_records", "unreadable", True),
        ("garbage", "unreadable", True),
        ("newer", "unreadable", True),
        ("z_copy", "repeated_run_id", True),
        ("empty", "no_records", True),
        ("adamw_512_0", "mixed_widths", True),
        ("dion_512_0", "skipped_lines", False),
        ("lion_512_0", "foreign_records", False),
    }


def test_stages_do_not_mix(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 128)
    append_records(
        folder / SPECTRAL_FILE,
        [replace(r, stage="validation", hard_rank=1.0) for r in read_spectral(folder).records],
    )
    runs = load_runs([tmp_path])
    assert [problem.kind for problem in runs.problems] == ["several_stages"]
    assert (runs.runs[0].cube("hard_rank") > 1).all()
    assert (load_runs([tmp_path], stage="validation").runs[0].cube("hard_rank") == 1).all()


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder"):
        load_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_runs([tmp_path / "nothing"])


def test_trailing_median_waits_for_nobody() -> None:
    values = np.array([[5.0], [1.0], [9.0], [2.0]])
    assert trailing_median(values, 3).ravel().tolist() == [5.0, 3.0, 5.0, 2.0]


def test_beta_of_t_starts_at_the_null_and_ends_at_the_truth(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.95, "adamw": 0.3}, noise=0.0, seeds=(0, 1))
    paths = {p.series: p for p in beta_trajectories(load_runs([tmp_path]), smoothing=1, metrics=["hard_rank"])}
    path = paths["muon", "post", "tail", "hard_rank"]
    assert path.steps.tolist() == [0, 20, 40, 60, 80, 100]
    assert path.null == (pytest.approx(0.7), 0)
    np.testing.assert_allclose(path.beta, 0.7 + 0.25 * path.steps / 100, rtol=1e-9)
    assert (path.num_widths, path.num_seeds) == (4, 2)
    assert paths["adamw", "post", "tail", "hard_rank"].beta[-1] == pytest.approx(0.3)


def test_a_folder_without_its_run_file_is_named_and_earlier_runs_are_left_alone(tmp_path: Path) -> None:
    folders = write_study(tmp_path, {"muon": 0.9}, (128, 256))
    (folders[0] / "run.json").unlink()
    earlier = folders[1] / "previous" / "001"
    earlier.mkdir(parents=True)
    for name in ("run.json", "spectral.jsonl"):
        (earlier / name).write_bytes((folders[1] / name).read_bytes().replace(b"muon_256_0", b"an_old_run"))
    found = load_runs([tmp_path])
    assert [run.run_id for run in found.runs] == ["muon_256_0"]
    (problem,) = found.problems
    assert problem.refused
    assert f"`{folders[0]}` was left out: it has records, but no `run.json`" in problem.message
    assert [run.run_id for run in load_runs([earlier]).runs] == ["an_old_run"]


def rewrite(folder: Path, change: Callable[[SpectralRecord], SpectralRecord | list[SpectralRecord]]) -> None:
    """Replace every record by one or more others."""
    found = read_spectral(folder).records
    (folder / SPECTRAL_FILE).unlink()
    changed = [change(record) for record in found]
    append_records(folder / SPECTRAL_FILE, [r for own in changed for r in (own if isinstance(own, list) else [own])])


def test_stacks_are_told_apart_or_refused(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256)
    rewrite(
        folder,
        lambda r: [
            replace(r, stack="model.encoder.layers"),
            replace(r, stack="model.decoder.layers", hard_rank=7.0),
        ],
    )
    refused = load_runs([tmp_path])
    assert not refused.runs
    assert (
        "`model.decoder.layers`, `model.encoder.layers`; choose one of them with --stack" in refused.problems[0].message
    )
    (run,) = load_runs([tmp_path], choice=Choice(stack="decoder")).runs
    assert np.unique(run.cube("hard_rank")).tolist() == [7.0]
    assert not load_runs([tmp_path], choice=Choice(stack="nobody")).runs


def test_dataloaders_and_repeated_evaluations_are_told_apart(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256)
    rewrite(
        folder,
        lambda r: [
            replace(r, loader=loader, ordinal=ordinal, hard_rank=10.0 * loader + ordinal + 1)
            for loader in (0, 1)
            for ordinal in (0, 1)
        ],
    )
    first = load_runs([tmp_path])
    assert np.unique(first.runs[0].cube("hard_rank")).tolist() == [1.0]
    assert "records of the dataloaders [0, 1]; 0 is used. Choose with --loader." in first.problems[0].message
    second = load_runs([tmp_path], choice=Choice(loader=1))
    assert np.unique(second.runs[0].cube("hard_rank")).tolist() == [11.0]


def test_records_without_a_number_are_lost_windows(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256)

    def lose(record: SpectralRecord) -> SpectralRecord:
        if record.step != 40:
            return record
        return replace(record, status="no_forward", width=0, hard_rank=None, soft_rank=None)

    rewrite(folder, lose)
    runs = load_runs([tmp_path])
    assert runs.runs[0].width == 256
    assert runs.runs[0].steps.tolist() == [0, 20, 60, 80, 100]
    assert "12 record(s) without a number (no_forward); 1 window(s) lost" in runs.problems[0].message


def test_an_unknown_step_is_nobodys_untrained_network(tmp_path: Path) -> None:
    for width in (128, 256, 512):
        rewrite(write_one(tmp_path, "muon", 0.9, width, steps=(0,)), lambda r: replace(r, step=None, stage="measure"))
    runs = load_runs([tmp_path])
    assert runs.runs[0].steps.tolist() == [-1]
    (path, *_) = beta_trajectories(runs)
    assert path.null is None


def test_a_run_says_itself_whether_it_is_whole(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256, steps=(0, 40, 99), hparams=recipe())
    (run,) = load_runs([tmp_path]).runs
    assert is_whole(run)  # the window of the hundredth step has 99 steps behind it
    write_run(folder, replace(read_run(folder), finished=False))
    assert is_whole(load_runs([tmp_path]).runs[0]) is False
    write_run(folder, replace(read_run(folder), finished=None, hparams={}))
    assert is_whole(load_runs([tmp_path]).runs[0]) is None


def test_ranks_across_sequences_are_fitted_where_all_runs_have_them(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256)
    one = {"jackknife_groups": "4"}
    rewrite(
        folder,
        lambda r: replace(
            r,
            hard_rank=50.0,
            hard_rank_ci_low=40.0,
            hard_rank_ci_high=62.5,
            extra={"hard_rank_across_sequences": 60.0},
            conventions=one,
        ),
    )
    (point, *_) = points_of_runs(load_runs([tmp_path]), metrics=["hard_rank"]).points
    assert (point.value, point.raw) == (60.0, 50.0)
    # ln(62.5 / 50) over t(3), and the median of five windows
    assert point.error == pytest.approx(np.log(1.25) / 3.18245 * 1.2533 / np.sqrt(5), rel=1e-4)
    (plain, *_) = points_of_runs(load_runs([tmp_path]), metrics=["hard_rank"], ranks="raw").points
    assert plain.value == 50.0
    assert np.isnan(plain.raw)
    write_one(tmp_path, "muon", 0.9, 128)  # has none
    assert points_of_runs(load_runs([tmp_path]), metrics=["hard_rank"]).points[-1].value == 50.0


def test_layers_that_took_turns_have_each_as_many_windows_and_miss_nothing(tmp_path: Path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 256, layers=5, noise=0.3)
    records = read_spectral(folder).records
    steps = sorted({r.step for r in records if r.step is not None})
    nothing = {
        "status": "not_in_turn",
        "num_tokens": 0,
        "soft_rank": None,
        "hard_rank": None,
        "hard_rank_debiased": None,
    }
    mine = [r.layer % 3 == steps.index(r.step or 0) % 3 for r in records]
    turned = [r if own else replace(r, **nothing) for r, own in zip(records, mine, strict=True)]
    (folder / SPECTRAL_FILE).unlink()
    append_records(folder / SPECTRAL_FILE, turned)
    runs = load_runs([tmp_path])
    assert not runs.problems
    assert runs.runs[0].turns == 3
    table = points_of_runs(runs, by=["bucket", "metric"], metrics=["hard_rank"], last=1, ranks="raw")
    (point,) = [p for p in table.points if p.series[0] == "tail"]
    last = {r.layer: r.hard_rank for r in turned if r.bucket == "tail" and r.hard_rank is not None}  # later ones win
    assert point.layers == pytest.approx([last[layer] for layer in range(5)])
    assert (point.steps, point.missing) == (tuple(steps[-3:]), 0)
