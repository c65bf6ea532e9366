"""The feed-forward networks of one block, by shape and parent.

A feed-forward network is a linear module ``f -> d`` (down) together with one or two ``d -> f`` (up, gate), or one
``d -> 2 f`` (both in one), under their lowest common parent. What attention is made of looks alike where ``f = d``;
only there names decide (:mod:`lightning_spectral.models.families`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from lightning_spectral.models.families import is_attention_leaf, is_down_leaf, is_not_measured, kind_of
from lightning_spectral.models.linears import FusedExperts, Linear, fused_experts, is_stacked, widths_of

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MIXERS = (nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)
_NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network of a block.

    Attributes:
        unit: Path of the lowest module that holds it, relative to the block.
        down: The down projection, or fused experts.
        ups: Up projections, the gate first.
        expert: Its number among experts, or ``None``.
        routed_by: Path of the module whose input holds all tokens in order, where this network sees some of them only.
    """

    unit: str
    down: Linear | FusedExperts
    ups: tuple[Linear, ...] = ()
    expert: int | None = None
    routed_by: str | None = None


@dataclass
class Anatomy:
    """What a block is made of.

    Attributes:
        networks: Its feed-forward networks, in the order of definition.
        has_attention: Whether something in it mixes positions, by name or type.
        num_other: Linear modules that belong to no feed-forward network.
    """

    networks: list[FeedForward]
    has_attention: bool
    num_other: int

    @property
    def is_block(self) -> bool:
        """More than a feed-forward network alone: an expert or a stage of layers is none."""
        return bool(self.networks) and (self.has_attention or self.num_other > 0)


def anatomy(block: nn.Module) -> Anatomy:
    """Take a block apart."""
    search = _Search(_residual_width(block))
    left = search.visit(block, "", "")
    return Anatomy(search.networks, search.has_attention, search.num_other + len(left))


class _Search:
    def __init__(self, residual: int | None) -> None:
        self.residual = residual
        self.networks: list[FeedForward] = []
        self.has_attention = False
        self.num_other = 0
        self._order = 0

    def visit(self, module: nn.Module, path: str, kind: str) -> list[Linear]:
        """Linear modules below ``module`` that no network has claimed; networks found on the way are kept."""
        found_before = len(self.networks)
        left: list[Linear] = []
        self._fused(module, path)
        for name, child in module._modules.items():
            if child is not None and not is_not_measured(name):
                left += self._child(child, name, f"{path}.{name}" if path else name, kind)
        if kind == "attention":
            self.has_attention = True
            self.num_other += len(left)
            return []
        used = self._pair(left, path, kind)
        if used or len(self.networks) > found_before:
            self._mark_experts(module, path, found_before)
            if kind == "feed_forward":  # routers and output gates are nobody else's
                return []
        return [linear for linear in left if linear.path not in used]

    def _child(self, child: nn.Module, name: str, path: str, kind: str) -> list[Linear]:
        widths = widths_of(child)
        if widths is not None:
            self._order += 1
            return [Linear(path, child, *widths, self._order, is_stacked(child))]
        self.has_attention |= isinstance(child, _MIXERS)
        if isinstance(child, nn.MultiheadAttention):
            return []
        own = kind_of("" if name.isdigit() else name, type(child).__name__)
        if isinstance(child, _CONTAINERS) and own != "attention":
            own = own or kind
        return self.visit(child, path, own or ("attention" if kind == "attention" else ""))

    def _fused(self, module: nn.Module, path: str) -> None:
        found = fused_experts(module, self.residual)
        if found is None:
            return
        self._order += 1
        self.networks.append(
            FeedForward(path, FusedExperts(path, module, *found, self._order), routed_by=_parent(path))
        )

    def _pair(self, left: list[Linear], path: str, kind: str) -> set[str]:
        """Claim the networks among these linear modules; the paths of what they use."""
        free = (
            left
            if kind == "feed_forward"
            else [linear for linear in left if not is_attention_leaf(_leaf(linear, path))]
        )
        downs = self._downs(free, path, kind)
        used: set[str] = set()
        for index, down in enumerate(downs):
            ups = _ups(down, free, downs[:index], downs[index + 1 :])
            routed = path if down.is_stacked else None
            self.networks.append(FeedForward(path, down, tuple(ups), routed_by=routed))
            used |= {down.path, *(up.path for up in ups)}
        return used

    def _downs(self, free: list[Linear], path: str, kind: str) -> list[Linear]:
        pairs = [(up, down) for up in free for down in free if _fit(up, down)]
        if kind != "feed_forward":
            pairs = [pair for pair in pairs if not _feeds_others(*pair, free)]
        wide = [(up, down) for up, down in pairs if down.num_in != down.num_out]
        if wide:
            wide = [pair for pair in wide if pair[0].order < pair[1].order]
            to_residual = [pair for pair in wide if pair[1].num_out == self.residual]
            return _unique(down for _, down in to_residual or wide)
        square = _unique(linear for pair in pairs for linear in pair)
        if len(square) < 2:
            return _unique(down for _, down in pairs)
        fused_up = _unique(down for up, down in pairs if up.num_out == 2 * down.num_in)
        if fused_up:
            return _called_down(fused_up, path)[-1:]
        if kind != "feed_forward" and len(square) > 3:  # q, k, v and out by other names
            return []
        return _called_down(square, path)[-1:]

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
                self.networks[n] = FeedForward(
                    network.unit, network.down, network.ups, int(number[1]) if number else None, path
                )


def _parent(path: str) -> str:
    """Path of the module around; of the block itself where there is none between."""
    return path.rpartition(".")[0]


def _fit(up: Linear, down: Linear) -> bool:
    return up is not down and up.num_in == down.num_out and up.num_out in (down.num_in, 2 * down.num_in)


def _feeds_others(up: Linear, down: Linear, free: list[Linear]) -> bool:
    """A state-space mixer reads its inner width with more than the projection out."""
    inner = down.num_in
    return inner != down.num_out and any(
        linear.num_in == inner and linear.num_out != down.num_out for linear in free if linear not in (up, down)
    )


def _ups(down: Linear, free: list[Linear], earlier: list[Linear], later: list[Linear]) -> list[Linear]:
    """Up projections of this network: those defined before it (behind the one before it), or behind the last one."""
    after = max((other.order for other in earlier if other.num_in == down.num_in), default=-1)
    ups = [up for up in free if _fit(up, down) and up.order > after and up not in earlier and up not in later]
    if later:
        ups = [up for up in ups if up.order < down.order]
    return sorted(ups, key=lambda up: ("gate" not in up.path.rpartition(".")[2] or "up" in up.path, up.order))[:2]


def _called_down(linears: list[Linear], path: str) -> list[Linear]:
    named = [linear for linear in linears if is_down_leaf(_leaf(linear, path))]
    return named if 0 < len(named) < len(linears) else linears


def _leaf(linear: Linear, path: str) -> str:
    """Name of a linear module as its network sees it: ``output`` for ``output.dense``."""
    relative = linear.path[len(path) + 1 :] if path else linear.path
    parts = [part for part in relative.split(".") if not part.isdigit()]
    return parts[0] if parts else relative


def _routes(module: nn.Module, num_experts: int) -> bool:
    widths = widths_of(module)
    if widths is None:
        return any((inner := widths_of(child)) is not None and inner[1] == num_experts for child in module.children())
    return widths[1] == num_experts


def _residual_width(block: nn.Module) -> int | None:
    """Width that a block returns to: that of most norms outside attention, else what its linear modules agree on."""
    norms: Counter[int] = Counter()
    _count_norms(block, norms)
    if norms:
        return norms.most_common(1)[0][0]
    ins: Counter[int] = Counter()
    outs: Counter[int] = Counter()
    for module in block.modules():
        widths = widths_of(module)
        if widths is not None:
            ins[widths[0]] += 1
            outs[widths[1]] += 1
    scores = Counter({width: min(ins[width], outs[width]) for width in set(ins) & set(outs)}).most_common(2)
    return scores[0][0] if scores and (len(scores) == 1 or scores[0][1] > scores[1][1]) else None


def _count_norms(module: nn.Module, norms: Counter[int]) -> None:
    for name, child in module._modules.items():
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


def _unique(linears: object) -> list[Linear]:
    kept: dict[str, Linear] = {}
    for linear in linears:  # type: ignore[attr-defined]
        kept.setdefault(linear.path, linear)
    return sorted(kept.values(), key=lambda linear: linear.order)
