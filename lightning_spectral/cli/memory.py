"""``lightning-spectral memory VERB``: the associative memory, simulated and predicted.

Every command that runs anything writes ``DIR/results.jsonl``, one JSON object per run as soon as it is done (``kind``
says which), with all inputs (``d``, ``d_out``, ``n_items``, ``alpha``, ``batch_size``, ``seed``, ``anisotropy``,
``dtype``, ``rule``, ``settings``, ``device``, ``chunk_size``) and all outputs:

* ``status``: ``ok``, or ``singular`` with the ``reason``: the run could not be made, its ``count`` is null;
* ``count``, ``prefix``, ``k50``, ``k90``, ``head_recall``, ``tail_recall``, ``mass``, ``curve_rank``, ``curve_recall``,
  ``distinct``, ``censored``, ``seconds``, ``update_spectrum``, ``update_singular_values``: measured;
* ``predicted_count``, ``predicted_prefix``, ``predicted_spread``, ``predicted_curve_*``: the theory for this very run,
  null where there is none; ``prediction_trusted``, and in ``prediction_note`` why not;
* ``asymptotic_exponent``, ``asymptotic_count``: the limiting law, never to be compared with a count at small d;
* ``batch``: ``expected_distinct``, ``predicted_critical_batch`` (population rows),
  ``asymptotic_critical_batch_exponent``;
* ``steps``: one row per ``step`` with ``mode``, ``steps``, ``step_scale``, ``schedule``, ``information_limit``; exact:
  ``loss``, ``loss_over_tail_mass``, ``best_probability`` and ``worst_probability`` of an item's own output,
  ``imbalance`` their difference; deflation: ``count`` is d_t and ``new`` its growth;
* ``newton-schulz``: ``exact_count``, ``capacity_share``, ``flattened_share``, ``smallest_singular_value`` (over the
  Frobenius norm), ``steps_for_capacity``;
* ``newton-schulz --checkpoint`` (kind ``flattening``): ``matrix``, ``optimizer``, ``own_settings``,
  ``flattened_share``, ``steps_needed``;
* ``theory``: predictions only, with ``predicted_d_t``, ``asymptotic_e_t``, ``predicted_critical_batch``;
* ``claims``: the same kinds with ``part``, SGD with ``method`` gram, and kind ``amplification``, whose ``count`` is
  Muon's signal over noise divided by SGD's at the ``ranks`` just beyond Muon's reach;
* ``recall``: one row a step: ``optimizer``, ``lr``, ``network``, ``loss``, ``count``, ``mass``, ``tail``, recall by
  octave of rank (``00``, ``01``, ...), ``tail_soft_rank``, ``tail_hard_rank`` measured at ``rank_step``;
* ``advise`` (kind ``advice``): ``layer``, ``outputs``, ``inputs``, ``rule``, ``stored``, ``stored_population``,
  ``rank``, ``tail_share``, ``critical_batch``, ``gains``, ``binds``, ``ns_steps_needed``.

A second command in the same folder moves the earlier results to ``previous/``; ``--resume`` continues them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning_spectral.memory import options as memory_options
from lightning_spectral.text import CommandError

Row = dict[str, Any]
_NS_SETS, _NS_STEPS = ["muon", "polar_express", "cubic"], [3, 4, 5, 6, 7, 8, 10, 12, 14]


def main(argv: list[str]) -> int:
    """Run one memory command."""
    from lightning_spectral.memory.plan import refuse_repeats

    parser = argparse.ArgumentParser(
        "lightning-spectral memory",
        description="The associative memory of arXiv:2603.26554: what one step stores.",
        epilog="`lightning-spectral memory fields` lists the fields of results.jsonl.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (help_line, example, add_options, _) in COMMANDS.items():
        verb = verbs.add_parser(
            name, help=help_line, description=help_line, epilog=f"Example: lightning-spectral memory {name} {example}"
        )
        if name not in ("report", "fields", "audience"):
            verb.add_argument(
                "--config", metavar="YAML", help="options from a recipe, e.g. recipes/memory/one_step.yaml"
            )
        add_options(verb)
    options = parser.parse_args(_with_config(argv, verbs))
    refuse_repeats(options)
    try:
        return COMMANDS[options.verb][3](options)
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
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
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
    parser.add_argument("--steps", type=memory_options.whole_number, default=5, help="optimizer steps (default: 5)")
    parser.add_argument("--mode", default="deflation", help="exact softmax dynamics, or deflation (default)")
    parser.add_argument(
        "--step-scale", type=memory_options.real_number, default=2.0, help="exact: c in |dW|_F = c sqrt(d d_out) (2)"
    )
    parser.add_argument("--schedule", default="linear", help="exact: constant, or linear to zero (default)")
    memory_options.add_rules(parser, ("sgd", "muon"))
    memory_options.add_run(parser, "out/memory/steps")


def _add_theory(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=memory_options.whole_number, default=0, help="also predict d_t this far")
    memory_options.add_rules(parser, ("sgd", "muon", "newton"))
    memory_options.add_run(parser, "out/memory/theory")


def _add_newton_schulz(parser: argparse.ArgumentParser) -> None:
    memory_options.add_problem(parser, d=[256])
    group = parser.add_argument_group("iterations")
    group.add_argument("--coefficients", nargs="+", help=f"coefficient sets (default: {' '.join(_NS_SETS)})")
    group.add_argument("--ns-steps", type=memory_options.whole_number, nargs="+", help=f"(default: {_NS_STEPS})")
    group.add_argument("--checkpoint", metavar="FILE", help="judge the momentum of a run by its own optimizer instead")
    group.add_argument("--as-gradient", action="store_true", help="--checkpoint without momentum: judge its matrices")
    group.add_argument("--ns-dtype", nargs="+", default=["float32", "bfloat16"])
    memory_options.add_run(parser, "out/memory/newton-schulz")


def _add_budget(parser: argparse.ArgumentParser, verb: str, budget: str) -> None:
    parser.add_argument(
        "--budget", default=budget, help=f"wall time, e.g. 90s, 3m, 2h; more reaches larger d (default: {budget})"
    )
    parser.add_argument(
        "--n-items", type=memory_options.whole_number, default=30000, help="items N, at every d (default: 30000)"
    )
    parser.add_argument("--first-seed", type=memory_options.whole_number, default=0)
    memory_options.add_run(parser, f"out/memory/{verb}", resume=False)


def _add_advise(parser: argparse.ArgumentParser) -> None:
    number = memory_options.whole_number
    parser.add_argument(
        "--counts", required=True, metavar="FILE", help="counts of the tokens: .npy, or a number a line"
    )
    parser.add_argument("--d", type=number, required=True, help="width of the residual stream")
    parser.add_argument("--ffn", type=number, help="width of the hidden layer (default: 4 d)")
    parser.add_argument("--batch-tokens", type=number, default=524288, help="tokens a step (default: 524288)")
    parser.add_argument("--rules", nargs="+", default=["sgd", "ns", "muon"], help="(default: sgd ns muon)")
    parser.add_argument("--coefficients", default="polar_express", help="of ns (default: polar_express)")
    parser.add_argument("--ns-steps", type=number, default=5, help="of ns (default: 5)")
    parser.add_argument(
        "--out", default="out/memory/advise", metavar="DIR", help="results.jsonl (default: %(default)s)"
    )


def _add_recall(parser: argparse.ArgumentParser) -> None:
    number, real = memory_options.whole_number, memory_options.real_number
    parser.add_argument("--d", type=number, nargs="+", default=[24, 32, 48, 64], help="features of keys and values")
    parser.add_argument("--network", default="mlp", choices=("mlp", "attention"), help="mlp, or subject and relation")
    parser.add_argument("--relations", type=number, default=4, help="attention: relations of each subject (default: 4)")
    parser.add_argument("--num-facts", type=number, default=4096)
    parser.add_argument("--alpha", type=real, default=1.2, help="power of the frequencies (default: 1.2)")
    parser.add_argument("--batch-size", type=number, default=2048, help="facts drawn a step (default: 2048)")
    parser.add_argument("--steps", type=number, default=40, help="optimizer steps (default: 40)")
    parser.add_argument("--every", type=number, default=10, help="test and measure every n steps (default: 10)")
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw", "sgd"])
    parser.add_argument("--lr", type=real, nargs="+", help="learning rates, instead of each optimizer's own three")
    parser.add_argument("--seeds", type=number, default=5)
    parser.add_argument("--first-seed", type=number, default=0)
    parser.add_argument("--out", default="out/memory/recall", metavar="DIR", help="(default: %(default)s)")


def _recall(options: argparse.Namespace) -> int:
    import json

    from lightning_spectral.memory import output, recall_study
    from lightning_spectral.memory.fit import read_results
    from lightning_spectral.memory.plan import Progress, Task

    plan = recall_study.plan(options)
    folder = output.prepare(options.out, keep=False, say=print)
    tasks = [
        Task(f"d={run[0]} {run[1]} lr={run[2]:g} seed={run[3]}", frozenset({json.dumps(run)}), 1, float(run[0]),
             partial(recall_study.run_rows, *run, options))
        for run in plan
    ]  # fmt: skip
    interrupted = output.write_rows(folder, output.with_progress(tasks, Progress(tasks)))
    output.conclude_recall(folder, read_results(folder), say=print)
    return output.INTERRUPTED if interrupted else 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a folder with results.jsonl, of a finished or interrupted command")
    parser.add_argument("--no-figures", action="store_true", help="write numbers only")


def _one_step(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import one_step_rows

    return _run(options, "one-step", one_step_rows)


def _batch(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import batch_rows

    return _run(options, "batch", batch_rows)


def _steps(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import step_rows
    from lightning_spectral.theory.dynamics import check_run

    run = {key: getattr(options, key) for key in ("steps", "mode", "step_scale", "schedule")}
    for rule in options.rules:
        check_run(rule, **run)
    return _run(options, "steps", partial(step_rows, run=run), run)


def _theory(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.runs import theory_rows
    from lightning_spectral.theory.problem import require_integer

    require_integer("steps", options.steps, 0, "leave it out to predict one step only")
    options.seeds, options.no_figures = 1, True

    def rows(problem: Any, rules: Sequence[str], settings: Any, machine: Row) -> Iterator[Row]:
        return theory_rows(problem, rules, settings, options.steps)

    return _run(options, "theory", rows, {"steps": options.steps})


def _run(options: argparse.Namespace, kind: str, make: Callable[..., Iterator[Row]], run: Row | None = None) -> int:
    """One task per problem of the options, with all its rules."""
    from lightning_spectral.memory.output import run_tasks
    from lightning_spectral.memory.plan import task_of

    settings, machine = memory_options.rule_settings(options), memory_options.machine(options)
    tasks = [
        task_of(kind, p, options.rules, settings, partial(make, p, options.rules, settings, machine), run)
        for p in memory_options.problems(options)
    ]
    return run_tasks(options.out, tasks, resume=options.resume, figures=not options.no_figures)


def _newton_schulz(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.output import run_tasks
    from lightning_spectral.memory.plan import newton_schulz_task
    from lightning_spectral.memory.runs import newton_schulz_rows
    from lightning_spectral.theory.rules import RuleSettings

    machine = memory_options.machine(options)
    sets, steps, dtypes = options.coefficients or _NS_SETS, options.ns_steps or _NS_STEPS, options.ns_dtype
    settings = [
        RuleSettings(coefficients=name, ns_steps=k, ns_dtype=dtype) for name in sets for k in steps for dtype in dtypes
    ]
    if options.checkpoint:
        return _flattening(options)
    tasks = [
        newton_schulz_task(p, settings, partial(newton_schulz_rows, p, sets, steps, dtypes, machine))
        for p in memory_options.problems(options)
    ]
    return run_tasks(options.out, tasks, resume=options.resume, figures=not options.no_figures)


def _flattening(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.flattening import checkpoint_rows, table
    from lightning_spectral.memory.output import prepare, write_rows

    rows = list(checkpoint_rows(options.checkpoint, options.coefficients, options.ns_steps, options.as_gradient))
    folder = prepare(options.out, keep=False, say=print)
    write_rows(folder, rows)
    print("\n".join(table(rows)))
    print(f"\nwritten to {folder}: results.jsonl")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.reproduce import plan

    return _within_budget(options, plan, laws=True)


def _claims(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.claims_runs import plan

    return _within_budget(options, plan, laws=False)


def _within_budget(options: argparse.Namespace, plan: Callable[..., Any], laws: bool) -> int:
    """Run a plan for as long as the budget says, then say what it shows."""
    begun = time.perf_counter()
    from lightning_spectral.memory.fit import read_results
    from lightning_spectral.memory.output import INTERRUPTED, conclude, prepare, write_rows
    from lightning_spectral.memory.reproduce import parse_budget, within_budget
    from lightning_spectral.theory.problem import require_integer

    seconds = parse_budget(options.budget)
    machine = memory_options.machine(options)
    require_integer("first_seed", options.first_seed, 0, "seeds are non-negative integers")
    require_integer("n_items", options.n_items, 1000, "fewer items than that are all recovered at once")
    parts = plan(options.n_items, options.first_seed, machine)
    folder = prepare(options.out, keep=False, say=print)
    rows = within_budget(parts, seconds, begun)
    interrupted = write_rows(folder, rows)
    conclude(folder, read_results(folder), figures=not options.no_figures, say=print, laws=laws)
    return INTERRUPTED if interrupted else 0


def _advise(options: argparse.Namespace) -> int:
    from lightning_spectral.memory import advise
    from lightning_spectral.memory.output import prepare, write_rows
    from lightning_spectral.theory.rules import RuleSettings, parse_rule

    counts = advise.read_counts(options.counts)
    ffn = options.ffn if options.ffn is not None else 4 * options.d
    advise.check(options.d, ffn, options.batch_tokens, len(counts))
    settings = RuleSettings(coefficients=options.coefficients, ns_steps=options.ns_steps)
    for rule in options.rules:
        parse_rule(rule, settings)
    advisor = advise.Advisor(counts, options.d, ffn, options.batch_tokens, settings)
    layers = advise.layers_of(options.d, ffn)
    found = [made for layer in layers for rule in options.rules if (made := advisor.advise(layer, rule)) is not None]
    steps = {layer.name: advisor.steps_needed(layer, options.coefficients) for layer in layers if not layer.hidden_relu}
    print("\n".join(advise.advice_lines(found, advisor, steps)))
    folder = prepare(options.out, keep=False, say=print)
    needed = {"ns_steps_needed": None, "batch_tokens": options.batch_tokens, "settings": options.coefficients}
    write_rows(folder, [{**one.as_dict(), **needed, "ns_steps_needed": steps.get(one.layer)} for one in found])
    print(f"\nwritten to {folder}: results.jsonl")
    return 0


def _audience(options: argparse.Namespace) -> int:
    from pathlib import Path

    from lightning_spectral.memory.audience_study import read_runs, table
    from lightning_spectral.text import write_text

    lines = table(read_runs(options.dir))
    write_text(Path(options.dir) / "audience.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwritten to {options.dir}: audience.md")
    return 0


def _add_audience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a folder of runs that were trained with UpdateAudience")


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from lightning_spectral.memory.fit import RESULTS_FILE, read_results
    from lightning_spectral.memory.output import conclude

    folder = Path(options.dir)
    if not (folder / RESULTS_FILE).is_file():
        raise CommandError(f"`DIR` {folder} holds no {RESULTS_FILE}; name the `--out` of a memory command.")
    rows = read_results(folder)
    if not rows:
        raise CommandError(f"`DIR` {folder}: {RESULTS_FILE} has no whole row yet.")
    conclude(folder, rows, figures=not options.no_figures, say=print, laws=True)
    return 0


def _fields(options: argparse.Namespace) -> int:
    print(__doc__)
    return 0


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


AddOptions = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[str, str, AddOptions, Callable[[argparse.Namespace], int]]] = {
    "one-step": ("one step from W = 0: count, curve and spectrum of each rule", "--d 128 256 --rules sgd muon ns5",
                 _add_one_step, _one_step),
    "batch": ("one step from a sampled batch: count against batch size", "--d 128 --batch-size 64 1024 population",
              _add_batch, _batch),
    "steps": ("many steps: exact softmax dynamics, or deflation", "--d 64 128 --steps 5", _add_steps, _steps),
    "theory": ("predictions only, nothing simulated", "--d 128 512 2048 --n-items 1000000", _add_theory, _theory),
    "newton-schulz": ("capacity kept by k Newton-Schulz steps", "--d 256, or --checkpoint last.ckpt",
                      _add_newton_schulz, _newton_schulz),
    "reproduce": ("every law of the paper within a time budget, with verdicts", "--budget 3m",
                  partial(_add_budget, verb="reproduce", budget="3m"), _reproduce),
    "claims": ("the paper's abstract as a test: eight sentences with numbers and verdicts", "--budget 10m",
               partial(_add_budget, verb="claims", budget="10m"), _claims),
    "advise": ("what one update stores of your vocabulary, and what binds", "--counts counts.npy --d 768 --ffn 3072",
               _add_advise, _advise),
    "recall": ("facts recalled and TAIL rank of a trained network, by width and optimizer", "--d 24 32 --seeds 2",
               _add_recall, _recall),
    "audience": ("whom updates served: records of UpdateAudience over runs, with intervals", "out/audience",
                 _add_audience, _audience),
    "report": ("tables, verdicts and figures of a folder of results again, from its rows alone", "out/memory/one-step",
               _add_report, _report),
    "fields": ("what the fields of results.jsonl mean", "", _add_nothing, _fields),
}  # fmt: skip
