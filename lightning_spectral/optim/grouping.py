"""From routes to parameter groups: one per role for a bare model, one per dict for a user who made groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_spectral.optim.members import MIXED, PARALLEL, Group, parallel_lists
from lightning_spectral.optim.routing import ROLES, Route


def group_entries(entry: dict[str, Any]) -> Any:
    """The argument of ``find_owners`` for one group dict."""
    return [entry["params"]] if isinstance(entry["params"], Tensor) else entry["params"]


def single_group(
    entry: dict[str, Any],
    routes: Sequence[Route],
    ratio: Callable[[Route], float],
    algorithms: dict[str, str],
    rest_decay: float,
) -> Group:
    """One group for one dict, whatever roles are in it; its ``weight_decay``, if given, is that of all of them."""
    settings = {key: value for key, value in entry.items() if key not in ("params", *PARALLEL)}
    if "weight_decay" in settings:
        settings.setdefault("fallback_weight_decay", settings["weight_decay"])
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    roles = {one.role for one in routes}
    role = roles.pop() if len(roles) == 1 else MIXED
    if role not in (MIXED, "matrix"):
        settings.setdefault("weight_decay", rest_decay)
    lists = parallel_lists(routes, [ratio(one) for one in routes])
    params = [one.named.param for one in routes]
    return {"algorithm": algorithms.get(role, ""), **settings, "params": params, "role": role, "lr_ratio": 1.0, **lists}


def make_names_unique(groups: Sequence[Group]) -> None:
    """Number parameters of the same name, which modules given one by one have: ``weight``, ``weight#2``; in place."""
    seen: dict[str, int] = {}
    for group in groups:
        for i, name in enumerate(group["param_names"]):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                group["param_names"][i] = f"{name}#{seen[name]}"


def role_groups(
    routes: Sequence[Route],
    ratio: Callable[[Route], float],
    algorithms: dict[str, str],
    weight_decay: float,
    rest_decay: float,
) -> list[Group]:
    """A group per role (and per learning rate ratio, where heads differ in width), named after it."""
    groups: list[Group] = []
    for role in ROLES:
        by_ratio: dict[float, list[Route]] = {}
        for one in routes:
            if one.role == role:
                by_ratio.setdefault(ratio(one), []).append(one)
        for count, (lr_ratio, members) in enumerate(by_ratio.items()):
            decay = weight_decay if role == "matrix" else rest_decay
            groups.append(
                {
                    "params": [one.named.param for one in members],
                    "name": role if count == 0 else f"{role}_{count + 1}",
                    "role": role,
                    "algorithm": algorithms[role],
                    "lr_ratio": lr_ratio,
                    "weight_decay": decay,
                    "fallback_weight_decay": decay,
                    **parallel_lists(members, [1.0] * len(members)),
                }
            )
    return groups
