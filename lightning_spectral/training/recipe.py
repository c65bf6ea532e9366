"""Recipes: litgpt's ``pretrain`` schema and a few keys more.

Those are ``callbacks``, ``strategy``, ``accelerator``, ``architecture`` and ``lr_schedule``.
Two functions are the whole interface::

    recipe = load("recipes/quickstart.yaml", ["--train.max_steps", "50"])   # or {"train.max_steps": 50}
    folder = run(recipe)                                                    # the run folder, recipe.out_dir

A :class:`Recipe` is checked, complete, plain and picklable. Every key may be overridden with a dotted path; an item
of a list is named by its place or, where it has a ``class_path``, by its class:
``callbacks.TailTokenProbe.init_args.every_n_steps``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_spectral.gpt.architecture import Architecture
from lightning_spectral.gpt.learning_rate import LRSchedule
from lightning_spectral.training.document import RecipeError, find, overridden, read_tree
from lightning_spectral.training.schema import check

__all__ = ["Recipe", "RecipeError", "load"]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        source: The file or name that it came from.
        content: Every key of the schema with plain values, defaults filled in; ``model_config`` holds the given keys
            only, so that what was not given can still come from the tokenizer.
    """

    source: str
    content: dict[str, Any]

    @property
    def out_dir(self) -> Path:
        """The run folder."""
        from litgpt.utils import init_out_dir

        return Path(init_out_dir(Path(self.content["out_dir"])))

    @property
    def architecture(self) -> Architecture:
        """Changes to litgpt's model."""
        return Architecture(**self.content["architecture"])

    @property
    def lr_schedule(self) -> LRSchedule:
        """Shape of the learning rate."""
        return LRSchedule(**self.content["lr_schedule"])

    def text(self) -> str:
        """The recipe as YAML that :func:`load` reads back."""
        return yaml.safe_dump(self.content, sort_keys=False)


def load(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file, or the name of a recipe that came with the package (``quickstart``, ``optimizers/muon``).
        overrides: Command-line words (``["--train.max_steps", "50", "--optimizer.init_args.lr=1e-3"]``), or dotted keys
            with values (``{"train.max_steps": 50}``). ``callbacks+`` appends to the list.

    Raises:
        RecipeError: If the file is missing or no YAML mapping, a key is unknown, a value has the wrong type, or a
            key is set to something that cannot be honoured.
    """
    file = find(path)
    return Recipe(str(file), check(overridden(read_tree(file), overrides)))
