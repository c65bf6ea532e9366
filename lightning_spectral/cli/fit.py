"""``lightning-spectral fit RUNS|points.csv``: the exponent of every series, with what qualifies it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.text import CommandError, tables
from lightning_spectral.text.tables import aside

if TYPE_CHECKING:
    from lightning_spectral.analysis.fits import PowerLawFit
    from lightning_spectral.analysis.shapes import Shape
    from lightning_spectral.analysis.study import Fitted

FloatArray = NDArray[np.float64]
_EPILOG = """\
examples:
  lightning-spectral fit out/study --out out/fits
  lightning-spectral fit points.csv --x ffn_hidden_dim --y value --by optimizer,bucket,metric --out out/fits
  lightning-spectral fit losses.csv --x params,tokens --y loss --model floor      # E + A N^-a + B D^-b

With one run per width the interval is Student's t over WIDTHS and says nothing about seeds; with several seeds it is
over widths AND seeds (a mixed model: level and slope per seed, an effect per width). What else must be read with
a slope is printed below the table: the state before the learning-rate decay, learning rates, the null."""


def main(argv: list[str]) -> int:
    """Fit, print a table, and write ``fits.csv`` and ``points.csv`` if asked."""
    parser = VerbParser(
        "fit",
        description="Fit value = A * width ** beta per series.",
        epilog=_EPILOG,
        elsewhere=inputs.ELSEWHERE,
    )
    inputs.add_input_options(parser)
    parser.add_argument(
        "--model",
        choices=["power", "bent", "floor", "all"],
        default="power",
        help="also fit y = E + A x^-a (floor; of two variables with --x N,D), a parabola (bent), or all, by AICc",
    )
    parser.add_argument("--out", metavar="DIR", help="write fits.csv and points.csv there")
    options = parser.parse_args(argv)
    with parser.own_words():
        return _fit(options)


def _fit(options: argparse.Namespace) -> int:
    """Fit what was read, and print it."""
    folder = inputs.out_folder(options.out)
    if options.x and "," in options.x:
        return fit_two(options)
    fitted, runs = inputs.load(options)

    from lightning_spectral.analysis.caveats import caveats_of, median_fits
    from lightning_spectral.analysis.tidy import fit_table, points_table, write_csv

    by, shown = fitted.table.by, median_fits(fitted)
    inputs.print_table(*table_of(by, shown), options.format, fit_table(by, shown))
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


def table_of(by: Sequence[str], shown: Sequence[PowerLawFit]) -> tuple[list[str], list[list[str]]]:
    """Header and texts; columns that would be empty all the way down are left out."""

    def interval(low: float, high: float) -> str:
        return inputs.interval(low, high)

    names = [name for name in by if name != "layer"]
    columns: dict[str, Callable[[PowerLawFit], str]] = {
        "beta": lambda fit: inputs.number(fit.beta),
        "95% CI": lambda fit: interval(fit.ci_low, fit.ci_high) + (" wide" if fit.wide and not fit.refused else ""),
        "raw ranks": lambda fit: inputs.number(fit.raw_beta),
        "95% CI, seeds": lambda fit: interval(fit.seed_low, fit.seed_high),
        "before decay": before_text,
        "untrained": lambda fit: inputs.number(fit.null_beta),
        "slope at the ends": lambda fit: (
            f"{inputs.number(fit.slope_low, 2)} to {inputs.number(fit.slope_high, 2)}" if fit.bend == fit.bend else "-"
        ),
        "layers": lambda fit: interval(fit.layer_low, fit.layer_high),
        "one width left out": lambda fit: interval(fit.loo_low, fit.loo_high),
        "ln A": lambda fit: inputs.number(fit.ln_a),
        "R2": lambda fit: inputs.number(fit.r2),
        "n": lambda fit: str(fit.n),
        "widths": lambda fit: f"{fit.x_min:g}-{fit.x_max:g}",
        "method": lambda fit: fit.method,
        "status": lambda fit: fit.status,
    }
    cells = {name: [text(fit) for fit in shown] for name, text in columns.items()}
    optional = ("raw ranks", "95% CI, seeds", "before decay")
    kept = [name for name in columns if name not in optional or set(cells[name]) != {"-"}]
    series = [[cell for name, cell in zip(by, fit.series, strict=True) if name != "layer"] for fit in shown]
    return [*names, *kept], [[*own, *(cells[name][k] for name in kept)] for k, own in enumerate(series)]


def fit_two(options: argparse.Namespace) -> int:
    """``--x N,D``: E + A N^-a + B D^-b of every series, with intervals."""
    from lightning_spectral.analysis.shapes import floor
    from lightning_spectral.analysis.study import is_table
    from lightning_spectral.analysis.tidy import read_columns, write_csv

    xs, files = inputs.names(options.x), [path for path in options.inputs if is_table(path)]
    if len(xs) != 2 or len(files) != len(options.inputs):
        raise CommandError(f"a law in two variables takes tables and two columns (--x N,D), got --x {options.x}.")
    inputs.refuse_unused(options, tables_given=True)
    if options.model not in ("floor", "all"):
        raise CommandError("a law in two variables is E + A N^-a + B D^-b: give --model floor with --x N,D.")
    by, rows, values, notes = options.by or [], [], [], []
    found, left_out = inputs.guarded(lambda: read_columns(files, [*xs, options.y], by, options.where))
    for series, (one, two, y) in found.items():
        shape = floor([one, two], y)
        if shape is None:
            notes.append(
                f"{' '.join(series) or 'the table'}: {len(y)} rows, no law that falls in both could be fitted."
            )
            continue
        texts = [
            f"{v:.4g} {inputs.interval(lo, hi)}" for v, lo, hi in zip(shape.values, shape.low, shape.high, strict=True)
        ]
        rows.append([*series, *texts, inputs.number(shape.rms, 4), str(shape.n)])
        numbers = [cell for ends in zip(shape.values, shape.low, shape.high, strict=True) for cell in ends]
        values.append([*series, *numbers, shape.rms, shape.n])
        a, b = shape.values[2], shape.values[4]
        whose, best = " ".join(filter(None, series)) or "all", f"the best {xs[0]} as cost^{b / (a + b):.3f}"
        notes.append(f"{whose}: where cost grows as {xs[0]} times {xs[1]}, {best}.")
        notes += _far_off([one, two], y, shape, whose)
    parameters = ["E", f"A ({xs[0]})", "a", f"B ({xs[1]})", "b"]
    machine = [f"{name}{end}" for name in ("E", "A", "a", "B", "b") for end in ("", "_low", "_high")]
    if rows:
        header = [*by, *machine, "rms_ln", "n"]
        inputs.print_table([*by, *parameters, "rms of ln y", "n"], rows, options.format, (header, values))
        folder = inputs.out_folder(options.out)
        if folder is not None:
            print(f"wrote {write_csv(folder / 'laws.csv', header, values)}", file=aside(options.format))
    if left_out:
        notes.append(f"{left_out} rows without a positive number in each of these columns were left out.")
    inputs.print_notes(notes, options.format)
    return 0 if rows else 1


def _far_off(xs: list[FloatArray], y: FloatArray, law: Shape, whose: str) -> list[str]:
    """A sentence on the points far off a law, and what it is without them."""
    from lightning_spectral.analysis.shapes import FAR, without_far

    rest, far = without_far(xs, y, law)
    if not far.any():
        return []
    text = f"{whose}: {far.sum()} of {len(y)} rows lie more than {FAR:g} robust standard deviations off the law"
    if rest is None:
        return [f"{text}; without them no law that falls in both could be fitted."]
    ends = (f"{n} = {rest.values[k]:.4g} {inputs.interval(rest.low[k], rest.high[k])}" for n, k in (("a", 2), ("b", 4)))
    return [f"{text}; without them E = {rest.values[0]:.4g}, {', '.join(ends)}."]


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
