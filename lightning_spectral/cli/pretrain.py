"""``lightning-spectral pretrain --config RECIPE [--any.key value ...]``: train, measure, and show the last window."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings

import yaml

from lightning_spectral.analysis.last_window import summary
from lightning_spectral.cli.parser import nearest_option
from lightning_spectral.text import CommandError, one_line
from lightning_spectral.text.tables import FORMATS, aside, print_table

_HELP = """\
usage: lightning-spectral pretrain --config RECIPE [--any.key value ...]

Train a litgpt GPT with Lightning, as a recipe says: litgpt's own `pretrain` schema, plus `callbacks`, `strategy`,
`accelerator`, `architecture` and `lr_schedule`.

  --config RECIPE       a YAML file, or the name of a shipped recipe: {names}
  --any.key VALUE       override a key; lists by place or class name, `--callbacks+ CLASS` appends
  --data PATH           train on your own .txt, .jsonl or .parquet file, glob or folder
  --resume auto         continue an interrupted run; refused if the recipe or this package has changed since
  --accept-changes      continue it all the same, under the new recipe
  --print_config        show the recipe with overrides and defaults and stop; names are checked (no import of litgpt)
  --print_recipe        the same with every argument of every class, and every value checked (some seconds)
  --format FORMAT       of the last window's table: table, json, csv, markdown or latex
  --help_keys [WORD]    every key with its type, default and meaning, or those with WORD in their name

examples:
  lightning-spectral pretrain --config quickstart
  lightning-spectral pretrain --config quickstart --data my_book.txt --out_dir out/book --train.max_steps 50
  lightning-spectral pretrain --config quickstart --optimizer.init_args.lr 1e-3 \\
      --callbacks.SpectralRankCallback.init_args.every_n_steps 10

The run folder (`out_dir`) gets the records, `checkpoints/` (for `--resume`), `final/` (a litgpt model) and `logs/`."""

_SHOW = ("--help_keys", "--print_recipe", "--print_config")
_OPTIONS = ("--config", "--format", "--accept-changes", "--help", *_SHOW)

# what Lightning says on every run and nobody can act on
_CHATTER = ("Tip:", "`weights_only` was not set", "TPU available", "Restored all states", "`Trainer.fit` stopped")


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input, 143 stopped by SIGTERM."""
    from lightning_spectral.training.devices import refuse_absent, surely_absent
    from lightning_spectral.training.document import RecipeError, names
    from lightning_spectral.training.names import keys, refuse_wrong_places, with_defaults
    from lightning_spectral.training.values import check_without_imports

    if not argv or argv == ["help"] or {"-h", "--help"} & {*argv}:
        print(_HELP.format(names=", ".join(names())))
        return 0 if argv else 2
    accept_changes = "--accept-changes" in argv
    config, show, style, words = _split([word for word in argv if word != "--accept-changes"])
    if show == "--help_keys":
        return _help_keys(words)
    _refuse_unknown_options(words, keys())
    if config is None and words and not words[0].startswith("-"):
        raise CommandError(f"`{words[0]}` is not an option: a recipe is given as `--config {words[0]}`.")
    if config is None:
        raise CommandError("no recipe: give `--config FILE` or a shipped name, e.g. `--config quickstart`.")
    try:
        tree = check_without_imports(config, words)  # before litgpt and Lightning are imported
        if show == "--print_config":
            print(yaml.safe_dump(with_defaults(tree), sort_keys=False), end="")
            return 0
        if show:
            return _show(config, words)
        refuse_wrong_places(tree)
        refuse_absent(tree.get("accelerator", "auto"), surely_absent)
        return _train(config, words, style, accept_changes)
    except RecipeError as error:
        raise CommandError(str(error)) from error


def _help_keys(words: list[str]) -> int:
    """Keys by a word of their name; the recipe that may stand beside it says nothing of them."""
    from lightning_spectral.training.document import RecipeError
    from lightning_spectral.training.help_keys import keys_with, text_of

    word = next((word for word in words if not word.startswith("-")), "")
    try:
        print(text_of(keys_with(word)))
    except RecipeError as error:
        raise CommandError(str(error)) from error
    return 0


def _refuse_unknown_options(words: list[str], keys: list[str]) -> None:
    """Options of the verb that are misspelled: they look like keys of a recipe."""
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and "." not in option and option[2:].removesuffix("+") not in keys:
            close = nearest_option(option, _OPTIONS)
            if close.endswith("?"):
                raise CommandError(f"unknown option `{option}`; {close}")


def _show(config: str, words: list[str]) -> int:
    _quieten()
    from lightning_spectral.training.recipe import load

    print(load(config, words).text(), end="")
    return 0


def _train(config: str, words: list[str], style: str, accept_changes: bool) -> int:
    # OpenMP threads that spin while they wait make a small model ten times slower on a machine that has other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _quieten()
    from lightning_spectral.training.preemption import first_rank, requeue, under_slurm
    from lightning_spectral.training.pretrain import pretrain
    from lightning_spectral.training.recipe import load

    recipe = load(config, words)
    try:
        outcome = pretrain(recipe, accept_changes=accept_changes)
    except SystemExit as error:
        if type(error).__name__ not in ("SIGTERMException", "PreemptedError"):
            raise
        name = getattr(error, "name", "SIGTERM")
        if first_rank():
            print(f"stopped by {name}; continue with `--resume auto` ({recipe.out_dir}).", file=sys.stderr)
            if name == "SIGUSR1" and under_slurm():
                requeue()
        return 143
    if not first_rank():
        return 0
    out = aside(style)
    print(file=out)
    if (table := summary(outcome.run_folder)) is not None:
        print_table(table, style)
    else:
        print("no spectral records: nothing was measured in this run.", file=out)
    print("\n".join(_losses(outcome.val_loss, outcome.unigram_entropy)), file=out)
    print(f"run folder   {outcome.run_folder}  (step {outcome.step}, {outcome.tokens:,} tokens)", file=out)
    if recipe.content["logger_name"] == "tensorboard":
        print(f"curves       tensorboard --logdir {outcome.run_folder}  (tab SPECTRAL)", file=out)
    return 0


def _losses(val_loss: float | None, unigram_entropy: float | None) -> list[str]:
    if val_loss is None:
        return []
    line = f"\nvalidation   loss {val_loss:.3f} nats per token (perplexity {math.exp(val_loss):.1f})"
    if unigram_entropy is not None:
        line += f"; token frequencies alone: {unigram_entropy:.3f}"
    return [line]


def _split(argv: list[str]) -> tuple[str | None, str | None, str, list[str]]:
    """``(recipe, flag, format, overrides)``."""
    values: dict[str, str] = {}
    show, words, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word in _SHOW:
            show = word
        elif option in ("--config", "--format"):
            if not equals and not rest:
                what = "a YAML file or a shipped name" if option == "--config" else f"one of {', '.join(FORMATS)}"
                raise CommandError(f"`{option}` has no value: give {what}.")
            if option in values:
                raise CommandError(
                    f"`{option}` is given twice, `{values[option]}` first: keep one (a recipe is laid over another by "
                    "its key `base`)."
                )
            values[option] = value if equals else rest.pop(0)
        else:
            words.append(word)
    style = values.get("--format", "table")
    if style not in FORMATS:
        raise CommandError(f"`--format` must be one of {', '.join(FORMATS)}, got {style}.")
    return values.get("--config"), show, style, words


def _one_line_warning(message: Warning | str, *where: object) -> str:
    """A warning without the file of a library in which it was raised."""
    return f"WARNING {one_line(message)}\n"


def _quieten() -> None:
    import lightning.pytorch  # noqa: F401  (it makes the handlers)

    def useful(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _CHATTER)

    warnings.formatwarning = _one_line_warning  # type: ignore[assignment]
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(useful)
