"""``lightning-spectral inspect MODEL``: what would be measured in a model, what would not, and the memory it takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.cli.measure import HINTS
from lightning_spectral.cli.model_source import KINDS, SEARCH, model_of, settings_of
from lightning_spectral.cli.parser import VerbParser, at_least, refuse_model
from lightning_spectral.text import CommandError, one_line
from lightning_spectral.text.tables import Column, Table, add_format_option, aside, print_table

if TYPE_CHECKING:
    from lightning_spectral.models.rehearsal import Rehearsed
    from lightning_spectral.models.sites import Found, Site, Stack


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    try:
        return _inspect(_options(argv))
    except CommandError as error:  # the same sentences as of `optimizer-table --model`
        raise CommandError(str(error).replace("`--model ", "`")) from error


def _inspect(options: argparse.Namespace) -> int:
    refuse_model(options.model)
    limit = options.memory_limit_mib
    if options.ranks > 1 and limit is None:
        raise CommandError("--ranks says how many share a window: give --memory-limit-mib, what each may use, too.")
    groups = options.buckets * options.shards
    rows: list[tuple[Any, ...]] = []
    said: list[str] = []
    for found, layouts, note in _found(options):
        made = rows_of(found.stacks, groups, layouts)
        rows += made
        said += _sentences(found, layouts, note)
        sizes = [row[-2] for row in made]
        if None not in sizes:
            said.append(f"memory in a window: {sum(sizes):.1f} MiB of sums ({groups} groups), and the rows that wait")
            if limit is not None:
                sites = [site for stack in found.stacks for site in stack.sites]
                said.append(_within(sites, sum(sizes), limit, options.ranks))
    print_table(Table(_HEADS, rows), options.format)
    out = aside(options.format)
    for sentence in said:
        print(sentence, file=out)
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = VerbParser(
        "inspect",
        description="Say which stacks of blocks a model has, where activations would be measured in them, which row is "
        "which token, what would not be measured, and the memory of a window. The model is built without memory (on "
        "the meta device); a script is run until it first goes backward, and ended there.",
    )
    parser.add_argument("model", help=f"{one_line(KINDS)}, or a training script (train.py)")
    parser.add_argument("words", nargs="*", help="of a script: its own command line, behind `--`")
    parser.add_argument(
        "--model-args", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model or its config"
    )
    parser.add_argument("--sites", nargs="+", choices=["pre", "post"], help="default: post")
    parser.add_argument("--modules", nargs="+", help="globs of down projections to measure instead of all")
    parser.add_argument("--hints", nargs="+", metavar="DOWN[,UP]", help=HINTS)
    parser.add_argument("--embedding", metavar="GLOB", help="the token embedding, where it is not found automatically")
    parser.add_argument(
        "--buckets", type=at_least(1), default=3, help="1: pooled only; 3: head, mid, tail (default: 3)"
    )
    parser.add_argument(
        "--shards", type=at_least(1), default=2, help="groups of sequences for unbiased ranks (default: 2)"
    )
    parser.add_argument(
        "--memory-limit-mib",
        type=at_least(0, float, itself=False),
        metavar="MIB",
        help="say what is kept of a window in so much",
    )
    parser.add_argument("--ranks", type=at_least(1), default=1, help="that share a window (default: 1)")
    add_format_option(parser)
    return parser.parse_args(argv)


def _found(options: argparse.Namespace) -> Iterator[tuple[Found, Mapping[str, Rehearsed], str]]:
    """Each model of what was named, the layouts of its stacks, and what is less than certain about it."""
    script = Path(options.model).expanduser()
    given = {name: value for name in SEARCH if (value := getattr(options, name)) is not None}
    if script.suffix == ".py":
        from lightning_spectral.cli.script_model import models_of

        if not script.is_file():
            raise CommandError(f"there is no script `{script}`.")
        for called in models_of(script, options.words, **_search(given)):
            yield called.found, called.layouts, f"`{type(called.model).__name__}`, as the script called it"
        return
    if options.words:
        raise CommandError(f"`{options.words[0]}`: words behind the model are for a script (`train.py`).")
    from lightning_spectral.models.rehearsal import rehearse
    from lightning_spectral.models.stacks import find_stacks

    source = model_of(options.model, settings_of("--model-args", options.model_args))
    try:
        found = find_stacks(source.model, **_search({**source.search, **given}))
    except ValueError as error:
        raise CommandError(one_line(error)) from error
    yield found, rehearse(source.model, found) if source.has_forward else {}, source.note


def _search(given: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`find_stacks` is asked."""
    from lightning_spectral.models.families import as_hints

    try:
        hints = as_hints(given.get("hints"))
    except ValueError as error:
        raise CommandError(one_line(error)) from error
    return {"sites": ["post"], **given, "hints": hints}


_HEADS = ("stack", "site", "module", "blocks", "sites", "width", Column("MiB in a window", ".1f"), "layout")


def rows_of(stacks: Sequence[Stack], groups: int, layouts: Mapping[str, Rehearsed]) -> list[tuple[Any, ...]]:
    """One row per kind of site of each stack."""
    rows: list[tuple[Any, ...]] = []
    for stack in stacks:
        kinds: dict[tuple[str, str, int | None], list[Site]] = {}
        for site in stack.sites:
            kinds.setdefault((site.site, _relative(site, stack), site.width), []).append(site)
        known = layouts.get(stack.name)
        layout = known.layout if known is not None and known.layout else None
        for (kind, where, width), sites in kinds.items():
            blocks = f"{len({site.layer for site in sites})} of {stack.num_blocks}"
            rows.append((stack.name, kind, where, blocks, len(sites), width, _mib(sites, groups), layout))
    return rows


def _relative(site: Site, stack: Stack) -> str:
    """Path inside the block, experts written as one."""
    inside = site.name.removeprefix(stack.name.removesuffix("*")).lstrip(".").partition(".")[2] or site.name
    return inside if site.expert is None else inside.replace(f".{site.expert}.", ".*.")


def _mib(sites: Sequence[Site], groups: int) -> float | None:
    from lightning_spectral.functional.packed import packed_size

    widths = [site.width for site in sites]
    if None in widths:
        return None
    return sum(4 * groups * packed_size(width) for width in widths if width) / 2**20


def _within(sites: Sequence[Site], moments_mib: float, limit_mib: float, ranks: int) -> str:
    """How a window is held in so much memory, as :func:`~lightning_spectral.probe.memory_plan.choose` has it."""
    from lightning_spectral.probe.memory_plan import MIN_ROWS, choose, row_widths, sample_mib

    plan = choose(row_widths(sites), moments_mib, limit_mib, world_size=ranks, item_bytes=2)
    if plan is None:
        least = sample_mib(row_widths(sites), MIN_ROWS, ranks, 2)
        return f"on {ranks} rank(s) with bf16 rows: {limit_mib:,.0f} MiB do not do, {MIN_ROWS} rows take {least:,.0f}"
    return f"on {ranks} rank(s) with bf16 rows: {plan}"


def _sentences(found: Found, layouts: Mapping[str, Rehearsed], note: str) -> Iterator[str]:
    """What the table does not say: ids, layouts with their proof, what is left out."""
    if note:
        yield f"model: {note}"
    names = [name for name, module in found.embeddings.items() if module is found.embedding]
    yield f"token ids: {f'`{names[0]}`' if names else 'none: pooled ranks only'}"
    for stack in found.stacks:
        known = layouts.get(stack.name)
        if known is None:
            yield f"layout of `{stack.name}`: not tried; it is proven in the first window"
        elif known.layout:
            yield f"layout of `{stack.name}`: {known.layout}, {known.agreement:.0%} of the rows looked at agree"
        else:
            yield f"layout of `{stack.name}`: not proven here; without proof in a window pooled only: {known.reason}"
    for sentence in found.notes:
        yield f"not measured: {sentence}"
