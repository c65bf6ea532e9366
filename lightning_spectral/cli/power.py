"""``lightning-spectral power RUNS|points.csv --amount .3``: how many more widths or seeds separate two slopes."""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import TYPE_CHECKING

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.text import CommandError, tables

if TYPE_CHECKING:
    from lightning_spectral.analysis.power import Need
    from lightning_spectral.analysis.study import Fitted

_EPILOG = """\
The scatter of ln(a/b) in the given runs is taken as that of the larger study: how much seeds differ in slope, what
widths have of their own, and the runs' noise. Widths lie over the same range. With one seed nothing is known about
other seeds: the plan is then for this seed's slopes."""


def main(argv: list[str]) -> int:
    """Print, for each pair of series, what separates slopes that differ by an amount."""
    parser = VerbParser(
        "power",
        description="How many more widths or seeds separate two slopes by a stated amount.",
        epilog=_EPILOG,
    )
    inputs.add_input_options(parser)
    parser.add_argument("--amount", type=float, required=True, help="difference of slopes to separate, e.g. .3")
    parser.add_argument("--power", type=float, default=0.8, help="share of studies that should find it (default: .8)")
    options = parser.parse_args(argv)
    if not options.amount > 0:
        raise CommandError(f"`--amount` must be > 0, got {options.amount:g}: it is a difference of two slopes.")
    if not 0.5 < options.power < 1:
        raise CommandError(f"`--power` must lie between .5 and 1, got {options.power:g}.")
    with parser.own_words():
        return _power(options)


def _power(options: argparse.Namespace) -> int:
    """Plan with the scatter of what was read."""
    from lightning_spectral.analysis.caveats import median_fits

    fitted, _ = inputs.load(options)
    found = needs_of(fitted, options.amount, options.power)
    if not found:
        raise CommandError("no two series have three widths in common: nothing says how much they scatter.")
    header = ["where", "a", "b", "interval now", "seeds now", "seeds needed", "widths now", "widths needed"]
    values = [[w, a, b, n.half_width, n.now[0], n.seeds or "", n.now[1], n.widths or ""] for w, a, b, n in found]
    rows = [
        [w, a, b, f"+- {n.half_width:.2f}", str(n.now[0]), _count(n.seeds), str(n.now[1]), _count(n.widths)]
        for w, a, b, n in found
    ]
    inputs.print_table(header, rows, options.format, ([name.replace(" ", "_") for name in header], values))
    what = f"Each alone, the rest as it is, to tell slopes {options.amount:g} apart (95 % intervals, power"
    print(f"note: {what} {options.power:g}, one pair by itself).", file=tables.aside(options.format))
    inputs.print_problems(fitted.problems)
    inputs.print_flags(fit.status for fit in median_fits(fitted))
    return 0


def needs_of(fitted: Fitted, amount: float, power: float = 0.8) -> list[tuple[str, str, str, Need]]:
    """(where, a, b, need) for every pair of series of layer medians that differ in one column.

    Raises:
        CommandError: If the amount or power is out of range.
    """
    from lightning_spectral.analysis.caveats import median_fits
    from lightning_spectral.analysis.compare import pair_of
    from lightning_spectral.analysis.power import needed, scatter_of

    by, groups, out = fitted.table.by, fitted.table.groups(), []
    for one, two in itertools.combinations(median_fits(fitted), 2):
        names = pair_of(by, one.series, two.series)
        scatter = scatter_of(groups[one.series], groups[two.series]) if names else None
        if names and scatter is not None and not one.refused and not two.refused:
            cells = (dict(zip(by, fit.series, strict=True)) for fit in (one, two))
            a, b = (" ".join(filter(None, (own[name] for name in names))) for own in cells)
            shared = dict(zip(by, one.series, strict=True))
            where = " ".join(cell for name, cell in shared.items() if name not in names and name != "layer" and cell)
            need = inputs.guarded(partial(needed, scatter, amount, power))
            out.append((where, a, b, need))
    return out


def _count(number: int | None) -> str:
    return "more than 64" if number is None else str(number)
