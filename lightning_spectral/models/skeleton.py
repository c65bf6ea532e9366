"""A model's modules from the names and shapes of its weights alone, where the code that makes it is not at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

_TABLE = re.compile(r"emb|wte|wpe|token|(^|\.)tok", re.IGNORECASE)


class Linear(nn.Module):
    """A weight that maps ``in_features`` to ``out_features``; stored (out, in), or (in, out) as Conv1D does."""

    def __init__(self, shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        self.weight = _parameter(shape)
        self.in_features, self.out_features = shape if transposed else reversed(shape)


class Norm(nn.Module):
    """A vector weight."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = _parameter(shape)


def skeleton(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Modules without a forward, on the meta device, that have these weights.

    What is two-dimensional and called an embedding becomes a table, other matrices linear modules, vectors norms. How a
    matrix is stored is told by its bias, which is as long as there are outputs.

    Args:
        shapes: Shape of each parameter by its full name.
    """
    root = nn.Module()
    owners: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owners.setdefault(path, {})[leaf] = tuple(shape)
    for path, own in owners.items():
        parent, _, last = path.rpartition(".")
        made = _module(path, own)
        if path:
            _at(root, parent)._modules[last] = _with_children(made, _at(root, parent)._modules.get(last))
        else:
            root._parameters.update(made._parameters)
    return root


def _with_children(made: nn.Module, earlier: nn.Module | None) -> nn.Module:
    if earlier is not None:
        made._modules.update(earlier._modules)
    return made


def _at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; bare ones are made on the way."""
    module = root
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            child = module._modules[part] = nn.Module()
        module = child
    return module


def _module(path: str, own: Mapping[str, tuple[int, ...]]) -> nn.Module:
    weight, bias = own.get("weight"), own.get("bias")
    if weight is not None and len(weight) == 2 and bias is None and _TABLE.search(path):
        return nn.Embedding(*weight, device="meta")
    if weight is not None and len(weight) == 2:
        transposed = bias is not None and bias[0] == weight[1] != weight[0]
        return Linear(weight, transposed)
    if weight is not None and len(weight) == 1:
        return Norm(weight)
    made = nn.Module()
    for leaf, shape in own.items():
        made.register_parameter(leaf, _parameter(shape))
    return made


def _parameter(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
