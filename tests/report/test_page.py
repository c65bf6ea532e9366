from __future__ import annotations

import csv
import json
import os
import re
import shlex
import xml.etree.ElementTree as ET
from argparse import Namespace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.cli.report import make_scene
from lightning_spectral.records.looks import OPTIMIZERS, family
from lightning_spectral.report import page as report
from lightning_spectral.report.figures import FIGURES
from lightning_spectral.report.figures_learning_rates import learning_rates
from lightning_spectral.report.figures_spectrum import read_spectra
from lightning_spectral.report.page import warnings_of, write_report
from lightning_spectral.report.rows import headline_rows
from lightning_spectral.report.scene import ReportData
from lightning_spectral.report.style import looks_of, shown_name, spread_labels
from tests.analysis.synthetic import let_diverge, recipe, write_one, write_spectra, write_study

OPTIONS = {
    "by": None, "metrics": ["soft_rank", "hard_rank"], "last": 5, "until_step": None, "stage": None, "method": "auto",
    "ranks": "auto", "stack": None, "loader": None, "where": [], "site": "post", "match_on": "loss", "tolerance": 0.02,
}  # fmt: skip


def scene_of(root: Path, **changes: object) -> ReportData:
    scene = make_scene(Namespace(inputs=[str(root)], **(OPTIONS | changes)))
    assert isinstance(scene, ReportData)
    return scene


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def write_whole_study(root: Path) -> Path:
    """A study that every figure finds something in."""
    slopes = {"muon": 0.9, "adamw": 0.3}
    folders = write_study(root, slopes, (128, 256, 512), seeds=(0, 1), sites=("pre", "post"), recipes=True)
    for width in (128, 256, 512):
        write_one(root, "adamw lr x3", 0.1, width, hparams=recipe(9e-3, kind="adamw"))
    for folder in folders:
        if "512" in folder.name:
            write_spectra(folder, 512)
    return root


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on the figures: draw one of them."""
    monkeypatch.setattr(report, "draw_all", lambda scene: {"health": FIGURES["health"].draw(scene)})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    return write_whole_study(root)


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(scene_of(study), folder, command="lightning-spectral report <study>")
    return folder


def test_every_figure_is_drawn_and_is_a_file(written: Path) -> None:
    drawn = set(FIGURES) - {"one_run", "estimates"}  # of one run by itself, and of a table of exponents
    assert {path.stem for path in (written / "figures").glob("*.svg")} == drawn
    assert {path.stem for path in (written / "figures").glob("*.csv")} == drawn
    for path in (written / "figures").glob("*.svg"):
        assert len(ET.parse(path).getroot().findall(".//{*}path")) > 10


def test_the_page_is_one_offline_file(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]+"', page)
    assert "<script" not in page
    assert "@import" not in page
    assert len(page) < 5_000_000
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(ids)


def test_the_headline_has_both_states_and_everything_they_must_be_read_with(study: Path) -> None:
    scene = scene_of(study, last=1)
    rows = {row["name"]: row for row in headline_rows(scene)}
    assert list(rows) == ["AdamW", "Muon"]  # another learning rate of AdamW has a section of its own
    fit = scene.fit(("muon",), "tail", "hard_rank")
    assert fit is not None
    assert rows["Muon"]["before"] == f"{fit.before_beta:.2f} [{fit.before_low:.2f}, {fit.before_high:.2f}]"
    assert fit.before_step == 80
    assert rows["Muon"]["seeds"] == f"{fit.seed_low:.3f} to {fit.seed_high:.3f}"
    assert rows["Muon"]["layers"] == f"{fit.layer_low:.3f} to {fit.layer_high:.3f}"
    (gap,) = (
        c for c in scene.compared("slope_difference_pre_decay", "tail", "hard_rank") if {c.a, c.b} == {"adamw", "muon"}
    )
    assert rows["Muon"]["gap_1"].startswith(f"{-gap.estimate:+.2f} [{-gap.ci_high:.2f}")
    assert rows["AdamW"]["gap_0"] == ""


def test_the_spectra_are_those_of_the_files(study: Path) -> None:
    run = next(run for run in scene_of(study).runs.runs if run.width == 512 and run.optimizer == "muon")
    spectra = read_spectra(run, "post", "tail")
    assert list(spectra) == [20, 60, 100]
    np.testing.assert_allclose(spectra[60], np.arange(1, 513) ** -1.1, rtol=1e-6)  # fp32 in the file
    (run.folder / "eigenvalues" / "train_00000070.safetensors").write_bytes(b"torn")
    loader = (run.folder / "eigenvalues" / "train_00000060.safetensors").read_bytes()
    (run.folder / "eigenvalues" / "train_00000060_loader_1.safetensors").write_bytes(loader)  # no spectrum of step 1
    assert list(read_spectra(run, "post", "tail")) == [20, 60, 100]
    assert read_spectra(run, "pre", "tail") == {}


@pytest.mark.usefixtures("one_figure")
def test_the_page_escapes_what_it_is_told(study: Path, tmp_path: Path) -> None:
    page = write_report(scene_of(study), tmp_path, title="<script>alert(1)</script>").page.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_numbers_of_the_page_are_those_of_the_tables(written: Path) -> None:
    page = (written / "report.html").read_text()
    cells = re.findall(r'data-csv="([^"]+)" data-row="(\d+)" data-column="(\w+)">([^<]*)<', page)
    tables = {name: rows_of(written / name) for name in {cell[0] for cell in cells}}
    assert len(cells) > 100
    for name, row, column, shown in cells:
        value = tables[name][int(row)][column]
        if shown == "-":
            assert value == ""
        else:
            digits = len(shown.partition(".")[2])
            assert shown == f"{float(value):.{digits}f}"


def test_warnings_that_cannot_be_missed(study: Path, tmp_path: Path) -> None:
    found = " ".join(warnings_of(scene_of(study)))
    assert "untrained network already has beta = 0.7" in found
    assert "Few widths: 3" in found
    assert "seeds = initial weights; the data order is shared by all runs" in found
    assert "The state before the learning-rate decay is another state" in found
    assert "The learning rate alone moves adamw's beta of TAIL hard rank (D = 128, 256, 512, seed 0)" in found
    assert "has no run at" not in found  # a run at another learning rate need not cover what the law does
    assert "across_decay" in found
    write_study(
        tmp_path, {"muon": 0.9, "adamw": 0.3}, widths=(128, 256, 512), steps=(20, 40), noise=0.6, num_tokens=900
    )
    write_one(tmp_path, "muon", 0.9, 1024, steps=(20, 40))
    alone = " ".join(warnings_of(scene_of(tmp_path)))
    assert "No state before the learning-rate decay" in alone
    for text in (
        "No seeds are told apart",
        "Wide interval",
        "few_tokens",
        "No null",
        "has no run at D = 1024",
    ):
        assert text in alone


def test_crossing_lines_are_said(tmp_path: Path) -> None:
    points = {"muon": 1.2, "adamw": -0.5}
    write_study(tmp_path, points, widths=(1, 2, 4, 8), noise=0.01)  # equal at D = 1, so they cross at the left end
    scene = scene_of(tmp_path)
    (crossing,) = scene.compared("crossover_width", "tail", "hard_rank")
    assert crossing.estimate == pytest.approx(1.0, abs=0.1)


@pytest.mark.usefixtures("one_figure")
def test_two_widths_make_a_report_that_says_no_fit(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, widths=(128, 256))
    page = unescape(write_report(scene_of(tmp_path / "runs"), tmp_path / "out").page.read_text())
    assert "No exponent of TAIL hard rank could be fitted" in page
    assert "fits refused: fewer than 3 widths" in page


def test_one_run_begins_with_its_curves_and_ends_with_the_sweep(tmp_path: Path) -> None:
    folder = write_one(tmp_path / "my runs", "muon", 0.9, 128, hparams=recipe())
    (folder / "hyperparameters.yaml").write_text("seed: 0\n")
    write_report(scene_of(tmp_path), tmp_path / "out")
    page = unescape((tmp_path / "out" / "report.html").read_text())
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections[0] == "one_run"
    assert sections[-2:] == ["next", "provenance"]
    assert not {"scaling_laws", "betas", "beta_table", "comparisons"} & set(sections)
    (command,) = re.findall(r"<code>(lightning-spectral sweep [^<]+)</code>", page)
    words = shlex.split(command)
    assert words[2] == str(folder / "hyperparameters.yaml")
    assert words[3:] == [
        *("--axis", "architecture.ffn_multiplier=1,2,4,8", "--axis", "seed=0,1,2", "--out", f"{folder}_widths")
    ]
    figure = rows_of(tmp_path / "out" / "figures" / "one_run.csv")
    last = [row["value"] for row in figure if row["series"] == "TAIL hard rank" and row["x"] == "100"]
    run = scene_of(tmp_path).runs.runs[0]
    assert float(last[0]) == np.median(run.cube("hard_rank")[0, run.buckets.index("tail"), -1])
    assert "validation loss" in {row["series"].partition(" ")[2] for row in figure}


def test_one_run_of_another_script_and_pooled_only(tmp_path: Path) -> None:
    write_one(tmp_path / "runs", "muon", 0.9, 128, layers=1)
    page = write_report(scene_of(tmp_path / "runs", metrics=["hard_rank"]), tmp_path / "out").page.read_text()
    assert "Train the same script at three or more FFN widths" in page


def test_the_pointer_shows_the_numbers_of_the_table(written: Path) -> None:
    page = unescape((written / "report.html").read_text())
    for key in ("scaling_laws", "betas", "beta_over_training", "rank_curves", "layers"):
        section = page[page.index(f'<section id="{key}"') :].partition("</section>")[0]
        shown = set(re.findall(r"<title>([^<]+: [^<]+)</title>", section))
        cells = {(row["series"], row["x"], row["value"]) for row in rows_of(written / "figures" / f"{key}.csv")}
        said = {f"{series}: {float(value):.4g}" + (f" at {float(x):.6g}" if x else "") for series, x, value in cells}
        assert shown == said, key
        table = set(re.findall(r'<td class="num">([^<]*)</td></tr>', section))
        assert table == {f"{float(value):.4g}" for _, _, value in cells}, key


def test_steps_can_be_read_as_logarithms_and_as_tokens(written: Path) -> None:
    page = (written / "report.html").read_text()
    section = page[page.index('<section id="rank_curves"') :].partition("</section>")[0]
    assert re.findall(r"<label [^>]*>([^<]+)</label>", section) == ["steps", "steps, log", "tokens"]
    assert section.count("<svg") == 3
    assert "training tokens" in section
    assert "1.02e+05" in section  # step 100 of 1,024 tokens
    assert 'name="scaling_laws-x"' not in page


def test_further_learning_rates_stretch_no_axis(study: Path) -> None:
    scene = scene_of(study)
    assert scene.series == [("adamw",), ("muon",)]
    assert ("adamw lr x3",) in scene.all_series
    assert any(point.series == ("adamw lr x3",) for point in scene.learning_rate_sweeps[0].points)


def test_a_run_that_diverged_has_no_points_and_a_cross(tmp_path: Path) -> None:
    """Its last windows with numbers are another state of training than the end of the others."""
    write_study(tmp_path, {"adamw": 0.4}, noise=0.005, recipes=True)
    for width in (128, 256, 512, 1024):
        folder = write_one(tmp_path, "adamw lr x9", 0.4, width, hparams=recipe(lr=2.7e-2))
        let_diverge(folder, 60) if width == 1024 else None
    scene = scene_of(tmp_path)
    series = ("adamw lr x9", "post", "tail", "hard_rank", "median")
    assert [point.x for point in scene.fitted.table.groups()[series]] == [128, 256, 512]
    (problem,) = [problem for problem in scene.runs.problems if problem.kind == "diverged"]
    assert "`adamw lr x9_1024_0` was left out: it diverged, from step 60 on" in problem.message
    drawn = learning_rates(scene)
    losses = next(ax for ax in drawn.figure.axes if ax.get_title() == "last loss, nats")
    (crosses,) = [line for line in losses.lines if line.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [2.7e-2]
    widest = next(line for line in losses.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2)
    assert np.isnan(widest.get_ydata()[1])


@pytest.mark.usefixtures("one_figure")
def test_a_report_that_fails_leaves_the_old_one(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old and whole")
    replaced = os.replace

    def fail(source: str, target: str) -> None:
        if str(target).endswith("report.html"):
            raise OSError("killed")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_report(scene_of(study), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old and whole"
    assert not list(tmp_path.glob("*.partial"))


def test_an_optimizer_looks_the_same_in_every_report() -> None:
    alone, together = looks_of([("dion_1_16",)]), looks_of([("AdamW",), ("Muon",), ("Dion 1/16",), ("sophia",)])
    assert alone["dion_1_16",].color == together["Dion 1/16",].color == OPTIMIZERS["dion 1/16"][0]
    assert len({(look.color, look.marker) for look in together.values()}) == 4
    variants = looks_of([("AdamW",), ("AdamW lr x3",)])
    assert variants["AdamW",].color == variants["AdamW lr x3",].color
    assert variants["AdamW lr x3",].variant == 1
    assert variants["AdamW",].variant == 0
    three = looks_of([("AdamW",), ("AdamW lr/3",), ("AdamW lr x3",)])
    assert len({(look.line, look.face) for look in three.values()}) == 3


@pytest.mark.parametrize(
    ("label", "base"),
    [("Dion (1/2)", "dion 1/2"), ("dion_1_16", "dion 1/16"), ("Dion", "dion"), ("NorMuon", "normuon"), ("muonic", "")],
)
def test_families(label: str, base: str) -> None:
    assert family(label)[0] == base


def test_labels_keep_their_order_and_their_distance() -> None:
    placed = spread_labels([0.5, 0.51, 0.9, 0.5], 0.1, 0.0, 1.0)
    gaps = [b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)]
    assert min(gaps) > 0.0999
    assert placed[2] == max(placed)
    assert spread_labels([], 0.1, 0.0, 1.0) == []


def test_labels_are_cut_and_cannot_turn_the_text_round() -> None:
    assert shown_name("a" * 300) == "a" * 19 + "\u2026" + "a" * 20
    assert shown_name("safe \u202egnp.exe\u202c \u2066x\u2069") == "safe gnp.exe x"
    (look,) = looks_of([("\u202eevil" + "x" * 300,)]).values()
    assert look.name.startswith("evilx")
    assert len(look.name) == 40


def test_one_run_with_one_window_is_dots_and_plain_words(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 64, hparams=recipe(), steps=(40,))
    write_report(scene_of(tmp_path), tmp_path / "out")
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert "1 run | FFN width 64 | 1 seed" in page
    assert "window at step 40" in page
    assert "refused" not in page
    assert " from " not in re.search(r"hard rank of [^<]*", page)[0]


@pytest.mark.parametrize(
    ("label", "shown"),
    [("AdamW 12K", "AdamW 12K"), ("muon_WSD", "Muon WSD"), ("Dion (1/2) QK", "Dion (1/2) QK"), ("MyOpt", "MyOpt")],
)
def test_the_rest_of_a_label_keeps_its_letters(label: str, shown: str) -> None:
    assert looks_of([(label,)])[label,].name == shown


def test_runs_of_one_series_may_have_other_numbers_of_layers(tmp_path: Path) -> None:
    """The last seed lost its deepest layer: it has no place in the mean by layer, and the others have."""
    for layers, seed in ((3, 0), (3, 1), (2, 2)):
        write_study(tmp_path, {"muon": 0.9}, seeds=(seed,), layers=layers)
    scene = scene_of(tmp_path)
    figure = FIGURES["layers"].draw(scene).figure
    assert figure is not None
    (line,) = [line for line in figure.axes[-1].lines if line.get_label() == "Muon"]
    widest = [p for p in scene.points(scene.series[0], scene.focus, "hard_rank") if p.x == 1024 and len(p.layers) == 3]
    assert len(widest) == 2
    expected = np.exp(np.mean(np.log([p.layers for p in widest]), axis=0))
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected, rtol=1e-12)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_layer_without_a_number_costs_no_page(tmp_path: Path, lost: int) -> None:
    """A layer of the widest run of one optimizer had no variance, in all its windows."""
    runs = write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, layers=3)
    widest = next(run for run in runs if run.name.startswith("muon_1024"))
    lines = [json.loads(line) for line in (widest / "spectral.jsonl").read_text().splitlines()]
    dead = {"status": "degenerate", "soft_rank": None, "hard_rank": None, "soft_rank_debiased": None}
    written = [line | (dead if line["layer"] == lost else {}) for line in lines]
    (widest / "spectral.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    write_report(scene_of(tmp_path / "runs"), tmp_path / "out")
    drawn = rows_of(tmp_path / "out" / "figures" / "layers.csv")
    shown = {row["x"] for row in drawn if row["series"] == "Muon" and row["panel"].startswith("hard rank by layer")}
    assert shown == {str(k) for k in range(3) if k != lost}
