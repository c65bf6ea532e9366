"""One place where a model keeps a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """One place where a model keeps a parameter.

    Attributes:
        path: Name of the owning module, without the wrappers of DDP, FSDP and torch.compile.
        module: The owning module.
        attribute: Name of the parameter in it.
        in_block: Whether it lies inside a repeated block (an element of a list of alike, composed modules).
        root: The outermost module.
    """

    path: str
    module: nn.Module
    attribute: str
    in_block: bool
    root: nn.Module

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute
