"""What a run's recorded recipe says: its learning rate, when that decays, and what its seed draws.

``run.json`` holds the LightningModule's hyper-parameters; for ``pretrain`` and ``sweep`` that is the whole recipe. Runs
of other scripts may hold less: then the answer is ``None``, never a guess.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_spectral.analysis.runs import Run

# keys that name a run, say where it writes or repeat it; the width is what a law is fitted over
_NOT_THE_TASK: Final = ("out_dir", "seed", "callbacks", "resume", "devices", "logger_name", "log", "model_name")
_WIDTH_KEYS: Final = (("architecture", "ffn_multiplier"), ("model_config", "intermediate_size"))


def learning_rate(run: Run) -> float | None:
    """Base learning rate of the run's optimizer."""
    recipe = run.info.hparams
    for value in (_at(recipe, "optimizer", "init_args", "lr"), _at(recipe, "lr"), _at(recipe, "learning_rate")):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


def num_steps(run: Run) -> int | None:
    """Optimizer steps that the recipe asks for."""
    recipe = run.info.hparams
    train = _at(recipe, "train")
    if not isinstance(train, Mapping) or train.get("epochs"):
        return None  # an epoch's length is not recorded
    limits = [train["max_steps"]] if train.get("max_steps") else []
    if train.get("max_tokens"):
        length = train.get("max_seq_length") or _at(recipe, "model_config", "block_size")
        if not length or not train.get("global_batch_size"):
            return None
        limits.append(int(train["max_tokens"]) // (int(train["global_batch_size"]) * int(length)))
    return min(limits, default=None)


def is_whole(run: Run) -> bool | None:
    """Whether a run has reached its end, by its own word, else by its recipe; ``None`` if neither says.

    A window of the last optimizer step has the number of the steps done before it.
    """
    if run.info.finished is not None:
        return run.info.finished
    steps = num_steps(run)
    return None if steps is None else bool(run.steps[-1] >= steps - 1)


def decay_step(run: Run) -> int | None:
    """Last step at the full learning rate, if the recipe holds the rate and lets it fall at the end.

    A cosine falls from the start: it has no state before the decay.
    """
    recipe = run.info.hparams
    fraction, steps = _at(recipe, "lr_schedule", "decay_fraction"), num_steps(run)
    if _at(recipe, "lr_schedule", "kind") != "constant_linear_decay" or not steps or not isinstance(fraction, float):
        return None
    warmup = _at(recipe, "train", "lr_warmup_steps") or 0
    start = max(int(warmup), math.floor(steps * (1.0 - fraction) + 1e-9))
    return start if 0 < start < steps else None


def seed_meaning(runs: Sequence[Run]) -> str:
    """What differs between two seeds of one configuration, as far as the recipes say."""
    seeds: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        seeds.setdefault((run.optimizer, run.width), set()).add(run.seed)
    if max((len(own) for own in seeds.values()), default=0) < 2:
        return ""
    order = {_at(run.info.hparams, "data", "init_args", "seed") for run in runs}
    if len(order) == 1 and None not in order:
        return "seeds = initial weights; the data order is shared by all runs, so its luck is in no interval"
    digests = {run.data_digests.get("train", "") for run in runs}
    if len(digests) == 1 and "" not in digests:
        return "seeds = initial weights; all runs saw the same data in the same order, so its luck is in no interval"
    if all(_at(run.info.hparams, "data") for run in runs):
        return "seeds = initial weights and data order"
    return "what a seed draws is not recorded"


def task_key(run: Run, *, without_rate: bool = False) -> str | None:
    """The recipe without run names, seed and width; equal keys are one configuration. ``None`` if there is none."""
    recipe = run.info.hparams
    if not isinstance(_at(recipe, "optimizer"), Mapping):
        return None
    kept = copy.deepcopy({key: value for key, value in recipe.items() if key not in _NOT_THE_TASK})
    for group, key in _WIDTH_KEYS:
        if isinstance(kept.get(group), dict):
            kept[group].pop(key, None)
    if without_rate and isinstance(kept["optimizer"].get("init_args"), dict):
        kept["optimizer"]["init_args"].pop("lr", None)
    return json.dumps(kept, sort_keys=True, default=str)


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree
