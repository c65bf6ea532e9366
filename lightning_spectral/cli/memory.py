"""``lightning-spectral memory VERB``: the associative memory, simulated and predicted.

Every command writes ``DIR/results.jsonl``, one JSON object per run (``kind`` says which), with all inputs (``d``,
``n_items``, ``alpha``, ``batch_size``, ``seed``, ``anisotropy``, ``dtype``, ``rule``, ``settings``, ``device``,
``chunk_size``) and all outputs:

* ``count``, ``prefix``, ``k50``, ``k90``, ``head_recall``, ``tail_recall``, ``mass``, ``curve_rank``, ``curve_recall``,
  ``distinct``, ``censored``, ``seconds``, ``update_spectrum``: measured;
* ``predicted_count``, ``predicted_prefix``, ``predicted_spread``, ``predicted_curve_*``, ``prediction_trusted``: the
  theory for this very run, ``null`` where there is none;
* ``asymptotic_exponent``, ``asymptotic_count``: the limiting law, never to be compared with a count at small d;
* ``batch``: ``expected_distinct``, ``predicted_critical_batch`` (population rows),
  ``asymptotic_critical_batch_exponent``;
* ``steps``: one row per ``step`` with ``mode``, ``steps``, ``step_scale``, ``schedule``; exact: ``loss``,
  ``loss_over_tail_mass``, ``best_probability`` and ``worst_probability`` of an item's own output, ``imbalance`` their
  difference; deflation: ``count`` is d_t and ``new`` its growth;
* ``newton-schulz``: ``exact_count``, ``capacity_share``, ``flattened_share``, ``smallest_singular_value`` (over the
  Frobenius norm), ``steps_for_capacity``;
* ``newton-schulz --checkpoint`` (kind ``flattening``): ``matrix``, ``flattened_share``, ``steps_needed``;
* ``theory``: predictions only, with ``predicted_d_t``, ``asymptotic_e_t``, ``predicted_critical_batch``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning_spectral.memory import options as memory_options
from lightning_spectral.text import CommandError

Row = dict[str, Any]


def main(argv: list[str]) -> int:
    """Run one memory command."""
    parser = argparse.ArgumentParser(
        "lightning-spectral memory", description="The associative memory of arXiv:2603.26554: what one step stores."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (help_line, add_options, _) in COMMANDS.items():
        verb = verbs.add_parser(name, help=help_line, description=help_line)
        verb.add_argument("--config", metavar="YAML", help="options from a recipe, e.g. recipes/memory/one_step.yaml")
        add_options(verb)
    options = parser.parse_args(_with_config(argv, verbs))
    try:
        return COMMANDS[options.verb][2](options)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _with_config(argv: list[str], verbs: Any) -> list[str]:
    """Options of a recipe become defaults of its verb; the command line has the last word."""
    if not argv or argv[0] not in COMMANDS or "--config" not in argv:
        return argv
    import yaml

    position = argv.index("--config")
    if position + 1 >= len(argv):
        raise CommandError("`--config` needs a file.")
    path = argv[position + 1]
    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise CommandError(f"`--config` {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("command", argv[0]) != argv[0]:
        raise CommandError(f"`--config` {path} is no recipe for `memory {argv[0]}`; its `command` must name that verb.")
    arguments: list[str] = []
    for key, value in content.items():
        if key == "command" or value is None or value is False:
            continue
        arguments.append("--" + key.replace("_", "-"))
        if value is not True:
            arguments += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return [argv[0], *arguments, *argv[1:position], *argv[position + 2 :]]


def _add_one_step(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[128, 256, 512])
    memory_options.add_rules(parser)
    memory_options.add_run(parser, "out/memory/one-step")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[64, 128], batches=False)
    parser.add_argument(
        "--batch-size", type=memory_options.batch_size, nargs="+", metavar="B",
        default=[16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, None], help="integers or `population`",
    )  # fmt: skip
    memory_options.add_rules(parser, ("sgd", "muon"))
    memory_options.add_run(parser, "out/memory/batch")


def _add_steps(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[64, 128])
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    parser.add_argument("--mode", default="deflation", help="exact softmax dynamics, or deflation (default)")
    parser.add_argument("--step-scale", type=float, default=2.0, help="exact: c in |dW|_F = c d (default: 2)")
    parser.add_argument("--schedule", default="linear", help="exact: constant, or linear to zero (default)")
    memory_options.add_rules(parser, ("sgd", "muon"))
    memory_options.add_run(parser, "out/memory/steps")


def _add_theory(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=0, help="also predict d_t for this many steps")
    memory_options.add_rules(parser, ("sgd", "muon", "newton"))
    memory_options.add_run(parser, "out/memory/theory")


def _add_newton_schulz(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[256])
    group = parser.add_argument_group("iterations")
    group.add_argument("--coefficients", nargs="+", default=["muon", "polar_express", "cubic"], help="coefficient sets")
    group.add_argument("--ns-steps", type=int, nargs="+", default=[3, 4, 5, 6, 7, 8, 10, 12, 14])
    group.add_argument("--checkpoint", metavar="FILE", help="judge the momentum (or matrices) of a checkpoint instead")
    group.add_argument("--ns-dtype", nargs="+", default=["float32", "bfloat16"])
    memory_options.add_run(parser, "out/memory/newton-schulz")


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", default="3m", help="wall time, e.g. 90s, 3m, 2h; more reaches larger d (default: 3m)"
    )
    parser.add_argument("--n-items", type=int, default=30000, help="items N of the one-step runs (default: 30000)")
    parser.add_argument("--first-seed", type=int, default=0)
    memory_options.add_run(parser, "out/memory/reproduce")


def _one_step(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import one_step_rows

    settings, machine = memory_options.rule_settings(options), memory_options.machine(options)
    problems = list(memory_options.problems(options))
    return _write(options, (row for p in problems for row in one_step_rows(p, options.rules, settings, machine)))


def _batch(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import batch_rows

    settings, machine = memory_options.rule_settings(options), memory_options.machine(options)
    problems = list(memory_options.problems(options))
    return _write(options, (row for p in problems for row in batch_rows(p, options.rules, settings, machine)))


def _steps(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import step_rows
    from lightning_spectral.theory.dynamics import check_run

    settings, machine = memory_options.rule_settings(options), memory_options.machine(options)
    run = {key: getattr(options, key) for key in ("steps", "mode", "step_scale", "schedule")}
    for rule in options.rules:
        check_run(rule, **run)
    problems = list(memory_options.problems(options))
    return _write(options, (row for p in problems for row in step_rows(p, options.rules, settings, machine, run)))


def _theory(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import theory_rows
    from lightning_spectral.theory.problem import require_integer

    require_integer("steps", options.steps, 0, "leave it out to predict one step only")
    settings = memory_options.rule_settings(options)
    options.seeds, options.no_figures = 1, True
    problems = list(memory_options.problems(options))
    return _write(options, (row for p in problems for row in theory_rows(p, options.rules, settings, options.steps)))


def _newton_schulz(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import newton_schulz_rows
    from lightning_spectral.theory.rules import RuleSettings

    machine = memory_options.machine(options)
    sets, steps, dtypes = options.coefficients, options.ns_steps, options.ns_dtype
    for name in sets:
        for k in steps:
            for dtype in dtypes:
                RuleSettings(coefficients=name, ns_steps=k, ns_dtype=dtype)
    if options.checkpoint:
        return _flattening(options)
    problems = list(memory_options.problems(options))
    return _write(options, (row for p in problems for row in newton_schulz_rows(p, sets, steps, dtypes, machine)))


def _flattening(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.flattening import checkpoint_rows, table
    from lightning_spectral.memory.output import write_rows

    rows = list(checkpoint_rows(options.checkpoint, options.coefficients, options.ns_steps))
    print("\n".join(table(rows)))
    print(f"written to {write_rows(options.out, rows)}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    begun = time.perf_counter()  # imports count
    from lightning_spectral.memory.reproduce import parse_budget, reproduce_rows

    seconds = parse_budget(options.budget)
    machine = memory_options.machine(options)
    rows = reproduce_rows(seconds, options.n_items, options.first_seed, machine, begun)
    return _write(options, rows, verdicts=True)


def _write(options: argparse.Namespace, rows: Iterator[Row], verdicts: bool = False) -> int:
    from lightning_spectral.memory.output import write_outputs

    return write_outputs(options.out, rows, figures=not options.no_figures, verdicts=verdicts, say=print)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "one-step": ("one step from W = 0: count, curve and spectrum of each rule", _add_one_step, _one_step),
    "batch": ("one step from a sampled batch: count against batch size", _add_batch, _batch),
    "steps": ("many steps: exact softmax dynamics, or deflation", _add_steps, _steps),
    "theory": ("predictions only, nothing simulated", _add_theory, _theory),
    "newton-schulz": ("capacity kept by k Newton-Schulz steps", _add_newton_schulz, _newton_schulz),
    "reproduce": ("every law of the paper within a time budget, with verdicts", _add_reproduce, _reproduce),
}
