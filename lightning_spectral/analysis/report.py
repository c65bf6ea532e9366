"""One offline HTML page, the same figures as files, the same numbers as CSV."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jinja2
import matplotlib
import numpy
import scipy
from markupsafe import Markup

from lightning_spectral.analysis.compare import Comparison, comparison_table
from lightning_spectral.analysis.figures import FIGURES, draw_all, inline, png_of, svg_of
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.health import FLAG_TEXT
from lightning_spectral.analysis.matched import matched_table
from lightning_spectral.analysis.points import LAYER_MEDIAN
from lightning_spectral.analysis.report_template import TEMPLATE
from lightning_spectral.analysis.runs import run_summary
from lightning_spectral.analysis.scene import Drawing, Scene, beta_text, joined
from lightning_spectral.analysis.style import BUCKET_NAMES, METRIC_NAMES
from lightning_spectral.analysis.tidy import fit_table, points_table, write_atomic, write_csv

REPORT: Final = "report.html"
_SHOWN_KINDS: Final = ("slope_difference", "slope_difference_paired", "level_difference", "crossover_width")
_FEW_WIDTHS: Final = 4


@dataclass(frozen=True)
class Written:
    """Files of one report.

    Attributes:
        page: The HTML page.
        figures: One SVG (and PNG, if asked for) a figure.
        tables: CSV files.
        warnings: What the page warns of.
    """

    page: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    warnings: tuple[str, ...]


def write_report(
    scene: Scene, folder: str | Path, *, title: str = "Spectral scaling report", command: str = "", png: bool = False
) -> Written:
    """Draw everything and write the page last: an old page stays whole until the new one is.

    Args:
        scene: What to show.
        folder: Where to write ``report.html``, ``figures/`` and the CSV files.
        title: Heading of the page.
        command: Command line, for the provenance.
        png: Also write PNG files.
    """
    folder = Path(folder)
    drawings = draw_all(scene)
    figures: list[Path] = []
    pictures: dict[str, str] = {}
    for key, drawing in drawings.items():
        if drawing.figure is None:
            continue
        pictures[key] = svg_of(drawing.figure, key)
        figures.append(write_atomic(folder / "figures" / f"{key}.svg", pictures[key].encode()))
        if png:
            figures.append(write_atomic(folder / "figures" / f"{key}.png", png_of(drawing.figure)))
    tables = write_tables(scene, folder)
    found = warnings_of(scene)
    page = render(scene, drawings, pictures, found, title, command)
    return Written(write_atomic(folder / REPORT, page.encode()), tuple(figures), tuple(tables), tuple(found))


def write_tables(scene: Scene, folder: Path) -> list[Path]:
    """Every number of the page as CSV."""
    by = scene.fitted.table.by
    paths = [
        [*path.series, int(step), beta, low, high]
        for path in scene.trajectories
        for step, beta, low, high in zip(path.steps, path.beta, path.low, path.high, strict=True)
    ]
    summaries = [run_summary(run) for run in scene.runs.runs]
    return [
        write_csv(folder / "fits.csv", *fit_table(by, scene.fitted.fits)),
        write_csv(folder / "points.csv", *points_table(scene.fitted.table)),
        write_csv(folder / "comparisons.csv", *comparison_table(by, scene.comparisons)),
        write_csv(
            folder / "beta_over_training.csv",
            [*(name for name in by if name != "layer"), "step", "beta", "ci_low", "ci_high"],
            [[float(c) if isinstance(c, numpy.floating) else c for c in row] for row in paths],
        ),
        write_csv(folder / "matched_loss.csv", *matched_table(scene.pairs)),
        write_csv(folder / "runs.csv", list(summaries[0]), [list(row.values()) for row in summaries]),
        write_csv(
            folder / "problems.csv",
            ["source", "kind", "refused", "message"],
            [[p.source, p.kind, p.refused, p.message] for p in scene.fitted.problems],
        ),
    ]


def warnings_of(scene: Scene) -> list[str]:
    """What nobody may miss: bad inputs, few widths or seeds, wide intervals, duplicates, the null."""
    out = [
        problem.message for problem in scene.fitted.problems if problem.kind == "duplicate_values" or problem.refused
    ]
    quiet = [problem for problem in scene.fitted.problems if problem.kind != "duplicate_values" and not problem.refused]
    out += [problem.message for problem in quiet[:6]]
    if len(quiet) > 6:
        out.append(f"{len(quiet) - 6} more problems of the inputs are listed in problems.csv.")
    out += missing_runs(scene)
    medians = [fit for fit in scene.fitted.fits if fit.series[-1] == LAYER_MEDIAN]
    flags: dict[str, int] = {}
    for fit in medians:
        for flag in fit.status.split("+"):
            flags[flag] = flags.get(flag, 0) + 1
    for flag, count in flags.items():
        if flag in FLAG_TEXT:
            out.append(f"{flag} ({count} of {len(medians)} fits): {FLAG_TEXT[flag]}.")
        elif flag.startswith("refused:"):
            out.append(f"{count} of {len(medians)} fits refused: {flag.removeprefix('refused:').replace('_', ' ')}.")
    fitted = [fit for fit in medians if not fit.refused]
    wide = [fit for fit in fitted if fit.wide]
    if wide:
        out.append(
            f"Wide interval (half-width of beta above 0.3, or none at all) in {len(wide)} of {len(fitted)} fits: "
            "compare optimizers by their difference and its interval, not by two point estimates."
        )
    if fitted and min(fit.num_widths for fit in fitted) < _FEW_WIDTHS:
        out.append(f"Few widths: {min(fit.num_widths for fit in fitted)}. An interval over so few says little.")
    if fitted and max(fit.num_seeds for fit in fitted) < 2:
        out.append("One seed a width: the intervals are over widths, not over seeds.")
    out += _level_warnings(scene)
    out += _null_warnings(scene)
    return out


def _level_warnings(scene: Scene) -> list[str]:
    return [
        f"A slope is not a level: on {_focus(scene)} the hard-rank lines of {c.a} and {c.b} cross at "
        f"D = {c.estimate:.0f}, inside the measured widths."
        for c in scene.compared("crossover_width", scene.focus, "hard_rank")
        if math.isfinite(c.estimate) and not c.note
    ][:3]


def _null_warnings(scene: Scene) -> list[str]:
    fits = [scene.fit(key, scene.focus, "hard_rank") for key in scene.series]
    known = [fit for fit in fits if fit is not None and math.isfinite(fit.null_beta)]
    if not known:
        return ["No null: the runs have no window at step 0 or 1, so the slope of the untrained network is not known."]
    null = sum(fit.null_beta for fit in known) / len(known)
    below = [fit for fit in known if fit.ci_high < fit.null_beta]
    text = f"The untrained network already has beta = {null:.2f} ({_focus(scene)} hard rank)"
    if len(below) == len(known):
        text += "; every trained slope lies below it: training takes slope away, and optimizers differ in how much"
    return [text + "."]


def missing_runs(scene: Scene) -> list[str]:
    """Widths and seeds that some series have and others lack."""
    seeds = sorted({run.seed for run in scene.runs.runs})
    out = []
    for key in scene.series:
        have = {(run.width, run.seed) for run in scene.groups[key]}
        lack = [
            f"D = {width}" + (f" seed {seed}" if seed else "")
            for width in scene.widths
            for seed in seeds
            if (width, seed) not in have
        ]
        if lack:
            shown = ", ".join(lack[:6]) + (f" and {len(lack) - 6} more" if len(lack) > 6 else "")
            out.append(f"{scene.looks[key].name} has no run at {shown}, where others have one.")
    return out


def leads_of(scene: Scene) -> list[str]:
    """The first sentences: the exponents of the headline bucket, and the difference clearest against its noise."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    what = f"{_focus(scene)} {METRIC_NAMES.get(metric, metric)}"
    fits = [(scene.looks[key].name, scene.fit(key, scene.focus, metric)) for key in scene.series]
    parts = [f"{name} {beta_text(fit)}" for name, fit in fits if fit is not None and not fit.refused]
    if not parts:
        return [f"No exponent of {what} could be fitted: {joined(sorted({fit.status for _, fit in fits if fit}))}."]
    return [f"{what} grows with width as D^beta: {joined(parts)}.", comparison_headline(scene)]


def comparison_headline(scene: Scene) -> str:
    """Which slopes are separated, with interval and p."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    found = [c for c in scene.compared("slope_difference", scene.focus, metric) if math.isfinite(c.p)]
    if not found:
        return "No two series could be compared."
    best = min(found, key=lambda c: c.p)
    a, b, sign = (best.a, best.b, 1) if best.estimate >= 0 else (best.b, best.a, -1)
    low, high = sorted((sign * best.ci_low, sign * best.ci_high))
    gap = f"by {sign * best.estimate:.2f} [{low:.2f}, {high:.2f}], p = {best.p:.2g}"
    separated = sum(c.separated for c in found)
    if not best.separated:
        return f"No slopes are separated; the clearest gap, {a} above {b} {gap}, may be noise."
    more = f" ({separated} of {len(found)} pairs are separated, uncorrected)" if len(found) > 1 else ""
    return f"The slope of {a} exceeds that of {b} {gap}{more}."


def render(
    scene: Scene,
    drawings: dict[str, Drawing],
    pictures: dict[str, str],
    found: Sequence[str],
    title: str,
    command: str,
) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    summaries = [run_summary(run) for run in scene.runs.runs]
    versions = {f"{name} {version}" for run in scene.runs.runs for name, version in run.info.versions.items()}
    seeds = {run.seed for run in scene.runs.runs if run.seed}
    steps = sorted({step for point in scene.fitted.table.points for step in point.steps})
    return environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=" | ".join(
            [
                f"{len(scene.runs.runs)} runs",
                f"{len(scene.widths)} FFN widths, {scene.widths[0]} to {scene.widths[-1]}",
                f"{len(seeds) or 'unknown'} seed(s)",
                f"site: {scene.site}",
                f"windows at steps {steps[0]} to {steps[-1]}, median per layer, then over layers",
            ]
        ),
        leads=leads_of(scene),
        warnings=found,
        cards=_cards(scene),
        sections=[
            {
                "key": key,
                "title": FIGURES[key].title,
                "headline": drawing.headline,
                "note": drawing.note,
                "svg": Markup(inline(pictures[key], key)) if key in pictures else "",
            }
            for key, drawing in drawings.items()
        ],
        table_note="Over widths: Student's t on one point a width (seeds of one width averaged first). Over seeds: "
        "one slope a seed. The range of beta with one width left out shows what hangs on a single width.",
        fit_names=[name for name in scene.fitted.table.by if name not in ("layer", "site")],
        fits=_fit_rows(scene),
        focus=_focus(scene),
        comparison_headline=comparison_headline(scene),
        comparisons=_comparison_rows(scene),
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=_version(),
        numpy=numpy.__version__,
        scipy=scipy.__version__,
        matplotlib=matplotlib.__version__,
        run_versions=", ".join(sorted(versions)) or "unknown",
        missing=missing_runs(scene),
        run_names=list(summaries[0]),
        hash_column=list(summaries[0]).index("sha256"),
        runs=[[str(cell) for cell in row.values()] for row in summaries],
    )


def _cards(scene: Scene) -> list[dict[str, Any]]:
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    rows = {fit.series: row for row, fit in enumerate(scene.fitted.fits)}
    out = []
    for key in scene.series:
        fit, look = scene.fit(key, scene.focus, metric), scene.looks[key]
        if fit is not None:
            card = _numbers(fit) | {"name": look.name, "color": look.text_color, "row": rows[fit.series]}
            seeds = f", {fit.num_seeds} seeds" if fit.num_seeds > 1 else ""
            card["ci"] = f"{card['ci_low']} to {card['ci_high']}"
            card["what"] = f"{_focus(scene)} {METRIC_NAMES.get(metric, metric)}"
            card["n"] = f"{fit.num_widths} widths{seeds}" if not fit.refused else fit.status
            out.append(card)
    return out


def _fit_rows(scene: Scene) -> list[dict[str, Any]]:
    by = scene.fitted.table.by
    out = []
    last = None
    order = {key: k for k, key in enumerate(scene.series)}
    labels = len(scene.series[0])
    numbered = [(row, fit) for row, fit in enumerate(scene.fitted.fits) if fit.series[-1] == LAYER_MEDIAN]
    for row, fit in sorted(numbered, key=lambda pair: order[pair[1].series[:labels]]):
        cells = dict(zip(by, fit.series, strict=True))
        if cells["site"] != scene.site:
            continue
        shown = {name: cells[name] for name in by if name not in ("layer", "site")}
        look = scene.looks[fit.series[:labels]]
        shown |= {
            "bucket": BUCKET_NAMES.get(cells["bucket"], cells["bucket"]),
            "metric": METRIC_NAMES.get(cells["metric"], cells["metric"]),
        }
        out.append(
            _numbers(fit)
            | {
                "cells": list(shown.values()),
                "color": look.color,
                "row": row,
                "new": cells["optimizer"] != last,
                "n": str(fit.n),
                "method": fit.method,
                "status": fit.status.replace("_", " ").replace("+", " + "),
                "widths": f"{fit.x_min:g} to {fit.x_max:g} ({fit.num_widths})",
            }
        )
        last = cells["optimizer"]
    return out


def _numbers(fit: PowerLawFit) -> dict[str, Any]:
    return {
        "beta": _text(fit.beta),
        "ci_low": _text(fit.ci_low),
        "ci_high": _text(fit.ci_high),
        "ln_a": _text(fit.ln_a),
        "r2": _text(fit.r2),
        "null": _text(fit.null_beta),
        "seeds": f"{_text(fit.seed_low)} to {_text(fit.seed_high)}" if math.isfinite(fit.seed_low) else "-",
        "loo": f"{_text(fit.loo_low)} to {_text(fit.loo_high)}" if math.isfinite(fit.loo_low) else "-",
        "wide": not fit.refused and fit.wide,
    }


def _comparison_rows(scene: Scene) -> list[dict[str, Any]]:
    wanted = {"bucket": scene.focus, "site": scene.site, "layer": LAYER_MEDIAN}
    kinds = {*_SHOWN_KINDS, "matched_loss_slope", "effect"}
    return [
        _comparison_row(row, c)
        for row, c in enumerate(scene.comparisons)
        if c.kind in kinds and all(c.where.get(name, value) == value for name, value in wanted.items())
    ]


def _comparison_row(row: int, c: Comparison) -> dict[str, Any]:
    digits = 0 if c.kind == "crossover_width" and c.estimate >= 10 else 3
    ci = f"{_text(c.ci_low, digits)} to {_text(c.ci_high, digits)}" if math.isfinite(c.ci_low) else "-"
    return {
        "a": c.a,
        "b": c.b,
        "metric": METRIC_NAMES.get(c.where.get("metric", ""), ""),
        "kind": c.kind.replace("_", " "),
        "estimate": _text(c.estimate, digits),
        "ci": ci,
        "p": _text(c.p),
        "status": c.status.replace("_", " "),
        "note": c.note,
        "row": row,
    }


def _text(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _focus(scene: Scene) -> str:
    return BUCKET_NAMES.get(scene.focus, scene.focus)


def _version() -> str:
    try:
        return metadata.version("lightning-spectral")
    except metadata.PackageNotFoundError:
        return "(not installed)"
