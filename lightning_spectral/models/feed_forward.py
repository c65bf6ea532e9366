"""The feed-forward networks of one block, by shape and parent.

A feed-forward network is a linear module ``f -> d`` (down) together with one or two ``d -> f`` (up, gate), or one
``d -> 2 f`` (both in one), under their lowest common parent. What attention is made of looks alike where ``f = d``;
only there names decide (:mod:`lightning_spectral.models.families`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_spectral.models.bare_networks import BareNetwork, bare_network, holds_hidden_experts
from lightning_spectral.models.families import is_not_measured, kind_of
from lightning_spectral.models.linears import Linear, is_stacked, widths_of
from lightning_spectral.models.pairs import Shape, networks_of
from lightning_spectral.models.walk import is_program, modules_of

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MIXERS = (nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)
HIDDEN = "keeps its experts where torch cannot see them; load them dequantised (`Mxfp4Config(dequantize=True)`)"
PROGRAM = "is a program of `torch.jit`, in which no hook runs; measure the module that it was made from"
_NUMBER = re.compile(r"(\d+)$")


class FeedForward(NamedTuple):
    """One feed-forward network of a block.

    Attributes:
        unit: Path of the lowest module that holds it, relative to the block.
        down: The down projection, or the bare matrices of a network or of experts.
        ups: Up projections, the gate first.
        expert: Its number among experts, or ``None``.
        routed_by: Path of the module whose input holds all tokens in order, where this network sees some of them only.
    """

    unit: str
    down: Linear | BareNetwork
    ups: tuple[Linear, ...] = ()
    expert: int | None = None
    routed_by: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """What a block is made of.

    Attributes:
        networks: Its feed-forward networks, in the order of definition.
        has_attention: Whether something in it mixes positions, by name or type.
        num_other: Linear modules that belong to no feed-forward network.
        has_norm: Whether it normalises anything.
        opaque: Why a part of it cannot be looked into; empty where all can.
    """

    networks: list[FeedForward]
    has_attention: bool
    num_other: int
    has_norm: bool = False
    opaque: str = ""

    @property
    def is_block(self) -> bool:
        """More than a feed-forward network alone: an expert or a stage of layers is none."""
        return bool(self.networks) and (self.has_attention or self.num_other > 0)


def anatomy(block: nn.Module) -> Anatomy:
    """Take a block apart."""
    norms: Counter[int] = Counter()
    _count_norms(block, norms)
    search = _Search(_residual_width(block, norms))
    left = search.visit(block, "", "")
    return Anatomy(search.networks, search.has_attention, search.num_other + len(left), bool(norms), search.opaque)


class _Search:
    def __init__(self, residual: int | None) -> None:
        self.residual = residual
        self.networks: list[FeedForward] = []
        self.has_attention = False
        self.num_other = 0
        self.opaque = ""

    def visit(self, module: nn.Module, path: str, kind: str) -> list[Linear]:
        """Linear modules below ``module`` that no network has claimed; networks found on the way are kept."""
        found_before = len(self.networks)
        left: list[Linear] = []
        if is_program(module):
            self.opaque = f"{f'`{path}`' if path else 'it'} {PROGRAM}"
            return left
        if kind != "attention":
            self._bare(module, path, kind)
        saved = "modules_to_save" in module._modules  # peft: a trained copy beside the original, which is not called
        for name, child in module._modules.items():
            if child is not None and not is_not_measured(name) and not (saved and name == "original_module"):
                left += self._child(child, name, f"{path}.{name}" if path else name, kind)
        if kind == "attention":
            self.has_attention = True
            self.num_other += len(left)
            return []
        used = self._pair(left, path, kind)
        if used or len(self.networks) > found_before:
            self._mark_experts(module, path, found_before)
            if kind == "feed_forward":  # routers and output gates belong to no other kind
                return []
        return [linear for linear in left if linear.path not in used]

    def _child(self, child: nn.Module, name: str, path: str, kind: str) -> list[Linear]:
        widths = widths_of(child)
        if widths is not None:
            return [Linear(path, child, *widths, is_stacked(child))]
        self.has_attention |= isinstance(child, _MIXERS)
        if isinstance(child, nn.MultiheadAttention):
            return []
        own = kind_of("" if name.isdigit() else name, type(child).__name__)
        if isinstance(child, _CONTAINERS) and own != "attention":
            own = own or kind
        return self.visit(child, path, own or ("attention" if kind == "attention" else ""))

    def _bare(self, module: nn.Module, path: str, kind: str) -> None:
        """The network that a module's own parameters make, if they do."""
        found = bare_network(module, self.residual, path, kind)
        if found is not None:
            self.networks.append(FeedForward(path, found, routed_by=_parent(path) if found.is_routed else None))
        elif holds_hidden_experts(module):
            self.opaque = f"`{path}` ({type(module).__name__}) {HIDDEN}"

    def _pair(self, left: list[Linear], below: str, kind: str) -> set[str]:
        """Claim the networks among these linear modules; the paths of what they use."""
        shapes = [
            Shape(n, _leaf(path, below), path.rpartition(".")[2], num_in, num_out)
            for n, (path, _, num_in, num_out, _) in enumerate(left)
        ]
        used: set[str] = set()
        for pair in networks_of(tuple(shapes), kind == "feed_forward", self.residual):
            down, ups = left[pair.down], tuple([left[n] for n in pair.ups])
            self.networks.append(FeedForward(below, down, ups, routed_by=below if down.is_stacked else None))
            used |= {down.path, *[up.path for up in ups]}
        return used

    def _mark_experts(self, module: nn.Module, path: str, first: int) -> None:
        """Number the networks in a list of experts, and say whose input holds all tokens."""
        for name, child in module._modules.items():
            if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) or len(child) < 2:
                continue
            prefix = f"{path}.{name}." if path else f"{name}."
            inside = [n for n, network in enumerate(self.networks[first:], first) if network.unit.startswith(prefix)]
            routers = [
                child_ for child_ in module._modules.values() if child_ is not None and _routes(child_, len(child))
            ]
            if len(inside) < len(child) or not ("expert" in name.lower() or routers):
                continue
            for n in inside:
                network = self.networks[n]
                member = network.unit.removeprefix(prefix).split(".")[0]
                number = _NUMBER.search(member)
                self.networks[n] = network._replace(expert=int(number[1]) if number else None, routed_by=path)


def _parent(path: str) -> str:
    """Path of the module around; of the block itself where there is none between."""
    return path.rpartition(".")[0]


def _leaf(path: str, below: str) -> str:
    """Name of a linear module as its network sees it: ``output`` for ``output.dense``."""
    relative = path[len(below) + 1 :] if below else path
    if "." not in relative:
        return relative
    return next((part for part in relative.split(".") if not part.isdigit()), relative)


def _routes(module: nn.Module, num_experts: int) -> bool:
    widths = widths_of(module)
    if widths is None:
        return any((inner := widths_of(child)) is not None and inner[1] == num_experts for child in module.children())
    return widths[1] == num_experts


def _residual_width(block: nn.Module, norms: Counter[int]) -> int | None:
    """Width that a block returns to: that of most norms outside attention, else what its linear modules agree on."""
    if norms:
        return norms.most_common(1)[0][0]
    ins: Counter[int] = Counter()
    outs: Counter[int] = Counter()
    for module in modules_of(block):
        widths = widths_of(module)
        if widths is not None:
            ins[widths[0]] += 1
            outs[widths[1]] += 1
    scores = Counter({width: min(ins[width], outs[width]) for width in set(ins) & set(outs)}).most_common(2)
    return scores[0][0] if scores and (len(scores) == 1 or scores[0][1] > scores[1][1]) else None


def _count_norms(module: nn.Module, norms: Counter[int]) -> None:
    for name, child in () if is_program(module) else module._modules.items():
        if child is None or kind_of(name, type(child).__name__) == "attention":
            continue
        width = _norm_width(child)
        if width is not None:
            norms[width] += 1
        else:
            _count_norms(child, norms)


def _norm_width(module: nn.Module) -> int | None:
    if "norm" not in type(module).__name__.lower():
        return None
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1:
        return int(weight.numel())
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, (tuple, list)) and shape else None
