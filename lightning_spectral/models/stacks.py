"""Stacks of blocks in a model, and the places in them where activations are measured.

``post`` is the INPUT of a down projection (after the nonlinearity), ``pre`` the OUTPUT of an up projection. A stack is
a list of repeated blocks (a decoder's layers, an encoder's, a vision tower's); a site is named by its full path and its
stack, never by the layer number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_spectral.models.families import Hint, installed_hints, is_other_table
from lightning_spectral.models.feed_forward import Anatomy, FeedForward
from lightning_spectral.models.linears import FusedExperts, fused_experts, widths_of
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.series import Block, Series, all_series

SITES = ("pre", "post")


@dataclass(frozen=True)
class Site:
    """One place to measure.

    Attributes:
        name: Path of the tapped module or parameter, wrapper prefixes removed.
        layer: Depth of the block in its stack.
        site: ``post`` (input of a down projection) or ``pre`` (output of an up projection).
        module: The tapped module; for fused experts the module that owns the parameter.
        expert: Expert index, or ``None``.
        stack: Path of the list of blocks.
        width: Features, where the module declares them.
        run: 0, or how often the same module had run before in one forward call (shared and looped layers).
        unit: Path of the feed-forward network that it is in: its pre and post sites share it.
        parameter: Name of the 3-D parameter of fused experts, else empty.
        up: Module whose input rows are those of the tokens that were sent here (fused experts: they themselves).
        up_parameter: Name of the 3-D parameter that they meet, for fused experts.
        routed_by: Module whose input holds all tokens in order, where this site sees only some of them.
    """

    name: str
    layer: int
    site: str
    module: nn.Module
    expert: int | None = None
    stack: str = ""
    width: int | None = None
    run: int = 0
    unit: str = ""
    parameter: str = ""
    up: nn.Module | None = None
    up_parameter: str = ""
    routed_by: nn.Module | None = None

    @property
    def key(self) -> str:
        """Unique in the model: ``model.layers.3.mlp.down_proj.post``, and ``...@1.post`` for a second run."""
        return f"{self.name}{f'@{self.run}' if self.run else ''}.{self.site}"

    @property
    def is_routed(self) -> bool:
        """Whether it sees only the tokens that a router sends to it."""
        return self.routed_by is not None


@dataclass(frozen=True)
class Stack:
    """A list of repeated blocks.

    Attributes:
        name: Its path, wrapper prefixes removed.
        blocks: Depth and entrance of each distinct block: the block itself, or, where it is a mere container that
            nobody calls, the first projection of its network.
        num_blocks: Depth, shared blocks counted as often as they occur.
        sites: What is measured in it, by depth.
        uncovered: Paths of blocks in which nothing is measured, each with the reason.
    """

    name: str
    blocks: tuple[tuple[int, nn.Module], ...]
    num_blocks: int
    sites: tuple[Site, ...]
    uncovered: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What :func:`find_stacks` found.

    Attributes:
        stacks: Every stack, in the order of definition.
        embedding: The token embedding that was named, else the largest table of the model, or ``None``.
        embeddings: Tables whose ids are looked at: the one that was named, else all.
        head: Projection to the vocabulary outside the stacks, or ``None``.
        notes: What was seen and is not measured, one sentence each.
    """

    stacks: tuple[Stack, ...]
    embedding: nn.Module | None
    embeddings: dict[str, nn.Module]
    head: nn.Module | None
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of all stacks."""
        return tuple(site for stack in self.stacks for site in stack.sites)


def find_stacks(
    model: nn.Module,
    *,
    sites: Sequence[str] = ("post",),
    modules: Sequence[str] | None = None,
    embedding: str | None = None,
    hints: Sequence[Hint] = (),
) -> Found:
    """Find the feed-forward sites of a model by its structure.

    Args:
        model: Any module, wrapped or not.
        sites: ``post``, ``pre`` or both.
        modules: Globs of down projections to measure instead of all.
        embedding: Glob of the token embedding, where content should not decide.
        hints: Rows for models that structure does not find; those of installed packages come after them.

    Raises:
        ValueError: If nothing is found, or a glob names nothing or no projection; the message says how to name it.
    """
    if not sites or set(sites) - set(SITES):
        raise ValueError(f"`sites` must name `post`, `pre` or both, got {list(sites)}.")
    named = {clean_name(name): module for name, module in model.named_modules()}
    named.pop("", None)
    series = all_series(model)
    rows = (*hints, *installed_hints())
    hint = next((row for row in rows if any(fnmatchcase(name, row.down) for name in named)), None)
    if modules:
        stacks = _by_glob(model, named, series, modules, sites)
    elif hint:
        stacks = _by_glob(model, named, series, [hint.down], sites, hint.up)
    else:
        stacks = [_stack(row, sites) for row in series]
    if not any(stack.sites for stack in stacks):
        raise ValueError(_nothing_found(model, named))
    tables = {name: module for name, module in named.items() if is_embedding(module)}
    if embedding is not None:
        tables = {name: named[name] for name in named if fnmatchcase(name, embedding)}
        if not tables:
            known = [name for name, module in named.items() if is_embedding(module)]
            raise ValueError(f"No module matches the embedding `{embedding}`. Embedding tables here: {known[:6]}.")
    likely = [module for name, module in tables.items() if not is_other_table(name)] or list(tables.values())
    table = max(likely, key=_num_ids, default=None)
    return Found(tuple(stacks), table, tables, _head(named, table, stacks), tuple(_notes(stacks)))


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks ids up in a table."""
    own = module.__dict__
    looks = isinstance(own.get("num_embeddings"), int) and isinstance(own.get("embedding_dim"), int)
    return isinstance(module, nn.Embedding) or (looks and not isinstance(module, nn.EmbeddingBag))


def _num_ids(module: nn.Module) -> int:
    return int(getattr(module, "num_embeddings", 0))


# sites of a stack


def _stack(series: Series, sites: Sequence[str]) -> Stack:
    found: list[Site] = []
    uncovered: dict[str, str] = {}
    for block in series.blocks:
        parts = block.anatomy
        for network in parts.networks:
            found += _network_sites(network, block.path, block.index, block.module, series.path, sites)
        if not parts.networks:
            uncovered[block.path] = _why_uncovered(parts)
    return Stack(series.path, _entrances(series), series.depth, tuple(found), uncovered)


def _entrances(series: Series) -> tuple[tuple[int, nn.Module], ...]:
    return tuple((block.index, _entrance(block)) for block in series.blocks)


def _entrance(block: Block) -> nn.Module:
    if not isinstance(block.module, (nn.ModuleList, nn.ModuleDict)) or not block.anatomy.networks:
        return block.module
    first = block.anatomy.networks[0]
    return first.ups[0].module if first.ups else first.down.module


def _network_sites(
    network: FeedForward, path: str, layer: int, block: nn.Module, stack: str, sites: Sequence[str]
) -> list[Site]:
    def full(relative: str) -> str:
        return clean_name(".".join(part for part in (path, relative) if part))

    routed_by = None if network.routed_by is None else block.get_submodule(network.routed_by)
    down, ups = network.down, network.ups
    common = Site("", layer, "post", block, network.expert, stack, unit=full(network.unit), routed_by=routed_by)
    if isinstance(down, FusedExperts):
        fused = replace(common, module=down.module, up=down.module, up_parameter=down.ups[0])
        post = replace(fused, name=f"{full(down.path)}.{down.down}", parameter=down.down, width=down.width)
        pre = replace(fused, name=f"{full(down.path)}.{down.ups[0]}", parameter=down.ups[0], site="pre")
    else:
        up = ups[0] if ups else None
        post = replace(common, name=full(down.path), module=down.module, width=down.num_in)
        post = replace(post, up=up.module if up and routed_by is not None else None)
        pre = post if up is None else replace(post, name=full(up.path), module=up.module, width=up.num_out, site="pre")
    return [*([post] if "post" in sites else []), *([pre] if "pre" in sites and pre is not post else [])]


def _why_uncovered(parts: Anatomy) -> str:
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
    return notes


# sites by glob


def _by_glob(
    model: nn.Module,
    named: dict[str, nn.Module],
    series: Sequence[Series],
    globs: Sequence[str],
    sites: Sequence[str],
    up: str = "",
) -> list[Stack]:
    names = _matching(named, globs)
    known = _known_networks(series)
    found: list[Site] = []
    for name in names:
        if name in known:
            network, block, stack = known[name]
            found += _network_sites(network, block.path, block.index, block.module, stack, sites)
        else:
            found += _named_site(name, named, series, sites, up)
    found = list({site.key: site for site in found}.values())
    return _stacks_of(_numbered(found), series, named)


def _matching(named: dict[str, nn.Module], globs: Sequence[str]) -> list[str]:
    """Names that a glob matches, without what lies inside another match; each must be a projection."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in _with_parameters(named)):
            examples = [name for name, module in named.items() if widths_of(module)][:6]
            raise ValueError(f"No module matches `{glob}`. Linear modules here: {examples}.")
    matched = [name for name in _with_parameters(named) if any(fnmatchcase(name, glob) for glob in globs)]
    matches = set(matched)
    outer = [name for name in matched if not any(parent in matches for parent in _parents(name))]
    for name in outer:
        module = named.get(name)
        if module is not None and _inner_linear(module) is None and fused_experts(module) is None:
            examples = [name_ for name_, child in named.items() if widths_of(child)][:6]
            raise ValueError(
                f"`modules`: `{name}` is a {type(module).__name__}, not a projection, so its input is not what a down "
                f"projection gets. Name the projection itself. Linear modules here: {examples}."
            )
    return outer


def _with_parameters(named: dict[str, nn.Module]) -> list[str]:
    """Names of modules, and of the 3-D parameters of fused experts."""
    names: list[str] = []
    for name, module in named.items():
        names.append(name)
        names += [f"{name}.{parameter}" for parameter, p in module._parameters.items() if p is not None and p.ndim == 3]
    return names


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _inner_linear(module: nn.Module) -> nn.Module | None:
    """The module itself if it is linear, else the only linear module inside it."""
    if widths_of(module) is not None:
        return module
    children = [child for child in module.children() if any(widths_of(inner) for inner in child.modules())]
    return _inner_linear(children[0]) if len(children) == 1 else None


def _known_networks(series: Sequence[Series]) -> dict[str, tuple[FeedForward, Block, str]]:
    """Every feed-forward network by the names under which a glob may mean it."""
    known: dict[str, tuple[FeedForward, Block, str]] = {}
    for row in series:
        for block in row.blocks:
            for network in block.anatomy.networks:
                down = network.down
                path = clean_name(f"{block.path}.{down.path}" if down.path else block.path)
                known[path] = (network, block, row.path)
                if isinstance(down, FusedExperts):
                    known[f"{path}.{down.down}"] = known[path]
    return known


def _named_site(
    name: str, named: dict[str, nn.Module], series: Sequence[Series], sites: Sequence[str], up: str
) -> list[Site]:
    """A projection that no feed-forward network was recognised for: its input, and by hint its up projection."""
    owner = name.rpartition(".")[0]
    if name not in named:
        raise ValueError(f"`modules`: `{name}` is a parameter of {type(named[owner]).__name__}, not a down projection.")
    module = _inner_linear(named[name]) or named[name]
    widths = widths_of(module)
    stack, layer = _place(name, series)
    site = Site(name, layer, "post", named[name], stack=stack, width=widths[0] if widths else None, unit=owner)
    found = [site] if "post" in sites else []
    if "pre" in sites:
        up_name = _nearest(name, [other for other in named if up and fnmatchcase(other, up)])
        if up_name is None:
            raise ValueError(f"No up projection was found for `{name}`: measure `sites=['post']` only.")
        up_widths = widths_of(named[up_name])
        width = up_widths[1] if up_widths else None
        found.append(replace(site, name=up_name, site="pre", module=named[up_name], width=width))
    return found


def _nearest(name: str, others: Sequence[str]) -> str | None:
    """The name that shares the longest path with ``name``."""

    def shared(other: str) -> int:
        pairs = zip(name.split("."), other.split("."), strict=False)
        return next((depth for depth, (a, b) in enumerate(pairs) if a != b), len(name))

    return max(others, key=shared, default=None)


def _place(name: str, series: Sequence[Series]) -> tuple[str, int]:
    """Stack and depth of a path: those of the block it is in, else the path before its first number."""
    for row in series:
        for block in row.blocks:
            if name == block.path or name.startswith(block.path + "."):
                return row.path, block.index
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (".".join(parts[:number]), int(parts[number])) if number is not None else ("", -1)


def _numbered(sites: list[Site]) -> list[Site]:
    """Sites outside blocks by their own number where each has another one, else in the order of definition."""
    loose = [site for site in sites if site.layer < 0]
    if not loose:
        return sites
    order = {site.name: index for index, site in enumerate(sites)}
    return [replace(site, layer=order[site.name]) if site.layer < 0 else site for site in sites]


def _stacks_of(sites: Sequence[Site], series: Sequence[Series], named: dict[str, nn.Module]) -> list[Stack]:
    stacks: list[Stack] = []
    for name in dict.fromkeys(site.stack for site in sites):
        members = tuple(site for site in sites if site.stack == name)
        row = next((row for row in series if row.path == name), None)
        if row is not None:
            wanted = {site.layer for site in members}
            blocks = tuple(entrance for entrance in _entrances(row) if entrance[0] in wanted)
            stacks.append(Stack(name, blocks, row.depth, members))
        else:
            stacks.append(Stack(name, tuple((site.layer, site.module) for site in members), len(members), members))
    return stacks


# head, messages


def _head(named: dict[str, nn.Module], table: nn.Module | None, stacks: Sequence[Stack]) -> nn.Module | None:
    """The last linear module outside the stacks that maps to as many scores as there are ids."""
    if table is None:
        return None
    inside = {id(module) for stack in stacks for _, block in stack.blocks for module in block.modules()}
    heads = [module for module in named.values() if id(module) not in inside and _maps_to(module, _num_ids(table))]
    return heads[-1] if heads else None


def _maps_to(module: nn.Module, num_ids: int) -> bool:
    widths = widths_of(module)
    return widths is not None and widths[1] == num_ids


def _nothing_found(model: nn.Module, named: dict[str, nn.Module]) -> str:
    examples = [name for name, module in named.items() if widths_of(module)][:6]
    linears = f"Linear modules here: {examples}." if examples else "It has no linear module."
    return (
        f"No feed-forward network was found in a list of blocks in `{type(model).__name__}`. Name the down projections "
        f"yourself: `modules=['*.ffn.down']`. {linears}"
    )
