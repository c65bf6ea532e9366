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
* ``recall``: one row per step: ``optimizer``, ``lr``, ``network``, ``loss``, ``count``, ``mass``, ``tail``, recall by
  octave of rank (``00``, ``01``, ...), ``tail_soft_rank``, ``tail_hard_rank`` measured at ``rank_step``;
* ``advise`` (kind ``advice``): ``layer``, ``outputs``, ``inputs``, ``rule``, ``stored``, ``stored_population``,
  ``rank``, ``tail_share``, ``critical_batch``, ``gains``, ``binds``, ``ns_steps_needed``.

A second command in the same folder moves the earlier results to ``previous/``; ``--resume`` continues them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_spectral.cli import memory_verbs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.memory import verb_options
from lightning_spectral.memory.options import Parser
from lightning_spectral.text import CommandError, read_yaml
from lightning_spectral.text.tables import add_format_option

_WITHOUT_RECIPE = ("report", "fields", "audience")
AddOptions = Callable[[Parser], None]
Call = Callable[[argparse.Namespace], int]


def main(argv: list[str]) -> int:
    """Run one memory command."""
    full = Parser.ALL in argv
    parser = VerbParser(
        "memory",
        description="The associative memory of arXiv:2603.26554: what one step stores.",
        epilog="`lightning-spectral memory fields` lists the fields of results.jsonl.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, (help_line, example, add_options, _) in COMMANDS.items():
        epilog = f"Example: lightning-spectral memory {name} {example}".strip()
        words = "DIR [options]" if name in ("report", "audience") else "[options]"
        usage = None if full else f"lightning-spectral memory {name} {words}"
        verb = verbs.add_parser(name, help=help_line, description=help_line, epilog=epilog, usage=usage, full=full)
        add_options(verb)
        if name not in _WITHOUT_RECIPE:
            verb.add_argument("--config", metavar="YAML", help="options from a recipe, e.g. recipes/memory/steps.yaml")
        if name != "fields":
            add_format_option(verb)
    options = parser.parse_args(["--help" if word == Parser.ALL else word for word in _with_config(argv)])
    from lightning_spectral.memory.plan import refuse_repeats  # torch: not for a help or a misspelled option

    refuse_repeats(options)
    with verbs.choices[options.verb].own_words(ValueError):
        return COMMANDS[options.verb][3](options)


def _with_config(argv: list[str]) -> list[str]:
    """Options of a recipe become defaults of its verb; the command line has the last word."""
    if not argv or argv[0] not in COMMANDS or "--config" not in argv:
        return argv
    import yaml

    position = argv.index("--config")
    if position + 1 >= len(argv):
        raise CommandError("`--config` needs a file.")
    path = argv[position + 1]
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"`--config` {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("command", argv[0]) != argv[0] or "train" in content:
        raise CommandError(f"`--config` {path} is no recipe for `memory {argv[0]}`; its `command` must name that verb.")
    arguments: list[str] = []
    for key, value in content.items():
        if key == "command" or value is None or value is False:
            continue
        arguments.append("--" + str(key).replace("_", "-"))
        if value is not True:
            arguments += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return [argv[0], *arguments, *argv[1:position], *argv[position + 2 :]]


def _fields(options: argparse.Namespace) -> int:
    print(__doc__)
    return 0


def _add_nothing(parser: Parser) -> None:
    """No options."""


COMMANDS: dict[str, tuple[str, str, AddOptions, Call]] = {
    "one-step": ("one step from W = 0: count, curve and spectrum of each rule", "--d 128 256 --rules sgd muon ns5",
                 verb_options.add_one_step, memory_verbs.one_step),
    "batch": ("one step from a sampled batch: count against batch size", "--d 128 --batch-size 64 1024 population",
              verb_options.add_batch, memory_verbs.batch),
    "steps": ("many steps: exact softmax dynamics, or deflation", "--d 64 128 --steps 5",
              verb_options.add_steps, memory_verbs.steps),
    "theory": ("predictions only, nothing simulated", "--d 128 512 2048 --n-items 1000000",
               verb_options.add_theory, memory_verbs.theory),
    "newton-schulz": ("capacity kept by k Newton-Schulz steps", "--d 256, or --checkpoint last.ckpt",
                      verb_options.add_newton_schulz, memory_verbs.newton_schulz),
    "reproduce": ("every law of the paper within a time budget, with verdicts", "--budget 3m",
                  partial(verb_options.add_budget, verb="reproduce", budget="3m"), memory_verbs.reproduce),
    "claims": ("the paper's abstract as a test: eight sentences with numbers and verdicts", "--budget 10m",
               partial(verb_options.add_budget, verb="claims", budget="10m"), memory_verbs.claims),
    "advise": ("what one update stores of your vocabulary, and what binds", "--counts counts.npy --d 768 --ffn 3072",
               verb_options.add_advise, memory_verbs.advise),
    "recall": ("facts recalled and TAIL rank of a trained network, by width and optimizer", "--d 24 32 --seeds 2",
               verb_options.add_recall, memory_verbs.recall),
    "audience": ("whom updates served: records of UpdateAudience over runs, with intervals", "out/audience",
                 verb_options.add_audience, memory_verbs.audience),
    "report": ("tables, verdicts and figures of a folder of results again, from its rows alone", "out/memory/one-step",
               verb_options.add_report, memory_verbs.report),
    "fields": ("what the fields of results.jsonl mean", "", _add_nothing, _fields),
}  # fmt: skip
