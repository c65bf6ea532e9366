"""``lightning-spectral fit RUNS|points.csv``: the exponent of every series, with what qualifies it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.text import tables
from lightning_spectral.text.tables import aside

if TYPE_CHECKING:
    from lightning_spectral.analysis.fits import PowerLawFit
    from lightning_spectral.analysis.study import Fitted

_EPILOG = """\
examples:
  lightning-spectral fit out/study --out out/fits
  lightning-spectral fit points.csv --x ffn_hidden_dim --y value --by optimizer,bucket,metric --out out/fits

With one run a width the interval is Student's t over WIDTHS and says nothing about seeds; with several seeds it is over
widths AND seeds (a mixed model: level and slope a seed, an effect a width). What else must be read with a slope stands
below the table: the state before the learning-rate decay, learning rates, the null."""


def main(argv: list[str]) -> int:
    """Fit, print a table, and write ``fits.csv`` and ``points.csv`` if asked."""
    parser = VerbParser(
        "fit",
        description="Fit value = A * width ** beta per series.",
        epilog=_EPILOG,
    )
    inputs.add_input_options(parser)
    parser.add_argument(
        "--model",
        choices=["power", "bent", "floor", "all"],
        default="power",
        help="also fit y = E + A x^-a (floor), a parabola in ln-ln (bent), or all, and compare them by AICc",
    )
    parser.add_argument("--out", metavar="DIR", help="write fits.csv and points.csv there")
    options = parser.parse_args(argv)
    with parser.own_words():
        return _fit(options)


def _fit(options: argparse.Namespace) -> int:
    """Fit what was read, and print it."""
    folder = inputs.out_folder(options.out)
    fitted, runs = inputs.load(options)

    from lightning_spectral.analysis.caveats import caveats_of, median_fits
    from lightning_spectral.analysis.tidy import fit_table, points_table, write_csv

    by = fitted.table.by
    shown = median_fits(fitted)
    # columns that would be empty all the way down are left out
    before = any(fit.before_beta == fit.before_beta for fit in shown)
    seeds = any(fit.seed_low == fit.seed_low for fit in shown)
    header = [*(name for name in by if name != "layer"), "beta", "95% CI"]
    header += [*(["95% CI, seeds"] if seeds else []), *(["before decay"] if before else []), "untrained"]
    header += ["slope at the ends", "layers", "one width left out", "ln A", "R2", "n", "widths", "method", "status"]
    rows = [
        [
            *(cell for name, cell in zip(by, fit.series, strict=True) if name != "layer"),
            inputs.number(fit.beta),
            inputs.interval(fit.ci_low, fit.ci_high) + (" wide" if fit.wide and not fit.refused else ""),
            *([inputs.interval(fit.seed_low, fit.seed_high)] if seeds else []),
            *([before_text(fit)] if before else []),
            inputs.number(fit.null_beta),
            "-" if fit.slope_low != fit.slope_low else f"{fit.slope_low:.2f} to {fit.slope_high:.2f}",
            inputs.interval(fit.layer_low, fit.layer_high),
            inputs.interval(fit.loo_low, fit.loo_high),
            inputs.number(fit.ln_a),
            inputs.number(fit.r2),
            str(fit.n),
            f"{fit.x_min:g}-{fit.x_max:g}",
            fit.method,
            fit.status,
        ]
        for fit in shown
    ]
    inputs.print_table(header, rows, options.format, fit_table(by, shown))
    if options.model != "power":
        print_shapes(fitted, options.model, options.format)
    inputs.print_notes(caveats_of(fitted, runs), options.format)
    inputs.print_problems(fitted.problems)
    inputs.print_flags(fit.status for fit in fitted.fits)
    if folder is not None:
        fits_file = write_csv(folder / "fits.csv", *fit_table(by, fitted.fits))
        points_file = write_csv(folder / "points.csv", *points_table(fitted.table))
        print(f"wrote {fits_file} and {points_file}", file=aside(options.format))
    return 0 if any(not fit.refused for fit in fitted.fits) else 1


def print_shapes(fitted: Fitted, model: str, style: str) -> None:
    """A table of the models of every layer median, the best of a series first."""
    from lightning_spectral.analysis.caveats import median_fits
    from lightning_spectral.analysis.shapes import shapes_of

    groups, rows = fitted.table.groups(), []
    for fit in median_fits(fitted):
        points = [point for point in groups[fit.series] if point.value > 0 and point.x > 0]
        found = shapes_of(*(np.array([getattr(point, name) for point in points]) for name in ("x", "value")))
        for shape in found:
            if model in (shape.model, "all"):
                k = shape.names.index("exponent")
                delta = shape.aicc - found[0].aicc
                level = inputs.number(shape.values[0]) if shape.model == "floor" else "-"
                cells = [inputs.number(shape.values[k]), inputs.interval(shape.low[k], shape.high[k]), level]
                rows.append([*fit.series, shape.model, *cells, inputs.number(delta, 1)])
    header = [*fitted.table.by, "model", "exponent", "95% CI", "E", "AICc minus the best"]
    tables.print_table(tables.Table(header, rows), style)


def before_text(fit: PowerLawFit) -> str:
    """``0.27 [0.19, 0.34]``."""
    if fit.before_beta != fit.before_beta:
        return "-"
    return f"{fit.before_beta:.2f} [{inputs.number(fit.before_low, 2)}, {inputs.number(fit.before_high, 2)}]"
