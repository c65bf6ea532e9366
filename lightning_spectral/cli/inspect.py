"""``lightning-spectral inspect MODEL``: what would be measured in a model, what would not, and the memory it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.cli.optimizer_table import build_model
from lightning_spectral.text import CommandError, one_line, read_yaml
from lightning_spectral.text.tables import Table, add_format_option, aside, print_table

if TYPE_CHECKING:
    from torch import nn

    from lightning_spectral.models.stacks import Site, Stack

_MODEL = """a litgpt name (pythia-160m), a Hugging Face model type (gpt2) or folder with a config.json, a litgpt folder
with a model_config.yaml, a recipe (.yaml), or the class path of a module (my_package.Net)"""


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="lightning-spectral inspect",
        description="Say which stacks of blocks a model has, where activations would be measured in them, what would "
        "not be measured, and the memory of a window. The model is built without memory (on the meta device).",
    )
    parser.add_argument("model", help=" ".join(_MODEL.split()))
    parser.add_argument(
        "--model-args", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model or its config"
    )
    parser.add_argument("--sites", nargs="+", choices=["pre", "post"], default=["post"], help="default: post")
    parser.add_argument("--modules", nargs="+", help="globs of down projections to measure instead of all")
    parser.add_argument("--buckets", type=int, default=3, help="1: pooled only; 3: head, mid, tail (default: 3)")
    parser.add_argument("--shards", type=int, default=1, help="groups of sequences for intervals (default: 1)")
    add_format_option(parser)
    options = parser.parse_args(argv)
    if options.buckets < 1 or options.shards < 1:
        raise CommandError(f"--buckets and --shards must be >= 1, got {options.buckets} and {options.shards}.")
    import torch

    from lightning_spectral.models.stacks import find_stacks

    with torch.device("meta"):
        model = _model(options.model, options.model_args)
    try:
        found = find_stacks(model, sites=options.sites, modules=options.modules)
    except ValueError as error:
        raise CommandError(one_line(error)) from error
    print_table(table(found.stacks, groups=options.buckets * options.shards), options.format)
    out = aside(options.format)
    names = [name for name, module in found.embeddings.items() if module is found.embedding]
    print(f"token ids: {f'`{names[0]}`' if names else 'none: pooled ranks only'}", file=out)
    print("layout: proven in the first window, by comparing what was embedded with what enters a stack", file=out)
    for note in found.notes:
        print(f"not measured: {note}", file=out)
    return 0


def table(stacks: Sequence[Stack], groups: int) -> Table:
    """One row a kind of site of each stack."""
    rows: list[tuple[Any, ...]] = []
    for stack in stacks:
        kinds: dict[tuple[str, str, int | None], list[Site]] = {}
        for site in stack.sites:
            kinds.setdefault((site.site, _relative(site, stack), site.width), []).append(site)
        for (kind, where, width), sites in kinds.items():
            blocks = f"{len({site.layer for site in sites})} of {stack.num_blocks}"
            rows.append((stack.name, kind, where, blocks, len(sites), width, _mib(sites, groups)))
    heads = ("stack", "site", "module", "blocks", "sites", "width", "MiB in a window")
    return Table(heads, rows)


def _relative(site: Site, stack: Stack) -> str:
    """Path inside the block, experts written as one."""
    inside = site.name.removeprefix(stack.name.removesuffix("*")).lstrip(".").partition(".")[2] or site.name
    return inside if site.expert is None else inside.replace(f".{site.expert}.", ".*.")


def _mib(sites: Sequence[Site], groups: int) -> float | None:
    from lightning_spectral.functional.packed import packed_size

    widths = [site.width for site in sites]
    if None in widths:
        return None
    return round(sum(4 * groups * packed_size(width) for width in widths if width) / 2**20, 1)


def _model(name: str, settings: Sequence[str]) -> nn.Module:
    path = Path(name).expanduser()
    config = path / "model_config.yaml"
    if config.is_file():
        return _litgpt(read_yaml(config.read_text(encoding="utf-8")))
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path)
    return build_model(name, _settings(settings))


def _of_recipe(path: Path) -> nn.Module:
    from lightning_spectral.training import document, recipe

    try:
        content = recipe.load(path).content
        named = {} if content["model_name"] == "custom" else document.named_config(content["model_name"])
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error)) from error
    return _litgpt(named | (content["model_config"] or {}))


def _litgpt(fields: dict[str, Any]) -> nn.Module:
    from litgpt import GPT, Config

    try:
        return GPT(Config(**fields))
    except (TypeError, ValueError) as error:
        raise CommandError(f"litgpt cannot build this model: {one_line(error)}") from error


def _settings(words: Sequence[str]) -> dict[str, Any]:
    pairs = [word.partition("=") for word in words]
    wrong = [word for word, (_, equals, _) in zip(words, pairs, strict=True) if not equals]
    if wrong:
        raise CommandError(f"--model-args: `{wrong[0]}` is not NAME=VALUE.")
    return {key: read_yaml(value) for key, _, value in pairs}
