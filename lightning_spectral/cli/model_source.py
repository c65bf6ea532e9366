"""A model by what a user has of it: a name, a class, a script, a recipe or a checkpoint; built without memory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.text import CommandError, did_you_mean, import_class, one_line, read_settings, read_yaml
from lightning_spectral.text.packages import why_missing

if TYPE_CHECKING:
    from torch import nn

KINDS = """a litgpt name (pythia-160m), a Hugging Face model type (gpt2) or folder with a config.json, a litgpt folder
with a model_config.yaml, a recipe (.yaml), a checkpoint (.ckpt, .pth, .pt, .safetensors), or the class path of a module
(my_package.Net, train.py:Net)"""
SEARCH = ("sites", "modules", "hints", "embedding")  # arguments that say where in a model is measured
_SKELETON = "read from the names and shapes of its weights: what they are called is all that says what they are for"


@dataclass(frozen=True)
class Source:
    """A model that was built to be looked at.

    Attributes:
        model: On the meta device where it can be built there.
        note: What is less than certain about it; empty if nothing is.
        has_forward: Whether it can be called; what was made from weights alone cannot.
        search: Of :data:`SEARCH`, what it comes with.
    """

    model: nn.Module
    note: str = ""
    has_forward: bool = True
    search: Mapping[str, Any] = field(default_factory=dict)


def model_of(name: str, settings: dict[str, Any]) -> Source:
    """The model of that name.

    Args:
        name: One of :data:`KINDS`.
        settings: Arguments of its class, or fields of its configuration.

    Raises:
        CommandError: If there is no such model, it cannot be read, or does not know a setting.
    """
    import torch

    from lightning_spectral.models.meta import without_memory

    for place in (without_memory, lambda: torch.device("meta"), nullcontext):
        try:
            with place():
                return _built(name, settings)
        except (NotImplementedError, RuntimeError) as error:  # computes with its weights while it is built
            failure = error
    raise CommandError(f"`{name}` cannot be built: {one_line(failure)}")


def _built(name: str, settings: dict[str, Any]) -> Source:
    path = Path(name).expanduser()
    for fits, build in _ON_DISK:
        if fits(path):
            try:
                return build(path, settings)
            except (ValueError, OSError) as error:
                raise CommandError(one_line(error)) from error
    if ".py:" in name:
        return Source(_of_file(name, settings))
    if name.startswith((".", "/", "~")) or path.suffix in (".yaml", ".yml", ".ckpt", ".pth", ".pt", ".safetensors"):
        raise CommandError(f"there is no model at `{name}`: expected {one_line(KINDS)}.")
    from lightning_spectral.training.document import litgpt_names, named_config

    short = name.rpartition("/")[2]
    if short in litgpt_names():
        return _of_fields(named_config(short) | settings)
    if "." in name and "/" not in name:
        try:
            made = import_class(name)
        except ImportError as error:
            raise CommandError(f"`--model {name}` cannot be imported: {error}.") from error
        return Source(_call(made, settings, name))
    return Source(_of_hugging_face_type(name, settings))


def settings_of(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as a mapping, values as in YAML.

    Raises:
        CommandError: If a word has no ``=``.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"`{flag} {pair}` must be NAME=VALUE.")
        found[name] = read_yaml(value)
    return found


# on disk


def _of_recipe(path: Path, settings: dict[str, Any]) -> Source:
    """The model of a recipe, and what its measuring callbacks say about where to measure."""
    from lightning_spectral.training import document, names

    tree = names.with_class_paths(document.overridden(document.read_tree(path), ()))
    names.refuse_unknown_names(tree)
    fields = tree.get("model_config") or document.named_config(tree["model_name"])
    source = _of_fields(fields | settings, tree.get("architecture"))
    init_args = [callback.get("init_args") or {} for callback in tree["callbacks"]]
    search = {key: value for one in reversed(init_args) for key, value in one.items() if key in SEARCH}
    return replace(source, search=search)


def _of_fields(fields: dict[str, Any], architecture: Mapping[str, Any] | None = None) -> Source:
    """GPT of litgpt from the fields of its configuration."""
    from lightning_spectral.gpt.alone import litgpt_alone

    with litgpt_alone():
        from litgpt.config import Config

        from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt

        try:
            changes = Architecture(**(architecture or {}))
            return Source(build_gpt(adapt_config(Config(**fields), changes), changes, seed=0))
        except Exception as error:  # any of litgpt's and torch's: the fields may be anybody's
            raise CommandError(f"litgpt cannot build this model: {one_line(error)}") from error


def _of_litgpt_folder(path: Path, settings: dict[str, Any]) -> Source:
    folder = path if path.is_dir() else path.parent
    try:
        return _of_fields(read_settings(folder / "model_config.yaml") | settings)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _of_checkpoint(path: Path, settings: dict[str, Any]) -> Source:
    """A checkpoint of ours by its recipe, any other file by the names of its weights: no class that it names is run."""
    from lightning_spectral.models.checkpoint_file import read_checkpoint

    content = read_checkpoint(path, device="meta")
    weights: Any = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else {}
    hparams = content.get("hyper_parameters") if isinstance(content, dict) else None
    if isinstance(hparams, dict) and {"model_config", "model_name", "architecture"} <= set(hparams):
        try:
            return _of_our_checkpoint(weights, hparams)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CommandError(f"`{path}` is not a checkpoint of `pretrain`: {one_line(error)}.") from error
    made = _of_weights(weights, path)
    if not isinstance(hparams, dict) or not isinstance(hparams.get("_class_path"), str):
        return made
    arguments = [f"{name}={value}" for name, value in hparams.items() if not str(name).startswith("_")]
    words = [
        "lightning-spectral",
        "inspect",
        hparams["_class_path"],
        *(["--model-args", *arguments] if arguments else []),
    ]
    own = f"it may name any class, so the one that it names is not run: if it is yours, `{shlex.join(words)}`"
    return replace(made, note=f"{own}; {_SKELETON}")


def _of_our_checkpoint(weights: Mapping[str, Any], hparams: Mapping[str, Any]) -> Source:
    from lightning_spectral.training.document import named_config

    fields = dict(hparams["model_config"] or named_config(hparams["model_name"]))
    head = next((value for name, value in weights.items() if name.endswith("lm_head.weight")), None)
    if head is not None:
        fields["padded_vocab_size"] = head.shape[0]
        fields.setdefault("vocab_size", head.shape[0])
    return _of_fields(fields, hparams["architecture"])


def _of_weights(weights: Any, path: Path) -> Source:
    from lightning_spectral.models.skeleton import skeleton

    named = weights.items() if isinstance(weights, Mapping) else ()
    shapes = {name: tuple(value.shape) for name, value in named if isinstance(name, str) and hasattr(value, "shape")}
    if not shapes:
        raise CommandError(f"`{path}` holds no weights: expected a state dict, or a Lightning checkpoint.")
    return Source(skeleton(shapes), _SKELETON, False)


def _of_safetensors(path: Path, settings: dict[str, Any]) -> Source:
    from safetensors import SafetensorError, safe_open

    from lightning_spectral.models.skeleton import skeleton

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = sorted(tensors.keys(), key=_numbers_as_numbers)
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise CommandError(f"`{file}` is no whole safetensors file: {one_line(error)}") from error
    if not shapes:
        raise CommandError(f"`{path}` holds no weights.")
    return Source(skeleton(shapes), _SKELETON, False)


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``: such files keep names in no order of definition."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _of_hugging_face_type(name: str, settings: dict[str, Any]) -> nn.Module:
    """A model of the defaults of its type, which some types do not have."""
    try:
        return _hugging_face(name, settings)
    except (CommandError, ImportError, NotImplementedError, RuntimeError):  # said, or tried in another way, elsewhere
        raise
    except Exception as error:  # whatever a foreign constructor raises
        raise CommandError(
            f"transformers cannot build `{name}` from its type alone ({type(error).__name__}: "
            f"{one_line(error).partition(' Model type should')[0][:200]}). Give what is missing by --model-args, or a "
            "folder with a config.json."
        ) from error


def _of_hugging_face_folder(path: Path, settings: dict[str, Any]) -> Source:
    try:
        return Source(_hugging_face(str(path), settings))
    except (ImportError, KeyError, ValueError, CommandError) as error:
        if not list(path.glob("*.safetensors")):
            raise CommandError(f"`{path}`: transformers cannot build this model: {one_line(error)}") from error
        made = _of_safetensors(path, settings)
        why = one_line(error).partition(". ")[0]
        return Source(made.model, f"transformers cannot build this model ({why}); {made.note}", False)


def _of_file(name: str, settings: dict[str, Any]) -> nn.Module:
    """``train.py:Net``: the file is imported, as ``import train`` would, and the class built."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise CommandError(f"there is no file `{file}`.")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"`{file}` cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    made = getattr(module, attribute, None)
    if made is None:
        known = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise CommandError(f"`{file}` has no `{attribute}`; {did_you_mean(attribute, known, otherwise='it has')}")
    return _call(made, settings, name)


_ON_DISK: tuple[tuple[Callable[[Path], bool], Callable[[Path, dict[str, Any]], Source]], ...] = (
    (lambda path: path.suffix in (".yaml", ".yml") and path.is_file(), _of_recipe),
    (lambda path: path.name == "lit_model.pth" and (path.parent / "model_config.yaml").is_file(), _of_litgpt_folder),
    (lambda path: (path / "model_config.yaml").is_file(), _of_litgpt_folder),
    (lambda path: path.suffix == ".safetensors" and path.is_file(), _of_safetensors),
    (lambda path: path.suffix in (".ckpt", ".pth", ".pt", ".bin") and path.is_file(), _of_checkpoint),
    (lambda path: (path / "config.json").is_file(), _of_hugging_face_folder),
    (lambda path: path.is_dir() and bool(list(path.glob("*.safetensors"))), _of_safetensors),
)


# by name


def _hugging_face(name: str, settings: dict[str, Any]) -> nn.Module:
    try:
        import transformers
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise CommandError(f"`--model {name}` is no litgpt model, and {why_missing('transformers')}") from error
    trust = {"trust_remote_code": settings.get("trust_remote_code") is True}  # without the word it would ask
    settings = {key: value for key, value in settings.items() if key not in trust}
    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(name, local_files_only=True, **trust, **settings)
    elif name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name, **settings)
    else:
        from lightning_spectral.training.document import litgpt_names

        hint = did_you_mean(name, [*litgpt_names(), *CONFIG_MAPPING], otherwise="known are litgpt's names and")
        raise CommandError(f"`--model {name}` is no litgpt name, Hugging Face model type, folder or class path; {hint}")
    for architecture in config.architectures or []:
        kind = getattr(transformers, architecture, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            made: nn.Module = kind(config)
            return made
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **trust)
    except ValueError:  # no decoder
        return AutoModel.from_config(config, **trust)


def _call(made: Any, settings: dict[str, Any], name: str, *given: Any) -> Any:
    from torch import nn

    if isinstance(made, nn.Module):
        return made
    try:
        found = made(*given, **settings)
    except (TypeError, ValueError) as error:
        raise CommandError(f"`--model {name}` cannot be built: {one_line(error)}. Set `--model-args`.") from error
    return found
