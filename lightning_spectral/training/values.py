"""Values in a recipe that cannot be right, said before anything is imported.

Types and closed choices are read from the annotations in the sources of litgpt, torch and this package
(:mod:`.sources`). Where an annotation leaves something open, the full check after the import decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lightning_spectral.text import did_you_mean
from lightning_spectral.training import devices
from lightning_spectral.training.document import RecipeError, find, overridden, read_tree
from lightning_spectral.training.names import (
    GROUPS,
    OUR_KEYS,
    SETUP,
    class_of,
    refuse_unknown_names,
    with_class_paths,
    with_defaults,
)
from lightning_spectral.training.sources import Choice, Hint, ListOf, alternatives, hints_of

_HABITS: Final = {"bf16": "bf16-mixed", "32": "32-true", "fp32": "32-true"}  # Lightning's older words, as it reads them


def check_without_imports(source: str | Path, words: Sequence[str]) -> dict[str, Any]:
    """The tree of a recipe with its overrides, names and values checked; imports neither torch nor litgpt.

    Raises:
        RecipeError: As :func:`~lightning_spectral.training.names.refuse_unknown_names` and
            :func:`refuse_wrong_values`.
    """
    tree = with_class_paths(overridden(read_tree(find(source)), words))
    refuse_unknown_names(tree)
    refuse_wrong_values(tree)
    return tree


def refuse_wrong_values(tree: Mapping[str, Any]) -> None:
    """Refuse values of another type, outside of a closed choice, or that no run can honour.

    Args:
        tree: From :func:`~lightning_spectral.training.names.with_class_paths`, with names that exist.

    Raises:
        RecipeError: One sentence with the key, the value seen and the remedy.
    """
    for key, hint, value in _annotated(tree):
        refuse_other_kinds(key, hint, value)
    devices.check_devices(tree.get("devices", "auto"))
    devices.check_strategy(tree.get("strategy", "auto"))
    devices.check_accelerator(tree.get("accelerator", "auto"))
    content = with_defaults(tree)
    for reason in (*bad_numbers(content), *bad_combinations(content)):
        raise RecipeError(reason)


def _annotated(tree: Mapping[str, Any]) -> Iterator[tuple[str, Hint, Any]]:
    """Key, annotation and value of what a recipe gives at the top, in groups, and to its classes."""
    top = {**(hints_of(SETUP) or {}), **(hints_of(OUR_KEYS) or {})}
    apart = {*GROUPS, "data", "callbacks", "optimizer", "strategy", "devices", "accelerator"}
    yield from ((key, top[key], tree[key]) for key in tree.keys() & top.keys() - apart)
    for group, path in GROUPS.items():
        yield from _of_class(f"{group}.", path, tree.get(group) or {})
    optimizer = tree.get("optimizer")
    classes = [("data", tree["data"]), *([("optimizer", optimizer)] if isinstance(optimizer, dict) else [])]
    classes += [(_name_in_list(spec), spec) for spec in tree["callbacks"]]
    for key, spec in classes:
        path, init_args = class_of(key, spec)
        yield from _of_class(f"{key}.init_args.", path if "." in path else f"torch.optim.{path}", init_args)


def _name_in_list(spec: Any) -> str:
    return f"callbacks.{class_of('callbacks', spec)[0].rpartition('.')[2]}"


def _of_class(prefix: str, path: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Hint, Any]]:
    hints = hints_of(path) or {}
    yield from ((f"{prefix}{key}", hints[key], value) for key, value in given.items() if key in hints)


def refuse_other_kinds(key: str, hint: Hint, value: Any) -> None:
    """Refuse a value that the annotation surely does not allow.

    Raises:
        RecipeError: With the values or types that it allows.
    """
    allowed = list(alternatives(hint))
    if _may_be_one_of(value, allowed):
        return
    lists = [one for one in allowed if isinstance(one, ListOf)]
    if lists and isinstance(value, list):
        wrong = next(item for item in value if not _may_be_one_of(item, lists[0].items))
        raise RecipeError(_sentence(f"each item of `{key}`", lists[0].items, wrong))
    if lists:
        raise RecipeError(f"`{key}` must be a list, got {value}: write [{str(value).strip('()')}].")
    raise RecipeError(_sentence(f"`{key}`", allowed, value))


def _sentence(what: str, allowed: Sequence[Any], value: Any) -> str:
    values = [one.value for one in allowed if isinstance(one, Choice)]
    types = ["a path" if one is Path else one.__name__ for one in allowed if isinstance(one, type)]
    value = "null" if value is None else value
    if types:
        return f"{what} must be {' or '.join([*types, *map(str, values)])}, got {value}."
    known = [*map(str, values), *(["null"] if None in allowed else [])]
    close = did_you_mean(_HABITS.get(str(value), value), values)
    close = f"; {close}" if close.endswith("?") else "."
    return f"{what} must be one of {', '.join(known)}, got {value}{close}"


def _may_be_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    return ... in allowed or any(_may_be(value, one) for one in allowed)


def _may_be(value: Any, allowed: Any) -> bool:
    """Whether a value could be meant as this type or choice; text that reads as a number is one."""
    if isinstance(allowed, Choice):
        return bool(value == allowed.value) and isinstance(value, bool) == isinstance(allowed.value, bool)
    if isinstance(allowed, ListOf):
        return isinstance(value, list) and all(_may_be_one_of(item, allowed.items) for item in value)
    if allowed is None:
        return value is None
    if allowed in (int, float):
        return _may_be_number(value, allowed)
    if allowed is bool:
        return isinstance(value, (bool, int)) or str(value).lower() in ("true", "false")
    return isinstance(value, (str, int, float))


def _may_be_number(value: Any, kind: type) -> bool:
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not math.isnan(value) if kind is float else math.isfinite(value) and value == int(value)


# (group, keys, whether an empty value means no limit): each must be at least 1
_COUNTS = (
    ("eval", ("interval", "max_iters"), False),
    ("train", ("global_batch_size", "micro_batch_size", "log_interval"), False),
    ("train", ("max_steps", "max_tokens", "epochs", "max_seq_length", "save_interval"), True),
)


def bad_numbers(content: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each count below 1, and each other number that is too small.

    Args:
        content: Every key of the schema with its value.
    """
    yield from _bad_sizes(content)
    for group, names, may_be_empty in _COUNTS:
        for name in names:
            value = content[group][name]
            if isinstance(value, (int, float)) and value < 1:
                remedy = "; leave it empty for no limit" if may_be_empty else ""
                yield f"`{group}.{name}` must be >= 1, got {value}{remedy}."


def _bad_sizes(content: Mapping[str, Any]) -> Iterator[str]:
    """What a model has none of, or a machine."""
    config = content["model_config"] or {}
    sizes = ("n_layer", "n_head", "n_embd", "intermediate_size", "block_size", "vocab_size", "padded_vocab_size")
    values = [(f"model_config.{name}", config.get(name), 1) for name in sizes]
    values += [("num_nodes", content["num_nodes"], 1), ("seed", content["seed"], 0)]
    values += [("train.lr_warmup_steps", content["train"]["lr_warmup_steps"], 0)]
    for key, value, least in values:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < least:
            yield f"`{key}` must be >= {least}, got {value}."


def bad_combinations(content: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each pair of settings that excludes each other, and for what only fine-tuning has.

    Args:
        content: Every key of the schema with its value.
    """
    train, evaluation = content["train"], content["eval"]
    if evaluation["max_new_tokens"] is not None:
        yield f"`eval.max_new_tokens: {evaluation['max_new_tokens']}` is for fine-tuning. Leave it empty."
    if evaluation["evaluate_example"] != "first":
        yield f"`eval.evaluate_example: {evaluation['evaluate_example']}` is for fine-tuning. Leave it out."
    if all(train[key] is None for key in ("max_steps", "max_tokens", "epochs")):
        yield "the run has no end: set `train.max_tokens`, `train.max_steps` or `train.epochs`."
    if content["initial_checkpoint_dir"] and content["resume"]:
        yield "`resume` and `initial_checkpoint_dir` both say where to start: set one of them."
    if content["logger_name"] != "wandb" and any(content["log"][key] for key in ("project", "run", "group")):
        yield f"`log.project`, `log.run` and `log.group` are for `logger_name: wandb`, got {content['logger_name']}."
