"""Which linear modules beside each other make feed-forward networks: by their widths, and by names where widths tie.

Pure: widths and names in, positions out. Alike experts are asked about once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from lightning_spectral.models.families import is_attention_leaf, is_down_leaf


class Shape(NamedTuple):
    """A linear module as those beside it see it, in the order of definition.

    Attributes:
        place: Position among them.
        leaf: Its name below their common parent, without numbers: ``output`` for ``output.dense``.
        last: Last part of its path.
        num_in: Features of its input.
        num_out: Features of its output.
    """

    place: int
    leaf: str
    last: str
    num_in: int
    num_out: int


class Pair(NamedTuple):
    """One network: positions of its down projection and of its up projections, the gate first."""

    down: int
    ups: tuple[int, ...]


@lru_cache(maxsize=4096)
def networks_of(shapes: tuple[Shape, ...], in_network: bool, residual: int | None) -> tuple[Pair, ...]:
    """The networks among linear modules.

    Args:
        shapes: The modules, in the order of definition.
        in_network: Whether names say that all of them are of a feed-forward network.
        residual: Width that the block returns to, if known.
    """
    free = shapes if in_network else tuple(shape for shape in shapes if not is_attention_leaf(shape.leaf))
    downs = _downs(free, in_network, residual)
    return tuple(
        Pair(down.place, tuple(up.place for up in _ups(down, free, downs[:n], downs[n + 1 :])))
        for n, down in enumerate(downs)
    )


def _downs(free: tuple[Shape, ...], in_network: bool, residual: int | None) -> list[Shape]:
    pairs = [(up, down) for up in free for down in free if _fit(up, down)]
    if not in_network:
        pairs = [pair for pair in pairs if not _feeds_others(*pair, free)]
    wide = [(up, down) for up, down in pairs if down.num_in != down.num_out]
    if wide:
        in_order = [pair for pair in wide if pair[0].place < pair[1].place]
        to_residual = [pair for pair in in_order if pair[1].num_out == residual]
        if not to_residual and _are_called_down([pair for pair in wide if pair[1].num_out == residual], in_order):
            to_residual = [pair for pair in wide if pair[1].num_out == residual]  # files of weights keep no order
        return _unique(down for _, down in to_residual or in_order)
    square = _unique(shape for pair in pairs for shape in pair)
    if len(square) < 2:
        return _unique(down for _, down in pairs)
    fused_up = _unique(down for up, down in pairs if up.num_out == 2 * down.num_in)
    if fused_up:
        return _called_down(fused_up)[-1:]
    if not in_network and len(square) > 3:  # q, k, v and out by other names
        return []
    return _called_down(square)[-1:]


def _are_called_down(pairs: list[tuple[Shape, Shape]], others: list[tuple[Shape, Shape]]) -> bool:
    named, other = ({is_down_leaf(down.leaf) for _, down in both} for both in (pairs, others))
    return named == {True} and True not in other


def _fit(up: Shape, down: Shape) -> bool:
    return up is not down and up.num_in == down.num_out and up.num_out in (down.num_in, 2 * down.num_in)


def _feeds_others(up: Shape, down: Shape, free: tuple[Shape, ...]) -> bool:
    """A state-space mixer reads its inner width with more than the projection out."""
    inner = down.num_in
    return inner != down.num_out and any(
        shape.num_in == inner and shape.num_out != down.num_out for shape in free if shape not in (up, down)
    )


def _ups(down: Shape, free: tuple[Shape, ...], earlier: list[Shape], later: list[Shape]) -> list[Shape]:
    """Up projections of this network: those defined before it (behind the one before it), or behind the last one."""
    after = max((other.place for other in earlier if other.num_in == down.num_in), default=-1)
    ups = [up for up in free if _fit(up, down) and up.place > after and up not in earlier and up not in later]
    if later:
        ups = [up for up in ups if up.place < down.place]
    return sorted(ups, key=lambda up: ("gate" not in up.last or "up" in up.last, up.place))[:2]


def _called_down(shapes: list[Shape]) -> list[Shape]:
    named = [shape for shape in shapes if is_down_leaf(shape.leaf)]
    return named if 0 < len(named) < len(shapes) else shapes


def _unique(shapes: Iterable[Shape]) -> list[Shape]:
    return sorted(set(shapes))
