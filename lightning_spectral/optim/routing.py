"""Which rule updates which parameter: from the modules that own it, their kind and their place, never from a number.

A head is known by ownership (``get_output_embeddings()``, a weight tied to an embedding), by its name, or as the last
linear layer of the model, outside the repeated blocks, with as many outputs as the token table has rows. That some
other layer happens to be as wide as a vocabulary or a position table says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lightning_spectral.models.layouts import convolution, is_linear, matrices_of
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.places import Place
from lightning_spectral.models.views import Views
from lightning_spectral.optim.owners import NamedParameter
from lightning_spectral.text.tables import Column, Table

Role = Literal["matrix", "embedding", "head", "vector"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "head", "vector")
TRANSPOSED = "transposed matrix"  # an override only
_COLUMNS = ("role", "tensors", Column("elements", ","), Column("share", ".1%"), "example", "why", "matrices", "rule")

_HEAD = re.compile(
    r"^(lm_heads?|heads?|classifier|unembed\w*|to_logits|logits|embed_out|score|qa_outputs|output_projection|cls"
    r"|codebooks_head|\w+_(lm_head|classifier))$"
)
_TABLE = re.compile(r"embed|pos|token|table|^A_log$|sinks|probe|latents|prompt", re.I)  # of bare parameters
_POSITIONS = re.compile(
    r"(^|[._])(pos\w*|wpe|\w*position\w*|\w*type\w*|seg\w*|time\w*|level\w*)($|[._])", re.IGNORECASE
)


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why.

    Attributes:
        named: The parameter.
        role: ``matrix``, ``embedding``, ``head`` or ``vector``.
        reason: A few words for the table.
        views: Its matrices, for the role ``matrix``.
        certain: Whether the role follows from ownership, kind or the user's word; else it is `vector` for want of one.
    """

    named: NamedParameter
    role: Role
    reason: str
    views: Views | None = None
    certain: bool = True

    @property
    def elements(self) -> int:
        """Entries of the whole parameter."""
        return int(torch.Size(self.named.shape).numel())


def route(named: Sequence[NamedParameter], overrides: dict[str, str] | None = None, split: str = "none") -> list[Route]:
    """Give every parameter a role, and every matrix parameter its views.

    Args:
        named: What ``find_owners`` returned.
        overrides: Regular expression searched in the name -> role; the first match wins over every rule here.
            ``transposed matrix`` is a matrix kept as (inputs, outputs).
        split: See ``layouts.SPLITS``.

    Raises:
        ValueError: If an override names an unknown role, matches nothing, or calls an embedding or a tensor without two
            dimensions a matrix.
    """
    overrides = overrides or {}
    heads = _Heads(named)
    used: set[str] = set()
    routes = []
    for one in named:
        pattern = next((p for p in overrides if any(re.search(p, place.name) for place in one.places)), None)
        if pattern is None:
            routes.append(_rule(one, heads, split))
        else:
            used.add(pattern)
            routes.append(_override(one, pattern, overrides[pattern], split))
    unused = set(overrides) - used
    if unused:
        raise ValueError(
            f"`roles` has patterns that match no parameter: {sorted(unused)}. Names look like {named[0].name!r}."
        )
    return routes


class _Heads:
    """What is known about output layers before single parameters are looked at."""

    def __init__(self, named: Sequence[NamedParameter]) -> None:
        self._owned: set[int] = set()  # weights that the model itself calls its output embeddings
        self._declared: set[int] = set()  # modules inside a model that says what its output embeddings are
        self._vocabularies: dict[int, set[int]] = {}  # id of the root -> rows of its token tables
        self._last: dict[
            tuple[int, str], str
        ] = {}  # (root, path of a module, "" for itself) -> last linear layer in it
        for root in {id(one.places[0].root): one.places[0].root for one in named}.values():
            self._ask(root)
            self._walk(root)

    def _ask(self, root: nn.Module) -> None:
        for module in root.modules():
            ask = getattr(type(module), "get_output_embeddings", None)
            if ask is None:
                continue
            self._declared.update(id(child) for child in module.modules())
            try:
                weight = getattr(ask(module), "weight", None)
            except Exception:  # noqa: S112 - a foreign method; some models have none and say so by raising
                continue
            if weight is not None:
                self._owned.add(id(weight))

    def _walk(self, root: nn.Module) -> None:
        for raw, module in root.named_modules(remove_duplicate=False):
            path = clean_name(raw)
            if isinstance(module, nn.Embedding) and not _POSITIONS.search(path):
                self._vocabularies.setdefault(id(root), set()).add(module.num_embeddings)
            if is_linear(module):
                parts = path.split(".")
                for depth in range(len(parts)):
                    self._last[id(root), ".".join(parts[:depth])] = path

    def reason(self, one: NamedParameter) -> str | None:
        """Why this matrix is a head; None when it is none."""
        if id(one.param) in self._owned:
            return "output embeddings"
        place = one.places[0]
        root = id(place.root)
        as_wide = one.shape[0] in self._vocabularies.get(root, set())
        if any(self._is_named_head(each, as_wide) for each in one.places):
            return "head by name"
        is_last = self._last.get((root, "")) == place.path
        if is_last and as_wide and not place.in_block and id(place.module) not in self._declared:
            return "last layer, as wide as the tokens"
        return None

    def _is_named_head(self, place: Place, as_wide: bool) -> bool:
        """A layer called a head, or the last layer right inside something called so.

        Inside a repeated block (multi-token prediction) it must also be as wide as the token table.
        """
        parent, _, last = place.path.rpartition(".")
        container = parent.rpartition(".")[2]
        if _HEAD.match(last) and not place.module._modules:
            return as_wide or not place.in_block
        if place.in_block or not _HEAD.match(container) or self._last.get((id(place.root), parent)) != place.path:
            return False
        # what is inside a `head` may also be a last transformation before a decoder that stands elsewhere
        return container not in ("head", "heads") or self._last.get((id(place.root), "")) == place.path


def _rule(one: NamedParameter, heads: _Heads, split: str) -> Route:
    kinds = [place.module for place in one.places]
    if any(_is_table(place) for place in one.places):
        return Route(one, "embedding", "embedding" if len(kinds) == 1 else "embedding, tied")
    if len(one.shape) < 2:
        return Route(one, "vector", f"{len(one.shape)}-D")
    if re.search(r"bias(_|$)", one.places[0].attribute):
        return Route(one, "vector", "bias")
    head = heads.reason(one) if one.places[0].attribute.endswith("weight") else None
    if head is not None and min(one.shape) > 1:
        return Route(one, "head", head)
    excluded = convolution(one.places[0], one.shape)
    if isinstance(excluded, str):
        return Route(one, "vector", excluded)
    views = matrices_of(one.places[0], one.shape, split)
    if views is None:
        thin = len([side for side in one.shape if side > 1]) < 2
        if thin or _TABLE.search(one.places[0].attribute):
            return Route(one, "vector", "one row or column" if thin else "bare table or state, see `roles`")
        return Route(one, "vector", f"{len(one.shape)}-D of {type(kinds[0]).__name__}, see `roles`", certain=False)
    return Route(one, "matrix", type(kinds[0]).__name__, views)


def _is_table(place: Place) -> bool:
    module = place.module
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__.endswith("Embedding")


def _override(one: NamedParameter, pattern: str, role: str, split: str) -> Route:
    reason = f"roles[{pattern}]"
    if role not in (*ROLES, TRANSPOSED):
        raise ValueError(f"`roles[{pattern!r}]` must be one of {[*ROLES, TRANSPOSED]}, got {role!r}.")
    if role not in ("matrix", TRANSPOSED):
        return Route(one, role, reason)  # type: ignore[arg-type]
    if any(isinstance(place.module, nn.Embedding) for place in one.places):
        raise ValueError(
            f"`roles[{pattern!r}]` makes the embedding `{one.name}` a matrix: its rows are looked up one at a time "
            "and must not be mixed. Narrow the pattern."
        )
    if len([side for side in one.shape if side > 1]) < 2:
        raise ValueError(
            f"`roles[{pattern!r}]` makes `{one.name}` of shape {one.shape} a matrix: "
            "two dimensions above one are needed."
        )
    views = matrices_of(one.places[0], one.shape, split) if role == "matrix" else None
    if views is None:
        leading = max(1, len(one.shape) - 1)
        stack = int(torch.Size(one.shape[:-2]).numel())
        views = Views(one.shape, leading, stack, transposed=role == TRANSPOSED)
    return Route(one, "matrix", reason, views)


def share_under_rule(routes: Sequence[Route]) -> float:
    """Share of the matrix elements that a matrix rule gets, leaving out what is certainly something else."""
    under = sum(one.elements for one in routes if one.role == "matrix")
    doubtful = sum(one.elements for one in routes if one.role != "matrix" and not one.certain)
    return 1.0 if under + doubtful == 0 else under / (under + doubtful)


def routing_table(routes: Sequence[Route], describe: Callable[[Route], str]) -> Table:
    """One row per role, kind of owner and shape of matrix: how many, their share, an example, why, the rule.

    Args:
        routes: What ``route`` returned.
        describe: Route -> the rule and learning rate it gets.
    """
    counted: dict[tuple[str, str, str], list[Route]] = {}
    for one in routes:
        label = "" if one.views is None else one.views.label
        counted.setdefault((one.role, one.reason, label), []).append(one)
    total = max(1, sum(one.elements for one in routes))
    rows = []
    for (role, reason, label), members in sorted(counted.items(), key=lambda item: ROLES.index(item[0][0])):
        elements = sum(member.elements for member in members)
        example = members[0].named.name
        rows.append([role, len(members), elements, elements / total, example, reason, label, describe(members[0])])
    return Table(_COLUMNS, rows)
