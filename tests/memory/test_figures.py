"""Figures never average different experiments, and their legends name what is drawn."""

import numpy as np
import pytest

from lightning_spectral.memory.figures import MEMORY_FIGURES, batch_figure, counts_figure, draw_all, steps_figure
from lightning_spectral.memory.figures_spectra import update_spectrum_figure
from lightning_spectral.memory.runs import batch_rows, newton_schulz_rows, one_step_rows, step_rows
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings

MACHINE = {"device": "cpu", "chunk_size": 1024, "cache_bytes": 2**28}
RUN = {"steps": 2, "mode": "deflation", "step_scale": 1.0, "schedule": "constant"}


def problems(**lists):
    names = list(lists)
    grid = np.array(np.meshgrid(*[np.array(v, dtype=object) for v in lists.values()], indexing="ij")).reshape(
        len(names), -1
    )
    for values in grid.T:
        fields = dict(zip(names, values, strict=True))
        yield MemoryProblem(**{"d": 16, "n_items": 200, "alpha": 1.5, **fields})


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.fixture(scope="module")
def one_step():
    return [
        row
        for problem in problems(d=[16, 24], anisotropy=[0.0, 2.0], seed=[0, 1])
        for row in one_step_rows(problem, ["sgd", "muon", "sign"], RuleSettings(), MACHINE)
    ]


def test_counts_of_two_anisotropies_are_two_panels(one_step):
    axes = counts_figure(one_step).axes
    assert len(axes) == 2
    for beta, axis in zip((0.0, 2.0), axes, strict=True):
        assert f"beta = {beta:g}" in axis.get_title()
        drawn = axis.containers[1].lines[0].get_ydata()
        truth = [
            np.mean([r["count"] for r in one_step if (r["d"], r["anisotropy"], r["rule"]) == (d, beta, "muon")])
            for d in (16, 24)
        ]
        assert list(drawn) == pytest.approx(truth)


@pytest.mark.parametrize("field", ["n_items", "batch_size", "anisotropy", "alpha"])
def test_no_figure_puts_two_values_of_an_input_together(field):
    values = {"n_items": [200, 300], "batch_size": [64, 128], "anisotropy": [0.0, 1.0], "alpha": [1.3, 1.7]}[field]
    rows = [
        row
        for problem in problems(d=[16, 24], **{field: values})
        for row in [
            *one_step_rows(problem, ["muon"], RuleSettings(), MACHINE),
            *step_rows(problem, ["muon"], RuleSettings(), MACHINE, RUN),
            *newton_schulz_rows(problem, ["muon"], [3, 5], ["float32"], MACHINE),
        ]
    ]
    for name, draw in MEMORY_FIGURES.items():
        figure = draw(rows)
        if figure is None:
            continue
        titles = [axis.get_title() for axis in figure.axes]
        assert len(set(titles)) == len(titles), name
        names = {"n_items": "N = ", "batch_size": "B = ", "anisotropy": "beta = ", "alpha": "alpha = "}
        for value in values:
            assert any(f"{names[field]}{value:g}" in title for title in titles), (name, titles)


def test_steps_of_two_batches_are_two_panels():
    rows = [
        row
        for problem in problems(batch_size=[16, 256])
        for row in step_rows(problem, ["muon"], RuleSettings(), MACHINE, RUN)
    ]
    axes = steps_figure(rows).axes
    assert ["B = 16" in axis.get_title() for axis in axes] == [True, False]
    for size, axis in zip((16, 256), axes, strict=True):
        assert list(axis.lines[0].get_ydata()) == [row["count"] for row in rows if row["batch_size"] == size]


def test_legends_name_what_is_drawn():
    exact = {**RUN, "mode": "exact"}
    problem = next(problems(seed=[0]))
    figure = steps_figure(list(step_rows(problem, ["muon"], RuleSettings(), MACHINE, exact)))
    assert "predicted, no fitted number" not in legend(figure)
    assert "information limit d^2 / (2 ln N)" in legend(figure)
    sampled = [r for p in problems(batch_size=[8, 64]) for r in batch_rows(p, ["muon"], RuleSettings(), MACHINE)]
    assert "predicted critical batch (90 %)" not in legend(batch_figure(sampled))
    whole = [*sampled, *batch_rows(problem, ["muon"], RuleSettings(), MACHINE)]
    assert "predicted critical batch (90 %)" in legend(batch_figure(whole))


def test_short_log_axes_have_more_than_one_label():
    rows = [
        {"kind": "one-step", "alpha": 1.5, "n_items": 9, "d": d, "rule_label": "muon", "count": d / 4.0,
         "predicted_count": None, "censored": False}
        for d in (128, 256)
    ]  # fmt: skip
    figure = counts_figure(rows)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    labels = [text for text in figure.axes[0].get_yticklabels(which="both") if low <= text.get_position()[1] <= high]
    assert sum(bool(text.get_text()) for text in labels) >= 2


def test_the_update_spectrum_shows_singular_values(one_step):
    axis = update_spectrum_figure(one_step).axes[0]
    muon = next(line for line in axis.lines if line.get_color() == "#0072B2")
    assert list(muon.get_ydata()) == pytest.approx([1.0] * len(muon.get_ydata()), rel=1e-6)  # a flat spectrum


def test_runs_that_could_not_be_made_are_in_no_figure(tmp_path):
    rows = [
        row
        for problem in problems(d=[16, 24], batch_size=[4, 256])
        for row in batch_rows(problem, ["muon", "newton"], RuleSettings(), MACHINE)
    ]
    assert {row["status"] for row in rows} == {"ok", "singular"}
    assert [path.name for path in draw_all(rows, tmp_path)] == ["count_vs_batch.png"]
