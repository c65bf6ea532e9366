"""The parameters of an optimizer as its groups say: role, matrices, learning rate, and what of each is here.

A group may hold one role (what a bare module is divided into) or all of them (a dict that the user gave stays one
group, so that schedulers and callbacks find as many groups as they were promised). What differs between its parameters
lies in lists beside ``params``: plain values, which checkpoints carry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_spectral.models.placement import Shard, Shards
from lightning_spectral.models.views import Views
from lightning_spectral.optim.routing import Role, Route

Group = dict[str, Any]
MIXED = "mixed"  # the `role` of a group with several
PARALLEL = ("param_names", "param_roles", "param_views", "param_lr_ratios")  # lists beside `params`


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter in its group.

    Attributes:
        param: As the optimizer sees it.
        group: Its group, live.
        name: In the model, without wrappers.
        role: What kind of parameter it is.
        algorithm: The rule it follows.
        views: Its matrices, for the role ``matrix``.
        shard: What of it is here.
        index: Position among all parameters of the optimizer.
        lr_ratio: Learning rate over that of its group.
    """

    param: nn.Parameter
    group: Group
    name: str
    role: Role
    algorithm: str
    views: Views | None
    shard: Shard
    index: int
    lr_ratio: float

    @property
    def lr(self) -> float:
        """Learning rate of this step, before the factor for a matrix's shape."""
        return float(self.group["lr"]) * float(self.group["lr_ratio"]) * self.lr_ratio

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay; in a group of several roles that of the rest is a setting of its own."""
        rest = self.group["role"] == MIXED and self.role != "matrix"
        return float(self.group["fallback_weight_decay" if rest else "weight_decay"])


def parallel_lists(routes: Sequence[Route], lr_ratios: Sequence[float]) -> dict[str, list[Any]]:
    """The lists that a group carries beside ``params``."""
    return {
        "param_names": [one.named.name for one in routes],
        "param_roles": [one.role for one in routes],
        "param_views": [_encode(one.views) for one in routes],
        "param_lr_ratios": list(lr_ratios),
    }


def members_of(groups: Sequence[Group], algorithm: str, fallback: str, shards: Shards) -> list[Member]:
    """All parameters, in the order of the groups.

    Raises:
        ValueError: If a group's parameters are no longer those that were routed: a flat partition, or a changed list.
    """
    members: list[Member] = []
    for group in groups:
        if len(group["params"]) != len(group["param_names"]):
            raise ValueError(_repartitioned(group["params"], len(group["param_names"])))
        lists = zip(group["params"], *(group[key] for key in PARALLEL), strict=True)
        for param, name, role, views, lr_ratio in lists:
            shard = shards.of(param, name)
            decoded = None if views is None else _decode(views)
            if decoded is not None and decoded.stored[0] * decoded.stored[1] != shard.numel:
                raise ValueError(_repartitioned([param], 1))
            rule = group["algorithm"] or (algorithm if role == "matrix" else fallback)
            members.append(Member(param, group, name, role, rule, decoded, shard, len(members), float(lr_ratio)))
    return members


def _encode(views: Views | None) -> str | None:
    if views is None:
        return None
    return json.dumps([views.shape, views.row_dims, views.stack, views.transposed, views.parts])


def _decode(text: str) -> Views:
    shape, row_dims, stack, transposed, parts = json.loads(text)
    decoded = None if parts is None else tuple(tuple(tuple(rows) for rows in part) for part in parts)
    return Views(tuple(shape), row_dims, stack, transposed, decoded)


def _repartitioned(params: Sequence[Tensor], expected: int) -> str:
    shapes = [tuple(param.shape) for param in params[:3]]
    return (
        f"a parameter group of {expected} parameters now holds {len(params)}, the first of shape {shapes}: something "
        "replaced them by a flat partition (DeepSpeed ZeRO, apex, FairScale), which has no matrices left. Use DDP, "
        "FSDP, FSDP2 or ZeRO stage 0; to add parameters use `add_param_group`."
    )
