"""Tables without points of a fit, drawn: ranks over steps, exponents over steps, exponents alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.analysis.published import (
    effect_of,
    kind_of,
    paths_of,
    read_curves,
    read_estimates,
    read_paths,
    shifts_of,
)
from lightning_spectral.analysis.runs import Problem, RunSet
from lightning_spectral.analysis.study import comparisons_of, fit_points
from lightning_spectral.cli import main
from lightning_spectral.report.figures_exponents import asymmetry, betas
from lightning_spectral.report.figures_scaling import scaling_laws
from lightning_spectral.report.rows import comparison_headline
from lightning_spectral.report.scene import ReportData, ReportFigure

WIDTHS, STEPS = (256, 512, 1024, 2048), (1, 100, 200)


def curves(path: Path) -> Path:
    """hard = D^(.5 + step / 1000), and a row that is cut off."""
    lines = ["optimizer,bucket,ffn_hidden_dim,step,hard_rank,hard_rank_smoothed"]
    lines += [
        f"AdamW 12K,{bucket},{width},{step},{(1 + k) * width ** (0.5 + step / 1000)!r},1"
        for k, bucket in enumerate(("head", "TAIL"))
        for width in WIDTHS
        for step in STEPS
    ]
    path.write_text("\n".join(lines) + "\nAdamW 12K,head,25")
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def test_ranks_over_steps(tmp_path: Path) -> None:
    table = curves(tmp_path / "t.csv")
    assert kind_of(table) == "curves"
    paths = {path.series: path for path in paths_of(read_curves(table))}
    own = paths["AdamW 12K", "post", "tail", "hard_rank"]
    assert own.steps.tolist() == list(STEPS)
    np.testing.assert_allclose(own.beta, [0.501, 0.6, 0.7], rtol=1e-9)
    assert own.num_widths == 4
    assert main(["report", str(table), "--out", str(tmp_path / "out")]) == 0
    drawn = {path.stem for path in (tmp_path / "out" / "figures").glob("*.svg")}
    assert {"beta_over_training", "rank_curves", "scaling_laws"} <= drawn
    written = [row for row in rows(tmp_path / "out" / "beta_over_training.csv") if row["bucket"] == "tail"]
    assert [float(row["beta"]) for row in written] == pytest.approx([0.501, 0.6, 0.7])
    # the fit is of the last step
    assert float(rows(tmp_path / "out" / "fits.csv")[0]["beta"]) == pytest.approx(0.7)
    shown = {(row["series"], row["x"]) for row in rows(tmp_path / "out" / "figures" / "rank_curves.csv")}
    assert shown == {(f"D = {width}", str(step)) for width in WIDTHS for step in STEPS}


def test_exponents_over_steps(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("optimizer,bucket,step,beta_hard,beta_soft\nMuon,tail,100,.5,.6\nMuon,tail,1,.2,\n")
    assert kind_of(table) == "betas_over_training"
    paths = {path.series[-1]: path for path in read_paths(table)}
    assert paths["hard_rank"].beta.tolist() == [0.2, 0.5]
    assert paths["soft_rank"].steps.tolist() == [100]
    assert main(["report", str(table), "--out", str(tmp_path / "out")]) == 0
    assert [path.stem for path in (tmp_path / "out" / "figures").glob("*.svg")] == ["beta_over_training"]


def estimates(path: Path, errors: bool) -> Path:
    names = "optimizer,head_count,bucket,metric,beta" + (",std_err,beta_lower,beta_upper,n_widths" if errors else "")
    cells = {("AdamW", 12): 0.4, ("AdamW", 6): 0.5, ("Muon", 12): 1.0, ("Muon", 6): 1.1}
    lines = [names]
    for (name, heads), beta in cells.items():
        more = f",.02,{beta - 0.05},{beta + 0.05},8" if errors else ""
        lines.append(f"{name},{heads},tail,hard_rank,{beta}{more}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_exponents_alone_say_how_far_they_move(tmp_path: Path) -> None:
    table = estimates(tmp_path / "t.csv", errors=False)
    assert kind_of(table) == "estimates"
    found = read_estimates(table)
    assert shifts_of(found) == pytest.approx((0.6, 0.1))
    assert effect_of(found) is None
    assert main(["report", str(table), "--out", str(tmp_path / "out")]) == 0
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert "moves by 0.60 (root mean square) between series and by 0.10 between levels; without standard errors" in page
    shown = {row["series"]: float(row["value"]) for row in rows(tmp_path / "out" / "figures" / "estimates.csv")}
    assert shown == {"AdamW, 12": 0.4, "AdamW, 6": 0.5, "Muon, 12": 1.0, "Muon, 6": 1.1}


def test_exponents_with_errors_have_an_effect_with_an_interval(tmp_path: Path) -> None:
    found = read_estimates(estimates(tmp_path / "t.csv", errors=True))
    assert {(own.low, own.high) for own in found if own.beta == 1.0} == {(0.95, 1.05)}
    effect = effect_of(found)
    assert effect is not None
    # unbiased: .6^2 and .1^2 without twice the variance
    assert effect.difference == pytest.approx((0.36 - 2 * 0.02**2) - (0.01 - 2 * 0.02**2), rel=1e-9)
    assert effect.ci_low > 0


def test_points_of_the_paper_stay_points(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    header = "run_id,optimizer,ffn_hidden_dim,metric,bucket,site,value,err_low,err_high,final_steps"
    table.write_text(f"{header}\na,AdamW,768,hard_rank,global,post,3,2,4,5;6\n")
    assert kind_of(table) == "points"


@pytest.mark.parametrize(("text", "words"), [("step,width,hard_rank\n1,2,x\n", "a step, a width and a rank"),
                                             ("step,beta\nx,1\n", "a step and an exponent"),
                                             ("optimizer,beta\na,\n", "no exponent")])  # fmt: skip
def test_an_empty_table_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert main(["report", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_points_and_tables_with_other_labels_are_one_report(tmp_path: Path) -> None:
    points, betas, larger = tmp_path / "points.csv", tmp_path / "betas.csv", tmp_path / "larger.csv"
    cells = [
        (name, rank, width) for name, rank in (("AdamW", ""), ("Dion", "1/2"), ("Dion", "1/16")) for width in WIDTHS
    ]
    lines = [
        f"{name}{rank}{w},160m,{name},{rank},{w},tail,hard_rank,{w ** (0.4 + len(rank) / 10)!r}"
        for name, rank, w in cells
    ]
    head = "run_id,model_scale,optimizer,dion_rank_fraction,ffn_hidden_dim,bucket,metric,value"
    points.write_text("\n".join([head, *lines]) + "\n")
    betas.write_text(
        "optimizer,optimizer_display_name,bucket,metric,beta\nDion,Dion (1/16),tail,hard_rank,.8\n"
        "AdamW,AdamW 12K,tail,hard_rank,.5\n"
    )
    larger.write_text(
        "run_id,model_scale,optimizer,ffn_hidden_dim,bucket,metric,value\n"
        + "".join(f"large{w},350m,AdamW,{w},tail,hard_rank,{w**0.3!r}\n" for w in WIDTHS)
    )
    out = tmp_path / "one"
    assert main(["report", str(points), str(betas), "--out", str(out)]) == 0
    # what has the name of points is drawn as they are, what has not is a series of its own
    drawn = {row["series"] for row in rows(out / "figures" / "estimates.csv")}
    assert drawn == {"Dion 1/16", "AdamW 12K"}
    assert {row["series"] for row in rows(out / "figures" / "betas.csv")} == {"AdamW", "Dion 1/2", "Dion 1/16"}
    assert main(["report", str(points), str(larger), str(betas), "--out", str(tmp_path / "all")]) == 0
    page = unescape((tmp_path / "all" / "report.html").read_text())
    assert "No two series could be compared" not in page  # what both sides have in common is part of their name
    assert ">Dion 1/2 160m<" in page
    fits = {(r["optimizer"], r["dion_rank_fraction"], r["model_scale"]): r for r in rows(tmp_path / "all" / "fits.csv")}
    assert float(fits["AdamW", "", "350m"]["beta"]) == pytest.approx(0.3)
    assert float(fits["AdamW", "", "160m"]["beta"]) == pytest.approx(0.4)


def scene_of(*names: str) -> ReportData:
    """TAIL hard and soft rank of some series, a different slope each."""
    points = [
        Point((name, "post", "tail", metric, "median"), float(width), width ** (0.5 + k) * (1 + 0.3 * (width == 512)))
        for k, name in enumerate(names)
        for metric in ("hard_rank", "soft_rank")
        for width in WIDTHS
    ]
    fitted = fit_points(PointTable(("optimizer", "site", "bucket", "metric", "layer"), tuple(points)))
    return ReportData(RunSet((), ()), fitted, tuple(comparisons_of(fitted)), (), ())


@pytest.mark.parametrize("draw", [betas, asymmetry])
def test_long_labels_beside_an_axis_have_their_room(draw: Callable[[ReportData], ReportFigure]) -> None:
    figure = draw(scene_of("M" * 20, "x" * 300)).figure
    assert figure is not None
    figure.canvas.draw()
    names = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
    assert len(names) == 2
    assert min(name.get_window_extent().x0 for name in names) >= 0


def test_the_first_sentence_has_the_names_of_the_figures() -> None:
    sentence = comparison_headline(scene_of("\u202eevil\u202c", "y" * 300))
    assert sentence.startswith("The slope of " + "y" * 19 + "\u2026" + "y" * 20 + " exceeds that of evil by ")


def test_long_labels_stay_out_of_the_next_panel() -> None:
    figure = scaling_laws(scene_of("AdamW with a rather long name")).figure
    assert figure is not None
    figure.canvas.draw()
    left, right = figure.axes
    ends = [text.get_window_extent().x1 for text in left.texts if text.get_text().startswith("AdamW")]
    assert ends
    beside = right.get_tightbbox()
    assert beside is not None
    assert max(ends) < beside.x0
    assert max(text.get_window_extent().x1 for text in right.texts) < figure.bbox.x1


def balanced(text: str) -> bool:
    """Whether every brace that is not escaped has its partner."""
    plain = re.sub(r"\\[{}]", "", text)
    depth = [plain[: k + 1].count("{") - plain[: k + 1].count("}") for k in range(len(plain))]
    return min(depth) >= 0 and depth[-1] == 0


def test_pdf_of_every_figure_and_latex_of_every_table(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    hostile = ["50%_a&b #1", "[x]*{y}", "$\\alpha$~^", "R\u00e9nyi \u202eno\u0303"]
    lines = [
        f'"{label}",{width},tail,{metric},{width**0.5 * (k + 1)!r}'
        for k, label in enumerate(hostile)
        for width in WIDTHS
        for metric in ("soft_rank", "hard_rank")
    ]
    path.write_text("\n".join(["optimizer,width,bucket,metric,value", *lines]) + "\n")
    out = tmp_path / "r"
    assert main(["report", str(path), "--pdf", "--latex", "--out", str(out)]) == 0
    for picture in (out / "figures").glob("*.svg"):
        content = picture.with_suffix(".pdf").read_bytes()
        assert content.startswith(b"%PDF-")
        assert b"/Subtype /Type3" not in content  # fonts that journals refuse
        assert b"CreationDate" not in content
    for table in out.glob("*.csv"):
        text = table.with_suffix(".tex").read_text()
        assert balanced(text)
        assert "\u202e" not in text
        first, *body, last = text.splitlines()
        assert (first[:15], last) == (r"\begin{tabular}", r"\end{tabular}")
        columns = len(re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", first)[1])  # type: ignore[index]
        for line in body:
            assert line == r"\hline" or (line.endswith(r" \\") and not line.startswith(("[", "*")))
            bare = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]", "", line)
            assert not set(bare.removesuffix(r" \\")) & set("%$#_~^\\") or line == r"\hline"
            assert line == r"\hline" or bare.count("&") == columns - 1
    assert r"50\%\_a\&b \#1" in (out / "fits.tex").read_text()


WHOLE = "optimizer,width,step,value\n" + "".join(f"a,{d}k,{s}k,{d**0.5 * s}\n" for d in (1, 2, 4) for s in (1, 2))


def test_values_at_several_steps_are_curves(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(WHOLE)
    assert kind_of(path) == "curves"
    (own,) = paths_of(read_curves(path))
    assert own.steps.tolist() == [1000, 2000]
    np.testing.assert_allclose(own.beta, 0.5, rtol=1e-9)
    path.write_text("".join(line for line in WHOLE.splitlines(keepends=True) if ",2k," not in line))
    assert kind_of(path) == "points"  # all of one step


def test_steps_between_steps_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("optimizer,width,step,hard_rank\na,64,.25,3\na,64,.5,4\n")
    with pytest.raises(ValueError, match=r"has the step `.25`: steps are whole numbers"):
        read_curves(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("optimizer,step,beta\na,1.5,3\n")
    with pytest.raises(ValueError, match=r"has the step `1.5`"):
        read_paths(tmp_path / "t.csv")


def test_a_run_that_is_there_twice_at_a_step_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text(WHOLE + "a,1k,2k,3\n")
    problems: list[Problem] = []
    last = {
        (c.width, int(s)): v
        for c in read_curves(path, problems=problems)
        for s, v in zip(c.steps, c.values, strict=True)
    }
    assert last[1000, 2000] == 3
    assert [problem.kind for problem in problems] == ["repeated_steps"]
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "several ranks of one series, width and seed at one step (1 more)" in "".join(capsys.readouterr())
