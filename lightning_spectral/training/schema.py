"""What a recipe may say: litgpt's own ``pretrain`` signature, read from the installed litgpt, and our few keys more."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback
from litgpt.data import DataModule
from litgpt.pretrain import setup as litgpt_setup

from lightning_spectral.gpt.architecture import Architecture
from lightning_spectral.gpt.learning_rate import LRSchedule
from lightning_spectral.gpt.module import optimizer_class
from lightning_spectral.text import import_class, one_line
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.names import (
    GROUPS,
    class_of,
    refuse_unknown_arguments,
    refuse_unknown_names,
    with_class_paths,
)
from lightning_spectral.training.values import refuse_wrong_values

_APART = ("model_config", "data", "callbacks", "optimizer")  # what takes jsonargparse most of its time


def our_keys(
    callbacks: list[Callback] | None = None,
    strategy: str | dict[str, Any] = "auto",
    accelerator: str = "auto",
    architecture: Architecture = Architecture(),  # noqa: B008
    lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008
) -> None:
    """The keys that litgpt's ``pretrain`` does not have.

    Args:
        callbacks: Lightning callbacks, each ``{class_path, init_args}``.
        strategy: Lightning strategy: auto, ddp, fsdp1, fsdp2, hsdp:REPLICAS, tp:SLICES (of feed-forward networks), a
            registered name, or ``{class_path, init_args}``.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps.
        architecture: Changes to litgpt's GPT.
        lr_schedule: Shape of the learning rate after warm-up.
    """


@lru_cache(maxsize=1)
def parser() -> ArgumentParser:
    """The schema as a jsonargparse parser."""
    made = ArgumentParser(prog="lightning-spectral pretrain", exit_on_error=False)
    made.add_function_arguments(litgpt_setup, fail_untyped=False, sub_configs=False)
    made.add_function_arguments(our_keys)
    return made


def defaults() -> dict[str, Any]:
    """Every key with its default, as plain values."""
    content: dict[str, Any] = {}
    for function in (litgpt_setup, our_keys):
        for name, parameter in inspect.signature(function).parameters.items():
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            content[name] = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
    return {key: str(value) if isinstance(value, Path) else value for key, value in content.items()}


def check(tree: dict[str, Any]) -> dict[str, Any]:
    """Check a recipe's tree and fill in the defaults.

    Raises:
        RecipeError: As :func:`lightning_spectral.training.recipe.load`.
    """
    # an empty block means its defaults
    tree = {
        key: value for key, value in tree.items() if value is not None or key not in GROUPS or key == "model_config"
    }
    tree = with_class_paths(tree)
    refuse_unknown_names(tree)
    refuse_wrong_values(tree)
    if tree.get("model_name") is None and tree.get("model_config") is None:
        raise RecipeError(
            "the recipe names no model: set `model_name` (litgpt's names) or describe one in `model_config`."
        )
    _check_class("data", tree["data"])
    for callback in tree["callbacks"]:
        _check_class("callbacks", callback)
        _callback(callback, only_check=True)
    _check_optimizer(tree.get("optimizer"))
    given_config = tree.get("model_config")
    tree["model_name"] = tree.get("model_name") or (given_config or {}).get("name") or "custom"
    content = defaults()
    content.update(_parsed(tree))
    content["model_config"] = given_config
    return content


def instantiate(content: dict[str, Any], run_folder: Path) -> Namespace:
    """Objects of a checked recipe: ``train``, ``eval``, ``log``, ``data``, ``callbacks``.

    Args:
        content: From :func:`check`.
        run_folder: Where our callbacks write, unless they say otherwise: Lightning's log folder is the logger's.

    Raises:
        RecipeError: If a constructor refuses its arguments.
    """
    wanted = {key: content[key] for key in ("model_name", "train", "eval", "log", "data")}
    try:
        made = parser().instantiate_classes(parser().parse_object(wanted))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise RecipeError(one_line(error)) from error
    made.callbacks = [_callback(_with_folder(callback, run_folder)) for callback in content["callbacks"] or []]
    return made


def _callback(spec: dict[str, Any], *, only_check: bool = False) -> Callback | None:
    """One at a time, by its own class: in a list of alternatives jsonargparse buries what is wrong."""
    name = spec["class_path"].rpartition(".")[2]
    try:
        kind = import_class(spec["class_path"], subclass_of=Callback)  # checked before it is built
    except ImportError as error:
        raise RecipeError(f"`callbacks`: `{spec['class_path']}` cannot be used: {error}.") from error
    one = ArgumentParser(exit_on_error=False)
    one.add_class_arguments(kind, name, fail_untyped=False)
    try:
        values = one.parse_object({name: spec.get("init_args") or {}})
        return None if only_check else getattr(one.instantiate_classes(values), name)
    except Exception as error:  # jsonargparse's own, or whatever the constructor raises
        raise RecipeError(f"`callbacks`: {name}: {one_line(_own_words(kind, spec) or error)}") from error


def _own_words(kind: type[Callback], spec: dict[str, Any]) -> Exception | None:
    """What a callback of ours says of its arguments; jsonargparse may fail to say what a choice takes."""
    if not kind.__module__.startswith("lightning_spectral."):
        return None
    try:
        kind(**(spec.get("init_args") or {}))
    except Exception as error:  # whatever a constructor raises
        return error
    return None


def _with_folder(callback: dict[str, Any], run_folder: Path) -> dict[str, Any]:
    init_args = callback.get("init_args") or {}
    ours = callback["class_path"].startswith("lightning_spectral.")
    if not ours or "dirpath" not in init_args or init_args["dirpath"]:
        return callback
    return {**callback, "init_args": {**init_args, "dirpath": str(run_folder)}}


def _parsed(tree: dict[str, Any]) -> dict[str, Any]:
    """Each part parsed alone and remembered: checking the runs of a sweep costs what differs between them."""
    rest = {key: value for key, value in tree.items() if key not in _APART}
    content = _parsed_part(pickle.dumps(rest))
    for key in _APART:
        if key in tree:
            try:
                content = {**content, key: _parsed_part(pickle.dumps({"model_name": "any", key: tree[key]}))[key]}
            except RecipeError as error:
                raise _of_its_field(key, tree[key]) or error from error
    return copy.deepcopy(content)


@lru_cache(maxsize=256)
def _parsed_part(pickled: bytes) -> dict[str, Any]:
    made = parser()
    try:
        values = made.parse_object(pickle.loads(pickled))  # noqa: S301 - pickled above, by this process
        content: dict[str, Any] = yaml.safe_load(made.dump(values, skip_none=False, skip_validation=True))
    except Exception as error:  # jsonargparse raises its own, argparse's, and whatever a class_path's import raises
        raise RecipeError(_what_does_not_fit(str(error))) from error
    return content


def _of_its_field(group: str, values: Any) -> RecipeError | None:
    """What is wrong with one value of a group, which jsonargparse shows as a whole."""
    hints = get_type_hints(import_class(GROUPS[group])) if group in GROUPS and isinstance(values, dict) else {}
    for name in hints.keys() & values:
        one = ArgumentParser(exit_on_error=False)
        one.add_argument(f"--{group}.{name}", type=hints[name])
        try:
            one.parse_object({group: {name: values[name]}})
        except Exception as error:  # jsonargparse's own
            return RecipeError(_what_does_not_fit(str(error)))
    return None


def _what_does_not_fit(message: str) -> str:
    """Jsonargparse's tree of tried types, as one sentence."""
    key = re.search(r'key "([^"]+)"', message)
    value = re.search(r"Given value: (.+)", message) or re.search(r"Got value: (.+)", message)
    if not key:
        return one_line(message)
    tried = re.findall(r"Expected an? (?:<class '([\w.]+)'>|([^.\n]+))", message)
    wanted = [name or text for name, text in tried if name != "NoneType"]
    if not value or not wanted:
        return one_line(message)
    return f"`{key[1]}` must be {' or '.join(dict.fromkeys(wanted))}, got {value[1].strip().rstrip('.')}."


def _check_class(key: str, spec: Any) -> None:
    """A class that can be imported and knows its ``init_args``: jsonargparse buries which one it does not."""
    path, init_args = class_of(key, spec)
    try:
        found = import_class(path)
    except ImportError as error:
        raise RecipeError(
            f"`{key}` names `{path}`, which cannot be imported: {error}; give the full class path."
        ) from error
    if key == "data" and not (isinstance(found, type) and issubclass(found, DataModule)):
        raise RecipeError(
            f"`data` names `{path}`, which is no data module of litgpt's kind: use `HubText` for a data set of the "
            "hub, `lightning_spectral.data.TextFiles` for files, or a subclass of `litgpt.data.DataModule`."
        )
    if isinstance(found, type):
        _refuse_classes_of_no_type(key, found, init_args)
    known = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        refuse_unknown_arguments(key, path, init_args, known)
    _refuse_missing_arguments(key, path, init_args, known)
    if key == "data":
        _refuse_values_of_other_types(f"{key}.init_args", found, init_args)


def _refuse_missing_arguments(
    key: str, path: str, init_args: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    fillable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in known.items():
        if parameter.kind in fillable and parameter.default is parameter.empty and init_args.get(name) is None:
            raise RecipeError(f"`{key}`: {path} needs `{name}`: set `{key}.init_args.{name}`.")


def _refuse_values_of_other_types(
    key: str, kind: type, init_args: Mapping[str, Any], skip: Collection[str] = ()
) -> None:
    """By the class's own signature: inside a choice of classes jsonargparse shows a tree of types."""
    one = ArgumentParser(exit_on_error=False)
    one.add_class_arguments(kind, key, skip=set(skip), fail_untyped=False)
    group, _, block = key.rpartition(".")
    try:
        one.parse_object({group: {block: dict(init_args)}})
    except Exception as error:  # jsonargparse's own
        raise RecipeError(_what_does_not_fit(str(error))) from error


def _refuse_classes_of_no_type(key: str, kind: type, init_args: Mapping[str, Any]) -> None:
    """A class inside an argument is checked against that argument's type; where it has none, any would be built."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        with contextlib.suppress(Exception):  # annotations that cannot be read say nothing
            hints |= get_type_hints(vars(base).get("__init__"))
    for name, value in init_args.items():
        if _names_a_class(value) and not _says_which(hints.get(name, Any)):
            raise RecipeError(
                f"`{key}.init_args.{name}` names a class, and {kind.__name__} takes anything there: it is not checked, "
                "build it in a script."
            )


def _names_a_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_names_a_class, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_a_class, value))


def _says_which(hint: Any) -> bool:
    """Whether a type leaves nothing open: no ``Any``, also not inside of containers."""
    if hint in (Any, object, dict, list, tuple, set, Callable) or isinstance(hint, TypeVar):
        return False
    if is_dataclass(hint):
        return all(map(_says_which, get_type_hints(hint).values()))
    is_open = inspect.isclass(get_origin(hint) or hint) and issubclass(get_origin(hint) or hint, (Mapping, Sequence))
    return all(map(_says_which, get_args(hint))) if get_args(hint) else not is_open or hint in (str, bytes)


def _check_optimizer(spec: Any) -> None:
    """A class, and arguments of the types that it names: torch itself fails with a traceback on some."""
    if spec is None:
        return
    try:
        found = optimizer_class(spec)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    init_args = class_of("optimizer", spec)[1] if isinstance(spec, dict) else {}
    _refuse_values_of_other_types("optimizer.init_args", found, init_args, skip={"params"})
