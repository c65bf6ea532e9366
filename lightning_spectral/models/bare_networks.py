"""Feed-forward networks whose matrices are bare parameters of one module: experts as one tensor, matrices by hand.

A parameter holds one matrix (2-D), a matrix for each expert (3-D), those of all experts one below another (2-D, DBRX)
or packed numbers of fewer bits (MXFP4: 4-D blocks). Shapes tell which one maps back to the residual width; where they
do not, names do.

Axes: E experts, G groups of packed numbers, B bytes of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_spectral.models.families import is_down_leaf, is_not_measured, kind_of

_OTHERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.Bilinear, nn.Embedding)
_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_NUM_EXPERTS = (
    "num_experts",
    "moe_num_experts",
    "num_local_experts",
    "n_experts",
    "n_routed_experts",
    "experts_per_rank",
)


@dataclass(frozen=True, slots=True)
class BareNetwork:
    """A network, or the experts of a mixture, whose matrices are parameters of one module.

    Attributes:
        path: Path of the module, relative to whatever was searched.
        module: The module.
        down: Name of the parameter of all down projections.
        ups: Names of those of the up projections, the gate first.
        width: Features between them; ``None`` where shapes do not tell.
        is_routed: Whether it holds experts, which see some tokens only.
        matrices: Parameter, input and output width of the down and the first up projection; empty where widths do not
            tell the two apart.
    """

    path: str
    module: nn.Module
    down: str
    ups: tuple[str, ...]
    width: int | None
    is_routed: bool = True
    matrices: tuple[tuple[str, int, int], ...] = ()


def bare_network(module: nn.Module, residual: int | None = None, path: str = "", kind: str = "") -> BareNetwork | None:
    """The network that the parameters of a module make, or ``None``.

    Args:
        module: Its parameters, not those of modules inside it, are looked at.
        residual: Width that the block returns to, if known.
        path: What the result is called.
        kind: ``feed_forward`` where names around the module say so; matrices that are 2-D are a network only then, or
            where the module's class says so.
    """
    if isinstance(module, _OTHERS) or len(module._parameters) + len(module._buffers) < 2:
        return None
    return (
        _packed(module, residual, path)
        or _of_experts(module, residual, path)
        or _of_matrices(module, residual, path, kind)
    )


def holds_hidden_experts(module: nn.Module) -> bool:
    """Whether a module says that it holds experts, and neither matrices nor modules of them can be seen in it."""
    return num_experts(module) is not None and not module._modules and bare_network(module) is None


def num_experts(module: nn.Module) -> int | None:
    """Experts that a module says it holds."""
    own = module.__dict__
    return next((own[name] for name in _NUM_EXPERTS if isinstance(own.get(name), int) and own[name] > 1), None)


def _of_experts(module: nn.Module, residual: int | None, path: str) -> BareNetwork | None:
    """3-D parameters: a matrix for each expert.

    The down projection is the parameter that maps to the residual width; where shapes do not tell, the one that is
    called so, else the last one.
    """
    stacks = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    if len(stacks) < 2 or len({shape[0] for shape in stacks.values()}) != 1 or next(iter(stacks.values()))[0] < 2:
        return None
    down = _down_of(stacks, residual)
    ups = tuple(sorted((name for name in stacks if name != down), key=lambda name: not _is_gate(name)))
    sides = set(stacks[down][1:])
    shared = sides & set(stacks[ups[0]][1:]) - ({residual} if residual and sides != {residual} else set())
    width = _width_of(stacks[down], stacks[ups[0]], residual)
    matrices = _matrices({name: (first, second) for name, (_, first, second) in stacks.items()}, down, ups[0], width)
    return BareNetwork(path, module, down, ups, width, matrices=matrices) if shared or width else None


def _of_matrices(module: nn.Module, residual: int | None, path: str, kind: str) -> BareNetwork | None:
    """2-D parameters: one network, or experts one below another."""
    found = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 2}
    downs = [name for name in found if is_down_leaf(name)]
    named = kind == "feed_forward" or kind_of("", type(module).__name__) == "feed_forward"
    plain = all(p.dtype in _NUMBERS and not is_not_measured(name) for name, p in found.items())
    if not (named and plain and len(downs) == 1 and 2 <= len(found) <= 3):
        return None
    experts = num_experts(module)
    flat = experts is not None and all(p.shape[0] % experts == 0 for p in found.values())
    shapes = {name: (p.shape[0] // (experts or 1) if flat else p.shape[0], p.shape[1]) for name, p in found.items()}
    down, ups = downs[0], sorted((name for name in found if name != downs[0]), key=lambda name: not _is_gate(name))
    back = residual if residual in shapes[down] else min(shapes[down])
    width = _other_side(shapes[down], back)
    up_widths = [_other_side(shapes[name], back) for name in ups]
    if width is None or any(up not in (width, 2 * width) for up in up_widths):
        return None
    return BareNetwork(path, module, down, tuple(ups), width, flat, _matrices(shapes, down, ups[0], width))


def _other_side(shape: tuple[int, int], back: int | None) -> int | None:
    """The side of a matrix that is not the residual width; ``None`` where neither is."""
    first, second = shape
    return second if first == back else first if second == back else None


def packed_matrices(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """``(E, in, out)`` of the matrices that parameters or buffers of fewer bits hold, by name; scales do not count.

    Blocks are ``(E, out, G, B)``, two numbers per byte; numbers of 8 bits ``(E, out, in)``.
    """
    tensors = {**module._parameters, **module._buffers}
    shapes = {name: _unpacked_shape(name, tensor) for name, tensor in tensors.items() if tensor is not None}
    found = {name: shape for name, shape in shapes.items() if shape is not None}
    return found if len(found) > 1 and len({experts for experts, _, _ in found.values()}) == 1 else {}


def _packed(module: nn.Module, residual: int | None, path: str) -> BareNetwork | None:
    stacks = packed_matrices(module)
    if not stacks:
        return None
    down = _down_of(stacks, residual)
    ups = tuple(sorted((name for name in stacks if name != down), key=lambda name: not _is_gate(name)))
    matrices = tuple((name, *stacks[name][1:]) for name in (down, ups[0]))
    return BareNetwork(path, module, down, ups, stacks[down][1], matrices=matrices)


def _unpacked_shape(name: str, tensor: Tensor) -> tuple[int, int, int] | None:
    if tensor.dtype in _NUMBERS or "scale" in name or "zero" in name or len(tensor.shape) < 3 or tensor.shape[0] < 2:
        return None
    if tensor.ndim == 4 and tensor.dtype == torch.uint8:
        return tensor.shape[0], 2 * math.prod(tensor.shape[2:]), tensor.shape[1]
    one_byte = tensor.ndim == 3 and tensor.element_size() == 1 and tensor.dtype != torch.uint8
    return (tensor.shape[0], tensor.shape[2], tensor.shape[1]) if one_byte else None


def _width_of(down: tuple[int, ...], up: tuple[int, ...], residual: int | None) -> int | None:
    """The side of the down projection that an up projection makes: once, or twice where gate and up are one.

    ``None`` where either side could be: then the first rows tell.
    """
    first, second = down[1:]
    if residual is not None and residual in down[1:]:
        return second if first == residual else first
    sides = ((first, second), (second, first))  # the width and the residual width, or the other way round
    fitting = {width for width, back in sides for made in (width, 2 * width) if sorted(up[1:]) == sorted((made, back))}
    if fitting:
        return fitting.pop() if len(fitting) == 1 else None
    return first if second in up[1:] and first not in up[1:] else min(first, second)


def _matrices(
    shapes: Mapping[str, tuple[int, int]], down: str, up: str, width: int | None
) -> tuple[tuple[str, int, int], ...]:
    back = _other_side(shapes[down], width)
    up_width = None if back is None else _other_side(shapes[up], back)
    if width is None or back is None or up_width is None or (width, back) == (back, up_width):
        return ()
    return (down, width, back), (up, back, up_width)


def _down_of(stacks: Mapping[str, tuple[int, ...]], residual: int | None) -> str:
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
