from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_spectral.analysis.health import FLAG_TEXT, find_duplicates, flags_of, slope_bias
from lightning_spectral.analysis.points import Point, points_of_runs
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.study import fit_points
from lightning_spectral.records import SPECTRAL_FILE, append_records, read_run, read_spectral, write_run
from tests.analysis.synthetic import power_law_points, table, write_study

SOUND = [replace(p, num_tokens=1e6, rank=p.value, steps=(1, 2)) for p in power_law_points(0.5, noise=0.1)]


@pytest.mark.parametrize(
    ("flag", "points"),
    [
        ("few_tokens", [replace(p, num_tokens=10 * SOUND[-1].value) for p in SOUND]),
        ("few_sequences", [*SOUND[1:], replace(SOUND[0], num_sequences=0.9 * SOUND[0].value)]),
        ("mixed_windows", [*SOUND[1:], replace(SOUND[0], steps=(1,))]),
        ("mixed_conventions", [*SOUND[1:], replace(SOUND[0], conventions=("other",))]),
        ("repeated_rows", [*SOUND, SOUND[0]]),
        ("repeated_runs", [*SOUND, replace(SOUND[0], source="again")]),
        ("repeated_x", [replace(p, seed="", source="") for p in [*SOUND, replace(SOUND[0], value=9.1)]]),
        ("unbalanced_seeds", [*SOUND, replace(SOUND[0], seed="7", source="s7")]),
        ("missing_values", [*SOUND[1:], replace(SOUND[0], missing=2)]),
    ],
)
def test_each_flag(flag: str, points: list[Point]) -> None:
    assert flag in flags_of(points)
    assert flag in FLAG_TEXT
    assert flag not in flags_of(SOUND)


def test_sound_points_have_no_flag() -> None:
    assert flags_of(SOUND) == ()


def points_with_a_copy(ids: bool) -> list[Point]:
    points = [
        replace(p, series=(name, metric), source=f"{name}_{p.x:g}" if ids else "")
        for k, name in enumerate(("muon", "normuon"))
        for m, metric in enumerate(("soft", "hard"))
        for p in power_law_points(0.5 + k + m, a=1.0 + k + m / 10, noise=0.2)
    ]
    twin = {p.series[1]: p.value for p in points if p.series[0] == "normuon" and p.x == 768}
    return [replace(p, value=twin[p.series[1]]) if p.series[0] == "muon" and p.x == 1024 else p for p in points]


@pytest.mark.parametrize("ids", [True, False])
def test_a_copied_run_is_found_across_optimizers_and_widths(ids: bool) -> None:
    found = find_duplicates(table(points_with_a_copy(ids), ("optimizer", "metric")))
    (duplicate,) = found.found
    assert duplicate.num_equal == 2
    if ids:
        assert (duplicate.first, duplicate.second) == ("muon_1024", "normuon_768")
    else:
        assert (duplicate.first, duplicate.second) == ("optimizer=muon width=1024.0", "optimizer=normuon width=768.0")
    fitted = fit_points(table(points_with_a_copy(ids), ("optimizer", "metric")))
    assert {fit.status for fit in fitted.fits} == {"duplicate_values"}
    assert [problem.kind for problem in fitted.problems] == ["duplicate_values"]


def test_chance_is_no_copy() -> None:
    points = points_with_a_copy(ids=True)
    # one measurement of two equal: not a copy; equal short numbers: not a copy either
    half = [replace(p, value=1.25) if p.series == ("muon", "hard") and p.x == 1024 else p for p in points]
    assert not find_duplicates(table(half, ("optimizer", "metric"))).found
    short = [Point((name,), x, v, f"{name}{x}") for name, x, v in (("a", 1, 2.5), ("a", 2, 3.5), ("b", 1, 3.5))]
    assert not find_duplicates(table(short, ("name",))).found
    # soft = hard of one run is a flat spectrum, not a copy
    flat = [Point((metric,), x, math.pi * x, f"run{x}") for metric in ("soft", "hard") for x in (1, 2, 3)]
    assert not find_duplicates(table(flat, ("metric",))).found


def test_a_copied_run_folder_under_another_id(tmp_path: Path) -> None:
    muon, *_ = write_study(tmp_path, {"muon": 0.9, "adamw": 0.4}, widths=(128, 256, 512))
    info = read_run(muon)
    copy = tmp_path / "copy"
    write_run(copy, replace(info, run_id="copy", labels={"optimizer": "normuon"}))
    append_records(copy / SPECTRAL_FILE, [replace(r, run_id="copy") for r in read_spectral(muon).records])
    runs = load_runs([tmp_path])
    found = find_duplicates(points_of_runs(runs))
    assert [(d.first, d.second) for d in found.found] == [("muon_128_0", "copy")]


def test_untrained_twins_are_equal_by_right(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.4}, widths=(128, 256, 512), steps=(0,))
    assert not find_duplicates(points_of_runs(load_runs([tmp_path]))).found


def test_the_better_design_is_not_punished() -> None:
    """Rank ~ D: N = 20 D has no slope bias, N = 4,096 at all widths has -.024 (finite-sample simulation: -.024)."""
    widths = (128, 256, 512, 1024)

    def measured(rows: Callable[[float], float]) -> list[Point]:
        ranks = [0.12 * d * 2 for d in widths]
        return [
            Point((), float(d), r / (1 + r / rows(d)), str(d), num_tokens=rows(d), rank=r / (1 + r / rows(d)))
            for d, r in zip(widths, ranks, strict=True)
        ]

    assert slope_bias(measured(lambda d: 20.0 * d)) == pytest.approx(0.0, abs=1e-12)
    assert "few_tokens" not in flags_of(measured(lambda d: 20.0 * d))
    assert slope_bias(measured(lambda d: 4096.0)) == pytest.approx(-0.025, abs=0.004)
    assert "few_tokens" in flags_of(measured(lambda d: 4096.0))
    unbiased = [replace(p, raw=p.value) for p in measured(lambda d: 1350.0)]
    assert "few_tokens" not in flags_of(unbiased)
