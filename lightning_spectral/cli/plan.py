"""``lightning-spectral plan RECIPE``: what a run or a sweep takes, before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

from lightning_spectral.cli.parser import at_least, parse_recipe_words, recipe_parser
from lightning_spectral.sweep.budget import (
    DEFAULT_MFU,
    LAUNCHES_S,
    MEMORY_BYTES,
    PEAK_FLOPS,
    RunCost,
    duration,
    hours,
    memory,
    run_cost,
)
from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Table, add_format_option, print_table

_EPILOG = """\
other options are recipe keys for every run, as for `pretrain`: --train.max_steps 50

examples:
  lightning-spectral plan paper/160m --gpu h100 --num-gpus 8
  lightning-spectral plan quickstart

Estimates from the recipe alone: 6 operations per parameter and token, attention, weights, gradients and optimizer state
in fp32. Activations are not in the memory; hours are at the given share of the GPU's peak (MFU)."""


def main(argv: list[str]) -> int:
    """Print the estimate; 0 done, 2 bad input."""
    parser = recipe_parser(
        "plan",
        description="Runs, tokens, parameters, operations, memory, hours and disk of a recipe or sweep.",
        epilog=_EPILOG,
        smoke="the recipe's tiny form",
    )
    parser.add_argument(
        "--gpu", type=str.lower, default="h100", choices=list(PEAK_FLOPS), help="whose peak counts (default: h100)"
    )
    parser.add_argument("--num-gpus", type=at_least(1), default=1, metavar="N", help="GPUs of one run")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="share of the peak that training reaches")
    add_format_option(parser)
    options, words = parse_recipe_words(parser, argv)
    if not 0 < options.mfu <= 1:
        raise CommandError(f"`--mfu` must be in (0, 1], got {options.mfu:g}: it is a share of the peak.")
    try:
        costs = _costs(options, words)
    except ValueError as error:  # RecipeError, too
        raise CommandError(str(error)) from error
    print_table(_table(costs, options.gpu, options.mfu, options.num_gpus), options.format)
    return 0


def _costs(options: argparse.Namespace, words: Sequence[str]) -> list[RunCost]:
    from lightning_spectral.sweep.axes import read
    from lightning_spectral.training import document
    from lightning_spectral.training.values import check_without_imports

    file = document.find(options.recipe)
    tree = document.read_tree(file)
    if not options.axis and not options.smoke and not tree.get("sweep"):
        check_without_imports(options.recipe, words)
        return [run_cost(file.stem, document.overridden(tree, words))]
    _, tree, common, grids = read(options.recipe, axes=options.axis, overrides=words, smoke=options.smoke)
    costs = []
    for grid in grids:
        for chosen in product(*(axis.values for axis in grid)):
            own: dict[str, Any] = {key: value for _, values in chosen for key, value in values.items()}
            costs.append(run_cost(" ".join(label for label, _ in chosen), document.overridden(tree, {**common, **own})))
    return costs


def _window(cost: RunCost, gpu: str) -> str:
    all_rows = f"{memory(cost.measure_bytes)} on each rank, {cost.windows} windows in a run"
    limit = MEMORY_BYTES[gpu] / 4  # `memory_limit_mib` by default: of what is free, so at most that
    if cost.measure_bytes <= limit:
        return all_rows
    return f"{all_rows}; more than the {memory(limit)} that it may take of one {gpu}: a sample of rows is kept"


def _table(costs: Sequence[RunCost], gpu: str, mfu: float, num_gpus: int) -> Table:
    total = sum(cost.train_flops for cost in costs)
    measuring = sum(cost.measure_flops for cost in costs)
    largest = max(costs, key=lambda cost: cost.state_bytes)
    widest = max(costs, key=lambda cost: cost.measure_bytes)
    per_gpu = largest.state_bytes
    all_runs, steps = hours(total, gpu, mfu, num_gpus), sum(cost.steps for cost in costs)
    launch_bound = []
    if all_runs * 3600 / steps < LAUNCHES_S / 2:
        apart = f"rather {duration(steps * LAUNCHES_S / 3600)} one after another: launching a step takes some"
        launch_bound = [("small steps", f"{apart} {1000 * LAUNCHES_S:.0f} ms; several workers share a GPU well")]
    rows = [
        ("runs", f"{len(costs):,}"),
        ("tokens", f"{sum(cost.tokens for cost in costs):,} ({costs[0].steps:,} steps in the first run)"),
        ("parameters", f"{min(c.parameters for c in costs):,} to {max(c.parameters for c in costs):,}"),
        ("operations", f"{total:.3g} FLOP of training, {measuring:.2g} of measuring ({measuring / total:.2%})"),
        ("time", f"{duration(all_runs)} on {num_gpus} x {gpu} at {mfu:.0%} of its peak, all runs"),
        ("longest run", duration(hours(max(c.train_flops for c in costs), gpu, mfu, num_gpus))),
        *launch_bound,
        ("memory", f"{memory(per_gpu)} a GPU under DDP, {memory(per_gpu / num_gpus)} under FSDP; activations on top"),
        ("a window", _window(widest, gpu)),
        ("disk", memory(sum(cost.disk_bytes for cost in costs))),
    ]
    return Table(("what", "estimate"), rows)
