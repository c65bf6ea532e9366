"""The stacks of blocks in a model, found by their structure, by a hint or by globs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_spectral.models.bare_networks import holds_hidden_experts, packed_matrices
from lightning_spectral.models.families import Hint, installed_hints, is_other_table
from lightning_spectral.models.feed_forward import HIDDEN, PROGRAM, Anatomy
from lightning_spectral.models.globs import by_glob, matches, with_parameters
from lightning_spectral.models.linears import widths_of
from lightning_spectral.models.reader import HIDDEN_EXPERTS
from lightning_spectral.models.series import Series, all_series
from lightning_spectral.models.sites import SITES, Found, Site, Stack, entrances, network_sites
from lightning_spectral.models.walk import is_program, modules_of, named_modules, uncollected

_OWN_TABLE = re.compile(r"^(?!.*(unembed|pos|rotary|rope|patch|time)).*embed", re.IGNORECASE)


@uncollected()
def find_stacks(
    model: nn.Module,
    *,
    sites: Sequence[str] = ("post",),
    modules: Sequence[str] | None = None,
    embedding: str | None = None,
    hints: Sequence[Hint] = (),
    is_part: bool = False,
) -> Found:
    """Find the feed-forward sites of a model by its structure.

    Args:
        model: Any module, wrapped or not.
        sites: ``post``, ``pre`` or both.
        modules: Globs of down projections to measure instead of all.
        embedding: Glob of the token embedding, where content should not decide.
        hints: Rows for models that structure does not find or finds wrongly: used in the blocks where they match,
            structure elsewhere. Those of installed packages come after them.
        is_part: The rest of the model is elsewhere (pipeline stages), so that what is named may be there.

    Raises:
        ValueError: If nothing is found in a whole model, or a glob names nothing or no projection; the message says how
            to name it.
    """
    if not sites or set(sites) - set(SITES):
        raise ValueError(f"`sites` must name `post`, `pre` or both, got {list(sites)}.")
    named = named_modules(model)
    series = all_series(model)
    rows, unused = _matching(named, hints)
    elsewhere = [glob for glob in modules or () if is_part and not matches(named, glob)]
    if modules:
        modules = [glob for glob in modules if glob not in elsewhere]
        stacks = by_glob(named, series, modules, sites, rows)
    else:
        stacks = [_stack(row, sites) for row in series]
        if rows:
            stacks = _with_hinted(stacks, by_glob(named, series, [row.down for row in rows], sites, rows))
    if not is_part and not any(stack.sites for stack in stacks):
        raise ValueError(_nothing_found(model, named))
    known = {name: module for name, module in named.items() if is_embedding(module) or is_own_table(module)}
    tables = known
    if embedding is not None:
        tables = {name: named[name] for name in named if fnmatchcase(name, embedding)}
        if not tables and is_part:
            elsewhere.append(embedding)
        elif not tables:
            raise ValueError(f"No module matches the embedding `{embedding}`. Embedding tables here: {[*known][:6]}.")
    plain = {name: module for name, module in tables.items() if _wrapped_table(module) is None} or tables
    likely = [module for name, module in plain.items() if not is_other_table(name)] or list(plain.values())
    table = max(likely, key=_num_ids, default=None)
    notes = (*_notes(stacks), *unused)
    return Found(tuple(stacks), table, tables, _head(model, table, stacks), notes, tuple(elsewhere))


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks ids up in a table, its own or one that an adapter wraps."""
    if _wrapped_table(module) is not None:
        return True
    own = module.__dict__
    looks = isinstance(own.get("num_embeddings"), int) and isinstance(own.get("embedding_dim"), int)
    return isinstance(module, nn.Embedding) or (looks and not isinstance(module, nn.EmbeddingBag))


def _wrapped_table(module: nn.Module) -> nn.Module | None:
    """The table inside an adapter of peft, which may use its weight without calling it."""
    inside = module._modules
    inner = next((inside[name] for name in ("base_layer", "original_module") if name in inside), None)
    return inner if inner is not None and is_embedding(inner) else None


def is_own_table(module: nn.Module) -> bool:
    """Whether a class of the script's, by its name, looks ids up in its one matrix; what it is called with decides."""
    if is_embedding(module) or module._modules or _OWN_TABLE.search(type(module).__name__) is None:
        return False
    return [parameter.ndim for parameter in module._parameters.values() if parameter is not None] == [2]


def num_ids(embedding: nn.Module | None) -> int | None:
    """Ids that a table holds; ``None`` where it does not tell."""
    if embedding is not None and is_own_table(embedding):
        return len(next(embedding.parameters()))
    return getattr(embedding, "num_embeddings", None)


def _num_ids(module: nn.Module) -> int:
    return num_ids(module) or 0


def _matching(named: dict[str, nn.Module], hints: Sequence[Hint]) -> tuple[list[Hint], list[str]]:
    """The rows that match something, each down projection's first one only, and a sentence for each given in vain."""
    rows = [*hints, *installed_hints()]
    if not rows:
        return [], []
    names = with_parameters(named)
    matching = [row for row in rows if any(fnmatchcase(name, row.down) for name in names)]
    return matching, [f"hint `{row.name}`: no module matches `{row.down}`." for row in hints if row not in matching]


def _with_hinted(stacks: Sequence[Stack], hinted: Sequence[Stack]) -> list[Stack]:
    """What hints name, and what structure found in the blocks where they name nothing."""
    by_name = {stack.name: stack for stack in hinted}
    merged = [_merged(stack, by_name.pop(stack.name)) if stack.name in by_name else stack for stack in stacks]
    return [*merged, *by_name.values()]


def _merged(stack: Stack, hinted: Stack) -> Stack:
    layers = {site.layer for site in hinted.sites}
    sites = sorted([*hinted.sites, *(s for s in stack.sites if s.layer not in layers)], key=lambda site: site.layer)
    names = [site.name for site in hinted.sites]
    left = {path: why for path, why in stack.uncovered.items() if not any(n.startswith(f"{path}.") for n in names)}
    return replace(stack, sites=tuple(sites), uncovered=left)


def _stack(series: Series, sites: Sequence[str]) -> Stack:
    found: list[Site] = []
    uncovered: dict[str, str] = {}
    for block in series.blocks:
        for network in block.anatomy.networks:
            found += network_sites(network, block, series.path, sites)
        if not block.anatomy.networks:
            uncovered[block.path] = _why_uncovered(block.anatomy)
    return Stack(series.path, entrances(series), series.depth, tuple(found), uncovered)


def _why_uncovered(parts: Anatomy) -> str:
    if parts.opaque:
        return parts.opaque
    if parts.has_attention:
        return "attention without a feed-forward network"
    return f"no feed-forward network recognised in it ({parts.num_other} linear modules)"


def _notes(stacks: Sequence[Stack]) -> list[str]:
    notes: list[str] = []
    for stack in stacks:
        for reason in dict.fromkeys(stack.uncovered.values()):
            paths = [path for path, why in stack.uncovered.items() if why == reason]
            some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
            notes.append(
                f"{len(paths)} of {len(stack.blocks)} blocks of `{stack.name}` are not measured: {reason} ({some})."
            )
        packed = [site.name for site in stack.sites if site.parameter in packed_matrices(site.module)]
        if packed:
            notes.append(
                f"{len(packed)} sites of `{stack.name}` keep their experts in packed numbers (`{packed[0]}`): they are "
                f"seen where torch multiplies unpacked matrices, else `no_forward`: {HIDDEN_EXPERTS}."
            )
    return notes


def _head(model: nn.Module, table: nn.Module | None, stacks: Sequence[Stack]) -> nn.Module | None:
    """The last linear module outside the stacks that maps to as many scores as there are ids."""
    if table is None:
        return None
    outside = modules_of(model, without=[block for stack in stacks for _, block in stack.blocks])
    return next((module for module in reversed(outside) if _maps_to(module, _num_ids(table))), None)


def _maps_to(module: nn.Module, width: int) -> bool:
    widths = widths_of(module)
    return widths is not None and widths[1] == width


def _nothing_found(model: nn.Module, named: dict[str, nn.Module]) -> str:
    examples = [name for name, module in named.items() if widths_of(module)][:6]
    linears = f"Linear modules here: {examples}." if examples else "It has no linear module."
    hidden = next((name for name, module in named.items() if holds_hidden_experts(module)), None)
    experts = f" `{hidden}` ({type(named[hidden]).__name__}) {HIDDEN}." if hidden else ""
    program = next((f"`{name}`" for name, module in named.items() if is_program(module)), "")
    program = "it" if is_program(model) else program
    experts += f" {program[0].upper()}{program[1:]} {PROGRAM}." if program else ""
    return (
        f"No feed-forward network was found in a list of blocks in `{type(model).__name__}`.{experts} Name the down "
        f"projections yourself: `modules=['*.ffn.down']`. {linears}"
    )
