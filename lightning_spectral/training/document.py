"""A recipe as a document: where recipes lie, YAML on its base, values set at dotted keys. No key is checked here.

Every key may be overridden with a dotted path; an item of a list is named by its place or, where it has a
``class_path``, by its class: ``callbacks.TailTokenProbe.init_args.every_n_steps``.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import yaml

from lightning_spectral.data.files import reader_of
from lightning_spectral.data.shards import names_tokens
from lightning_spectral.text import did_you_mean, read_yaml, yaml_mistake

OUR_DATA = (
    "StateOfTheUnion",
    "HubText",
    "TokenFiles",
)  # known by name; a bare `TextFiles` is litgpt's, ours is named by its class path or a file


class RecipeError(ValueError):
    """A recipe that cannot be run, said in one sentence: the key, the value seen, the remedy."""


def folder_of_recipes() -> Path:
    """Where the recipes lie: inside the installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Names of the recipes that came with the package (the folder also holds files of other verbs)."""
    root = folder_of_recipes()
    found = [
        file
        for file in root.rglob("*.yaml")
        if re.search(r"^(model_name|model_config|base):", file.read_text(), re.MULTILINE)
    ]
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in found)


def find(path: str | Path) -> Path:
    """The file of a recipe named by path or by name.

    Raises:
        RecipeError: If there is none.
    """
    if not str(path) or not Path(path).name:
        raise RecipeError(f"`--config {path}` names no recipe: give a YAML file or a shipped name, e.g. `quickstart`.")
    if Path(path).is_file():
        return Path(path)
    name = Path(path).with_suffix("").as_posix().removeprefix("recipes/")
    shipped = folder_of_recipes() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    hint = did_you_mean(name, names(), otherwise="give a YAML file or one of the shipped names")
    raise RecipeError(f"no recipe `{path}`: {hint}")


def parse_words(words: Sequence[str]) -> list[tuple[str, Any]]:
    """``["--a.b", "1", "--c=2"]`` -> ``[("a.b", 1), ("c", 2)]``; values are read as YAML.

    Raises:
        RecipeError: If a word is not an option, or an option has no value.
    """
    pairs: list[tuple[str, Any]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise RecipeError(f"`{word}` is not an option: {_as_option(word)}, e.g. `--train.max_steps 50`.")
        if equals and not value:
            raise RecipeError(f"`--{key}=` has no value: write `--{key}=VALUE`, or `--{key}=null` to leave it empty.")
        if not equals:
            if not rest or re.match(r"--[a-zA-Z]", rest[0]):
                raise RecipeError(f"`--{key}` has no value: write `--{key} VALUE`.")
            value = rest.pop(0)
        if not all(key.removesuffix("+").split(".")):
            raise RecipeError(f"`--{key}` has an empty name between its dots: write e.g. `--train.max_steps 50`.")
        pairs.append((key, _value_of(key, value, rest)))
    _refuse_replaced(pairs)
    return pairs


def _as_option(word: str) -> str:
    """How a word that is no option should be written."""
    if re.match(r"-[a-zA-Z]$", word):
        return "options are written out, as `--config RECIPE` or `--out_dir DIR`"
    return f"write `-{word}`" if re.match(r"-[a-zA-Z]\w*(\.|$)", word) else "write `--key value`"


_CLOSING = {"{": "}", "[": "]"}


def _value_of(key: str, text: str, after: Sequence[str] = ()) -> Any:
    """A value; what begins like a mapping or a list must be one.

    Raises:
        RecipeError: If it is none.
    """
    value = read_value(text)
    if isinstance(value, str) and text[:1] in _CLOSING and not text.endswith(_CLOSING[text[0]]):
        wanted = "put the whole value in quotes, '{key: value}' or '[a, b]'"
        if after and not after[0].startswith("--"):
            raise RecipeError(f"`--{key}` has the value `{text}`, and then comes `{after[0]}`: {wanted}.")
        raise RecipeError(f"`--{key}`: `{text}` has no closing `{_CLOSING[text[0]]}`: {wanted}.")
    if isinstance(value, str) and text.startswith("{") and text.endswith("}"):
        raise RecipeError(
            f"`--{key}`: `{text}` is no YAML: names with signs in them want quotes of their own, "
            "\"{modules: ['*.proj']}\"."
        )
    return value


def _refuse_replaced(pairs: Sequence[tuple[str, Any]]) -> None:
    """A whole that comes after a part of it would replace that part without a word."""
    for place, (key, value) in enumerate(pairs):
        part = next((earlier for earlier, _ in pairs[:place] if earlier.startswith(f"{key}.")), None)
        if part is not None and not (isinstance(value, dict) and "class_path" not in value):
            raise RecipeError(f"`--{key}` comes after `--{part}` and would replace it: give `--{key}` first.")


def read_value(text: str) -> Any:
    """One value as YAML, with ``1e-3`` a number."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def text_data(value: str) -> dict[str, Any] | None:
    """The data module for ``data: my.txt`` or ``data: shards/*.bin``, if the value names files."""
    if names_tokens(value):
        return {"class_path": "lightning_spectral.data.TokenFiles", "init_args": {"path": value}}
    if any(sign in value for sign in "/*\\") or reader_of(Path(value)) is not None or Path(value).exists():
        return {"class_path": "lightning_spectral.data.TextFiles", "init_args": {"path": value}}
    return None


def overridden(tree: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's tree with values set at dotted keys, without its ``sweep:`` and ``smoke:`` blocks.

    Args:
        tree: From :func:`read_tree`.
        overrides: Command-line words, or dotted keys with values; see :func:`lightning_spectral.training.recipe.load`.

    Raises:
        RecipeError: If a word is no option or a key leads nowhere.
    """
    out = copy.deepcopy({key: value for key, value in tree.items() if key not in ("sweep", "smoke")})
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else parse_words(overrides)
    for key, value in pairs:
        set_value(out, key, value)
    return out


def read_tree(file: Path) -> dict[str, Any]:
    """Keys and values of a recipe as they are written, laid over its ``base``; ``sweep:`` included.

    Raises:
        RecipeError: If it, or its base, is no YAML mapping.
    """
    tree = _read_mapping(file)
    base = tree.get("base")
    if isinstance(base, str) and Path(base).is_file() and Path(base).resolve() == file.resolve():
        raise RecipeError(f"`base: {base}` in `{file}` names that file itself: name another recipe, or leave it out.")
    return _on_its_base(tree)


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or a date that is none
        raise RecipeError(f"`{file}` is not YAML: {yaml_mistake(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"`{file}` holds {type(tree).__name__}, not keys and values like `out_dir: out/run`.")
    return tree


def _on_its_base(tree: dict[str, Any]) -> dict[str, Any]:
    """Lay a recipe over the one that its ``base`` names; a top-level key replaces the base's whole.

    But for two: an axis of ``sweep`` may list labels of the base's axis of that name, and ``smoke`` is laid over the
    base's part by part.
    """
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_mapping(find(str(base)))
    if "base" in below:
        raise RecipeError(f"`base: {base}` has a `base` itself: name the recipe at the bottom, `{below['base']}`.")
    if isinstance(below.get("smoke"), dict) and isinstance(tree.get("smoke"), dict):
        both = {**(below["smoke"].get("set") or {}), **(tree["smoke"].get("set") or {})}
        tree["smoke"] = {**below["smoke"], **tree["smoke"], "set": both}
    return {**below, **_with_labels_of(below, tree)}


def _with_labels_of(below: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``optimizer: [AdamW, Muon]`` in a sweep stands for these labels of the base's axis ``optimizer``."""
    known = (below.get("sweep") or {}).get("axes") or {}
    block = tree.get("sweep")
    if not isinstance(block, dict):
        return tree

    def axes(grid: Any) -> Any:
        if not isinstance(grid, dict):
            return grid
        return {name: _labelled(values, known.get(name)) for name, values in grid.items()}

    also = [axes(grid) for grid in block["also"]] if isinstance(block.get("also"), list) else block.get("also")
    return {**tree, "sweep": {**block, "axes": axes(block.get("axes")), **({"also": also} if also else {})}}


def _labelled(values: Any, known: Any) -> Any:
    takes_over = isinstance(values, list) and isinstance(known, dict) and all(value in known for value in values)
    return {label: known[label] for label in values} if takes_over else values


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key, opening up what is a bare name or null on the way."""
    append = key.endswith("+")
    steps = key.removesuffix("+").split(".")
    if steps[0] == "model_config" and len(steps) > 1 and tree.get("model_config") is None and tree.get("model_name"):
        tree["model_config"] = named_config(tree["model_name"])
    node: Any = tree
    for depth, step in enumerate(steps[:-1]):
        here = ".".join(steps[: depth + 1])
        place = _place(node, step, here)
        child = node[place] if isinstance(node, list) else node.get(place)
        if isinstance(child, str):
            # `--optimizer.init_args.lr` on `optimizer: AdamW`, `--data.init_args.seed` on `data: my.txt`
            child = text_data(child) or {"class_path": child}
        elif child is None:
            child = [] if here == "callbacks" else {}
        elif not isinstance(child, (dict, list)):
            raise RecipeError(f"`{here}` is {child!r} and has nothing below it: cannot set `{key}`.")
        node[place] = child
        node = child
    place = _place(node, steps[-1], key)
    if append:
        old = node.get(place) if isinstance(node, dict) else node[place]
        value = [*(old or []), *(value if isinstance(value, list) else [value])]
    if len(steps) == 1:
        value = _laid_over(node.get(place), value)
    node[place] = value


def _laid_over(old: Any, value: Any) -> Any:
    """``--train={max_steps: 3}`` leaves the block's other keys, as in jsonargparse; another class has its own."""
    if not isinstance(value, dict) or not isinstance(old, dict):
        return value
    if "class_path" in old and value.get("class_path", old["class_path"]) != old["class_path"]:
        return value
    init_args = {**(old.get("init_args") or {}), **(value.get("init_args") or {})}
    return {**old, **value, **({"init_args": init_args} if init_args else {})}


def _place(node: Any, step: str, here: str) -> Any:
    if not isinstance(node, list):
        return step
    if step.isdigit() and int(step) < len(node):
        return int(step)
    classes = [str(item.get("class_path") if isinstance(item, dict) else item).rpartition(".")[2] for item in node]
    if classes.count(step) == 1:
        return classes.index(step)
    if not classes:
        raise RecipeError(
            f"`{here}`: the list is empty; `--callbacks+ {'NAME' if step.isdigit() else step}` adds one, and what "
            "follows it can set it."
        )
    hint = did_you_mean(step, classes, otherwise="it has")
    raise RecipeError(f"`{here}` names no item of the list; {hint}")


def litgpt_names() -> list[str]:
    """Every model that litgpt has a name for."""
    return list(config_alone().name_to_config)


def named_config(name: str) -> dict[str, Any]:
    """The fields that litgpt sets for a named model, so that one of them can be overridden.

    Raises:
        RecipeError: If litgpt knows no such model.
    """
    litgpt = config_alone()
    if name in litgpt.name_to_config:
        return dict(litgpt.name_to_config[name])
    for config in litgpt.configs:
        hf = config["hf_config"]
        if name in (hf["name"], f"{hf['org']}/{hf['name']}"):
            return dict(config)
    hint = did_you_mean(name, litgpt.name_to_config, otherwise="")
    hint = f"; {hint}" if hint.endswith("?") else ":"
    raise RecipeError(f"litgpt knows no model `{name}`{hint} give one of its names, or describe one in `model_config`.")


def config_alone() -> Any:
    """``litgpt.config`` without the rest of litgpt, whose import takes seconds: the file is made to be used alone."""
    if "litgpt.config" in sys.modules:
        return sys.modules["litgpt.config"]
    alone = "_litgpt_config_alone"
    if alone not in sys.modules:
        package = find_spec("litgpt")
        if package is None or package.origin is None:
            raise RecipeError("recipes need litgpt: `pip install litgpt`.")
        spec = spec_from_file_location(alone, Path(package.origin).with_name("config.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[alone] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alone])
    return sys.modules[alone]
