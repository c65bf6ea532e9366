"""Sites that a user or a hint names by globs of paths, instead of those that structure finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_spectral.models.bare_networks import BareNetwork, bare_network
from lightning_spectral.models.families import Hint
from lightning_spectral.models.feed_forward import FeedForward
from lightning_spectral.models.linears import widths_of
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.series import Block, Series
from lightning_spectral.models.sites import Site, Stack, entrances, network_sites


def by_glob(
    named: dict[str, nn.Module],
    series: Sequence[Series],
    globs: Sequence[str],
    sites: Sequence[str],
    hints: Sequence[Hint] = (),
) -> list[Stack]:
    """The stacks of the sites that globs name.

    Args:
        named: Every module by its clean path.
        series: Lists of blocks that structure found.
        globs: Of down projections.
        sites: ``post``, ``pre`` or both.
        hints: Say where up projections are that structure does not find.

    Raises:
        ValueError: If a glob names nothing, or no projection.
    """
    names = _matching(named, globs)
    known = _known_networks(series)
    found: list[Site] = []
    for name in names:
        if name in known:
            network, block, stack = known[name]
            found += network_sites(network, block, stack, sites)
        else:
            found += _named_site(name, named, series, sites, hints)
    found = list({site.key: site for site in found}.values())
    return _stacks_of(_numbered(found), series)


def _matching(named: dict[str, nn.Module], globs: Sequence[str]) -> list[str]:
    """Names that a glob matches, without what lies inside another match; each must be a projection."""
    for glob in globs:
        if not matches(named, glob):
            examples = [name for name, module in named.items() if widths_of(module)][:6]
            raise ValueError(f"No module matches `{glob}`. Linear modules here: {examples}.")
    matched = [name for name in with_parameters(named) if any(fnmatchcase(name, glob) for glob in globs)]
    inside = set(matched)
    outer = [name for name in matched if not any(parent in inside for parent in _parents(name))]
    for name in outer:
        module = named.get(name)
        if module is not None and _inner_linear(module) is None and bare_network(module) is None:
            examples = [name_ for name_, child in named.items() if widths_of(child)][:6]
            raise ValueError(
                f"`modules`: `{name}` is a {type(module).__name__}, not a projection, so its input is not what a down "
                f"projection gets. Name the projection itself. Linear modules here: {examples}."
            )
    return outer


def matches(named: dict[str, nn.Module], glob: str) -> bool:
    """Whether a glob names anything."""
    return any(fnmatchcase(name, glob) for name in with_parameters(named))


def with_parameters(named: dict[str, nn.Module]) -> list[str]:
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
                if isinstance(down, BareNetwork):
                    known[f"{path}.{down.down}"] = known[path]
    return known


def _named_site(
    name: str, named: dict[str, nn.Module], series: Sequence[Series], sites: Sequence[str], hints: Sequence[Hint]
) -> list[Site]:
    """A projection that no feed-forward network was recognised for: its input, and by hint its up projection."""
    owner = name.rpartition(".")[0]
    if name not in named:
        raise ValueError(f"`modules`: `{name}` is a parameter of {type(named[owner]).__name__}, not a down projection.")
    module = _inner_linear(named[name]) or named[name]
    widths = widths_of(module)
    stack, layer = _place(name, series)
    site = Site(name, layer, "post", named[name], stack=stack, width=widths[0] if widths else None, unit=name)
    found = [site] if "post" in sites else []
    if "pre" in sites:
        ups = [hint.up for hint in hints if hint.up and fnmatchcase(name, hint.down)]
        up_name = _nearest(name, [other for other in named if any(fnmatchcase(other, up) for up in ups)])
        if up_name is None:
            raise ValueError(
                f"No up projection was found for `{name}`: measure `sites=['post']` only, or say where it is: "
                f"`hints=['{name},PATH']`."
            )
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


def _stacks_of(sites: Sequence[Site], series: Sequence[Series]) -> list[Stack]:
    stacks: list[Stack] = []
    for name in dict.fromkeys(site.stack for site in sites):
        members = tuple(site for site in sites if site.stack == name)
        row = next((row for row in series if row.path == name), None)
        if row is not None:
            wanted = {site.layer for site in members}
            blocks = tuple(entrance for entrance in entrances(row) if entrance[0] in wanted)
            stacks.append(Stack(name, blocks, row.depth, members))
        else:
            stacks.append(Stack(name, tuple((site.layer, site.module) for site in members), len(members), members))
    return stacks
