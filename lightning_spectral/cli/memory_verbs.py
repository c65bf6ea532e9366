"""What each ``lightning-spectral memory VERB`` does with its options."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_spectral.memory import options as memory_options
from lightning_spectral.memory.verb_options import NS_SETS, NS_STEPS
from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import print_tables

Row = dict[str, Any]


def one_step(options: argparse.Namespace) -> int:
    """``one-step``."""
    from lightning_spectral.memory.runs import one_step_rows

    return _run(options, "one-step", one_step_rows)


def batch(options: argparse.Namespace) -> int:
    """``batch``."""
    from lightning_spectral.memory.runs import batch_rows

    return _run(options, "batch", batch_rows)


def steps(options: argparse.Namespace) -> int:
    """``steps``."""
    from lightning_spectral.memory.runs import step_rows
    from lightning_spectral.theory.dynamics import check_run
    from lightning_spectral.theory.problem import require_integer

    require_integer("steps", options.steps, 1, "take at least one step")
    run = {key: getattr(options, key) for key in ("steps", "mode", "step_scale", "schedule")}
    for rule in options.rules:
        check_run(rule, **run)
    return _run(options, "steps", partial(step_rows, run=run), run)


def theory(options: argparse.Namespace) -> int:
    """``theory``."""
    from lightning_spectral.memory.runs import theory_rows
    from lightning_spectral.theory.problem import require_integer

    require_integer("steps", options.steps, 0, "leave it out to predict one step only")
    require_integer("seeds", options.seeds, 1, "a prediction needs one, and is the same for all")
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
    return run_tasks(options.out, tasks, resume=options.resume, figures=not options.no_figures, style=options.format)


def newton_schulz(options: argparse.Namespace) -> int:
    """``newton-schulz``."""
    from lightning_spectral.memory.output import run_tasks
    from lightning_spectral.memory.plan import newton_schulz_task
    from lightning_spectral.memory.runs import newton_schulz_rows
    from lightning_spectral.theory.rules import RuleSettings

    machine = memory_options.machine(options)
    sets, numbers, dtypes = options.coefficients or NS_SETS, options.ns_steps or NS_STEPS, options.ns_dtype
    settings = [
        RuleSettings(coefficients=name, ns_steps=number, ns_dtype=dtype)
        for name, number, dtype in itertools.product(sets, numbers, dtypes)
    ]
    if options.checkpoint:
        return _flattening(options)
    tasks = [
        newton_schulz_task(p, settings, partial(newton_schulz_rows, p, sets, numbers, dtypes, machine))
        for p in memory_options.problems(options)
    ]
    return run_tasks(options.out, tasks, resume=options.resume, figures=not options.no_figures, style=options.format)


def _flattening(options: argparse.Namespace) -> int:
    from lightning_spectral.memory.flattening import checkpoint_rows
    from lightning_spectral.memory.output import conclude, prepare, write_rows

    rows = list(checkpoint_rows(options.checkpoint, options.coefficients, options.ns_steps, options.as_gradient))
    folder = prepare(options.out, style=options.format)
    write_rows(folder, rows)
    conclude(folder, rows, figures=False, style=options.format)
    return 0


def reproduce(options: argparse.Namespace) -> int:
    """``reproduce``."""
    from lightning_spectral.memory.reproduce import plan

    return _within_budget(options, plan, laws=True)


def claims(options: argparse.Namespace) -> int:
    """``claims``."""
    from lightning_spectral.memory.claims_runs import plan

    return _within_budget(options, plan, laws=False)


def _within_budget(options: argparse.Namespace, plan: Callable[..., Any], laws: bool) -> int:
    """Run a plan for as long as the budget says, then say what it shows."""
    begun = time.perf_counter()
    from lightning_spectral.memory.fit import read_results
    from lightning_spectral.memory.output import INTERRUPTED, conclude, prepare, sayer, write_rows
    from lightning_spectral.memory.reproduce import within_budget
    from lightning_spectral.theory.problem import require_integer

    machine = memory_options.machine(options)
    require_integer("first_seed", options.first_seed, 0, "seeds are non-negative integers")
    require_integer("n_items", options.n_items, 1000, "fewer items than that are all recovered at once")
    parts = plan(options.n_items, options.first_seed, machine)
    folder = prepare(options.out, style=options.format)
    interrupted = write_rows(folder, within_budget(parts, options.budget, begun, sayer(options.format)))
    conclude(folder, read_results(folder), figures=not options.no_figures, laws=laws, style=options.format)
    return INTERRUPTED if interrupted else 0


def advise(options: argparse.Namespace) -> int:
    """``advise``."""
    from lightning_spectral.memory import advise as advice
    from lightning_spectral.memory.output import prepare, sayer, write_rows
    from lightning_spectral.theory.rules import RuleSettings, parse_rule

    counts = advice.read_counts(options.counts)
    ffn = options.ffn if options.ffn is not None else 4 * options.d
    advice.check(options.d, ffn, options.batch_tokens, len(counts))
    settings = RuleSettings(coefficients=options.coefficients, ns_steps=options.ns_steps)
    for rule in options.rules:
        parse_rule(rule, settings)
    advisor = advice.Advisor(counts, options.d, ffn, options.batch_tokens, settings)
    layers = advice.layers_of(options.d, ffn)
    found = [made for layer in layers for rule in options.rules if (made := advisor.advise(layer, rule)) is not None]
    plain = [layer for layer in layers if not layer.hidden_relu]
    needed = {layer.name: advisor.steps_needed(layer, options.coefficients) for layer in plain}
    print_tables([advice.advice_table(found)], options.format)
    say = sayer(options.format)
    say("\n" + "\n".join(advice.advice_lines(found, advisor, needed)))
    folder = prepare(options.out, style=options.format)
    more = {"batch_tokens": options.batch_tokens, "settings": options.coefficients}
    write_rows(folder, [{**one.as_dict(), "ns_steps_needed": needed.get(one.layer), **more} for one in found])
    say(f"\nwritten to {folder}: results.jsonl")
    return 0


def recall(options: argparse.Namespace) -> int:
    """``recall``."""
    import sys

    from lightning_spectral.memory import recall_study
    from lightning_spectral.memory.fit import read_results
    from lightning_spectral.memory.output import INTERRUPTED, conclude, prepare, write_rows

    recall_study.check(options)
    folder = prepare(options.out, style=options.format)
    rows = recall_study.study_rows(options, lambda line: print(line, file=sys.stderr))
    interrupted = write_rows(folder, rows)
    conclude(folder, read_results(folder), figures=not options.no_figures, style=options.format)
    return INTERRUPTED if interrupted else 0


def audience(options: argparse.Namespace) -> int:
    """``audience``."""
    from lightning_spectral.memory.audience_study import read_runs, table
    from lightning_spectral.memory.output import sayer
    from lightning_spectral.text import write_text
    from lightning_spectral.text.tables import render

    made = table(read_runs(options.dir))
    write_text(Path(options.dir) / "audience.md", render(made, "markdown") + "\n")
    print_tables([made], options.format)
    sayer(options.format)(f"\nwritten to {options.dir}: audience.md")
    return 0


def report(options: argparse.Namespace) -> int:
    """``report``."""
    from lightning_spectral.memory.fit import RESULTS_FILE, read_results
    from lightning_spectral.memory.output import conclude

    folder = Path(options.dir)
    if not (folder / RESULTS_FILE).is_file():
        raise CommandError(f"`DIR` {folder} holds no {RESULTS_FILE}; name the `--out` of a memory command.")
    rows = read_results(folder)
    if not rows:
        raise CommandError(f"`DIR` {folder}: {RESULTS_FILE} has no whole row yet.")
    conclude(folder, rows, figures=not options.no_figures, laws=True, style=options.format)
    return 0
