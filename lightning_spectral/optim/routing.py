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

from lightning_spectral.models.layouts import convolution, input_layer, matrices_of
from lightning_spectral.models.places import Place
from lightning_spectral.models.views import Views
from lightning_spectral.optim.heads import Heads
from lightning_spectral.optim.owners import NamedParameter
from lightning_spectral.text.tables import Column, Table

Role = Literal["matrix", "embedding", "head", "vector"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "head", "vector")
TRANSPOSED = "transposed matrix"  # an override only
_COLUMNS = ("role", "tensors", Column("elements", ","), Column("share", ".1%"), "example", "why", "matrices", "rule")

_TABLE = re.compile(  # of bare parameters
    r"embed|pos|token|table|^(A_log|D)$|sinks|probe|latents|quer(y|ies)$|prompt|code(book|vector)|centroid|prototype",
    re.I,
)
_BIAS = re.compile(r"bias(es)?(_|$)")


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

    @property
    def inputs(self) -> int:
        """How many values one output is made of."""
        views = matrices_of(self.named.places[0], self.named.shape)
        return self.named.shape[-1] if views is None else views.matrix[1]


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
    for expression in overrides:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"`roles`: `{expression}` is no regular expression: {error}.") from error
    heads = Heads(named)
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


def _rule(one: NamedParameter, heads: Heads, split: str) -> Route:
    place = one.places[0]
    owner = type(place.module).__name__
    if any(_is_table(place) for place in one.places):
        return Route(one, "embedding", "embedding" if len(one.places) == 1 else "embedding, tied")
    if len(one.shape) < 2:
        return Route(one, "vector", f"{len(one.shape)}-D")
    if _BIAS.search(place.tensor) or place.path.endswith("_bias"):  # also over one-hot positions
        return Route(one, "vector", "bias")
    if len([side for side in one.shape if side > 1]) < 2:
        return Route(one, "vector", "one row or column")
    head = heads.reason(one) if place.tensor.endswith("weight") else None
    if head is not None:
        return Route(one, "head", head)
    excluded = convolution(place, one.shape) or input_layer(place)
    if isinstance(excluded, str):
        return Route(one, "vector", excluded)
    views = matrices_of(place, one.shape, split)
    if views is not None:
        return Route(one, "matrix", owner, views)
    leads = one.shape[0] == 1 and not place.tensor.endswith("weight")  # what is one of a batch
    if leads or _TABLE.search(place.attribute) or "Embedding" in owner:
        return Route(one, "vector", "bare table or state, see `roles`")
    return Route(one, "vector", f"{len(one.shape)}-D of {owner}, see `roles`", certain=False)


def _is_table(place: Place) -> bool:
    module = place.module
    table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__.endswith("Embedding")
    return table or place.tensor == "lora_embedding_A"  # its columns are looked up one at a time


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
