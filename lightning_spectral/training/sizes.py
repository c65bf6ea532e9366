"""Data, tokenizer, model and batch sizes of a run, made to fit together before the Trainer is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir, parse_devices

from lightning_spectral.data.text_blocks import TextBlocks
from lightning_spectral.training.devices import spread_of
from lightning_spectral.training.document import RecipeError, named_config
from lightning_spectral.training.recipe import Recipe


@dataclass(frozen=True)
class Lengths:
    """Batch sizes and steps of a run."""

    devices: int
    num_nodes: int
    seq_length: int
    accumulation: int
    num_steps: int
    warmup_iters: int

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.devices * self.num_nodes


def checkpoint_dir(content: dict[str, Any], key: str) -> Path | None:
    """The folder that a key names.

    Raises:
        RecipeError: If it is not there.
    """
    path = content[key]
    if path is None:
        return None
    folder: Path = extend_checkpoint_dir(Path(path))
    if not folder.is_dir():
        raise RecipeError(f"`{key}` names `{path}`, which does not exist: give a folder, or leave it out.")
    return folder


def model_config(recipe: Recipe, data: DataModule, tokenizer_dir: Path | None) -> Config:
    """Litgpt's config of the recipe's model, with the vocabulary of its data.

    Raises:
        RecipeError: If litgpt refuses it, or the vocabulary is too small for the tokenizer.
    """
    if isinstance(data, TextBlocks):
        data.connect(tokenizer_dir=tokenizer_dir)
        data.prepare_data()
        vocab = data.vocab_size
        config = config_of(recipe, vocab)
    else:
        vocab = Tokenizer(tokenizer_dir).vocab_size if tokenizer_dir else 0
        config = config_of(recipe)
    if config.padded_vocab_size is not None and config.padded_vocab_size < vocab:
        raise RecipeError(
            f"the tokenizer has {vocab} ids, the model's `padded_vocab_size` is {config.padded_vocab_size}: raise it, "
            "or leave the vocabulary out of `model_config` to take the tokenizer's."
        )
    return config


def config_of(recipe: Recipe, vocab_size: int | None = None) -> Config:
    """Litgpt's config of the recipe's model.

    Args:
        recipe: The recipe.
        vocab_size: Ids of the tokenizer, where the recipe describes a model and does not say how many it has.

    Raises:
        RecipeError: If litgpt refuses it.
    """
    given = recipe.content["model_config"]
    described = given is not None
    given = dict(given) if described else named_config(recipe.content["model_name"])
    if vocab_size is not None and described and not {"vocab_size", "padded_vocab_size"} & set(given):
        given["vocab_size"] = given["padded_vocab_size"] = vocab_size
    architecture, width = recipe.architecture, given.get("intermediate_size")
    if architecture.ffn_multiplier is not None:
        derived = round(architecture.ffn_multiplier * given.get("n_embd", Config.n_embd))
        if width is not None and described and width != derived:
            raise RecipeError(
                f"two FFN widths: `model_config.intermediate_size` is {width}, `architecture.ffn_multiplier` gives "
                f"{derived}: keep one of them."
            )
        given["intermediate_size"] = derived
    try:
        return Config(**given)
    except (AssertionError, TypeError) as error:
        reason = str(error) or "n_embd must be a multiple of n_head, n_head of n_query_groups"
        raise RecipeError(f"litgpt refuses the `model_config`: {reason}.") from error


def connect(
    data: DataModule, train: TrainArgs, config: Config, tokenizer_dir: Path | None, content: dict[str, Any]
) -> Lengths:
    """Batch sizes, steps and sequence length; tells the data module its part of them.

    Raises:
        RecipeError: If they do not fit together.
    """
    try:
        devices, num_nodes = parse_devices(content["devices"]), content["num_nodes"]
    except ValueError as error:
        raise RecipeError(f"`devices` must be auto or a whole number >= 1, got {content['devices']}.") from error
    world = spread_of(content["strategy"]).data_parallel(devices * num_nodes)  # ranks with data of their own
    micro = train.micro_batch_size
    seq_length = train.max_seq_length or config.block_size
    if seq_length > config.block_size:
        raise RecipeError(
            f"`train.max_seq_length` is {seq_length}, the model's `block_size` is {config.block_size}: lower the first "
            "or raise the second."
        )
    if train.global_batch_size % (world * micro):
        raise RecipeError(
            f"`train.global_batch_size` {train.global_batch_size} is no multiple of {world} device(s) * "
            f"`train.micro_batch_size` {micro} = {world * micro}: change one of them."
        )
    accumulation = train.gradient_accumulation_iters(world, 1)
    ours = isinstance(data, TextBlocks)
    settings: dict[str, Any] = {"batch_size": micro, "max_seq_length": seq_length}
    if isinstance(data, TextBlocks):
        data.connect(**settings, tokenizer_dir=tokenizer_dir)
        epoch_iters = max(1, data.num_train_blocks // (world * micro))
    else:
        data.connect(tokenizer=Tokenizer(tokenizer_dir) if tokenizer_dir else None, **settings)
        epoch_iters = _epoch_iters(data, world) if train.epochs or train.lr_warmup_fraction else 1
    limits = []
    if train.max_tokens:
        limits.append(train.max_tokens // world // (micro * seq_length) // accumulation)
    if train.max_steps:
        limits.append(train.max_steps)
    if train.epochs:
        limits.append(train.epochs * epoch_iters // accumulation)
    num_steps = min(limits)
    if num_steps < 1:
        raise RecipeError(
            f"the run has no whole optimizer step: one takes {train.global_batch_size} sequences of {seq_length} "
            "tokens. Raise `train.max_tokens` or `train.epochs`, or lower `train.global_batch_size`."
        )
    if ours:
        data.connect(
            **settings,
            tokenizer_dir=tokenizer_dir,
            global_batch_size=train.global_batch_size,
            num_steps=num_steps,
            seed=content["seed"],
        )
    warmup = train.warmup_iters(world, 1, num_steps * accumulation, range(epoch_iters))
    return Lengths(devices, num_nodes, seq_length, accumulation, num_steps, warmup)


def _epoch_iters(data: DataModule, world: int) -> int:
    data.prepare_data()
    data.setup()
    return max(1, len(data.train_dataloader()) // world)
