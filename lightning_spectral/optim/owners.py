"""Whose parameters an optimizer was handed: names, owning modules and logical shapes.

Optimizers are handed a module, ``named_parameters()``, or (litgpt, LightningCLI) a bare ``parameters()`` generator. An
unstarted generator still knows the module it walks; for a list the owners are looked up among the live modules.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

from torch import Tensor, nn

from lightning_spectral.models.placement import Shards
from lightning_spectral.models.places import Place, places_in

REMEDY = (
    "Pass the module itself, `module.named_parameters()`, or an unstarted `module.parameters()` of a live module, "
    "so that embeddings and heads can be told from hidden matrices."
)


@dataclass(frozen=True)
class NamedParameter:
    """A parameter with all the places where the model keeps it (several when weights are tied).

    Attributes:
        param: The parameter as the optimizer will see it: whole, a flat shard (FSDP1) or a DTensor.
        places: At least one.
        shape: Logical shape, whatever is held here.
    """

    param: nn.Parameter
    places: tuple[Place, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.places[0].name


def find_owners(params: Any, shards: Shards | None = None) -> list[NamedParameter]:
    """Resolve whatever an optimizer can be handed to parameters with names and owning modules.

    Args:
        params: A module, ``named_parameters()``, ``parameters()``, or a list of parameters or ``(name, parameter)``.
        shards: What this rank holds; looked up when None.

    Raises:
        ValueError: If nothing is given, or a parameter belongs to no live module.
    """
    if params is None or isinstance(params, (str, int, float)):
        raise TypeError(f"`params` is {params!r}, not a model. {REMEDY}")
    if isinstance(params, type):
        raise TypeError(f"`params` is the class `{params.__name__}`, not a model: make one first. {REMEDY}")
    if callable(params) and not isinstance(params, nn.Module):
        name = getattr(params, "__name__", type(params).__name__)
        raise TypeError(f"`params` is the function `{name}`: call it, `{name}()`. {REMEDY}")
    if isinstance(params, nn.Module):
        return _walk([params], None, (), shards)
    root = _module_behind(params)
    if root is not None:
        return _walk([root], {id(p) for p in params_of(params)}, (), shards)
    given = params_of(params)
    if not given:
        raise ValueError(f"`params` holds no parameter. {REMEDY}")
    return _walk(_live_roots(), {id(p) for p in given}, given, shards)


def find_owners_together(
    entries: Sequence[Any], shards: Shards, beside: Sequence[tuple[Tensor, str]] = ()
) -> list[list[NamedParameter]]:
    """As ``find_owners`` for every entry, with names in the smallest module that holds all of them.

    A group of ``model.lm_head.parameters()`` alone would not tell that it is the head of anything.

    Args:
        entries: What ``find_owners`` takes, each.
        shards: What this rank holds.
        beside: Parameters that have names already, which further ones are to fit.

    Raises:
        ValueError: If an entry is empty, or a parameter belongs to no live module.
    """
    given = [params_of(entry.parameters() if isinstance(entry, nn.Module) else entry) for entry in entries]
    if not all(given):
        raise ValueError(f"`params` holds no parameter. {REMEDY}")
    wanted = {id(param) for params in given for param in params} | {id(param) for param, _ in beside}
    roots = _around(wanted, beside[0] if beside else None)
    return [_walk(roots, {id(p) for p in params}, params, shards) for params in given]


def _around(wanted: set[int], known: tuple[Tensor, str] | None) -> list[nn.Module]:
    """The smallest live module with all of these parameters; the one in which one has its known name, if that is given.

    All live modules where none has them all.
    """
    roots = _live_roots()
    root = next((root for root in roots if wanted <= {id(p) for p in root.parameters()}), None)
    if root is None:
        return roots
    chain = [root]
    while inner := [
        m for m in chain[-1]._modules.values() if m is not None and wanted <= {id(p) for p in m.parameters()}
    ]:
        chain.append(inner[0])
    if known is not None:
        fits = [m for m in chain if any(p is known[0] and place.name == known[1] for p, place in places_in(m))]
        return (fits or chain[-1:])[:1]
    return chain[-1:]


def params_of(params: Iterable[Any]) -> list[Tensor]:
    """The parameters of an iterable of parameters or ``(name, parameter)`` pairs.

    Raises:
        TypeError: If something else is in it.
    """
    found = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    other = next((entry for entry in found if not isinstance(entry, Tensor)), None)
    if other is not None:
        raise TypeError(f"`params` holds {other!r}, which is no parameter. {REMEDY}")
    return found


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


def _walk(
    roots: Iterable[nn.Module], wanted: set[int] | None, order: Sequence[Tensor], shards: Shards | None
) -> list[NamedParameter]:
    """All places of every wanted parameter, in the order given, else in the model's own."""
    places: dict[int, list[Place]] = {}
    found: dict[int, nn.Parameter] = {}
    for root in roots:
        for param, place in places_in(root):
            if wanted is not None and id(param) not in wanted:
                continue
            known = places.setdefault(id(param), [])
            if all(place.module is not other.module or place.attribute != other.attribute for other in known):
                known.append(place)
            found.setdefault(id(param), param)
    orphans = [p for p in order if id(p) not in places]
    if orphans:
        raise ValueError(_orphan_message(orphans, len(order)))
    keys = dict.fromkeys([id(p) for p in order] if order else list(found))
    shards = shards or Shards()
    result = [
        NamedParameter(found[key], tuple(places[key]), shards.of(found[key], places[key][0].name).shape) for key in keys
    ]
    if not result:
        raise ValueError(f"`params` holds no parameter. {REMEDY}")
    return result


def _orphan_message(orphans: Sequence[Tensor], total: int) -> str:
    first = orphans[0]
    flat = all(p.ndim == 1 for p in orphans) and len(orphans) == total
    if flat:
        return (
            f"all {total} parameters are vectors that no module owns (the first has {first.numel()} entries): a flat "
            "partition (DeepSpeed ZeRO, apex, FairScale) has no matrices left to orthogonalise. Use DDP, FSDP, "
            "FSDP2 or ZeRO stage 0, and build the optimizer from the module."
        )
    return (
        f"{len(orphans)} of {total} parameters belong to no live module, the first of shape {tuple(first.shape)}; "
        f"their role would be a guess. {REMEDY}"
    )
