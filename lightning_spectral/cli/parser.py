"""What the parsers of several verbs have in common beyond :mod:`lightning_spectral.text.parser`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.text import CommandError
from lightning_spectral.text.parser import VerbParser, at_least, nearest_option

if TYPE_CHECKING:
    from lightning_spectral.data.files import FoundFiles

__all__ = ["VerbParser", "at_least", "data_files", "nearest_option", "parse_recipe_words", "recipe_parser"]


def data_files(path: str) -> FoundFiles:
    """Files of ``--data``.

    Raises:
        CommandError: If nothing readable is there.
    """
    from lightning_spectral.data.files import find_files

    try:
        return find_files(path)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(f"`--data`: {error}") from error


def refuse_model(name: str) -> None:
    """A misspelled name of a model is said before torch is imported.

    Raises:
        CommandError: With the nearest that there is.
    """
    from lightning_spectral.training.names import refuse_unknown_model

    file = Path(name)
    if file.suffix == ".py" and not file.is_file():
        raise CommandError(f"there is no script `{name}`: give its path, or the class path of a module.")
    module, colon, attribute = name.partition(":")
    if colon and re.fullmatch(r"[\w.]+", module) and not Path(module).exists():
        raise CommandError(f"`{name}`: of an importable module write `{module}.{attribute}`; a file is `train.py:Net`.")
    if file.is_file() and file.suffix in (".txt", ".csv", ".json", ".jsonl", ".md"):
        raise CommandError(f"`{name}` is no model: give a recipe, a checkpoint, a folder of one, or `train.py:Net`.")
    try:
        refuse_unknown_model(name)
    except ValueError as error:
        raise CommandError(str(error)) from error


_AXIS = "the values of a key are an axis, `--axis seed=0,1,2`."
_WORKERS = "it is called `--workers` here."
# what people write to a sweep or a plan
_OF_RECIPES = {
    "--where": "fit, compare and report choose among runs with it; a sweep runs what its axes say, `--axis seed=0`.",
    "--filter": "a sweep runs what its axes say, `--axis seed=0`.",
    "--seeds": _AXIS,
    "--widths": "the values of a key are an axis, `--axis architecture.ffn_multiplier=1,2,4`.",
    "--optimizers": "the values of a key are an axis, `--axis optimizer=AdamW,Muon`.",
    "--sweep": _AXIS,
    "--grid": _AXIS,
    **dict.fromkeys(("--parallel", "--jobs", "--num-workers", "--num_workers", "--max-workers"), _WORKERS),
}


def recipe_parser(verb: str, *, description: str, epilog: str, smoke: str) -> VerbParser:
    """The head of the verbs that take a recipe, axes and recipe keys."""
    parser = VerbParser(verb, description=description, epilog=epilog, elsewhere=_OF_RECIPES)
    parser.add_argument("recipe", help="a YAML file or a shipped name, with a `sweep:` block or --axis")
    parser.add_argument("--axis", action="append", default=[], metavar="KEY=A,B,C", help="a recipe key and its values")
    parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def _is_value(word: str, words: Sequence[str]) -> bool:
    """Whether it follows an option that has no ``=``."""
    before = words[words.index(word) - 1] if words.index(word) else ""
    return before.startswith("--") and "=" not in before


def parse_recipe_words(parser: VerbParser, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Options and the words left for the recipe.

    Raises:
        CommandError: If a word is neither an option of the verb nor a recipe key.
    """
    from lightning_spectral.training.names import keys

    options, words = parser.parse_known_args(argv)
    if any(word.partition("=")[0] == "--config" for word in words):
        raise CommandError(f"`--config` is of `pretrain`: here the recipe is the first word, {parser.prog} RECIPE.")
    stray = next((word for word in words if re.match(r"[\w.]+=", word)), None)
    if stray is not None and not _is_value(stray, words):
        raise CommandError(f"`{stray}` is one word too many: an axis is `--axis {stray}`.")
    parser.refuse_unknown(words, also=keys())
    return options, words
