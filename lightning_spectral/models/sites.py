"""What is measured in a model: sites, and the stacks of blocks that they lie in.

``post`` is the INPUT of a down projection (after the nonlinearity), ``pre`` the OUTPUT of an up projection. A stack is
a list of repeated blocks (a decoder's layers, an encoder's, a vision tower's); a site is named by its full path and its
stack, never by the layer number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_spectral.models.bare_networks import BareNetwork
from lightning_spectral.models.feed_forward import FeedForward
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.series import Block, Series

SITES = ("pre", "post")


@dataclass(frozen=True, slots=True)
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
        unit: Path of its network's down projection: what its pre and post sites share, and no other network has.
        parameter: Name of the 3-D parameter of fused experts, else empty.
        up: Module whose input rows are those of the tokens that were sent here (fused experts: they themselves).
        up_parameter: Name of the 3-D parameter that they meet, for fused experts.
        routed_by: Module whose input holds all tokens in order, where this site sees only some of them.
        matrices: Of a bare network: parameter, input and output width, where widths tell its matrices apart.
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
    matrices: tuple[tuple[str, int, int], ...] = ()

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
            is never called, the first projection of its network.
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
        embeddings: Embeddings whose input ids are recorded: the one that was named, else all.
        head: Projection to the vocabulary outside the stacks, or ``None``.
        notes: What was seen and is not measured, one sentence each.
        elsewhere: Globs that name nothing here; of a part of a model.
    """

    stacks: tuple[Stack, ...]
    embedding: nn.Module | None
    embeddings: dict[str, nn.Module]
    head: nn.Module | None
    notes: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of all stacks."""
        return tuple(site for stack in self.stacks for site in stack.sites)


def network_sites(network: FeedForward, block: Block, stack: str, sites: Sequence[str]) -> list[Site]:
    """The sites of one feed-forward network.

    Args:
        network: The network.
        block: The block that it is in.
        stack: Path of the list of blocks.
        sites: ``post``, ``pre`` or both.
    """
    module = block.module
    routed_by = None if network.routed_by is None else module.get_submodule(network.routed_by)
    layer, expert = block.index, network.expert
    down, up = network.down, network.ups[0] if network.ups else None
    path = _full(block.path, down.path)
    found: list[Site] = []
    if isinstance(down, BareNetwork):
        first, unit = down.ups[0], f"{path}.{down.down}"
        for site, parameter, width in (("post", down.down, down.width), ("pre", first, None)):
            where = (f"{path}.{parameter}", layer, site, down.module, expert, stack, width, 0, unit)
            found += [Site(*where, parameter, down.module, first, routed_by, down.matrices)] if site in sites else []
        return found
    arrives = up.module if up is not None and routed_by is not None else None
    if "post" in sites:
        where = (path, layer, "post", down.module, expert, stack, down.num_in, 0, path)
        found.append(Site(*where, up=arrives, routed_by=routed_by))
    if "pre" in sites and up is not None:
        where = (_full(block.path, up.path), layer, "pre", up.module, expert, stack, up.num_out, 0, path)
        found.append(Site(*where, up=arrives, routed_by=routed_by))
    return found


def _full(path: str, relative: str) -> str:
    return clean_name(f"{path}.{relative}" if path and relative else path or relative)


def entrances(series: Series) -> tuple[tuple[int, nn.Module], ...]:
    """Depth of each block, and the module whose call is the block's: see :attr:`Stack.blocks`."""
    return tuple((block.index, _entrance(block)) for block in series.blocks)


def _entrance(block: Block) -> nn.Module:
    if not isinstance(block.module, (nn.ModuleList, nn.ModuleDict)) or not block.anatomy.networks:
        return block.module
    first = block.anatomy.networks[0]
    return first.ups[0].module if first.ups else first.down.module
