"""What the README and the studies' pages say of slopes is what `fit` and `compare` say of the committed points."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.compare import Comparison
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.matched import MatchedPair, compare_matched
from lightning_spectral.analysis.study import comparisons_of, fit_points
from lightning_spectral.analysis.tidy import read_points_csv

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FOCUS = ("layer=median", "metric=hard_rank")
ZOO = ("AdamW", "Muon", "Muon heads", "NorMuon", "AdaMuon", "MuonH", "Dion", "Dion2", "NorDion2", "SOAP")


@cache
def study(
    name: str, where: Sequence[str] = FOCUS, variations: bool = False
) -> tuple[dict[str, PowerLawFit], list[Comparison]]:
    """Fits by optimizer and layer, and comparisons, of TAIL; without the ladders of learning rates."""
    table, problems = read_points_csv(RESULTS / name / "points.csv", where=["bucket=tail", *where])
    assert not problems
    kept = tuple(point for point in table.points if variations or " lr" not in point.series[0])
    fitted = fit_points(replace(table, points=kept))
    place = table.by.index("layer")
    fits = {" ".join((fit.series[0], fit.series[place])).removesuffix(" median"): fit for fit in fitted.fits}
    return fits, comparisons_of(fitted)


def shown(estimate: float, low: float, high: float, digits: int = 2) -> str:
    """``0.31 [0.20, 0.43]``."""
    texts = [f"{number:.{digits}f}" for number in (estimate, low, high)]
    estimate_, low_, high_ = ("0." + "0" * digits if not float(text) else text for text in texts)
    return f"{estimate_} [{low_}, {high_}]"


def slope(fit: PowerLawFit) -> str:
    return shown(fit.beta, fit.ci_low, fit.ci_high)


def more(name: str, one: str, two: str, kind: str = "slope_difference", where: Sequence[str] = FOCUS) -> Comparison:
    """By how much the first exceeds the second."""
    return oriented(study(name, where)[1], one, two, kind)


def oriented(comparisons: Sequence[Comparison], one: str, two: str, kind: str) -> Comparison:
    found = next(c for c in comparisons if c.kind == kind and {c.a, c.b} == {one, two})
    if found.a == one:
        return found
    return replace(found, estimate=-found.estimate, ci_low=-found.ci_high, ci_high=-found.ci_low)


def difference(c: Comparison, digits: int = 2) -> str:
    return shown(c.estimate, c.ci_low, c.ci_high, digits)


def at_equal_loss(name: str, one: str, two: str) -> Comparison:
    """The slope at equal loss, from the committed pairs of ranks."""
    with (RESULTS / name / "matched_loss.csv").open() as file:
        pairs = [
            MatchedPair(
                (row["a"],), (row["b"],), row["site"], row["bucket"], row["metric"], int(row["width"]), row["seed"],
                *(float(row[key]) for key in ("at", "loss_a", "loss_b", "rank_a", "rank_b")),
            )
            for row in csv.DictReader(file)
            if (row["bucket"], row["metric"]) == ("tail", "hard_rank")
        ]  # fmt: skip
    return oriented(compare_matched(pairs), one, two, "matched_loss_slope")


def said(page: Path, *sentences: str) -> None:
    """Each of the sentences stands on the page."""
    text = re.sub(r"\s+", " ", page.read_text())
    for sentence in sentences:
        assert sentence in text, (page, sentence)


def test_the_readme_says_of_the_pocket_study_what_its_points_say() -> None:
    fits, gap = study("pocket_study")[0], more("pocket_study", "Muon", "AdamW")
    late, small = study("pocket_tokens")[0]["AdamW"], more("pocket_tokens", "Muon", "AdamW")
    said(
        ROOT / "README.md",
        f"Muon turns width into hard rank with beta = {slope(fits['Muon'])}, AdamW with {slope(fits['AdamW'])};",
        f"is {difference(gap)} (p = {gap.p_holm:.3f}, corrected for three pairs)",
        f"AdamW's to {slope(late)}, and the gap shrinks to {difference(small)}",
    )


def test_the_pocket_studys_page_says_what_its_points_say() -> None:
    page, (fits, _) = RESULTS / "pocket_study" / "README.md", study("pocket_study")
    for name, fit in fits.items():
        said(page, f"| {name} | {slope(fit)} | [{fit.seed_low:.2f}, {fit.seed_high:.2f}] |")
    gap, loss = more("pocket_study", "Muon", "AdamW"), at_equal_loss("pocket_study", "Muon", "AdamW")
    dion, close = (more("pocket_study", "Dion 1/16", other) for other in ("AdamW", "Muon"))
    bent = [name for name, fit in fits.items() if "bent" in fit.status]
    assert bent == ["Dion 1/16"]
    ends = {name: (f"{fit.slope_low:.2f}", f"{fit.slope_high:.2f}") for name, fit in fits.items()}
    said(
        page,
        f"by {difference(gap)} over widths and seeds (p = {gap.p:.2g}; {gap.p_holm:.3f} corrected for the three pairs)",
        f"{difference(loss)} at equal validation loss",
        f"{difference(dion)}, p = {dion.p_holm:.3f} corrected. Dion against Muon is not: {difference(close)}, "
        f"p = {close.p_holm:.3f}.",
        f"describe Dion (local slope {ends['Dion 1/16'][0]} at D = 128, {ends['Dion 1/16'][1]} at 1,024; p < .05)",
        f"({' to '.join(ends['Muon'])}, {' to '.join(ends['AdamW'])})",
        f"With one width left out it is {fits['Muon'].loo_low:.2f} to {fits['Muon'].loo_high:.2f};",
    )
    second = study("pocket_study", ("layer=layer_01", "metric=hard_rank"))[0]
    betas = {name.removesuffix(" layer_01"): f"{fit.beta:.2f}" for name, fit in second.items()}
    said(page, f"has beta {betas['AdamW']} (AdamW), {betas['Muon']} (Muon), {betas['Dion 1/16']} (Dion)")


def test_the_token_studys_page_says_what_its_points_say() -> None:
    page, (fits, _) = RESULTS / "pocket_tokens" / "README.md", study("pocket_tokens")
    narrow = (*FOCUS, "width<=1024")
    for name, fit in fits.items():
        ends = f"{fit.slope_low:.2f}, {fit.slope_high:.2f}"
        short = study("pocket_tokens", narrow)[0][name]
        line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {name} |"))
        assert line.startswith(f"| {name} | {slope(fit)} |")
        assert f"| {ends} | {slope(short)} |" in line
    gap, loss = more("pocket_tokens", "Muon", "AdamW"), at_equal_loss("pocket_tokens", "Muon", "AdamW")
    short, earlier = more("pocket_tokens", "Muon", "AdamW", where=narrow), more("pocket_study", "Muon", "AdamW")
    level = more("pocket_tokens", "Muon", "AdamW", "level_difference")
    soft = more("pocket_tokens", "AdamW", "Muon", where=("layer=median", "metric=soft_rank"))
    second = study("pocket_tokens", ("layer=layer_01", "metric=hard_rank"))[0]
    said(
        page,
        f"exceeds AdamW's by {difference(gap, 3)}, p = {gap.p:.2g}; {difference(loss, 3)} at equal loss;",
        f"by {difference(short)}, where that study, at 0.41 M tokens, found {difference(earlier)}.",
        f"hard rank is {100 * np.expm1(level.estimate):.0f} % higher (ln {difference(level)})",
        f"the difference is {difference(soft)}.",
        f"AdamW's slope is {slope(second['AdamW layer_01'])}, Muon's {slope(second['Muon layer_01'])};",
    )


def test_the_zoos_page_says_what_its_points_say() -> None:
    page = RESULTS / "zoo" / "README.md"
    both = [study("zoo", ("layer=median", f"metric={metric}"))[0] for metric in ("hard_rank", "soft_rank")]
    assert set(both[0]) == set(ZOO)
    for name in ZOO:
        cells = [slope(fits[name]) + ", bent" * ("bent" in fits[name].status) for fits in both]
        label = "Muon, a matrix per head" if name == "Muon heads" else name
        line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {label} | "))
        assert line.startswith(f"| {label} | {cells[0]} | {cells[1]} |")
        if name != "AdamW":
            assert line.endswith(f"| {difference(more('zoo', name, 'AdamW'))} |"), line
    pairs = [c for c in study("zoo")[1] if c.kind == "slope_difference"]
    best = min(pairs, key=lambda c: c.p)
    said(page, f"(smallest p over the pairs {best.p:.3f}, {best.p_holm:.2g} corrected)")


@pytest.mark.parametrize("name", ["pocket_study", "pocket_tokens"])
def test_committed_comparisons_are_those_of_the_points(name: str) -> None:
    with (RESULTS / name / "comparisons.csv").open() as file:
        rows = {
            (row["kind"], row["a"], row["b"], row["optimizer"]): row
            for row in csv.DictReader(file)
            if (row["bucket"], row["layer"], row["metric"]) == ("tail", "median", "hard_rank")
        }
    found = [c for c in study(name, variations=True)[1] if c.kind in ("slope_difference", "level_difference")]
    assert found
    for c in found:
        row = rows[c.kind, c.a, c.b, ""]
        for key in ("estimate", "ci_low", "ci_high", "p", "p_holm"):
            # scipy's Student quantiles differ by 2e-11 between 1.15 and 1.17
            assert getattr(c, key) == pytest.approx(float(row[key] or "nan"), rel=1e-6, abs=1e-8, nan_ok=True)
