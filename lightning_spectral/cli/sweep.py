"""``lightning-spectral sweep RECIPE``: many runs from one recipe and axes."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from lightning_spectral.cli.parser import at_least, parse_recipe_words, recipe_parser
from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Column, Table, add_format_option, aside, print_table

_EPILOG = """\
other options are recipe keys for every run, as for `pretrain`: --train.max_steps 50

examples:
  lightning-spectral sweep pocket_study
  lightning-spectral sweep quickstart --axis architecture.ffn_multiplier=1,2,4 --axis seed=0,1 --out out/widths
  lightning-spectral sweep pocket_study --axis optimizer=AdamW,Muon --dry-run

Stop with Ctrl-C and start again at will: finished runs are skipped, interrupted ones resume."""


def main(argv: list[str]) -> int:
    """Run the sweep; 0 all finished, 1 a run failed, 2 bad input, 130 interrupted."""
    parser = recipe_parser(
        "sweep",
        description="Expand a recipe over axes and run what is not finished yet.",
        epilog=_EPILOG,
        smoke="the recipe's tiny form, then fit, compare and report: does it all work?",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run folders (default: the recipe's out_dir)")
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="runs at a time (default: one a GPU, or one a CPU core)"
    )
    parser.add_argument("--launcher", choices=["local", "ray", "slurm"], default="local")
    parser.add_argument("--rerun-changed", action="store_true", help="run changed runs again, from the start")
    parser.add_argument("--accept-changes", action="store_true", help="go on with runs that another recipe started")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their states, run nothing")
    add_format_option(parser)
    options, words = parse_recipe_words(parser, argv)
    return _sweep(options, words)


def _sweep(options: argparse.Namespace, words: list[str]) -> int:
    """Plan and run."""
    from lightning_spectral.sweep import plan as sweep
    from lightning_spectral.sweep.axes import read

    if options.out and Path(options.out).is_file():
        raise CommandError(f"`--out {options.out}` is a file: give a folder, in which each run has its own.")
    what = {"axes": options.axis, "overrides": words, "smoke": options.smoke}
    try:
        read(options.recipe, **what)  # a misspelled name is said before anything is started or imported
        from lightning_spectral.sweep.launchers import LAUNCHERS

        # before the plan is made: workers import torch meanwhile
        launcher = None if options.dry_run else LAUNCHERS[options.launcher](options.workers)
        changes = {"rerun_changed": options.rerun_changed, "accept_changes": options.accept_changes}
        found = sweep.plan(options.recipe, **what, out_dir=options.out, **changes)
    except ValueError as error:  # RecipeError, too
        raise CommandError(str(error)) from error
    if launcher is None:
        rows = [(found.states[job.run_id].name, job.run_id, job.folder) for job in found.jobs]
        print_table(Table(("state", Column("run", key="run_id"), "folder"), rows), options.format)
        print(f"{len(rows)} runs, {len(found.to_do())} to do, in {found.out_dir}", file=aside(options.format))
        return 0
    changed = [job.run_id for job in found.jobs if found.states[job.run_id].name == "changed"]
    if changed:
        detail = found.states[changed[0]].detail
        raise CommandError(
            f"{len(changed)} run(s) in `{found.out_dir}` were started under another recipe, first `{changed[0]}`"
            f"{f' ({detail})' if detail else ''}: give another --out, --rerun-changed to start them "
            "anew, or --accept-changes to go on with them under the new recipe."
        )
    code = _run(found, launcher)
    return code or (_whole_way(str(found.out_dir)) if options.smoke else 0)


def _whole_way(out_dir: str) -> int:
    """``fit``, ``compare`` and ``report`` of what a smoke run has made."""
    from lightning_spectral.cli import compare, fit, report

    for verb in (fit, compare, report):
        print(f"\nlightning-spectral {verb.__name__.rpartition('.')[2]} {out_dir}")
        if code := verb.main([out_dir]):
            return code
    return 0


def _run(found, launcher) -> int:  # type: ignore[no-untyped-def]
    from lightning_spectral.sweep import plan as sweep
    from lightning_spectral.sweep.run import run_all
    from lightning_spectral.sweep.screen import ProgressDisplay, cost_line

    # a batch system asks with SIGTERM, and a background job of a shell script has SIGINT switched off
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.default_int_handler)
    try:
        board = run_all(found, launcher, ProgressDisplay())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    ended = sum(sweep.state_of(job).has_ended for job in found.jobs)
    where = "all runs" if ended == len(found.jobs) else f"the {ended} of {len(found.jobs)} runs that have ended"
    for split, pairs in sweep.seen_data(found).items():
        digests = sorted({digest for _, digest in pairs})
        if sweep.one_digest_a_seed(pairs) and len(digests) > 1:
            print(f"{split} data: the same in {where} for each seed ({len(digests)} seeds)")
        elif len(digests) > 1:
            print(f"WARNING the {split} data differ between runs: {len(digests)} digests.", file=sys.stderr)
        elif digests:
            print(f"{split} data: the same in {where} ({digests[0][:12]})")
    if cost := cost_line(found.out_dir):
        print(cost)
    print(f"next: lightning-spectral report {found.out_dir}")
    return 1 if board.failed else 0
