"""One optimizer for a whole model: hidden matrices by an algorithm of their own, the rest by AdamW or Lion.

A step is: clip or refuse, vector rules, momentum of every local part, whole matrices (this rank's own, or gathered from
the ranks that hold parts), updates applied to every local part. What differs between Muon, NorMuon and Dion is a
``MatrixRule``; which matrices a parameter holds is in its ``Views``; what of them is here is in its ``Shard``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_spectral.models.placement import Shards, local
from lightning_spectral.models.views import Views
from lightning_spectral.optim.announcement import LOG, show_table, warn_of_few, warn_of_lost_updates
from lightning_spectral.optim.checkpoint import make_uniform
from lightning_spectral.optim.gradients import local_gradients, usable_gradients
from lightning_spectral.optim.grouping import Grouping
from lightning_spectral.optim.matrix_rule import MatrixRule
from lightning_spectral.optim.matrix_step import MatrixStep
from lightning_spectral.optim.members import PARALLEL, Group, Member, members_of
from lightning_spectral.optim.migrate import Found, find_states, settings_from
from lightning_spectral.optim.routing import Route, routing_table, share_under_rule
from lightning_spectral.optim.settings import (
    CommonSettings,
    MatrixSettings,
    fallback_ratio,
    full_signature,
    group_settings,
)
from lightning_spectral.optim.state import StateLayout
from lightning_spectral.optim.telemetry import MatrixTelemetry
from lightning_spectral.optim.vector_rules import vector_step
from lightning_spectral.text.tables import Table, render


class SpectralOptimizer(Optimizer):
    """Base class; use ``Muon``, ``NorMuon``, ``Dion`` or ``AdamW``.

    Learning rates are ratios: every group keeps ``lr_ratio`` and the step uses ``group["lr"] * group["lr_ratio"]``. A
    scheduler, or litgpt's loop, may therefore write one value into the ``lr`` of all groups.

    A model, or its parameters, are divided into groups named after their roles. A dict with ``params``, here or in
    ``add_param_group``, stays one group whatever is in it; keys that are no settings are kept for whoever reads them.

    Args:
        params: A module (best), ``named_parameters()``, ``parameters()``, or a list of dicts with such ``params``.
        lr: Learning rate.
        algorithm: A key of ``matrix_rules`` for hidden matrices, or of ``VECTOR_RULES``.
        settings: Everything that subclasses share.
        own: Settings of the algorithm alone, carried by every group.

    Attributes:
        routing: Which parameters were last given which role, matrices, rule and learning rate, as it was logged.

    Raises:
        ValueError: If a setting is out of range, or a parameter's role cannot be known.
    """

    matrix_rules: dict[str, MatrixRule] = {}  # noqa: RUF012  # one entry per subclass, never mutated
    settings_class: type[CommonSettings] = CommonSettings
    routing: Table

    def __init_subclass__(cls) -> None:
        """Spell the shared settings out for help(), litgpt and the checks of recipes."""
        super().__init_subclass__()
        if "__init__" in cls.__dict__:
            cls.__signature__ = full_signature(cls.__init__, cls.settings_class)  # type: ignore[attr-defined]

    def __init__(
        self, params: Any, lr: float, algorithm: str, settings: CommonSettings, own: dict[str, Any] | None = None
    ) -> None:
        self._algorithm, self._settings = algorithm, settings
        self._grouping = Grouping(algorithm, settings, fallback_ratio(lr, settings.fallback_lr))
        self._known: tuple[tuple[int, ...], list[Member]] | None = None
        self._matrix_step: tuple[tuple[int, ...], MatrixStep] | None = None
        self._observed: dict[str, MatrixTelemetry] | None = None
        defaults = {"lr": lr, **group_settings(settings), **(own or {})}
        defaults.update(algorithm="", role="", fallback_weight_decay=self._grouping.rest_decay)
        shards = Shards()
        groups, routes = self._grouping.groups(params, shards)
        super().__init__(groups, defaults)
        self._members(shards)
        self._given = [id(one.named.param) for one in routes]
        self._announce(routes)
        for member in self._members():
            if member.param.requires_grad and local(member.param).device.type != "meta":
                self._init_state(member)

    # ---- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; ``closure`` re-evaluates the model under grad and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = self._members()
        grads = local_gradients(members)
        matrices = [m for m in members if m.algorithm in self.matrix_rules and m.param.requires_grad]
        plan = self._step_of(matrices) if matrices else None
        presence = None if plan is None else plan.ask(grads)
        read: Callable[[Tensor], float] = float if presence is None else presence.require_same
        settings = self._settings
        usable = usable_gradients(members, grads, settings.max_grad_norm, settings.nonfinite, read)
        if usable is None:
            return loss
        for member in members:
            if id(member.param) in usable and not self.state[member.param]:  # unfrozen, or its device was not known
                self._init_state(member)
                if plan is not None:
                    plan.forget(member)
        rest = [m for m in members if m.algorithm not in self.matrix_rules and id(m.param) in usable]
        vector_step(rest, usable, self.state, settings.bf16_weights)
        if plan is not None and presence is not None:
            plan.run(presence, usable, self.state, None if self._observed is None else self._observe)
        return loss

    def _step_of(self, matrices: list[Member]) -> MatrixStep:
        key = tuple(id(member) for member in matrices)
        if self._matrix_step is None or self._matrix_step[0] != key:
            settings = self._settings
            assert isinstance(settings, MatrixSettings)
            share, size = settings.share_over_ranks, settings.bucket_mib * 2**20
            plan = MatrixStep(matrices, self.matrix_rules, share, size, settings.bf16_weights)
            self._matrix_step = (key, plan)
        return self._matrix_step[1]

    # ---- telemetry ---------------------------------------------------------------------------------------------------

    def observe_next_step(self) -> None:
        """Let the next ``step`` record the spectra of every matrix that this rank makes whole; see ``observed``."""
        self._observed = {}

    @property
    def observed(self) -> dict[str, MatrixTelemetry]:
        """Name -> what ``observe_next_step`` asked for; where ranks share the work each has its own part.

        Of a parameter with several matrices the names are ``name[0]``, ``name[1]`` and so on.
        """
        return dict(self._observed or {})

    def stop_observing(self) -> None:
        """Forget the recorded spectra and make steps cheap again."""
        self._observed = None

    def _observe(self, name: str, direction: Tensor, update: Tensor, group: Group) -> None:
        assert self._observed is not None
        self._observed[name] = MatrixTelemetry.measure(direction, update, group)

    @property
    def matrix_views(self) -> dict[int, Views]:
        """``id(parameter)`` -> the matrices that are updated one by one, for parameters under a matrix rule."""
        return {id(member.param): member.views for member in self._members() if member.views is not None}

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's own format; every state tensor lies as its parameter does, see ``checkpoint``."""
        members = self._members()
        packed = super().state_dict()
        keys = [key for group in packed["param_groups"] for key in group["params"]]
        states: dict[Any, dict[str, Any]] = {}
        for key, member in zip(keys, members, strict=True):
            if key not in packed["state"]:
                continue
            states[key] = self._layout.saved(member, packed["state"][key])
        if any(member.shard.span is not None for member in members):
            make_uniform(states, {key: member.param for key, member in zip(keys, members, strict=True)})
        packed["state"] = states
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint of any strategy, or of torch's AdamW or Muon; parameters are matched by name.

        Settings (learning rates and so on) are taken from checkpoints of this package, and from torch's AdamW into
        ``AdamW``; a setting that the checkpoint does not know keeps its value. What else a foreign checkpoint has is
        state only.

        Raises:
            ValueError: If the checkpoint belongs to another model or optimizer; says which parameter does not fit.
        """
        members = self._members()
        place = {id(member.param): i for i, member in enumerate(members)}
        found = find_states(state_dict, members, [place[key] for key in self._given if key in place])
        if found.missing:
            self._say(f"the checkpoint has no state of {len(found.missing)} parameters, {found.missing[0]} first")
        kept = {i: self._layout.loaded(members[i], state, found.source) for i, state in found.states.items()}
        super().load_state_dict({"state": kept, "param_groups": self._loaded_groups(found)})
        for i, member in enumerate(self._members()):  # torch casts to the parameter's dtype; some are wider
            for name, value in kept.get(i, {}).items():
                self.state[member.param][name] = value.to(local(member.param).device)

    def _loaded_groups(self, found: Found) -> list[dict[str, Any]]:
        """Our groups with the saved settings; what the parameters are is ours to say."""
        groups = []
        position = 0
        for index, group in enumerate(self.param_groups):
            settings = settings_from(found, index, group, self._algorithm)
            if "betas" in settings:
                settings["betas"] = tuple(settings["betas"])
            count = len(group["params"])
            groups.append({**group, **settings, "params": list(range(position, position + count))})
            position += count
        return groups

    # ---- groups and state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters after construction (unfreezing), as one group; roles are found as in the constructor."""
        if all(key in param_group for key in PARALLEL):
            super().add_param_group(param_group)
            return
        shards = Shards()
        group, routes = self._grouping.further(param_group, self.param_groups, shards)
        super().add_param_group(group)
        self._given += [id(one.named.param) for one in routes]
        members = self._members(shards)
        self._announce(routes)
        for member in members:
            if member.group is self.param_groups[-1] and member.param.requires_grad:
                self._init_state(member)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle needs; the order in which parameters were given as positions."""
        place = {id(member.param): i for i, member in enumerate(self._members())}
        given = [place[key] for key in self._given if key in place]
        kept = {name: self.__dict__[name] for name in ("_algorithm", "_settings", "_grouping")}
        return {**super().__getstate__(), **kept, "_given": given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Plans are built anew on demand: process groups and id() do not survive pickling or a deep copy."""
        given = state.pop("_given", None)
        super().__setstate__(state)
        self._known = self._matrix_step = self._observed = None
        if given is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            self._given = [id(params[i]) for i in given]

    def _members(self, shards: Shards | None = None) -> list[Member]:
        """All parameters; looked up again when the groups, or the parameters in them, are no longer those known."""
        key = tuple(id(thing) for group in self.param_groups for thing in (group, *group["params"]))
        if self._known is None or self._known[0] != key:
            before = None if self._known is None else self._known[1]
            members = members_of(self.param_groups, self._algorithm, self._grouping.fallback, shards or Shards())
            self._known = (key, members)
            if before is not None:
                self._carry_over(before, members)
        return self._known[1]

    def _carry_over(self, before: Sequence[Member], now: Sequence[Member]) -> None:
        """Give parameters that were put in the place of others (`.to_empty`, accelerate) what those had."""
        present = {id(member.param) for member in now}
        old = {m.name: m for m in before if id(m.param) not in present}
        for member in now:
            predecessor = old.get(member.name)
            if predecessor is None or self.state.get(member.param):
                continue
            self._given = [id(member.param) if key == id(predecessor.param) else key for key in self._given]
            state = self.state.get(predecessor.param)
            if not state or local(member.param).device.type == "meta":
                continue
            saved = self._layout.saved_if_whole(predecessor, state)
            fits = saved is not None and predecessor.shard.numel == member.shard.numel
            self._init_state(member)
            if fits and saved is not None:
                self.state[member.param].update(self._layout.loaded(member, saved, "ours"))
        for orphan in old.values():
            self.state.pop(orphan.param, None)

    def _announce(self, routes: Sequence[Route]) -> None:
        """Log where everything went, and warn where that can hardly be meant."""
        self.routing = self._routing(routes)
        table = render(self.routing)
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        show_table()
        self._say("routes:\n" + table)
        if self._settings.bf16_weights == "nearest":
            warn_of_lost_updates(self._members())
        if self._algorithm in self.matrix_rules:
            warn_of_few(type(self).__name__, share_under_rule(routes), self._grouping.fallback, table)

    def _routing(self, routes: Sequence[Route]) -> Table:
        by_id = {id(member.param): member for member in self._members()}

        def describe(one: Route) -> str:
            member = by_id[id(one.named.param)]
            scale = f" x {member.group['lr_scale']}" if member.algorithm in self.matrix_rules else ""
            return f"{member.algorithm}, lr {member.lr:.3g}{scale}, wd {member.weight_decay:g}"

        return routing_table(routes, describe)

    def _say(self, text: str) -> None:
        LOG.info("%s %s", type(self).__name__, text)

    @property
    def _layout(self) -> StateLayout:
        return StateLayout(self.matrix_rules, self._settings.bf16_weights)

    def _init_state(self, member: Member) -> None:
        """Create all state at once: every rank, also one without a part, then has the same keys."""
        self.state[member.param] = self._layout.fresh(member)


SpectralOptimizer.__signature__ = inspect.signature(SpectralOptimizer.__init__)  # type: ignore[attr-defined]
