"""Names in a recipe (keys, data, callbacks, optimizers, their arguments), checked before anything is imported.

What exists is read from the sources of the installed packages (:mod:`.sources`), never from a list of our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from lightning_spectral.data.files import find_files
from lightning_spectral.data.shards import SUFFIXES
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.packages import is_installed, why_missing
from lightning_spectral.training.document import (
    OUR_DATA,
    RecipeError,
    litgpt_names,
    named_config,
    text_data,
)
from lightning_spectral.training.sources import (
    arguments_of,
    assigned_strings,
    defaults_of,
    fields_of,
    is_missing,
    public_names,
)

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
# what people call a key -> how it is called here
_HABITS: Final = {
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "lr"),
    **dict.fromkeys(("gradient_clip_val", "grad_clip", "clip_grad", "max_grad_norm", "clip"), "max_norm"),
    **dict.fromkeys(("accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum"), "global_batch_size"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch"), "micro_batch_size"),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "warmup"), "lr_warmup_steps"),
    **dict.fromkeys(("seq_len", "seq_length", "sequence_length", "max_length"), "max_seq_length"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embed", "embed_dim", "hidden_dim"), "n_embd"),
    **dict.fromkeys(("num_layers", "num_hidden_layers", "n_layers"), "n_layer"),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), "n_head"),
    **dict.fromkeys(("d_ff", "ffn_dim", "ffn_hidden_size", "mlp_dim"), "intermediate_size"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "nproc_per_node"), "devices"),
    **dict.fromkeys(("wandb", "logger", "report_to", "tensorboard"), "logger_name"),
    **dict.fromkeys(("save_every", "save_steps", "checkpoint_every"), "save_interval"),
    **dict.fromkeys(("log_every", "logging_steps", "log_every_n_steps"), "log_interval"),
    **dict.fromkeys(("tokenizer", "tokenizer_path"), "tokenizer_dir"),
    **dict.fromkeys(("amp", "dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("nodes", "nnodes"), "num_nodes"),
    "device": "accelerator",
    "batch_size": "global_batch_size",
    "steps": "max_steps",
    "num_epochs": "epochs",
    "width": "intermediate_size",
    "heads": "n_head",
    "layers": "n_layer",
    "depth": "n_layer",
}
_CLASS_KEYS: Final = ("class_path", "init_args", "dict_kwargs")
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
    _refuse_other_kinds(tree)
    if tree.get("data") is None:
        _refuse_other_files(tree)
    callbacks = tree.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise RecipeError(
            f"`callbacks` must be a list of class names or `class_path`s, got {callbacks!r}; "
            "`--callbacks+ NAME` adds one."
        )
    named = {**tree, "data": _data(tree.get("data")), "callbacks": [_callback(callback) for callback in callbacks]}
    return {**named, "optimizer": _optimizer(tree["optimizer"])} if "optimizer" in tree else named


def _refuse_other_kinds(tree: Mapping[str, Any]) -> None:
    if "command" in tree:
        raise RecipeError(
            f"the recipe has `command: {tree['command']}`: it is for `lightning-spectral memory {tree['command']} "
            "--config FILE`, not for a training."
        )
    if set(tree) == {"callbacks"}:
        raise RecipeError(
            "the recipe has `callbacks` and nothing else: `LIGHTNING_SPECTRAL=FILE python train.py` puts them into a "
            "script of your own; to train, give a recipe with a model and `data`."
        )


def _refuse_other_files(tree: Mapping[str, Any]) -> None:
    """Files of other programs, which have no `data` and keys that are none here."""
    unknown = [str(key) for key in tree if key not in keys()]
    if {"trainer", "model"} <= set(unknown):
        raise RecipeError(
            "the recipe has `trainer` and `model`: it is a file for LightningCLI, `python train.py fit --config FILE`; "
            "`pretrain --print_config --config quickstart` shows a recipe."
        )
    if {"architectures", "model_type"} & set(unknown):
        raise RecipeError(
            "the recipe has `model_type` or `architectures`: it is the `config.json` of a Hugging Face model; give a "
            "recipe, and litgpt's name of the model as `--model_name`."
        )
    if unknown:
        raise RecipeError(f"unknown key `{unknown[0]}`; {did_you_mean(unknown[0], keys())}")


def with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every key of the schema and of its groups; arguments of classes as they were given."""
    starts = {**defaults_of(SETUP), **defaults_of(OUR_KEYS)}
    filled = {**starts, **tree}
    for group in GROUPS.keys() - {"model_config"}:
        filled[group] = {**starts[group], **(tree.get(group) or {})}
    filled["model_name"] = tree.get("model_name") or (tree.get("model_config") or {}).get("name") or "custom"
    return filled


def refuse_wrong_places(tree: Mapping[str, Any]) -> None:
    """Refuse a run folder that is a file, data that are not there, and a logger without its package.

    Raises:
        RecipeError: One sentence with the path.
    """
    out_dir = tree.get("out_dir")
    if isinstance(out_dir, str) and Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise RecipeError(f"`out_dir` is `{out_dir}`, which is a file: give a folder.")
    resume = tree.get("resume")
    if isinstance(resume, str) and resume != "auto" and not Path(resume).exists():
        raise RecipeError(f"`resume` names `{resume}`, which does not exist: give a checkpoint, `auto` or `false`.")
    if resume is True and isinstance(out_dir, str) and not any(Path(out_dir).glob("checkpoints/*")):
        raise RecipeError(
            f"`resume: true`, but `{Path(out_dir) / 'checkpoints'}` holds no checkpoint: use `resume: auto` to start "
            "where there is none."
        )
    logger = tree.get("logger_name")
    if logger in ("wandb", "mlflow", "tensorboard") and not is_installed(logger):
        raise RecipeError(f"`logger_name: {logger}`: {why_missing(logger)}")
    kinds = {"lightning_spectral.data.TextFiles": {}, "lightning_spectral.data.TokenFiles": {"suffixes": SUFFIXES}}
    path = (tree["data"].get("init_args") or {}).get("path")
    if tree["data"]["class_path"] in kinds and isinstance(path, str):
        try:
            find_files(path, **kinds[tree["data"]["class_path"]])
        except (FileNotFoundError, ValueError) as error:
            raise RecipeError(f"`data`: {error}") from error


def refuse_unknown_model(name: str) -> None:
    """Refuse a bare name that is neither litgpt's nor a Hugging Face model type; imports neither.

    Raises:
        RecipeError: With the nearest that there is.
    """
    kinds = assigned_strings("transformers.models.auto.configuration_auto", "CONFIG_MAPPING_NAMES")
    if not kinds or "." in name or "/" in name or Path(name).exists():
        return
    known = [*litgpt_names(), *(kind for kind in kinds if kind.islower())]
    if name not in known:
        hint = did_you_mean(name, known)
        hint = hint if hint.endswith("?") else "give one of them."
        raise RecipeError(f"`--model {name}` is no litgpt name, Hugging Face model type, folder or class path; {hint}")


def refuse_unknown_names(tree: Mapping[str, Any]) -> None:
    """Refuse what cannot exist under the name given.

    Args:
        tree: From :func:`with_class_paths`.

    Raises:
        RecipeError: One sentence with the name, and the nearest one that exists.
    """
    for package in ("torch", "lightning", "litgpt"):
        if not is_installed(package):
            raise RecipeError(f"recipes need litgpt, Lightning and torch, and {why_missing(package)}")
    for key in tree:
        if key not in keys():
            raise RecipeError(f"unknown key `{key}`; {_nearest_key(str(key), tree)}")
    for group, path in GROUPS.items():
        value = tree.get(group)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise RecipeError(
                f"`{group}` must hold keys and values, got {value!r}; it knows: {', '.join(fields_of(path)[:8])}."
            )
        _refuse_unknown(value, fields_of(path), f"{group}.")
    if isinstance(tree.get("model_name"), str) and tree.get("model_config") is None:
        named_config(tree["model_name"])
    _refuse_unknown_class("data", tree["data"])
    for callback in tree["callbacks"]:
        _refuse_unknown_class("callbacks", callback)
    _refuse_unknown_optimizer(tree.get("optimizer"))


def _refuse_unknown(given: Iterable[str], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for key in given:
        name, colon, value = str(key).partition(":")
        if colon and name in known:
            raise RecipeError(f"`{prefix}{key}`: YAML wants a space after the colon, `{name}: {value}`.")
        if key not in known:
            raise RecipeError(f"unknown key `{prefix}{key}`; {did_you_mean(key, known, prefix=prefix)}")


def _nearest_key(key: str, tree: Mapping[str, Any]) -> str:
    """A suggestion: the key of that name further down, else the nearest at the top."""
    if key == "base":
        return "a recipe is laid over another in its file: write `base: NAME` there."
    word = _HABITS.get(key.replace("-", "_"), key.replace("-", "_"))
    if word in keys():
        return f"did you mean `{word}`?"
    deeper = next((path for path in _paths_below(tree) if path.rpartition(".")[2] == word), None)
    return f"did you mean `{deeper}`?" if deeper else did_you_mean(key, keys())


def _paths_below(tree: Mapping[str, Any]) -> Iterator[str]:
    """Dotted paths of the keys in groups, and of what the optimizer, the data and the callbacks take."""
    for group in ("train", "eval", "model_config", "architecture", "lr_schedule", "log"):
        yield from (f"{group}.{name}" for name in fields_of(GROUPS[group]))
    optimizer = tree.get("optimizer")
    path = str(optimizer.get("class_path") if isinstance(optimizer, dict) else optimizer)
    specs = [("optimizer", path if "." in path else f"torch.optim.{path}")]
    named = [str(c["class_path"]) for c in tree["callbacks"] if isinstance(c, dict) and "class_path" in c]
    specs += [(f"callbacks.{path.rpartition('.')[2]}", path) for path in named]
    specs.append(("data", tree["data"]["class_path"]))
    for key, class_path in specs:
        yield from (f"{key}.init_args.{name}" for name in arguments_of(class_path) or [])


def class_of(key: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of ``{class_path, init_args}``.

    Raises:
        RecipeError: If it is something else, or has other keys.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        near = next((own for own in spec if did_you_mean(own, ["class_path"]).endswith("?")), None) if spec else None
        hint = "." if near in (None, "class_path") else f": `{near}` must be `class_path`."
        raise RecipeError(f"`{key}` must be a class name or have a `class_path`, got {spec!r}{hint}")
    name = spec["class_path"].rpartition(".")[2]
    for other in spec:
        if other not in _CLASS_KEYS:
            here = f"{key}.{name}" if key == "callbacks" else key
            if isinstance(spec[other], dict):
                raise RecipeError(f"`{here}.{other}`: the arguments of {name} stand under `init_args`, not `{other}`.")
            raise RecipeError(f"`{here}.{other}`: {name} takes its arguments as `{here}.init_args.{other}`.")
    init_args = spec.get("init_args") or {}
    if not isinstance(init_args, dict):
        raise RecipeError(f"`{key}.init_args` must hold keys and values, got {init_args!r}.")
    return spec["class_path"], init_args


def refuse_unknown_arguments(key: str, path: str, init_args: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse arguments that a class does not take.

    Raises:
        RecipeError: With the nearest that it takes.
    """
    known = [name for name in known if name != "params"]
    for name in init_args:
        if name not in known:
            hint = did_you_mean(name, known, otherwise="it knows")
            raise RecipeError(f"`{key}`: {path.rpartition('.')[2]} does not know `{name}`; {hint}")


def _refuse_unknown_class(key: str, spec: Any) -> None:
    path, init_args = class_of(key, spec)
    if "." not in path or is_missing(path):
        module, _, name = path.rpartition(".")
        names = public_names(module) if module else _known_callbacks()
        hint = did_you_mean(name, names, otherwise="it has") if names else "give the full class path."
        raise RecipeError(f"`{key}` names `{path}`, which does not exist; {hint}")
    known = arguments_of(path)
    if known is not None:
        refuse_unknown_arguments(key, path, init_args, known)


def _refuse_unknown_optimizer(spec: Any) -> None:
    path = spec.get("class_path") if isinstance(spec, dict) else spec
    if spec is None:
        return
    if not isinstance(path, str):
        raise RecipeError(f"`optimizer` must be a class name or have a `class_path`, got {spec!r}.")
    full = path if "." in path else f"torch.optim.{path}"
    if is_missing(full):
        module, _, name = full.rpartition(".")
        if "." in path and not public_names(module):
            raise RecipeError(
                f"no optimizer `{path}`: there is no module `{module}` for that class path. Is its folder on "
                "PYTHONPATH? A bare name, such as AdamW or Muon, is torch's or ours."
            )
        names = public_names(module) if "." in path else [*_our_optimizers(), *public_names(module)]
        otherwise = "give a name in torch.optim, such as AdamW, or a class path; there are"
        hint = did_you_mean(name, names, prefix=f"{module}." if "." in path else "", otherwise=otherwise)
        raise RecipeError(f"no optimizer `{path}`; {hint}")
    known = arguments_of(full)
    if isinstance(spec, dict) and known is not None:
        refuse_unknown_arguments("optimizer", path, class_of("optimizer", spec)[1], known)


def _our_optimizers() -> list[str]:
    """Names that mean our class where no module is named: all but AdamW, which stays torch's, as in litgpt."""
    return [name for name in public_names("lightning_spectral.optim") if name not in ("AdamW", "SpectralOptimizer")]


def _optimizer(value: Any) -> Any:
    """``Muon`` -> ``lightning_spectral.Muon``, alone or as ``class_path``; everything else as it is."""
    if isinstance(value, dict):
        return {**value, "class_path": _optimizer(value["class_path"])} if "class_path" in value else value
    return f"lightning_spectral.{value}" if value in _our_optimizers() else value


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
    if name.startswith("$"):
        raise RecipeError(f"`data` is `{name}`: a recipe fills in no variables; give the value with `--data {name}`.")
    known = [*OUR_DATA, *(n for n in litgpts if n[0].isupper() and n not in _NO_DATA)]
    raise RecipeError(f"`data` is `{name}`, which is neither a file nor a data module; {_nearest(name, known)}")


def _nearest(name: str, known: list[str]) -> str:
    hub = "a data set of the Hugging Face Hub is {class_path: HubText, init_args: {dataset: NAME}}; by name there are"
    return did_you_mean(name, known, otherwise=hub)


_CALLBACK_ROOMS: Final = ("lightning_spectral.callbacks", "lightning_spectral", "lightning.pytorch.callbacks")


def _known_callbacks() -> list[str]:
    """Names that mean a callback without their module: ours, then Lightning's."""
    ours = [name for name in public_names("lightning_spectral") if re.search("(Callback|Probe|Alarm|Audience)$", name)]
    return list(dict.fromkeys([*ours, *public_names(_CALLBACK_ROOMS[-1])]))


def _callback(spec: Any) -> Any:
    if isinstance(spec, str):
        spec = {"class_path": spec}
    name = spec.get("class_path") if isinstance(spec, dict) else None
    if name in _known_callbacks():
        room = next(room for room in _CALLBACK_ROOMS if name in public_names(room))
        return {**spec, "class_path": f"{room}.{name}"}
    return spec
