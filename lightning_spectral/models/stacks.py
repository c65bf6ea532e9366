"""Stacks of blocks in a model, and the places in them where activations are measured.

``post`` is the INPUT of a down projection (after the nonlinearity), ``pre`` the OUTPUT of an up projection. A stack is
a list of repeated blocks (a decoder's layers, an encoder's, a vision tower's); a site is named by its full path and its
stack, never by the layer number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Site:
    """One place to measure.

    Attributes:
        name: Path of the tapped module or parameter, wrapper prefixes removed.
        layer: Depth of the block in its stack.
        site: ``post`` (input of a down projection) or ``pre`` (output of an up projection).
        module: The tapped module; for fused experts the module that owns the parameter.
        expert: Expert index, or ``None``.
        router: The expert's router, or ``None``.
        num_experts_per_token: How many experts the router picks.
        stack: Path of the list of blocks.
        width: Features, where the module declares them.
        run: 0, or how often the same module had run before in one forward call (shared and looped layers).
    """

    name: str
    layer: int
    site: str
    module: nn.Module
    expert: int | None = None
    router: nn.Module | None = None
    num_experts_per_token: int = 1
    stack: str = ""
    width: int | None = None
    run: int = 0

    @property
    def key(self) -> str:
        """Unique in the model: ``model.layers.3.mlp.down_proj.post``, and ``...@1.post`` for a second run."""
        return f"{self.name}{f'@{self.run}' if self.run else ''}.{self.site}"

    @property
    def is_routed(self) -> bool:
        """Whether it sees only the tokens that a router sends to it."""
        return self.router is not None


@dataclass(frozen=True)
class Stack:
    """A list of repeated blocks.

    Attributes:
        name: Its path, wrapper prefixes removed.
        num_blocks: Blocks in it.
        sites: What is measured in it, by layer.
        uncovered: Paths of blocks in which nothing is measured, each with the reason.
    """

    name: str
    num_blocks: int
    sites: tuple[Site, ...]
    uncovered: dict[str, str] = field(default_factory=dict)
