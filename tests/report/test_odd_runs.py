"""Reports of what is not as usual: runs without numbers, one window, very large ones, very long names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_spectral.analysis.caveats import caveats_of
from lightning_spectral.cli import main
from lightning_spectral.report.figures import draw_all
from lightning_spectral.report.page import prose, warnings_of
from lightning_spectral.report.style import round_ticks, short_count, short_labels, shown_name
from tests.analysis.synthetic import let_diverge, write_one, write_study
from tests.report.test_page import scene_of

LONG = "my_experiment_with_lr_0.003_and_wd_0.01_and_warmup_2000_on_fineweb_edu_10B_seed_"


@pytest.mark.parametrize("first_bad", [0, 60])
def test_a_diverged_run_has_a_page(tmp_path: Path, first_bad: int) -> None:
    let_diverge(write_one(tmp_path / "runs", "muon", 0.9, 128), first_bad)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "it diverged, from step" in page
    assert ("No window of muon_128_0 has a rank (status: nonfinite)" in page) == (first_bad == 0)
    assert "sampling bias is below" not in page  # nothing is known of it


def test_one_window_has_no_steps_between_steps(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 128, steps=(0,))
    ranks, _, losses, *_ = _figure(tmp_path, "one_run").axes
    for ax in (ranks, losses):
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [0]


def test_a_large_run_is_a_small_page_without_powers_of_ten(tmp_path: Path) -> None:
    write_one(tmp_path / "runs", "adamw", 0.9, 16384, layers=48, steps=range(0, 120_000, 2000))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(page) < 1_500_000
    (finding,) = re.findall(r'<p class="finding">(hard rank of[^<]*)', page)
    assert "e+" not in finding
    assert "120k" in page


def test_series_with_long_names_differ_and_fit_their_figures(tmp_path: Path) -> None:
    for seed in range(12):
        write_one(tmp_path, "muon" if seed % 2 else "adamw", 0.5, 128, seed, labels={"exp": f"{LONG}{seed}"})
    scene = scene_of(tmp_path)
    names = [look.name for look in scene.looks.values()]
    assert len(set(names)) == 12
    assert max(map(len, names)) <= 20
    figures = draw_all(scene)
    for key in ("bucket_grid", "rank_curves", "phase_map", "scaling_laws"):
        figure = figures[key].figure
        assert figure is not None
        renderer = FigureCanvasAgg(figure).get_renderer()
        texts = [text for ax in figure.axes for text in (ax.title, ax._left_title, *ax.texts) if text.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        assert min(box.x0 for box in boxes) >= 0, key
        assert max(box.x1 for box in boxes) <= figure.bbox.width, key
        titles = [ax._left_title.get_window_extent(renderer) for ax in figure.axes if ax._left_title.get_text()]
        assert not any(a.overlaps(b) for k, a in enumerate(titles) for b in titles[:k]), key
    assert sum("has no run at" in warning for warning in warnings_of(scene)) == 3
    assert any("9 more series lack runs" in warning for warning in warnings_of(scene))


def test_which_series_has_few_widths(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9}, (64, 128, 256, 512))
    write_study(tmp_path, {"adamw": 0.9}, (64, 128, 256))
    scene = scene_of(tmp_path)
    few = [text for text in caveats_of(scene.fitted, scene.runs) if text.startswith("Few widths")]
    assert few == ["Few widths: 3 (adamw). An interval over so few says little."]


def test_one_run_is_not_warned_of_a_decay_that_has_no_slope_to_change(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 128)
    assert not any("decay" in text for text in warnings_of(scene_of(tmp_path)))


def test_no_reason_is_a_status_word(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, (64, 128))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    lead = re.findall(r'<p class="lead">([^<]*)', page)[0]
    assert lead == "No exponent of TAIL hard rank could be fitted: fewer than 3 widths."
    text = re.sub(r"<(style|details|svg).*?</\1>|<[^>]+>", "", page, flags=re.DOTALL)
    assert "`" not in text


def test_prose() -> None:
    assert prose("set `x<y` to 2 % & go") == "set <code>x&lt;y</code> to 2\u00a0% &amp; go"


def test_labels() -> None:
    assert short_labels(["lr x3", ""]) == ["lr x3", ""]
    assert short_labels([LONG + "0", LONG + "1"]) == ["seed 0", "seed 1"]
    assert short_labels([LONG + "0"]) == [LONG + "0"]
    assert short_labels([LONG + "0", "another one"]) == [LONG + "0", "another one"]
    assert shown_name("a" * 30 + "b" * 30, 21) == "a" * 10 + "\u2026" + "b" * 10
    assert [short_count(n) for n in (0, 59, 9999)] == ["0", "59", "9999"]
    assert [short_count(n) for n in (10_000, 150_000, 2_500_000)] == ["10k", "150k", "2.5M"]


@pytest.mark.parametrize(("low", "high"), [(0.935, 1.29), (8.6, 29), (210, 320), (1e-3, 2e-3), (1.0, 1.01)])
def test_ticks_of_a_short_logarithmic_axis_are_round(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low < tick < high for tick in ticks)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert len(f"{steps[0]:.6g}".replace(".", "").strip("0")) <= 2


def _figure(root: Path, key: str) -> Figure:
    figure = draw_all(scene_of(root))[key].figure
    assert figure is not None
    return figure
