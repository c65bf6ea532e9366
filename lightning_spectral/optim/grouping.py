"""From parameters to groups: one per role for a bare model, one per dict for a user who made groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_spectral.models.placement import Shards
from lightning_spectral.optim.members import MIXED, PARALLEL, Group, parallel_lists
from lightning_spectral.optim.owners import NamedParameter, find_owners, find_owners_together
from lightning_spectral.optim.routing import ROLES, Route, route
from lightning_spectral.optim.settings import HEAD_LR_SCALES, CommonSettings, check_group
from lightning_spectral.text import did_you_mean


@dataclass(frozen=True)
class Grouping:
    """How one optimizer divides parameters into groups.

    Attributes:
        algorithm: Rule of hidden matrices.
        settings: Of the optimizer.
        fallback_ratio: Learning rate of everything else over that of hidden matrices.
    """

    algorithm: str
    settings: CommonSettings
    fallback_ratio: float

    @property
    def fallback(self) -> str:
        """Rule of what is not a hidden matrix."""
        return str(getattr(self.settings, "fallback", "adamw"))

    @property
    def rest_decay(self) -> float:
        """Weight decay of what is not a hidden matrix."""
        decay = self.settings.fallback_weight_decay
        return self.settings.weight_decay if decay is None else decay

    def groups(self, params: Any, shards: Shards) -> tuple[list[Group], list[Route]]:
        """Groups and routes of whatever an optimizer can be handed; roles are found with all of it in view.

        Raises:
            ValueError: If a parameter's role cannot be known, or a group has a setting that cannot be honoured.
        """
        if isinstance(params, (list, tuple)) and params and all(isinstance(entry, dict) for entry in params):
            routed = self._routes(find_owners_together([_given(entry) for entry in params], shards))
            groups = [self._of_dict(entry, routes) for entry, routes in zip(params, routed, strict=True)]
        else:
            routed = self._routes([find_owners([params] if isinstance(params, Tensor) else params, shards)])
            groups = self._by_role(routed[0])
        _make_names_unique(groups)
        return groups, [one for routes in routed for one in routes]

    def further(self, entry: dict[str, Any], before: Sequence[Group], shards: Shards) -> tuple[Group, list[Route]]:
        """One group more, beside those ``before`` it."""
        known = [pair for group in before for pair in zip(group["params"], group["param_names"], strict=True)]
        routes = self._routes(find_owners_together([_given(entry)], shards, known))[0]
        group = self._of_dict(entry, routes)
        _make_names_unique([*before, group])
        return group, routes

    def _routes(self, owned: Sequence[list[NamedParameter]]) -> list[list[Route]]:
        split = getattr(self.settings, "split", "none")
        everything = iter(route([one for entry in owned for one in entry], self.settings.roles, split))
        return [[next(everything) for _ in entry] for entry in owned]

    def _of_dict(self, entry: dict[str, Any], routes: Sequence[Route]) -> Group:
        """One group for one dict, whatever roles are in it; its ``weight_decay``, if given, is that of all of them."""
        settings = {key: value for key, value in entry.items() if key not in ("params", *PARALLEL)}
        check_group(self.settings, settings)
        if "weight_decay" in settings:
            settings.setdefault("fallback_weight_decay", settings["weight_decay"])
        if "betas" in settings:
            settings["betas"] = tuple(settings["betas"])
        roles = {one.role for one in routes}
        role = roles.pop() if len(roles) == 1 else MIXED
        if role not in (MIXED, "matrix"):
            settings.setdefault("weight_decay", self.rest_decay)
        return {
            "algorithm": "" if role == MIXED else self._rule_of(role),
            **settings,
            "params": [one.named.param for one in routes],
            "role": role,
            "lr_ratio": 1.0,
            **parallel_lists(routes, [self._ratio(one) for one in routes]),
        }

    def _by_role(self, routes: Sequence[Route]) -> list[Group]:
        """A group per role (and per learning rate ratio, where heads differ in width), named after it."""
        groups: list[Group] = []
        for role in ROLES:
            by_ratio: dict[float, list[Route]] = {}
            for one in routes:
                if one.role == role:
                    by_ratio.setdefault(self._ratio(one), []).append(one)
            for count, (lr_ratio, members) in enumerate(by_ratio.items()):
                decay = self.settings.weight_decay if role == "matrix" else self.rest_decay
                groups.append(
                    {
                        "params": [one.named.param for one in members],
                        "name": role if count == 0 else f"{role}_{count + 1}",
                        "role": role,
                        "algorithm": self._rule_of(role),
                        "lr_ratio": lr_ratio,
                        "weight_decay": decay,
                        "fallback_weight_decay": decay,
                        **parallel_lists(members, [1.0] * len(members)),
                    }
                )
        return groups

    def _rule_of(self, role: str) -> str:
        return self.algorithm if role == "matrix" else self.fallback

    def _ratio(self, one: Route) -> float:
        if one.role == "matrix":
            return 1.0
        scale = HEAD_LR_SCALES[self.settings.head_lr_scale](one.inputs) if one.role == "head" else 1.0
        return self.fallback_ratio * scale


def _given(entry: dict[str, Any]) -> Any:
    if "params" not in entry:
        hint = did_you_mean(next(iter(entry), ""), ["params"], otherwise="its key is")
        raise ValueError(f"a group has the keys {list(entry)} and no `params`; {hint}")
    params = entry["params"]
    return [params] if isinstance(params, Tensor) else params


def _make_names_unique(groups: Sequence[Group]) -> None:
    """Number parameters of the same name, which modules given one by one have: ``weight``, ``weight#2``; in place."""
    seen: dict[str, int] = {}
    for group in groups:
        for i, name in enumerate(group["param_names"]):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                group["param_names"][i] = f"{name}#{seen[name]}"
