"""``lightning-spectral compare RUNS|points.csv``: differences of exponents, levels and spectra at equal loss."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser, at_least
from lightning_spectral.text.tables import aside

if TYPE_CHECKING:
    from lightning_spectral.analysis.compare import Comparison
    from lightning_spectral.analysis.matched import MatchedPair
    from lightning_spectral.analysis.runs import RunSet

_EPILOG = """\
kinds of comparison:
  slope_difference         beta of a minus beta of b: slope of ln(a/b) at the widths and seeds that both have, over
                           widths and seeds (mixed model); what a width or a seed has in common cancels
  slope_difference_pre_decay  the same just before the learning rate decays (where the recipe is recorded)
  decay_change             beta at the end minus beta before the decay, same runs
  level_difference         ln(a/b) in the middle of the common widths
  crossover_width          where the two lines meet: every width that the test does not refuse (0 or inf: open)
  asymmetry                beta_soft - beta_hard of one series
  effect                   optimizer against --architecture COLUMN: mean squared shift over all pairs
  matched_loss[_slope]     ln(a/b) at equal loss, step or tokens (--match-on), per width and as a slope"""

_SHOWN = 60  # comparisons that a person still reads


def main(argv: list[str]) -> int:
    """Compare, print a table, and write ``comparisons.csv`` if asked."""
    parser = VerbParser(
        "compare",
        description="Differences between series, with intervals and p values.",
        epilog=_EPILOG,
        elsewhere=inputs.ELSEWHERE,
    )
    inputs.add_input_options(parser)
    parser.add_argument("--architecture", metavar="COLUMN", help="weigh the optimizer's effect against this column's")
    parser.add_argument("--match-on", choices=["loss", "step", "tokens"], default="loss")
    parser.add_argument(
        "--tolerance", type=at_least(0, float), default=0.02, help="nats within which a loss counts as reached"
    )
    parser.add_argument("--all", action="store_true", help=f"print all comparisons, even if more than {_SHOWN}")
    parser.add_argument("--out", metavar="DIR", help="write comparisons.csv (and matched_loss.csv) there")
    options = parser.parse_args(argv)
    with parser.own_words():
        return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    """Compare what was read, and print it."""
    folder = inputs.out_folder(options.out)
    fitted, runs = inputs.load(options)

    from lightning_spectral.analysis.caveats import caveats_of
    from lightning_spectral.analysis.compare import comparison_table
    from lightning_spectral.analysis.matched import matched_table
    from lightning_spectral.analysis.points import LAYER_MEDIAN
    from lightning_spectral.analysis.study import comparisons_of
    from lightning_spectral.analysis.tidy import write_csv

    found = inputs.guarded(lambda: comparisons_of(fitted, options.architecture))
    pairs, at_loss = matched_of(options, runs)
    found += at_loss
    medians = [c for c in found if c.where.get("layer", LAYER_MEDIAN) == LAYER_MEDIAN]
    shown = medians if options.all or len(medians) <= _SHOWN else headline(medians)
    header = ["kind", "where", "what", "estimate", "95% CI", "p", "p (Holm)", "status", "note"]
    inputs.print_table(header, rows_of(shown), options.format, comparison_table(fitted.table.by, shown))
    out = aside(options.format)
    if len(shown) < len(medians):
        print(
            f"{len(medians) - len(shown)} more comparisons (other buckets and metrics): --all, or --out DIR.", file=out
        )
    if len(medians) > 1:
        print(
            "p (Holm) is corrected for the pairs of one kind, site, bucket, metric and layer; those with a variation "
            "of another series (AdamW lr/3 beside AdamW) among themselves.",
            file=out,
        )
    inputs.print_notes(caveats_of(fitted, runs), options.format)
    inputs.print_problems(fitted.problems)
    inputs.print_flags(c.status for c in found)
    if folder is not None:
        print(f"wrote {write_csv(folder / 'comparisons.csv', *comparison_table(fitted.table.by, found))}", file=out)
        if pairs:
            print(f"wrote {write_csv(folder / 'matched_loss.csv', *matched_table(pairs))}", file=out)
    return 0 if any(not c.status.startswith("refused") for c in found) else 1


def matched_of(options: argparse.Namespace, runs: RunSet | None) -> tuple[list[MatchedPair], list[Comparison]]:
    """Pairs of runs at one loss (step, tokens) and what they say; a note of those that could not be matched."""
    from lightning_spectral.analysis.matched import compare_matched, matched_pairs

    if runs is None:
        return [], []
    pairs, unmatched = inputs.guarded(
        lambda: matched_pairs(runs, axis=options.match_on, tolerance=options.tolerance, metrics=options.metrics)
    )
    if unmatched:
        text = f"note: {unmatched} pair(s) of runs could not be matched on {options.match_on}."
        print(text, file=aside(options.format))
    return pairs, compare_matched(pairs)


def rows_of(shown: list[Comparison]) -> list[list[str]]:
    """Texts of the table's cells."""
    return [
        [
            c.kind,
            " ".join(cell for name, cell in c.where.items() if cell and name != "layer"),
            f"{c.a} - {c.b}" if c.kind != "effect" else f"{c.a} vs {c.b}",
            inputs.number(c.estimate),
            inputs.interval(c.ci_low, c.ci_high),
            "-" if c.p != c.p else f"{c.p:.2g}",
            "-" if c.p_holm != c.p_holm else f"{c.p_holm:.2g}",
            c.status,
            c.note,
        ]
        for c in shown
    ]


def headline(found: list[Comparison]) -> list[Comparison]:
    """Those of TAIL hard rank (where they were measured), without single widths."""
    for name, wanted in (("bucket", "tail"), ("metric", "hard_rank")):
        if any(c.where.get(name) == wanted for c in found):
            found = [c for c in found if c.where.get(name, wanted) == wanted]
    return [c for c in found if c.kind != "matched_loss"]
