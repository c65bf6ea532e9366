"""``lightning-spectral optimizer-table --model ... --optimizer Muon``: which rule gets which weight."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_spectral.cli.model_source import KINDS, model_of, settings_of
from lightning_spectral.cli.parser import VerbParser, refuse_model
from lightning_spectral.text import CommandError, did_you_mean, import_class, one_line
from lightning_spectral.text.tables import add_format_option, aside, print_table
from lightning_spectral.training.sources import public_names


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = VerbParser(
        "optimizer-table",
        description="Say which matrices a model holds, which parameters are embeddings, heads and vectors, and which "
        "rule and learning rate each gets. The model is built without memory (on the meta device), nothing is trained.",
    )
    parser.add_argument("--model", required=True, help=one_line(KINDS))
    parser.add_argument(
        "--optimizer",
        help="a name in lightning_spectral, or a class path (default: that of a recipe, if ours; else Muon)",
    )
    parser.add_argument(
        "--model-args", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model or its config"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the optimizer, e.g. lr=0.02 split=heads"
    )
    add_format_option(parser)
    options = parser.parse_args(argv)
    refuse_model(options.model)
    name, settings = (options.optimizer, {}) if options.optimizer else _of_recipe(Path(options.model))
    optimizer_class = _optimizer_class(name)
    settings |= settings_of("--set", options.set)
    _require_known("--set", settings, [n for n in inspect.signature(optimizer_class).parameters if n != "params"])
    source = model_of(options.model, settings_of("--model-args", options.model_args))
    log = logging.getLogger("lightning_spectral.optim")
    level = log.level
    log.setLevel(logging.ERROR)  # the table is printed below instead
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer = optimizer_class(source.model, **settings)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{'`--set`: ' if options.set else ''}{one_line(error)}") from error
        finally:
            log.setLevel(level)
    print_table(optimizer.routing, options.format)
    if source.note:
        print(f"\nNote: the model is {source.note}.", file=aside(options.format))
    for warning in caught:
        print(f"\nWarning: {str(warning.message).splitlines()[0]}", file=aside(options.format))
    return 0


def _of_recipe(model: Path) -> tuple[str, dict[str, Any]]:
    """Name and settings of the optimizer of a recipe, where the model is one."""
    from lightning_spectral.training.document import read_tree

    spec = read_tree(model).get("optimizer") if model.suffix in (".yaml", ".yml") and model.is_file() else None
    if isinstance(spec, dict) and str(spec.get("class_path")).startswith("lightning_spectral."):
        return spec["class_path"], dict(spec.get("init_args") or {})
    return "Muon", {}  # others route nothing


def _optimizer_class(name: str) -> Any:
    known = [own for own in public_names("lightning_spectral.optim") if own != "SpectralOptimizer"]
    if "." not in name and name not in known and (hint := did_you_mean(name, known)).endswith("?"):
        raise CommandError(f"no optimizer `{name}` (`--optimizer`): {hint}")  # before torch is imported
    from lightning_spectral import optim

    try:
        found = getattr(optim, name) if name in optim.__all__ else import_class(name)
    except ImportError as error:
        hint = did_you_mean(name, [n for n in optim.__all__ if n != "SpectralOptimizer"], otherwise="there are")
        raise CommandError(f"no optimizer `{name}` (`--optimizer`): {hint}") from error
    if not (isinstance(found, type) and issubclass(found, optim.SpectralOptimizer)):
        raise CommandError(f"`--optimizer {name}` does not route parameters: name one of {', '.join(optim.__all__)}.")
    return found


def _require_known(flag: str, settings: dict[str, Any], known: Sequence[str]) -> None:
    for name in settings:
        if name not in known:
            raise CommandError(f"`{flag} {name}` is no setting; {did_you_mean(name, known)}")
