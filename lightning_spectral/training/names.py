"""Names in a recipe (keys, data, callbacks, optimizers, their arguments), checked before anything is imported.

What exists is read from the sources of the installed packages (:mod:`.sources`), never from a list of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from lightning_spectral.text import did_you_mean
from lightning_spectral.training.document import OUR_DATA, RecipeError, named_config, text_data
from lightning_spectral.training.sources import arguments_of, choices, fields_of, is_missing, public_names

SETUP = "litgpt.pretrain.setup"
OUR_KEYS = "lightning_spectral.training.schema.our_keys"
# key with keys of its own -> the dataclass behind it
GROUPS = {
    "model_config": "litgpt.config.Config",
    "train": "litgpt.args.TrainArgs",
    "eval": "litgpt.args.EvalArgs",
    "log": "litgpt.args.LogArgs",
    "architecture": "lightning_spectral.gpt.architecture.Architecture",
    "lr_schedule": "lightning_spectral.gpt.learning_rate.LRSchedule",
}
_NO_DATA = ("DataModule", "SFTDataset")  # of ``litgpt.data.__all__``: bases, no data


@lru_cache(maxsize=1)
def keys() -> list[str]:
    """Every top-level key: those of litgpt's ``pretrain`` and ours."""
    return [*(arguments_of(SETUP) or []), *(arguments_of(OUR_KEYS) or [])]


def with_class_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with data and callbacks as ``{class_path, init_args}``, whatever short form they were given in.

    Raises:
        RecipeError: If there is no data, or a name is not known.
    """
    callbacks = tree.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise RecipeError(f"`callbacks` must be a list of class names or `class_path`s, got {callbacks!r}.")
    return {**tree, "data": _data(tree.get("data")), "callbacks": [_callback(callback) for callback in callbacks]}


def refuse_unknown_names(tree: Mapping[str, Any]) -> None:
    """Refuse what cannot exist under the name given.

    Args:
        tree: From :func:`with_class_paths`.

    Raises:
        RecipeError: One sentence with the name, and the nearest one that exists.
    """
    _refuse_unknown(tree, keys(), "")
    for group, path in GROUPS.items():
        value = tree.get(group)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise RecipeError(f"`{group}` must hold keys and values, got {value!r}.")
        _refuse_unknown(value, fields_of(path), f"{group}.")
    if isinstance(tree.get("model_name"), str) and tree.get("model_config") is None:
        named_config(tree["model_name"])
    _refuse_unknown_logger(tree.get("logger_name"))
    _refuse_unknown_class("data", tree["data"])
    for place, callback in enumerate(tree["callbacks"]):
        _refuse_unknown_class(f"callbacks.{place}", callback)
    _refuse_unknown_optimizer(tree.get("optimizer"))


def _refuse_unknown(given: Iterable[str], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"unknown key `{prefix}{key}`; {did_you_mean(key, known, prefix=prefix)}")


def _refuse_unknown_logger(name: Any) -> None:
    known = choices("litgpt.types.LoggerChoice")
    if isinstance(name, str) and known and name not in known:
        raise RecipeError(f"`logger_name` must be one of {', '.join(known)}, got {name}.")


def _refuse_unknown_class(key: str, spec: Any) -> None:
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise RecipeError(f"`{key}` must be a class name or have a `class_path`, got {spec!r}.")
    path = spec["class_path"]
    if "." not in path or is_missing(path):
        module, _, name = path.rpartition(".")
        names = public_names(module) if module else public_names("lightning_spectral.callbacks")
        hint = did_you_mean(name, names, otherwise="it has") if names else "give the full class path."
        raise RecipeError(f"`{key}` names `{path}`, which does not exist; {hint}")
    _refuse_unknown_arguments(key, path, spec.get("init_args"))


def _refuse_unknown_arguments(key: str, path: str, init_args: Any) -> None:
    known = arguments_of(path)
    if known is None or not init_args:
        return
    if not isinstance(init_args, dict):
        raise RecipeError(f"`{key}.init_args` must hold keys and values, got {init_args!r}.")
    for name in init_args:
        if name not in known:
            hint = did_you_mean(name, known, otherwise="it knows")
            raise RecipeError(f"`{key}`: {path.rpartition('.')[2]} does not know `{name}`; {hint}")


def _refuse_unknown_optimizer(spec: Any) -> None:
    path = spec.get("class_path") if isinstance(spec, dict) else spec
    if not isinstance(path, str):
        return
    full = path if "." in path else f"torch.optim.{path}"
    if is_missing(full):
        module, _, name = full.rpartition(".")
        prefix = f"{module}." if "." in path else ""
        otherwise = "give a name in torch.optim, such as AdamW, or a class path; there are"
        hint = did_you_mean(name, public_names(module), prefix=prefix, otherwise=otherwise)
        raise RecipeError(f"no optimizer `{path}`; {hint}")
    if isinstance(spec, dict):
        known = arguments_of(full)
        unknown = [name for name in spec.get("init_args") or {} if known is not None and name not in known]
        if unknown and known:
            hint = did_you_mean(unknown[0], [name for name in known if name != "params"], otherwise="it knows")
            owner = path.rpartition(".")[2]
            raise RecipeError(f"`optimizer.init_args` has `{unknown[0]}`, which {owner} does not know; {hint}")


def _data(value: Any) -> Any:
    """A name, a class path or a file of text -> ``{class_path, init_args}``."""
    if isinstance(value, dict):
        return {**value, "class_path": _data_class(str(value.get("class_path")))}
    if value is None:
        raise RecipeError(
            "the recipe names no `data`: use `data: StateOfTheUnion`, `--data path/to/text.txt`, or a class path."
        )
    return text_data(str(value)) or {"class_path": _data_class(str(value))}


def _data_class(name: str) -> str:
    if "." in name:
        return name
    if name in OUR_DATA:
        return f"lightning_spectral.data.{name}"
    litgpts = public_names("litgpt.data")
    if name in litgpts:
        return f"litgpt.data.{name}"
    known = [*OUR_DATA, *(n for n in litgpts if n[0].isupper() and n not in _NO_DATA)]
    raise RecipeError(f"`data: {name}` is neither a file nor a data module; {_nearest(name, known)}")


def _nearest(name: str, known: list[str]) -> str:
    return did_you_mean(name, known, otherwise="by name there are")


def _callback(spec: Any) -> Any:
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if isinstance(spec, dict) and spec.get("class_path") in public_names("lightning_spectral.callbacks"):
        return {**spec, "class_path": f"lightning_spectral.callbacks.{spec['class_path']}"}
    return spec
