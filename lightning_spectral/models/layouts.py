"""How modules keep their matrices: which parameters hold any, stacked, transposed, flattened, or fused from parts.

A row of ``_BARE`` for a class that keeps matrices as bare parameters; everything else follows from the kind of module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from lightning_spectral.models.fused import parts_of
from lightning_spectral.models.places import Place
from lightning_spectral.models.views import Views

SPLITS = ("none", "projections", "heads")

Shape = tuple[int, ...]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INPUT_NAMES = re.compile(r"(^|[._])(\w*patch\w*|stem|\w*embed\w*)($|[._])", re.IGNORECASE)
_EXPERTS = re.compile(r"Expert|MoE|Moe")
_DOWN = re.compile(r"down|w2|output|fc2|wo$")


def _stack(shape: Shape, transposed: bool = False) -> Views:
    """(..., M, N): one matrix for every index of the leading dimensions."""
    return Views(shape, len(shape) - 1, prod(shape[:-2]), transposed)


def _heads_in(shape: Shape) -> Views:
    return Views(shape, 1, transposed=True)  # (inputs, heads, head size)


def _heads_out(shape: Shape) -> Views:
    return Views(shape, 1)  # (outputs, heads, head size)


# (class, attribute) as regular expressions -> views of a parameter of this shape
_BARE: tuple[tuple[str, str, Callable[[Shape, Any], Views]], ...] = (
    ("XLNetRelativeAttention|FunnelRelMultiheadAttention", "[qkvr]|r_kernel", lambda shape, _: _heads_in(shape)),
    ("XLNetRelativeAttention", "o", lambda shape, _: _heads_out(shape)),
    ("Llama4TextExperts|AriaGroupedExpertsGemm|GroupedLinearLayer", ".*", lambda shape, _: _stack(shape, True)),
    ("DbrxExpertGLU", "w1|v1", lambda shape, module: Views(shape, 1, module.moe_num_experts)),
    ("DbrxExpertGLU", "w2", lambda shape, module: Views(shape, 1, module.moe_num_experts, transposed=True)),
)


def matrices_of(place: Place, shape: Shape, split: str = "none") -> Views | None:
    """The matrices of a parameter by the kind of its owner, or None when it holds none.

    Args:
        place: Where the model keeps it.
        shape: Its logical shape.
        split: A name in ``SPLITS``: keep fused projections whole, divide them into q, k, v (gate, up), or into heads.
    """
    views = _whole(place, shape)
    if views is None or min(views.matrix) <= 1:
        return None
    if split == "none":
        return views
    parts = parts_of(place, views, by_head=split == "heads")
    return views if parts is None else replace(views, parts=parts)


def _whole(place: Place, shape: Shape) -> Views | None:
    module, attribute, kind = place.module, place.attribute, type(place.module).__name__
    if len(shape) < 2:
        return None
    for class_name, name, views in _BARE:
        if re.fullmatch(class_name, kind) and re.fullmatch(name, attribute) and len(shape) >= 2:
            return views(shape, module)
    if isinstance(module, _CONVOLUTIONS):
        found = convolution(place, shape)
        return found if isinstance(found, Views) else None
    if len(shape) == 2:
        return _two_dimensional(module, attribute, kind, shape)
    if _EXPERTS.search(kind) and len(shape) == 3:
        return _stack(shape, _experts_are_transposed(module, attribute, shape))
    if "Linear" in kind and not isinstance(module, nn.Bilinear) and attribute.endswith("weight"):
        return _stack(shape)
    return None


def is_linear(module: nn.Module) -> bool:
    """Linear layers by type, and look-alikes (quantised, LoRA, Hugging Face's Conv1D) by what they call themselves."""
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind == "Conv1D" or ("Linear" in kind and "weight" in module._parameters)


def _two_dimensional(module: nn.Module, attribute: str, kind: str, shape: Shape) -> Views | None:
    if kind == "Conv1D":  # Hugging Face's: (inputs, outputs)
        return Views(shape, transposed=True)
    if isinstance(module, nn.Linear) or ("Linear" in kind and re.search(r"weight|^lora_", attribute)):
        return Views(shape)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return Views(shape)
    if isinstance(module, nn.RNNBase) and attribute.startswith("weight"):
        return Views(shape)
    if re.search(r"Router$|Gate$", kind) and attribute == "weight":
        return Views(shape)
    return None


def _experts_are_transposed(module: nn.Module, attribute: str, shape: Shape) -> bool:
    """From what the module says of itself, else from where its hidden size stands."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = next((h for h in (getattr(module, n, None) for n in ("hidden_size", "hidden_dim", "dim")) if h), None)
    rows, columns = shape[-2:]
    if hidden is None or rows == columns or hidden not in (rows, columns):
        return False
    hidden_is_rows = rows == hidden
    return not hidden_is_rows if _DOWN.search(attribute) else hidden_is_rows


def convolution(place: Place, shape: Shape) -> Views | str | None:
    """The matrices of a convolution, why it has none, or None when the owner is no convolution.

    Filters are rows, flattened over inputs and positions; every group is a matrix of its own. Depthwise filters see one
    channel and are vectors; a layer that reads raw inputs (patches, pixels, waveforms) plays the part of an embedding.
    """
    module = place.module
    if not isinstance(module, _CONVOLUTIONS) or len(shape) < 3:
        return None
    if module.groups > 1 and min(module.in_channels, module.out_channels) // module.groups <= 1:
        return "depthwise convolution"
    if module.in_channels <= 4 or _INPUT_NAMES.search(place.path) or _is_first(place.root, module):
        return "convolution of the input"
    return Views(shape, 1, module.groups, isinstance(module, _TRANSPOSED_CONVOLUTIONS))


def _is_first(root: nn.Module, module: nn.Module) -> bool:
    return next(m for m in root.modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear, nn.Embedding))) is module
