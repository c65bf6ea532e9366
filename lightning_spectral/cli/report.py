"""``lightning-spectral report RUNS|points.csv``: one offline page with every figure, table and warning."""

from __future__ import annotations

import argparse
import shlex

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser, at_least
from lightning_spectral.text import CommandError

_ELSEWHERE = {
    **dict.fromkeys(("--html", "--output", "-o"), "the page and its files are written to a folder, `--out DIR`."),
    "--dark": "the page follows the reader's screen.",
    "--open": "open `report.html` in the folder `--out` with a browser.",
}


def main(argv: list[str]) -> int:
    """Write the report, and TensorBoard events if asked."""
    parser = VerbParser(
        "report",
        description="One offline HTML page, the same figures as SVG files, the same numbers as CSV.",
        elsewhere={**inputs.ELSEWHERE, **_ELSEWHERE},
    )
    inputs.add_input_options(parser)
    parser.add_argument("--out", default="out/report", metavar="DIR", help="where to write (default: out/report)")
    parser.add_argument("--title", default="Spectral scaling report")
    parser.add_argument("--site", default="post", help="site of the figures: post or pre (default: post)")
    parser.add_argument("--match-on", choices=["loss", "step", "tokens"], default="loss")
    parser.add_argument(
        "--tolerance", type=at_least(0, float), default=0.02, help="nats within which a loss counts as reached"
    )
    parser.add_argument("--png", action="store_true", help="also write the figures as PNG")
    parser.add_argument("--pdf", action="store_true", help="also write the figures as PDF")
    parser.add_argument("--latex", action="store_true", help="also write the tables as LaTeX (tabular)")
    parser.add_argument(
        "--to-tensorboard", metavar="DIR", help="also write beta(t) with its band as TensorBoard events"
    )
    options = parser.parse_args(argv)
    with parser.own_words():
        return _report(options, argv)


def _report(options: argparse.Namespace, argv: list[str]) -> int:
    """Draw what was read."""
    from lightning_spectral.analysis.conditions import of_measured
    from lightning_spectral.analysis.study import is_table

    folder = inputs.out_folder(options.out)
    inputs.out_folder(options.to_tensorboard, "--to-tensorboard")
    assert folder is not None
    if folder.suffix in (".html", ".htm", ".pdf") and not folder.exists():
        raise CommandError(f"`--out {folder}` names a page, and a folder is written: give e.g. `--out {folder.stem}`.")
    inputs.refuse_missing(options.inputs)
    tables = [path for path in options.inputs if is_table(path)]
    inputs.refuse_unused(options, tables_given=bool(tables))
    if options.by and not tables:
        raise CommandError("a report groups runs by their labels; --by is for tables.")
    if tables and options.site != "post":
        raise CommandError(
            "`--site` is for run folders, and tables were given: leave it out, or use `--where site=pre`."
        )
    if not tables and (measured := inputs.guarded(lambda: of_measured(options.where))):
        raise CommandError(f"a report shows all that was measured: `--where {measured[0]}` is for fit and compare.")

    from lightning_spectral.report.page import write_report
    from lightning_spectral.report.scene import ReportData

    scene: ReportData = inputs.guarded(lambda: scene_of_tables(options, tables) if tables else make_scene(options))
    command = shlex.join(["lightning-spectral", "report", *argv])
    also = [name for name in ("png", "pdf", "latex") if getattr(options, name)]
    written = write_report(scene, folder, title=options.title, command=command, also=also)
    for warning in written.warnings:
        print(f"WARNING {warning}")
    if options.to_tensorboard:
        from lightning_spectral.report.to_tensorboard import write_events

        print(f"wrote {write_events(scene.trajectories, options.to_tensorboard)} TensorBoard series")
    print(
        f"wrote {written.page} ({written.page.stat().st_size / 1e6:.1f} MB), {len(written.figures)} figures, ", end=""
    )
    print(f"{len(written.tables)} tables in {folder}")
    return 0


def scene_of_tables(options: argparse.Namespace, files: list[str]):  # type: ignore[no-untyped-def]  # lazy class
    """What can be shown of tables of points."""
    from lightning_spectral.analysis.cells import Sheet, read_sheet
    from lightning_spectral.analysis.published import (
        MEASURED,
        kind_of,
        last_points,
        named_as,
        paths_of,
        read_curves,
        read_estimates,
        read_paths,
    )
    from lightning_spectral.analysis.runs import Problem, RunSet
    from lightning_spectral.analysis.study import comparisons_of, fit_points
    from lightning_spectral.analysis.tables import as_of_runs
    from lightning_spectral.report.scene import ReportData

    if len(files) < len(options.inputs):
        raise CommandError(f"give tables or run folders, not {len(options.inputs)} inputs of both kinds.")
    kinds = [(kind_of(sheet), sheet) for sheet in map(read_sheet, files)]

    def of(kind: str) -> list[Sheet]:
        return [sheet for own, sheet in kinds if own == kind]

    problems: list[Problem] = []
    curves = [curve for file in of("curves") for curve in read_curves(file, options.where, problems)]
    paths = [path for file in of("betas_over_training") for path in read_paths(file, options.where)]
    estimates = [own for file in of("estimates") for own in read_estimates(file, options.where)]
    if of("points"):
        table, of_points = inputs.read_tables(options, of("points"))
        problems += of_points
        table = as_of_runs(table, options.y)
    else:
        most = max((len(curve.series) - 3 for curve in curves), default=1)
        curves = named_as(curves, most, ())
        table = last_points(curves, ("optimizer", *(f"label_{k}" for k in range(1, most))))
    num_labels = len(table.by) - len(MEASURED) - 1  # and the layer
    known = list(dict.fromkeys(point.series[:num_labels] for point in table.points))
    curves, paths = named_as(curves, num_labels, known), named_as(paths, num_labels, known)
    estimates = named_as(estimates, num_labels, known)
    fitted = fit_points(table, method=options.method, problems=problems)
    paths += paths_of(curves)
    compared = tuple(comparisons_of(fitted))
    return ReportData(
        RunSet((), ()), fitted, compared, tuple(paths), (), options.site, options.last, tuple(curves), tuple(estimates)
    )


def make_scene(options: argparse.Namespace):  # type: ignore[no-untyped-def]  # a lazily imported class
    """Read the runs and compute everything that the figures show."""
    from lightning_spectral.analysis.matched import compare_matched, matched_pairs
    from lightning_spectral.analysis.study import comparisons_of
    from lightning_spectral.analysis.trajectory import SMOOTHING_WINDOWS, beta_trajectories
    from lightning_spectral.report.scene import ReportData

    fitted, runs = inputs.fit_runs(options, None)
    if not runs.runs:
        reasons = "; ".join(problem.message for problem in runs.problems[:3])
        raise CommandError(f"no run could be read: {reasons}")
    if not any(options.site in run.sites for run in runs.runs):
        raise CommandError(f"no run measured `--site {options.site}`; they have {', '.join(runs.runs[0].sites)}.")
    pairs, _ = matched_pairs(
        runs, axis=options.match_on, tolerance=options.tolerance, metrics=options.metrics, site=options.site
    )
    comparisons = (*comparisons_of(fitted), *compare_matched(pairs))
    smoothing = min(SMOOTHING_WINDOWS, options.last)
    paths = tuple(beta_trajectories(runs, metrics=options.metrics, smoothing=smoothing))
    return ReportData(runs, fitted, comparisons, paths, tuple(pairs), options.site, options.last)
