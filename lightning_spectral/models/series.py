"""Lists of repeated blocks in a model: a decoder's layers, an encoder's, the stages of a vision tower.

A list is a ``ModuleList``, ``Sequential`` or ``ModuleDict`` whose members are numbered, or numbered attributes of one
class (``block1``, ``block2``). Where members of a list are stages with lists of whole blocks, the inner lists count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from lightning_spectral.models.bare_networks import bare_network, holds_hidden_experts, num_experts
from lightning_spectral.models.feed_forward import Anatomy, anatomy
from lightning_spectral.models.linears import widths_of
from lightning_spectral.models.names import clean_name, unwrapped
from lightning_spectral.models.walk import is_program

_NUMBER = re.compile(r"\d+$")
_NOT_TAKEN_APART = Anatomy([], False, 0)


@dataclass(frozen=True, slots=True)
class Block:
    """One member of a list.

    Attributes:
        path: Its path, wrapper prefixes removed.
        index: Depth at which it occurs first.
        module: The member.
        anatomy: What it is made of.
    """

    path: str
    index: int
    module: nn.Module
    anatomy: Anatomy = _NOT_TAKEN_APART


@dataclass(frozen=True)
class Series:
    """One list.

    Attributes:
        path: Its path, wrapper prefixes removed.
        blocks: Its distinct members.
        depth: Members, a shared one counted as often as it occurs.
    """

    path: str
    blocks: tuple[Block, ...]
    depth: int


def all_series(model: nn.Module) -> list[Series]:
    """Every list of blocks in which a feed-forward network was recognised, in the order of definition.

    Lists of feed-forward networks and nothing else (prediction heads) count only where the model has no other list.
    """
    search = _Search(model)
    found = [series for series in search.lists(model, "") if search.has_networks(series)]
    return [search.with_anatomy(series) for series in [s for s in found if search.mixes(s)] or found]


class _Search:
    """One walk through a model; what was learnt about a module is kept by identity."""

    def __init__(self, model: nn.Module) -> None:
        self._sizes: dict[int, int] = {}
        self._holds_lists: set[int] = set()
        self._anatomies: dict[int, Anatomy] = {}
        self._seen: set[int] = set()
        self._size(model)

    def has_networks(self, series: Series) -> bool:
        """Whether any member holds a feed-forward network."""
        return any(self._anatomy(block.module).networks for block in series.blocks)

    def mixes(self, series: Series) -> bool:
        """Whether any member holds more than that; a head may have layers in front and behind, but no norm."""
        parts = [self._anatomy(block.module) for block in series.blocks]
        return any(part.has_attention or (part.num_other and part.has_norm) for part in parts)

    def with_anatomy(self, series: Series) -> Series:
        """The same list with what was learnt about its members."""
        blocks = tuple(replace(block, anatomy=self._anatomy(block.module)) for block in series.blocks)
        return replace(series, blocks=blocks)

    def lists(self, module: nn.Module, path: str) -> Iterator[Series]:
        """The outermost lists below a module, or those inside their members where these are stages."""
        if id(module) in self._seen or is_program(module):
            return
        self._seen.add(id(module))
        series, others = self._split(module, path)
        for row in series:
            inner = [found for block in row.blocks for found in self._stages(block)]
            if inner:
                yield from inner
            else:
                yield row
        for name, child in others:
            yield from self.lists(child, _join(path, name))

    def _stages(self, block: Block) -> list[Series]:
        """Lists of whole blocks inside a member."""
        if id(block.module) not in self._holds_lists:
            return []
        found = [series for series in self.lists(block.module, block.path) if self.has_networks(series)]
        whole = all(self._anatomy(inner.module).is_block for series in found for inner in series.blocks)
        return found if whole else []

    def _split(self, module: nn.Module, path: str) -> tuple[list[Series], list[tuple[str, nn.Module]]]:
        """The lists that a module's children make, and the children that are in none."""
        numbered = self._numbered(module)
        series: list[Series] = []
        taken: set[str] = set()
        for stem, members in numbered.items():
            whole = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and len(numbered) == 1
            name = "" if whole or not stem else f"{stem}*"
            series.append(_series(_join(path, name), path, members))
            taken |= {member for member, _ in members}
        children = module._modules.items()
        others = [(name, child) for name, child in children if child is not None and name not in taken]
        return series, [(name, child) for name, child in others if self._sizes.get(id(child), 0) >= 2]

    def _numbered(self, module: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
        """Children whose names differ in a number only, by what is left of the name."""
        groups: dict[str, list[tuple[str, nn.Module]]] = {}
        for name, child in module._modules.items():
            if child is None or not name[-1:].isdigit() or self._sizes.get(id(child), 0) < 2:
                continue
            if widths_of(child) is None:
                groups.setdefault(_NUMBER.sub("", name), []).append((name, child))
        in_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        return {stem: members for stem, members in groups.items() if in_list or _alike(members)}

    def _size(self, module: nn.Module) -> int:
        """Linear modules in a module, fused experts counted as two; notes on the way who holds numbered children."""
        known = self._sizes.get(id(module))
        if known is not None:
            return known
        if is_program(module) or widths_of(module) is not None:
            self._sizes[id(module)] = 1 + is_program(module)  # of a program it is not seen what it holds
            return self._sizes[id(module)]
        children = [child for child in module._modules.values() if child is not None]
        size = sum([self._size(child) for child in children])
        own = module._parameters or module._buffers or num_experts(module) is not None
        size += 2 * bool(own and (bare_network(module) is not None or holds_hidden_experts(module)))
        self._sizes[id(module)] = size
        if any(id(child) in self._holds_lists for child in children) or (size > 1 and self._numbered(module)):
            self._holds_lists.add(id(module))
        return size

    def _anatomy(self, block: nn.Module) -> Anatomy:
        if id(block) not in self._anatomies:
            self._anatomies[id(block)] = anatomy(block)
        return self._anatomies[id(block)]


def _alike(members: list[tuple[str, nn.Module]]) -> bool:
    return len(members) > 1 and len({type(unwrapped(child)) for _, child in members}) == 1


def _series(path: str, parent: str, members: list[tuple[str, nn.Module]]) -> Series:
    numbers = [int(match[0]) for name, _ in members if (match := _NUMBER.search(name))]
    indices = numbers if len(set(numbers)) == len(members) else list(range(len(members)))
    blocks: dict[int, Block] = {}
    for (name, child), index in zip(members, indices, strict=True):
        blocks.setdefault(id(child), Block(clean_name(_join(parent, name)), index, child))
    return Series(clean_name(path), tuple(blocks.values()), len(members))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
