"""``lightning-spectral fit RUNS|points.csv``: the exponent of every series, with what qualifies it."""

from __future__ import annotations

import argparse

from lightning_spectral.cli import inputs

_EPILOG = """\
examples:
  lightning-spectral fit out/study --out out/fits
  lightning-spectral fit points.csv --x ffn_hidden_dim --y value --by optimizer,bucket,metric --out out/fits

The interval is Student's t over WIDTHS. With one run a width it says nothing about seeds; with several seeds the runs
of one width are averaged first (ols_seed_means), and seed_low/seed_high give the interval over seeds."""


def main(argv: list[str]) -> int:
    """Fit, print a table, and write ``fits.csv`` and ``points.csv`` if asked."""
    parser = argparse.ArgumentParser(
        "lightning-spectral fit",
        description="Fit value = A * width ** beta per series.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs.add_input_options(parser)
    parser.add_argument("--out", metavar="DIR", help="write fits.csv and points.csv there")
    options = parser.parse_args(argv)
    folder = inputs.out_folder(options.out)
    fitted, _ = inputs.load(options)

    from lightning_spectral.analysis.points import LAYER_MEDIAN
    from lightning_spectral.analysis.tidy import fit_table, points_table, write_csv

    by = fitted.table.by
    shown = [f for f in fitted.fits if "layer" not in by or f.series[by.index("layer")] == LAYER_MEDIAN]
    header = [*(name for name in by if name != "layer"), "beta", "95% CI", "ln A", "R2", "n", "widths", "method"]
    header += ["left-one-out", "null", "status"]
    rows = [
        [
            *(cell for name, cell in zip(by, fit.series, strict=True) if name != "layer"),
            inputs.number(fit.beta),
            f"[{inputs.number(fit.ci_low)}, {inputs.number(fit.ci_high)}]" + (" wide" if fit.wide else ""),
            inputs.number(fit.ln_a),
            inputs.number(fit.r2),
            str(fit.n),
            f"{fit.x_min:g}-{fit.x_max:g}",
            fit.method,
            f"[{inputs.number(fit.loo_low)}, {inputs.number(fit.loo_high)}]",
            inputs.number(fit.null_beta),
            fit.status,
        ]
        for fit in shown
    ]
    inputs.print_table(header, rows)
    inputs.print_problems(fitted.problems)
    inputs.print_flags(fit.status for fit in fitted.fits)
    if folder is not None:
        fits_file = write_csv(folder / "fits.csv", *fit_table(by, fitted.fits))
        points_file = write_csv(folder / "points.csv", *points_table(fitted.table))
        print(f"wrote {fits_file} and {points_file}")
    return 0 if any(not fit.refused for fit in fitted.fits) else 1
