"""Which rule updates which parameter: from the modules that own it, its names and its logical shape, never a guess.

Optimizers are handed a module, ``named_parameters()``, or (litgpt, LightningCLI) a bare ``parameters()`` generator. An
unstarted generator still knows the module it walks; for a list the owners are looked up among the live modules.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_spectral.optim.shards import fsdp1_pieces, piece_of

Role = Literal["matrix", "embedding", "head", "vector"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "head", "vector")

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_original_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_HEAD_NAME = re.compile(r"(^|[._])(lm_head|head|classifier|unembed\w*|to_logits|embed_out|score)$")
_REMEDY = (
    "Pass the module itself, `module.named_parameters()`, or an unstarted `module.parameters()` of a live module, "
    "so that embeddings and heads can be told from hidden matrices."
)


@dataclass(frozen=True)
class Owned:
    """A parameter with all the places where the model keeps it (several when weights are tied).

    Attributes:
        param: The parameter as the optimizer will see it: whole, a flat shard (FSDP1) or a DTensor (FSDP2).
        name: First name, wrapper prefixes removed.
        owners: ``(module path, module, attribute)`` for every place.
        shape: Logical shape, whatever is held here.
    """

    param: nn.Parameter
    name: str
    owners: tuple[tuple[str, nn.Module, str], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why."""

    owned: Owned
    role: Role
    reason: str


def find_owners(params: Any) -> list[Owned]:
    """Resolve whatever an optimizer can be handed to parameters with names and owning modules.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of parameters or ``(name, parameter)``.

    Raises:
        ValueError: If nothing is given, or a parameter belongs to no live module.
    """
    if isinstance(params, nn.Module):
        return _walk([params], None)
    root = _module_behind(params)
    if root is not None:
        return _walk([root], {id(p) for p in params_of(params)})
    given = params_of(params)
    if not given:
        raise ValueError(f"`params` holds no parameter. {_REMEDY}")
    return _walk(_live_roots(), {id(p) for p in given}, given)


def params_of(params: Iterable[Any]) -> list[Tensor]:
    """The parameters of an iterable of parameters or ``(name, parameter)`` pairs."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in params]


def route(owned: Sequence[Owned], overrides: dict[str, str] | None = None) -> list[Route]:
    """Give every parameter a role.

    Args:
        owned: What ``find_owners`` returned.
        overrides: Regular expression searched in the name -> role; the first match wins over every rule here.

    Raises:
        ValueError: If an override names an unknown role, matches nothing, or calls an embedding or a tensor without two
            dimensions a matrix.
    """
    overrides = overrides or {}
    vocabularies = {m.num_embeddings for o in owned for _, m, _ in o.owners if isinstance(m, nn.Embedding)}
    used: set[str] = set()
    routes = []
    for one in owned:
        pattern = next((p for p in overrides if any(re.search(p, name) for name in _names(one))), None)
        if pattern is None:
            role, reason = _rule(one, vocabularies)
        else:
            used.add(pattern)
            role, reason = _checked_override(one, pattern, overrides[pattern])
        routes.append(Route(one, role, reason))
    unused = set(overrides) - used
    if unused:
        raise ValueError(
            f"`roles` has patterns that match no parameter: {sorted(unused)}. Names look like {owned[0].name!r}."
        )
    return routes


def routing_table(routes: Sequence[Route], describe: Callable[[Role], str]) -> str:
    """One line per role and owner kind: how many parameters, an example, the rule and learning rate they get."""
    counted: dict[tuple[str, str], list[Route]] = {}
    for one in routes:
        counted.setdefault((one.role, one.reason), []).append(one)
    lines = [f"{'role':<10}{'tensors':>8}{'elements':>12}  {'example':<34}{'why':<34}rule"]
    for role in ROLES:
        for (of_role, reason), members in counted.items():
            if of_role != role:
                continue
            elements = sum(_elements(member.owned.shape) for member in members)
            example = members[0].owned.name[-33:]
            lines.append(f"{role:<10}{len(members):>8}{elements:>12,}  {example:<34}{reason:<34}{describe(role)}")
    return "\n".join(lines)


def _rule(one: Owned, vocabularies: set[int]) -> tuple[Role, str]:
    kinds = [module for _, module, _ in one.owners]
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or type(m).__name__.endswith("Embedding") for m in kinds):
        return "embedding", "embedding" if len(kinds) == 1 else "embedding, tied"
    if len(one.shape) != 2 or min(one.shape) <= 1:
        return "vector", f"{len(one.shape)}-D" if len(one.shape) != 2 else "one row or column"
    path, owner, attribute = one.owners[0]
    if _is_linear(owner):
        if _HEAD_NAME.search(path):
            return "head", "head by name"
        if one.shape[0] in vocabularies:
            return "head", "as many outputs as tokens"
        return "matrix", type(owner).__name__
    if isinstance(owner, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return "matrix", "MultiheadAttention"
    return "vector", f"2-D of {type(owner).__name__}, see `roles`"


def _is_linear(module: nn.Module) -> bool:
    """Linear layers by type, and look-alikes (quantised, LoRA, HF's Conv1D) by what they call themselves."""
    return isinstance(module, nn.Linear) or "Linear" in type(module).__name__ or type(module).__name__ == "Conv1D"


def _checked_override(one: Owned, pattern: str, role: str) -> tuple[Role, str]:
    if role not in ROLES:
        raise ValueError(f"`roles[{pattern!r}]` must be one of {list(ROLES)}, got {role!r}.")
    if role == "matrix":
        if any(isinstance(m, nn.Embedding) for _, m, _ in one.owners):
            raise ValueError(
                f"`roles[{pattern!r}]` makes the embedding `{one.name}` a matrix: its rows are looked up one at a time "
                "and must not be mixed. Narrow the pattern."
            )
        if len(one.shape) != 2 or min(one.shape) <= 1:
            raise ValueError(
                f"`roles[{pattern!r}]` makes `{one.name}` of shape {one.shape} a matrix: "
                "two dimensions above one are needed."
            )
    return role, f"roles[{pattern}]"  # type: ignore[return-value]


def _module_behind(params: Any) -> nn.Module | None:
    """The module whose ``parameters()`` made this generator, as long as nothing was taken from it."""
    if not isinstance(params, GeneratorType) or inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    root = params.gi_frame.f_locals.get("self") if params.gi_frame is not None else None
    return root if isinstance(root, nn.Module) else None


def _live_roots() -> list[nn.Module]:
    """Every module that no other live module contains. One pass over the heap, about 0.2 s."""
    # type() instead of isinstance(): the heap holds proxies whose __class__ runs code.
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    children = {id(c) for m in modules for c in m.__dict__.get("_modules", {}).values() if c is not None}
    return [m for m in modules if id(m) not in children and "_parameters" in m.__dict__]


def _walk(roots: Iterable[nn.Module], wanted: set[int] | None, order: Sequence[Tensor] = ()) -> list[Owned]:
    """All places of every wanted parameter, in the order given, else in the model's own."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    found: dict[int, nn.Parameter] = {}
    for root in roots:
        for path, module in root.named_modules():
            for attribute, param in module._parameters.items():
                if param is None or (wanted is not None and id(param) not in wanted):
                    continue
                if all(module is not known for _, known, _ in places.get(id(param), [])):
                    places.setdefault(id(param), []).append((_WRAPPERS.sub("", path + ".")[:-1], module, attribute))
                found[id(param)] = param
    orphans = [p for p in order if id(p) not in places]
    if orphans:
        raise ValueError(
            f"{len(orphans)} of {len(order)} parameters belong to no live module, the first of shape "
            f"{tuple(orphans[0].shape)}; their role would be a guess. {_REMEDY}"
        )
    ordered = [id(p) for p in order] if order else list(found)
    flat_views = fsdp1_pieces()
    result = []
    for key in dict.fromkeys(ordered):
        if key in found:
            path, _, attribute = places[key][0]
            name = f"{path}.{attribute}" if path else attribute
            result.append(Owned(found[key], name, tuple(places[key]), piece_of(found[key], flat_views).shape))
    if not result:
        raise ValueError(f"`params` holds no parameter. {_REMEDY}")
    return result


def _names(one: Owned) -> list[str]:
    return [f"{path}.{attribute}" if path else attribute for path, _, attribute in one.owners]


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
