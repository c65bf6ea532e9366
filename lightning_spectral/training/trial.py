"""A recipe tried on the meta device: its model and its optimizer are built, and nothing is allocated."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from lightning_spectral.gpt.architecture import adapt_config, build_gpt
from lightning_spectral.gpt.module import build_optimizer
from lightning_spectral.text import one_line
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.recipe import Recipe
from lightning_spectral.training.sizes import config_of


def try_out(recipe: Recipe) -> None:
    """Build what a recipe describes, without memory.

    Raises:
        RecipeError: If model or optimizer cannot be built: the key, and what was said.
    """
    config = config_of(recipe)
    log = logging.getLogger("lightning_spectral.optim")
    level = log.level
    log.setLevel(logging.ERROR)  # the table of roles is for the training itself
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = build_gpt(adapt_config(config, recipe.architecture), recipe.architecture, seed=0)
            except (ValueError, TypeError, AssertionError, RuntimeError) as error:
                raise RecipeError(f"the model cannot be built: {one_line(error)}") from error
            try:
                build_optimizer(recipe.content["optimizer"], model)
            except (ValueError, TypeError, AssertionError, RuntimeError) as error:
                raise RecipeError(f"`optimizer`: {_shown(recipe.content['optimizer'])}: {one_line(error)}") from error
    finally:
        log.setLevel(level)


def _shown(spec: Any) -> str:
    """``AdamW(lr=-1)``."""
    path, init_args = (spec["class_path"], spec.get("init_args") or {}) if isinstance(spec, dict) else (spec, {})
    return f"{path.rpartition('.')[2]}({', '.join(f'{name}={value!r}' for name, value in init_args.items())})"
