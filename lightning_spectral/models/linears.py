"""Modules that multiply by a matrix, whoever wrote them: torch, Hugging Face's ``Conv1D``, LoRA, quantised ones.

Axes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import nn

# How libraries spell the two widths: torch and bitsandbytes, Conv1D, GPTQ, Megatron, torchtune's LoRA.
_SPELLINGS = (
    ("in_features", "out_features"),
    ("nx", "nf"),
    ("infeatures", "outfeatures"),
    ("input_size", "output_size"),
    ("in_dim", "out_dim"),
)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


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


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """Experts whose matrices are 3-D parameters of one module.

    Attributes:
        path: Path of the module.
        module: The module.
        down: Name of the parameter of all down projections.
        ups: Names of those of the up projections, the gate first.
        width: Features between them.
    """

    path: str
    module: nn.Module
    down: str
    ups: tuple[str, ...]
    width: int


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of a module that multiplies by a matrix, or ``None``."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    for name in _WRAPPED:
        if name in module._modules:
            return widths_of(module._modules[name])  # type: ignore[arg-type]
    if isinstance(module, (*_CONVOLUTIONS, nn.RNNBase, nn.Bilinear, nn.Embedding)):
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


def fused_experts(module: nn.Module, residual: int | None = None) -> tuple[str, tuple[str, ...], int] | None:
    """The down projections, the up projections and the width of a module that keeps experts as 3-D parameters.

    The down projection is the parameter that maps to the residual width; where shapes do not tell, the one that is
    called so, else the last one.
    """
    if isinstance(module, _CONVOLUTIONS):
        return None
    stacks = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    if len(stacks) < 2 or len({shape[0] for shape in stacks.values()}) != 1 or next(iter(stacks.values()))[0] < 2:
        return None
    down = _fused_down(stacks, residual)
    if down is None:
        return None
    ups = tuple(sorted((name for name in stacks if name != down), key=lambda name: not _is_gate(name)))
    sides = set(stacks[down][1:])
    shared = sides & set(stacks[ups[0]][1:]) - ({residual} if residual and sides != {residual} else set())
    width = _fused_width(stacks[down], stacks[ups[0]], residual)
    return (down, ups, width) if shared or width else None


def _fused_width(down: tuple[int, ...], up: tuple[int, ...], residual: int | None) -> int:
    """The side of the down projection that an up projection makes: once, or twice where gate and up are one."""
    first, second = down[1:]
    if residual is not None and residual in down[1:]:
        return second if first == residual else first
    twice = [side for side in (first, second) if 2 * side in up[1:]]
    if len(twice) == 1:
        return twice[0]
    return first if second in up[1:] and first not in up[1:] else min(first, second)


def _fused_down(stacks: dict[str, tuple[int, ...]], residual: int | None) -> str | None:
    called_so = [name for name in stacks if _is_down(name)]
    if len(called_so) == 1:
        return called_so[0]
    shapes = list(stacks.values())
    alone = [name for name, shape in stacks.items() if shapes.count(shape) == 1]
    if len(stacks) > 2 and len(alone) == 1:
        return alone[0]
    smallest = min(shape[1] * shape[2] for shape in shapes)
    small = [name for name, shape in stacks.items() if shape[1] * shape[2] == smallest]
    if len(small) == 1 and 2 * smallest in {shape[1] * shape[2] for shape in shapes}:
        return small[0]
    return list(stacks)[-1]


def _is_down(name: str) -> bool:
    lowered = name.lower()
    return "down" in lowered or "out" in lowered or lowered in {"w2", "fc2", "wo", "weight2"}


def _is_gate(name: str) -> bool:
    return "gate" in name.lower()


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
