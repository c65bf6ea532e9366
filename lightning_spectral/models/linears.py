"""Modules that multiply by a matrix, whoever wrote them: torch, Hugging Face's ``Conv1D``, LoRA, quantised ones."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from lightning_spectral.models.names import unwrapped

# How libraries spell the two widths: torch and bitsandbytes, Conv1D, GPTQ, Megatron, torchtune's LoRA.
_SPELLINGS = (
    ("in_features", "out_features"),
    ("nx", "nf"),
    ("infeatures", "outfeatures"),
    ("input_size", "output_size"),
    ("in_dim", "out_dim"),
)


class Linear(NamedTuple):
    """A module that maps ``num_in`` features to ``num_out``.

    Attributes:
        path: Its path, relative to whatever was searched.
        module: The module.
        num_in: Features of its input.
        num_out: Features of its output.
        is_stacked: Its weight holds a matrix for each expert, its input the rows of all of them.
    """

    path: str
    module: nn.Module
    num_in: int
    num_out: int
    is_stacked: bool = False


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of a module that multiplies by a matrix, or ``None``."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if isinstance(module, torch.jit.ScriptModule):
        return None
    inner = unwrapped(module)
    if inner is not module:
        return widths_of(inner)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear, nn.Embedding)):
        return None
    own, of_class = module.__dict__, _declared(type(module))  # type: ignore[arg-type]
    for first, second in _SPELLINGS:
        if first in own or first in of_class:  # not through `__getattr__`, which is slow where there is none
            num_in, num_out = getattr(module, first, None), getattr(module, second, None)
            if isinstance(num_in, int) and isinstance(num_out, int) and _has_weight(module):
                return num_in, num_out
    return None


@cache
def _declared(kind: type) -> frozenset[str]:
    """Spellings of the first width that a class has as an attribute or property of its own."""
    return frozenset(first for first, _ in _SPELLINGS if hasattr(kind, first))


def is_stacked(module: nn.Module) -> bool:
    """Whether a linear module holds a matrix for each expert."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 3


def _has_weight(module: nn.Module) -> bool:
    """A tensor of its own, or a linear module that it wraps; a configuration or a whole network has neither.

    Quantised ones call theirs ``qweight``, ``W_q``, ``codes``, ``indices`` and more, as parameters or buffers.
    """
    own = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None for tensor in own):
        return True
    if any(getattr(module, name, None) is not None for name in ("weight", "qweight", "W_q", "_packed_params")):
        return True
    inner = [getattr(module, name, None) for name in ("base_layer", "linear")]
    return any(isinstance(child, nn.Module) and widths_of(child) is not None for child in inner)
