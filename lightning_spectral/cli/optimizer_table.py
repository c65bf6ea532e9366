"""``lightning-spectral optimizer-table --model ... --optimizer Muon``: which rule gets which weight."""

from __future__ import annotations

import argparse
import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.text import CommandError, did_you_mean, import_class, one_line, read_yaml
from lightning_spectral.text.tables import add_format_option, aside, print_table

if TYPE_CHECKING:
    from torch import nn

_MODEL = """a litgpt name (pythia-160m), a Hugging Face model type (gpt2) or folder with a config.json, or the class
path of a module (my_package.Net)"""


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="lightning-spectral optimizer-table",
        description="Say which matrices a model holds, which parameters are embeddings, heads and vectors, and which "
        "rule and learning rate each gets. The model is built without memory (on the meta device), nothing is trained.",
    )
    parser.add_argument("--model", required=True, help=" ".join(_MODEL.split()))
    parser.add_argument("--optimizer", default="Muon", help="a name in lightning_spectral, or a class path")
    parser.add_argument(
        "--model-args", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model or its config"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the optimizer, e.g. lr=0.02 split=heads"
    )
    add_format_option(parser)
    options = parser.parse_args(argv)
    import torch

    optimizer_class = _optimizer_class(options.optimizer)
    settings = _settings("--set", options.set)
    _require_known("--set", settings, [n for n in inspect.signature(optimizer_class).parameters if n != "params"])
    with torch.device("meta"):
        model = build_model(options.model, _settings("--model-args", options.model_args))
    log = logging.getLogger("lightning_spectral.optim")
    level = log.level
    log.setLevel(logging.ERROR)  # the table is printed below instead
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer = optimizer_class(model, **settings)
        except (TypeError, ValueError) as error:
            raise CommandError(one_line(error)) from error
        finally:
            log.setLevel(level)
    print_table(optimizer.routing, options.format)
    for warning in caught:
        print(f"\nWarning: {str(warning.message).splitlines()[0]}", file=aside(options.format))
    return 0


def build_model(name: str, settings: dict[str, Any]) -> nn.Module:
    """The model of that name on the current device.

    Raises:
        CommandError: If there is no such model, or it does not know a setting.
    """
    if Path(name).is_dir():
        return _hugging_face(name, settings)
    if "." in name and "/" not in name and not name[-1].isdigit():
        try:
            made = import_class(name)
        except ImportError as error:
            raise CommandError(f"`--model {name}` cannot be imported: {error}.") from error
        return _call(made, settings, name)
    from litgpt.config import name_to_config

    if name.rpartition("/")[2] in name_to_config:
        from litgpt import GPT, Config

        config = _call(Config.from_name, settings, name, name.rpartition("/")[2])
        return GPT(config)
    return _hugging_face(name, settings)


def _hugging_face(name: str, settings: dict[str, Any]) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise CommandError(f"`--model {name}` is no litgpt model, and transformers is not installed.") from error
    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(name, local_files_only=True, **settings)
    elif name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name, **settings)
    else:
        from litgpt.config import name_to_config

        hint = did_you_mean(name, [*name_to_config, *CONFIG_MAPPING], otherwise="known are litgpt's names and")
        raise CommandError(f"`--model {name}` is no litgpt name, Hugging Face model type, folder or class path; {hint}")
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError:  # no decoder
        return AutoModel.from_config(config)


def _call(made: Any, settings: dict[str, Any], name: str, *given: Any) -> Any:
    from torch import nn

    if isinstance(made, nn.Module):
        return made
    try:
        found = made(*given, **settings)
    except (TypeError, ValueError) as error:
        raise CommandError(f"`--model {name}` cannot be built: {one_line(error)}. Set `--model-args`.") from error
    return found


def _optimizer_class(name: str) -> Any:
    from lightning_spectral import optim

    try:
        found = getattr(optim, name) if name in optim.__all__ else import_class(name)
    except ImportError as error:
        hint = did_you_mean(name, [n for n in optim.__all__ if n != "SpectralOptimizer"], otherwise="there are")
        raise CommandError(f"no optimizer `{name}`: {hint}") from error
    if not (isinstance(found, type) and issubclass(found, optim.SpectralOptimizer)):
        raise CommandError(f"`--optimizer {name}` does not route parameters: name one of {', '.join(optim.__all__)}.")
    return found


def _settings(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"`{flag} {pair}` must be NAME=VALUE.")
        found[name] = read_yaml(value)
    return found


def _require_known(flag: str, settings: dict[str, Any], known: Sequence[str]) -> None:
    for name in settings:
        if name not in known:
            raise CommandError(f"`{flag} {name}` is no setting; {did_you_mean(name, known)}")
