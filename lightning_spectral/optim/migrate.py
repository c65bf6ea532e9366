"""Find the state of each parameter in a checkpoint of ours or of torch: by name, else by its place in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_spectral.models.names import clean_name
from lightning_spectral.optim.members import PARALLEL, Member
from lightning_spectral.optim.vector_rules import VECTOR_RULES

State = dict[str, Any]
_OURS_TO_SAY = ("params", *PARALLEL, "role", "algorithm", "name")
_SHARED_WITH_TORCH = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "nesterov")


@dataclass(frozen=True)
class Found:
    """What a checkpoint has for this optimizer.

    Attributes:
        states: Position of a member -> its saved state.
        groups: Position of one of our groups -> the saved group it was.
        missing: Names of members without state in the checkpoint.
        source: ``ours``, ``adamw`` (torch's; also ours, into a rule for matrices) or ``muon`` (torch's).
    """

    states: dict[int, State]
    groups: dict[int, dict[str, Any]]
    missing: tuple[str, ...]
    source: str


def find_states(saved: dict[str, Any], members: Sequence[Member], given_order: Sequence[int]) -> Found:
    """Match a state dict to members.

    Args:
        saved: ``state_dict()`` of this package's optimizers, of torch's, or what FSDP and DCP make of them.
        members: Of this optimizer.
        given_order: Positions of the members in the order in which the model has them.

    Raises:
        ValueError: If the checkpoint belongs to another model.
    """
    groups = saved["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    source = _source(groups)
    names = _saved_names(groups, keys)
    if names is not None:
        position = {member.name: i for i, member in enumerate(members)}
        matched = {position[name]: key for name, key in zip(names, keys, strict=True) if name in position}
        if not matched and len(keys) == len(members):  # the same parameters seen from another module
            matched = _by_position(keys, members, given_order, source)
        if not matched:
            raise ValueError(
                f"no parameter of the checkpoint is in this model: it has {names[:3]}, the model "
                f"{[m.name for m in members[:3]]}. It belongs to another model."
            )
    else:
        matched = _by_position(keys, members, given_order, source)
    states = {i: saved["state"][key] for i, key in matched.items() if saved["state"].get(key)}
    if source == "ours" and any("exp_avg" in state for i, state in states.items() if _is_matrix(members[i])):
        source = "adamw"  # our own: what it says of learning rates is not meant for matrices
    missing = tuple(m.name for i, m in enumerate(members) if i not in matched and m.param.requires_grad)
    return Found(states, _groups(groups, members, matched), missing, source)


def _is_matrix(member: Member) -> bool:
    return member.algorithm not in VECTOR_RULES


def _source(groups: Sequence[dict[str, Any]]) -> str:
    if all("algorithm" in group for group in groups):
        return "ours"
    return "muon" if any("ns_steps" in group for group in groups) else "adamw"


def _saved_names(groups: Sequence[dict[str, Any]], keys: Sequence[Any]) -> list[str] | None:
    """Names of the saved parameters: written beside them, or (FSDP, DCP) used as keys; None if there are none."""
    if keys and all(isinstance(key, str) for key in keys):
        return [clean_name(key) for key in keys]
    names = [clean_name(name) for group in groups for name in group.get("param_names", ())]
    return names if len(names) == len(keys) else None


def _by_position(
    keys: Sequence[Any], members: Sequence[Member], given_order: Sequence[int], source: str
) -> dict[int, Any]:
    if source == "ours" and len(keys) == len(members):  # written before names were: roles in the same order
        return dict(enumerate(keys))
    if len(keys) == len(members):
        return dict(zip(given_order, keys, strict=True))
    matrices = [i for i in given_order if members[i].role == "matrix"]
    if source == "muon" and len(keys) == len(matrices):
        return dict(zip(matrices, keys, strict=True))
    raise ValueError(
        f"the checkpoint has {len(keys)} parameters without names and this optimizer {len(members)} ({len(matrices)} "
        "matrices): it belongs to another model, or the optimizer was built from another part of it. Checkpoints of "
        "optimizers built from `named_parameters()` are matched by name."
    )


def _groups(
    groups: Sequence[dict[str, Any]], members: Sequence[Member], matched: dict[int, Any]
) -> dict[int, dict[str, Any]]:
    """For every one of our groups the saved group that most of its parameters were in."""
    group_of = {key: group for group in groups for key in group["params"]}
    ours: dict[int, list[dict[str, Any]]] = {}
    order = list({id(m.group): None for m in members})
    for i, key in matched.items():
        ours.setdefault(order.index(id(members[i].group)), []).append(group_of[key])
    return {
        index: max(candidates, key=lambda group: sum(other is group for other in candidates))
        for index, candidates in ours.items()
    }


def translated(state: State, member: Member, wanted: Sequence[str], source: str) -> State:
    """A saved state with the names that the member's rule uses.

    A matrix that AdamW trained gets AdamW's first moment as its momentum: both are running means of the gradient.
    """
    if "momentum_buffer" in wanted and "momentum_buffer" not in state and source == "adamw" and "exp_avg" in state:
        scale = 1.0 if member.group["momentum_style"] == "ema" else 1 / (1 - float(member.group["momentum"]))
        return {"step": state.get("step", 0.0), "momentum_buffer": state["exp_avg"] * scale}
    return {"step": 0.0, **state}


def settings_from(found: Found, index: int, group: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """Settings of a saved group for one of ours: all of our own, torch's where the rule is the same, else none."""
    saved = found.groups.get(index, {})
    if found.source == "ours":
        return {name: value for name, value in saved.items() if name not in _OURS_TO_SAY}
    if found.source != algorithm or group["algorithm"] != algorithm:
        return {}
    return {name: saved[name] for name in _SHARED_WITH_TORCH if name in saved}
