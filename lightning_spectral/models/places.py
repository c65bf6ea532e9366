"""One place where a model keeps a parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightning_spectral.models.names import clean_name

_KEEPERS = (nn.ParameterList, nn.ParameterDict)  # of parameters that another module computes with
_PART = re.compile(r"^parametrizations\.(\w+)\.original\d*$|^(weight)_(?:v|orig|raw)$")


@dataclass(frozen=True)
class Place:
    """One place where a model keeps a parameter.

    Attributes:
        path: Name of the owning module, without the wrappers of DDP, FSDP and torch.compile.
        module: The owning module: the one that computes with it, also where a list or a parametrization keeps it.
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

    @property
    def tensor(self) -> str:
        """What the owner calls it: ``weight``, also of what weight and spectral norm keep; the name of a list."""
        part = _PART.match(self.attribute)
        return self.attribute.partition(".")[0] if part is None else part.group(1) or part.group(2)


def places_in(root: nn.Module) -> Iterator[tuple[nn.Parameter, Place]]:
    """Every parameter, at every place where it is kept."""
    modules = dict(root.named_modules(remove_duplicate=False))
    in_block = {"": False}
    for path, module in modules.items():
        parent, _, last = path.rpartition(".")
        if path:
            in_block[path] = in_block[parent] or (last.isdecimal() and _is_repeated(modules[parent], module))
        own, inside = _owner(path, modules)
        for attribute, param in module._parameters.items():
            if param is not None:
                yield param, Place(clean_name(own), modules[own], inside + attribute, in_block[path], root)


def _owner(path: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The module that computes with the parameters kept at a path, and their names in it up to the last."""
    own = path
    if type(modules[path]).__name__ == "ParametrizationList" and ".parametrizations." in f".{path}":
        own = path.rpartition("parametrizations.")[0].rstrip(".")
    while own and isinstance(modules[own], _KEEPERS):
        own = own.rpartition(".")[0]
    inside = path[len(own) :].lstrip(".")
    return own, f"{inside}." if inside else ""


def _is_repeated(container: nn.Module, child: nn.Module) -> bool:
    """Whether a numbered child is one of several alike blocks; a single layer (a Linear of a Sequential) is none."""
    if not child._modules:
        return False
    if isinstance(container, nn.ModuleList):
        return True
    return sum(type(other) is type(child) for other in container._modules.values()) > 1
