"""One offline HTML page, the same figures as files, the same numbers as CSV."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jinja2
import matplotlib
import numpy
import scipy
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lightning_spectral.analysis.caveats import caveats_of, median_fits, missing_runs
from lightning_spectral.analysis.compare import comparison_table
from lightning_spectral.analysis.health import FLAG_TEXT
from lightning_spectral.analysis.learning_rates import learning_rate_table
from lightning_spectral.analysis.matched import matched_table
from lightning_spectral.analysis.tidy import fit_table, points_table, write_atomic, write_csv
from lightning_spectral.report.dark import palette, themed, variable
from lightning_spectral.report.figures import FIGURES, draw_all, inline, picture_of, svg_of
from lightning_spectral.report.figures_run import sweep_command
from lightning_spectral.report.numbers import rows_of, thinned, views_over_steps
from lightning_spectral.report.rows import (
    comparison_headline,
    comparison_rows,
    fit_rows,
    focus_name,
    headline_name,
    headline_rows,
    run_summary,
    summary_sentences,
)
from lightning_spectral.report.scene import ReportData, ReportFigure
from lightning_spectral.report.template import TEMPLATE
from lightning_spectral.text import visible
from lightning_spectral.text.tables import Column, Table
from lightning_spectral.text.tables import render as render_table

REPORT: Final = "report.html"


@dataclass(frozen=True)
class Written:
    """Files of one report.

    Attributes:
        page: The HTML page.
        figures: One SVG (and PNG or PDF, if asked for) a figure.
        tables: CSV files (and LaTeX, if asked for).
        warnings: What the page warns of.
    """

    page: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]
    warnings: tuple[str, ...]


def write_report(
    scene: ReportData,
    folder: str | Path,
    *,
    title: str = "Spectral scaling report",
    command: str = "",
    also: Collection[str] = (),
) -> Written:
    """Draw everything and write the page last: an old page stays whole until the new one is.

    Args:
        scene: What to show.
        folder: Where to write ``report.html``, ``figures/`` and the CSV files.
        title: Heading of the page.
        command: Command line, for the provenance.
        also: Further formats: ``png`` and ``pdf`` of every figure, ``latex`` of every table.
    """
    folder = Path(folder)
    drawings = draw_all(scene)
    figures: list[Path] = []
    pictures: dict[str, str] = {}
    for key, drawing in drawings.items():
        if drawing.figure is None:
            continue
        pictures[key] = svg_of(drawing.figure, key)
        numbers = [[row.panel, row.series, row.x, row.y] for row in rows_of(drawing.figure)]
        write_csv(folder / "figures" / f"{key}.csv", ["panel", "series", "x", "value"], numbers)
        figures.append(write_atomic(folder / "figures" / f"{key}.svg", pictures[key].encode()))
        figures += [
            write_atomic(folder / "figures" / f"{key}.{kind}", picture_of(drawing.figure, kind))
            for kind in ("png", "pdf")
            if kind in also
        ]
    tables = write_tables(scene, folder, latex="latex" in also)
    found = warnings_of(scene)
    page = render(scene, drawings, pictures, found, title, command)
    return Written(write_atomic(folder / REPORT, visible(page).encode()), tuple(figures), tuple(tables), tuple(found))


def write_tables(scene: ReportData, folder: Path, *, latex: bool = False) -> list[Path]:
    """Every number of the page as CSV; with ``latex`` each table as a ``tabular``, too."""
    written = []
    for name, (header, rows) in tables_of(scene).items():
        written.append(write_csv(folder / f"{name}.csv", header, rows))
        if latex:
            written.append(write_atomic(folder / f"{name}.tex", latex_of(header, rows).encode()))
    return written


def latex_of(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as LaTeX: four digits of a number, no column that is empty all the way down."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else visible(str(value))

    cells = [[float(value) if isinstance(value, numpy.floating) else value for value in row] for row in rows]
    kept = [k for k in range(len(header)) if not cells or any(row[k] != "" and row[k] == row[k] for row in cells)]
    columns = [Column(header[k], text) for k in kept]
    return render_table(Table(columns, [[row[k] for k in kept] for row in cells]), "latex") + "\n"


def tables_of(scene: ReportData) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows of every table, by the name of its file."""
    by = scene.fitted.table.by
    problems = [[p.source, p.kind, p.refused, p.message] for p in scene.fitted.problems]
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "fits": fit_table(by, scene.fitted.fits),
        "points": points_table(scene.fitted.table),
        "comparisons": comparison_table(by, scene.comparisons),
        "problems": (["source", "kind", "refused", "message"], problems),
    }
    if scene.trajectories:
        paths = [
            [*path.series, int(step), *map(float, numbers)]
            for path in scene.trajectories
            for step, *numbers in zip(path.steps, path.beta, path.low, path.high, strict=True)
        ]
        header = [*(name for name in by if name != "layer"), "step", "beta", "ci_low", "ci_high"]
        tables["beta_over_training"] = (header, paths)
    if summaries := [run_summary(run) for run in scene.runs.runs]:
        tables["learning_rates"] = learning_rate_table(scene.learning_rate_sweeps, scene.fitted.table)
        tables["matched_loss"] = matched_table(scene.pairs)
        tables["runs"] = (list(summaries[0]), [list(row.values()) for row in summaries])
    return tables


def warnings_of(scene: ReportData) -> list[str]:
    """Warnings: bad inputs, few widths or seeds, wide intervals, duplicates, the null."""
    out = [
        problem.message for problem in scene.fitted.problems if problem.kind == "duplicate_values" or problem.refused
    ]
    quiet = [problem for problem in scene.fitted.problems if problem.kind != "duplicate_values" and not problem.refused]
    out += [problem.message for problem in quiet[:6]]
    if len(quiet) > 6:
        out.append(f"{len(quiet) - 6} more problems of the inputs are listed in problems.csv.")
    missing = _missing(scene)
    out += missing[:3]
    if len(missing) > 3:
        out.append(
            f"{len(missing) - 3} more series lack runs that others have: they are listed at the end of the page."
        )
    medians = median_fits(scene.fitted)
    flags: dict[str, int] = {}
    for fit in medians:
        for flag in fit.status.split("+"):
            flags[flag] = flags.get(flag, 0) + 1
    for flag, count in flags.items():
        if flag in FLAG_TEXT:
            out.append(f"{flag} ({count} of {len(medians)} fits): {FLAG_TEXT[flag]}.")
        elif flag.startswith("refused:") and len(scene.widths) > 1:  # one width: the headline says it
            out.append(f"{count} of {len(medians)} fits refused: {flag.removeprefix('refused:').replace('_', ' ')}.")
    out += caveats_of(scene.fitted, scene.runs if scene.runs.runs else None, listed=False)
    out += _level_warnings(scene)
    return [*out, *_null_warnings(scene)]


def _level_warnings(scene: ReportData) -> list[str]:
    out = []
    for c in scene.compared("crossover_width", scene.focus, "hard_rank"):
        a, b = scene.sides(c)
        if math.isfinite(c.estimate) and not c.note:
            out.append(
                f"A slope is not a level: on {focus_name(scene)} the hard-rank lines of {a} and {b} cross at "
                f"D = {c.estimate:.0f}, inside the measured widths."
            )
    return out[:3]


def _null_warnings(scene: ReportData) -> list[str]:
    fits = [scene.fit(key, scene.focus, "hard_rank") for key in scene.series]
    known = [fit for fit in fits if fit is not None and math.isfinite(fit.null_beta)]
    if not known:
        return []
    null = sum(fit.null_beta for fit in known) / len(known)
    below = [fit for fit in known if fit.ci_high < fit.null_beta]
    text = f"The untrained network already has beta = {null:.2f} ({focus_name(scene)} hard rank)"
    if len(below) == len(known):
        text += "; every trained slope lies below it: training takes slope away, and optimizers differ in how much"
    return [text + "."]


def _missing(scene: ReportData) -> list[str]:
    if not scene.runs.runs:
        return []
    return missing_runs(
        {scene.looks[key].name: [(run.width, run.seed) for run in scene.groups[key]] for key in scene.series}
    )


def render(
    scene: ReportData,
    drawings: dict[str, ReportFigure],
    pictures: dict[str, str],
    found: Sequence[str],
    title: str,
    command: str,
) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    summaries = [run_summary(run) for run in scene.runs.runs]
    versions = {f"{name} {version}" for run in scene.runs.runs for name, version in run.info.versions.items()}
    sections = _sections(scene, drawings, pictures)
    headline, fits = headline_rows(scene), fit_rows(scene)
    inks = [variable(row["color"], "text") for row in headline] + [variable(row["color"]) for row in fits]
    return environment.from_string(TEMPLATE).render(
        title=title,
        ink=variable,
        prose=prose,
        palette=palette([*inks, *(str(view["svg"]) for section in sections for view in section["views"])]),
        subtitle=_subtitle(scene),
        leads=summary_sentences(scene),
        warnings=found,
        headline=headline,
        headline_what=headline_name(scene),
        reference=scene.looks[scene.series[0]].name,
        before_step=_before_step(scene),
        sections=sections,
        table_note="The interval is over widths, and over seeds where there are any (mixed model). Seeds: one slope "
        "a seed. The range of beta with one width left out shows what hangs on a single width; that over the layers, "
        "what the median hides. Before decay: the last windows at the full learning rate, same method.",
        fit_names=[name for name in scene.fitted.table.by if name not in ("layer", "site")],
        fits=fits,
        focus=focus_name(scene),
        comparison_headline=comparison_headline(scene),
        comparisons=comparison_rows(scene) if len(scene.runs.runs) != 1 else [],
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=_version(),
        numpy=numpy.__version__,
        scipy=scipy.__version__,
        matplotlib=matplotlib.__version__,
        run_versions=", ".join(sorted(versions)) or "unknown",
        missing=_missing(scene),
        any_fit=bool(scene.fitted.fits) and not (len(scene.runs.runs) == 1 and not scene.any_fit),
        next_command=sweep_command(scene.runs.runs[0]) if len(scene.runs.runs) == 1 else "",
        one_run=len(scene.runs.runs) == 1,
        run_names=list(summaries[0]) if summaries else [],
        hash_column=list(summaries[0]).index("sha256") if summaries else -1,
        runs=[[str(cell) for cell in row.values()] for row in summaries],
    )


def prose(text: str) -> Markup:
    """A sentence as HTML: words in backticks are code, and a number is not torn from its per cent sign."""
    kept = str(escape(text)).replace(" %", "\u00a0%")
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", kept))  # noqa: S704 - escaped


def _sections(scene: ReportData, drawings: dict[str, ReportFigure], pictures: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "title": FIGURES[key].title,
            "headline": drawing.headline,
            "note": drawing.note,
            "numbers": number_rows(drawing.figure),
            "views": views_of(key, pictures[key], drawing.figure, scene.tokens_per_step) if key in pictures else [],
        }
        for key, drawing in drawings.items()
        if key in pictures or len(scene.runs.runs) != 1
    ]


def views_of(key: str, picture: str, figure: Figure | None, tokens_per_step: float | None) -> list[dict[str, Any]]:
    """The figure, and the same over other axes of training."""
    views = [{"name": "steps", "svg": Markup(themed(inline(picture, key)))}]  # noqa: S704 - drawn by us
    found = views_over_steps(figure, key, tokens_per_step) if figure is not None else {}
    for what in sorted(found):
        svg = Markup(themed(inline(found[what], f"{key}-{what.replace(', ', '-')}")))  # noqa: S704 - drawn by us
        views += [{"name": what, "svg": svg}]
    return views


def number_rows(figure: Figure | None) -> list[list[str]]:
    """Panel, series, x and value of what a figure shows, as texts; evenly thinned where there are very many."""
    rows = thinned(rows_of(figure)) if figure is not None else []
    return [[row.panel, row.series, "" if math.isnan(row.x) else f"{row.x:.6g}", f"{row.y:.4g}"] for row in rows]


def _subtitle(scene: ReportData) -> str:
    points = scene.fitted.table.points
    seeds = {point.seed for point in points if point.seed}
    steps = sorted({step for point in points for step in point.steps})
    runs = len(scene.runs.runs)
    what = f"{runs} run{'s' * (runs > 1)}" if runs else f"a table of {len(points)} points"
    parts = [what] if points or runs else ["a table of exponents"]
    if len(scene.widths) > 1:
        parts.append(f"{len(scene.widths)} FFN widths, {scene.widths[0]} to {scene.widths[-1]}")
    elif scene.widths:
        parts.append(f"FFN width {scene.widths[0]}")
    parts += [f"{len(seeds) or 'unknown'} seed{'s' * (len(seeds) != 1)}", f"site: {scene.site}"]
    if steps:
        when = f"window at step {steps[0]}" if len(steps) == 1 else f"windows at steps {steps[0]} to {steps[-1]}"
        parts.append(f"{when}, median per layer, then over layers")
    return " | ".join(parts)


def _before_step(scene: ReportData) -> str:
    steps = {int(fit.before_step) for fit in scene.fitted.fits if math.isfinite(fit.before_step)}
    return f" (step {', '.join(map(str, sorted(steps)))})" if steps else ""


def _version() -> str:
    try:
        return metadata.version("lightning-spectral")
    except metadata.PackageNotFoundError:
        return "(not installed)"
