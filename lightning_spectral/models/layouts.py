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
# a module that reads patches, pixels or waveforms; not what merges or shifts hidden ones
_INPUT_NAMES = re.compile(r"^(?!pos|\w*_pos)(\w*patch(?!\w*(merg|expand))\w*|stem\w*|\w*embed\w*)$", re.IGNORECASE)
_PATCHES = re.compile(
    r"^(\w*patch_?embed(ding|dings|der)?|vision_embed_tokens)$", re.IGNORECASE
)  # also of a linear layer
_EXPERTS = re.compile(r"Expert|MoE|Moe")
_DOWN = re.compile(r"down|w2|out|fc2|wo$")
_PROJECTION = re.compile(r"^(\w*_)?proj(ection)?(_weight)?$")  # bare
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim")  # `hidden_dim` beside `dim` is inner


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
    ("RecurrentGemmaRglru", r"\w+_gate_weight", lambda shape, _: _stack(shape, True)),  # block-diagonal
    ("ZambaMambaMixer", "(x|dt)_proj_weight", lambda shape, _: _stack(shape)),  # of each head
    ("CsmCodebooksHead", "weight", lambda shape, _: _stack(shape, True)),
    (
        r"Gemma3MultiModalProjector|T5Gemma2MultiModalProjector",
        r"\w+_weight",
        lambda shape, _: Views(shape, 1, 1, True),
    ),
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
    module, name, kind = place.module, place.tensor, type(place.module).__name__
    if len(shape) < 2:
        return None
    for class_name, tensor, views in _BARE:
        if re.fullmatch(class_name, kind) and re.fullmatch(tensor, name):
            return views(shape, module)
    if is_convolution(module):
        found = convolution(place, shape)
        return found if isinstance(found, Views) else None
    if len(shape) == 2:
        key = place.attribute.rpartition(".")[2]  # in a dict
        return _two_dimensional(module, name, kind, shape) or _two_dimensional(module, key, kind, shape)
    if len(shape) == 3 and (_EXPERTS.search(kind) or re.search("expert", place.name, re.IGNORECASE)):
        return _stack(shape, _experts_are_transposed(place, shape))
    if "Linear" in kind and not isinstance(module, nn.Bilinear) and name.endswith("weight"):
        return _stack(shape)
    return None


def is_convolution(module: nn.Module) -> bool:
    """Convolutions of torch and what derives from them."""
    return isinstance(module, _CONVOLUTIONS)


def is_linear(module: nn.Module) -> bool:
    """Linear layers by type, and look-alikes (quantised, LoRA, Hugging Face's Conv1D) by what they call themselves."""
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind == "Conv1D" or ("Linear" in kind and "weight" in module._parameters)


def _two_dimensional(module: nn.Module, name: str, kind: str, shape: Shape) -> Views | None:
    if kind == "Conv1D":  # Hugging Face's: (inputs, outputs)
        return Views(shape, transposed=True)
    if isinstance(module, nn.Linear) or ("Linear" in kind and name.endswith("weight")) or name.startswith("lora_"):
        return Views(shape)
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return Views(shape)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight"):
        return Views(shape)
    if re.search(r"Router$|Gate$", kind) and name == "weight":
        return Views(shape)
    if _PROJECTION.match(name) and not isinstance(
        module, nn.Embedding
    ):  # `x @ self.proj`, `linear(x, self.proj_weight)`
        return Views(shape, transposed=not name.endswith("weight"))
    return None


def _experts_are_transposed(place: Place, shape: Shape) -> bool:
    """From what the module says of itself, else from where the hidden size stands, its own or the model's."""
    said = getattr(place.module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    rows, columns = shape[-2:]
    if place.tensor == "weight":  # of a module for one projection
        inputs = next((getattr(place.module, name, None) for name in ("in_features", "input_size")), None)
        return rows != columns and inputs == rows
    widths = [getattr(place.module, name, None) for name in _WIDTHS]
    widths += [m.embedding_dim for m in place.root.modules() if isinstance(m, nn.Embedding)]
    hidden = next((width for width in widths if width in (rows, columns)), None)
    if hidden is None or rows == columns:
        return False
    hidden_is_rows = rows == hidden
    return not hidden_is_rows if _DOWN.search(place.tensor) else hidden_is_rows


def input_layer(place: Place) -> str | None:
    """Why a linear layer plays the part of an embedding: it reads patches; None where it does not."""
    names = place.path.split(".")[-2:]
    if not isinstance(place.module, nn.Linear) or not any(_PATCHES.match(name) for name in names):
        return None
    return "linear layer of the input" if _is_first_in(place, _PATCHES) else None


def convolution(place: Place, shape: Shape) -> Views | str | None:
    """The matrices of a convolution, why it has none, or None when the owner is no convolution.

    Filters are rows, flattened over inputs and positions; every group is a matrix of its own. Depthwise filters see one
    channel and are vectors; a layer that reads or makes what is raw (patches, pixels, waveforms) plays the part of an
    embedding or a head.
    """
    module: Any = place.module
    if not is_convolution(module) or len(shape) < 3:
        return None
    if module.groups > 1 and min(module.in_channels, module.out_channels) // module.groups <= 1:
        return "depthwise convolution"
    if module.in_channels <= 4 or _is_first_in(place, _INPUT_NAMES) or _first_layer(place.root) is module:
        return "convolution of the input"
    views = Views(shape, 1, module.groups, isinstance(module, _TRANSPOSED_CONVOLUTIONS))
    if min(views.matrix) <= 1:
        return "one row or column"
    return "convolution of the output" if module.out_channels <= 4 else views


def _is_first_in(place: Place, names: re.Pattern[str]) -> bool:
    """Whether this is the first layer of the nearest module of such a name that contains it, or called so itself."""
    parts = place.path.split(".")
    for depth in range(len(parts), 0, -1):
        if names.match(parts[depth - 1]):
            return _first_layer(_above(place, len(parts) - depth)) is place.module
    return False


def _above(place: Place, levels: int) -> nn.Module:
    """The module so many levels above the owner."""
    module = place.module
    for _ in range(levels):
        module = next(m for m in place.root.modules() if any(child is module for child in m._modules.values()))
    return module


def _first_layer(root: nn.Module) -> nn.Module | None:
    return next((m for m in root.modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear, nn.Embedding))), None)
