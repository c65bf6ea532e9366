"""One optimizer for a whole model: hidden matrices by an algorithm of their own, the rest by AdamW or Lion.

A step is: clip or refuse, vector rules, momentum of every local piece, whole matrices (this device's, this rank's
share, or gathered from shards), updates applied to every local piece. What differs between Muon, NorMuon and Dion is a
``MatrixRule``; what differs between one device, DDP, FSDP1 and FSDP2 is in ``matrix_step``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.optim.checkpoint import (
    companion_to_saved,
    held_length,
    make_uniform,
    saved_to_companion,
    saved_to_param_layout,
)
from lightning_spectral.optim.gradients import usable_gradients
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.matrix_step import MatrixStep
from lightning_spectral.optim.param_groups import ROLES, Owned, Role, Route, find_owners, route, routing_table
from lightning_spectral.optim.settings import HEAD_LR_SCALES, Settings, check_settings
from lightning_spectral.optim.shards import Piece, fsdp1_pieces, local, piece_of
from lightning_spectral.optim.telemetry import MatrixTelemetry
from lightning_spectral.optim.vector_rules import VECTOR_RULES, VECTOR_STATE

_LOG = logging.getLogger("lightning_spectral.optim")


class SpectralOptimizer(Optimizer):
    """Base class; use ``Muon``, ``NorMuon``, ``Dion`` or ``AdamW``.

    Learning rates are ratios: every group keeps ``lr_ratio`` and the step uses ``group["lr"] * group["lr_ratio"]``. A
    scheduler, or litgpt's loop, may therefore write one value into the ``lr`` of all groups.

    Args:
        params: A module (best), ``named_parameters()``, ``parameters()``, or a list of dicts with such ``params``.
        algorithm: A key of ``matrix_rules`` for hidden matrices, or of ``VECTOR_RULES``.
        defaults: Settings that every group carries; a group dict may override any of them.
        ratios: Role -> learning rate over the base learning rate.
        weight_decays: Role -> weight decay.
        head_lr_scale: A name in ``HEAD_LR_SCALES``.
        roles: Regular expression searched in the parameter name -> role, where the rules of ``param_groups`` are wrong.
        max_grad_norm: Clip to this global norm without touching ``p.grad``.
        nonfinite: ``propagate`` NaN and Inf as AdamW does, ``raise``, or ``skip`` the step on all ranks.
        share_over_ranks: Under DDP, spread the orthogonalisation over the ranks.

    Raises:
        ValueError: If a setting is out of range, or a parameter's role cannot be known.
    """

    matrix_rules: dict[str, MatrixRule] = {}  # noqa: RUF012  # one entry per subclass, never mutated

    def __init__(
        self,
        params: Any,
        *,
        algorithm: str,
        fallback: str,
        defaults: dict[str, Any],
        ratios: dict[Role, float],
        weight_decays: dict[Role, float],
        head_lr_scale: str = "none",
        roles: dict[str, str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        share_over_ranks: bool = True,
    ) -> None:
        check_settings(defaults, fallback, max_grad_norm, nonfinite, head_lr_scale)
        self._settings = Settings(
            algorithm,
            fallback,
            ratios,
            weight_decays,
            head_lr_scale,
            dict(roles or {}),
            max_grad_norm,
            nonfinite,
            share_over_ranks,
        )
        self._names: dict[int, str] = {}
        self._matrix_step: MatrixStep | None = None
        self._observed: dict[str, MatrixTelemetry] | None = None
        groups, routes = self._route(params, defaults)
        super().__init__(groups, defaults)
        self._log_routes(routes)
        flat_views = fsdp1_pieces()
        for index, (param, group) in enumerate(self._members()):
            if param.requires_grad:
                self._init_state(param, group, index, piece_of(param, flat_views))

    # ---- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; ``closure`` re-evaluates the model under grad and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = list(self._members())
        grads = usable_gradients(
            [param for param, _ in members], self._settings.max_grad_norm, self._settings.nonfinite, self._name
        )
        if grads is None:
            return loss
        for index, (param, group) in enumerate(members):
            if id(param) in grads and not self.state[param]:  # unfrozen, or created before the device was known
                self._init_state(param, group, index, piece_of(param))
        self._vector_step(grads)
        matrices = [(param, group) for param, group in members if self._rule(group) is not None and param.requires_grad]
        if matrices:
            if self._matrix_step is None or not self._matrix_step.covers(matrices):
                self._matrix_step = MatrixStep(matrices, self.matrix_rules, self._settings.share_over_ranks)
            self._matrix_step.run(grads, self.state, None if self._observed is None else self._observe)
        return loss

    def _vector_step(self, grads: dict[int, Tensor]) -> None:
        for group in self.param_groups:
            if self._rule(group) is not None:
                continue
            active = [p for p in group["params"] if id(p) in grads and local(p).numel()]
            if not active:
                continue
            states = [{key: local(value) for key, value in self.state[p].items()} for p in active]
            lr = float(group["lr"]) * group["lr_ratio"]
            VECTOR_RULES[group["algorithm"]](
                [local(p) for p in active], [grads[id(p)] for p in active], states, group, lr
            )

    # ---- telemetry ---------------------------------------------------------------------------------------------------

    def observe_next_step(self) -> None:
        """Let the next ``step`` record the spectra of every matrix that this rank makes whole; see ``observed``."""
        self._observed = {}

    @property
    def observed(self) -> dict[str, MatrixTelemetry]:
        """Parameter name -> what ``observe_next_step`` asked for; under DDP and FSDP each rank has its own share."""
        return dict(self._observed or {})

    def stop_observing(self) -> None:
        """Forget the recorded spectra and make steps cheap again."""
        self._observed = None

    def _observe(self, param: Tensor, direction: Tensor, update: Tensor, group: Group) -> None:
        assert self._observed is not None
        self._observed[self._name(param)] = MatrixTelemetry.measure(direction, update, group)

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's own format; every state tensor lies as its parameter does, see ``checkpoint``."""
        packed = super().state_dict()
        flat_views = fsdp1_pieces()
        keys = [key for group in packed["param_groups"] for key in group["params"]]
        params = dict(zip(keys, (param for param, _ in self._members()), strict=True))
        states: dict[Any, dict[str, Any]] = {}
        any_flat = False
        for key, (param, group) in zip(keys, self._members(), strict=True):
            if key not in packed["state"]:
                continue
            piece = piece_of(param, flat_views)
            any_flat = any_flat or piece.kind == "flat"
            companions = self._companions(param, group, piece)
            states[key] = {
                name: companion_to_saved(value, param) if name in companions else value
                for name, value in packed["state"][key].items()
            }
        if any_flat:
            make_uniform(states, params)
        packed["state"] = states
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint of any strategy: its own, or a full one, which is cut for this rank."""
        saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        members = list(self._members())
        if len(saved_keys) != len(members):
            raise ValueError(
                f"the checkpoint has {len(saved_keys)} parameters and this optimizer {len(members)}: it belongs to "
                "another model, or the optimizer was built from another part of it."
            )
        flat_views = fsdp1_pieces()
        states: dict[Any, dict[str, Any]] = {}
        exact: list[tuple[nn.Parameter, str, Tensor]] = []
        for key, (param, group) in zip(saved_keys, members, strict=True):
            saved = state_dict["state"].get(key)
            if not saved:
                continue
            piece = piece_of(param, flat_views)
            companions = self._companions(param, group, piece)
            kept: dict[str, Any] = {}
            for name in ("step", *self._elementwise(group), *companions):
                if name not in saved:
                    raise ValueError(
                        f"the checkpoint has no `{name}` for `{self._name(param)}`: it was written by another "
                        f"optimizer. It holds {sorted(saved)}."
                    )
                if name == "step":
                    kept[name] = torch.as_tensor(saved[name], dtype=torch.float32).reshape(()).clone()
                elif name in companions:
                    kept[name] = saved_to_companion(saved[name], piece, companions[name])
                else:
                    kept[name] = saved_to_param_layout(saved[name], param, piece)
            exact += [(param, name, kept[name]) for name in ("step", *companions)]
            states[key] = kept
        super().load_state_dict({**state_dict, "state": states})
        for param, name, value in exact:  # torch casts to the parameter's dtype; these stay fp32
            self.state[param][name] = value.to(local(param).device)

    # ---- groups and state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters after construction (unfreezing); roles are found as in the constructor."""
        if "role" in param_group:
            super().add_param_group(param_group)
            return
        groups, routes = self._route([param_group], self.defaults)
        first = sum(len(group["params"]) for group in self.param_groups)
        for group in groups:
            super().add_param_group(group)
        self._log_routes(routes)
        for index, (param, group) in enumerate(self._members()):
            if index >= first and param.requires_grad:
                self._init_state(param, group, index, piece_of(param))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Built anew on demand: process groups and id() do not survive pickling or a deep copy.
        self._names, self._matrix_step, self._observed = {}, None, None

    def _route(self, params: Any, defaults: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Route]]:
        entries: Iterable[dict[str, Any]] = [{"params": params}]
        if isinstance(params, (list, tuple)) and params and all(isinstance(entry, dict) for entry in params):
            entries = params
        resolved: list[tuple[list[Owned], dict[str, Any]]] = []
        for entry in entries:
            given = [entry["params"]] if isinstance(entry["params"], Tensor) else entry["params"]
            unknown = set(entry) - {"params"} - set(defaults)
            if unknown:
                raise ValueError(
                    f"a parameter group has unknown settings {sorted(unknown)}; known: {sorted(defaults)}."
                )
            resolved.append((find_owners(given), {k: v for k, v in entry.items() if k != "params"}))
        everything = route([one for owned, _ in resolved for one in owned], self._settings.roles)
        role_of = {id(one.owned.param): one.role for one in everything}
        self._names.update({id(one.owned.param): one.owned.name for one in everything})
        groups: list[dict[str, Any]] = []
        for owned, overrides in resolved:
            for role in ROLES:
                members = [one for one in owned if role_of[id(one.param)] == role]
                by_ratio: dict[float, list[nn.Parameter]] = {}
                for one in members:
                    by_ratio.setdefault(self._ratio(role, one), []).append(one.param)
                for ratio, params_of_group in by_ratio.items():
                    settings = {
                        "algorithm": self._settings.algorithm if role == "matrix" else self._settings.fallback,
                        "weight_decay": self._settings.weight_decays[role],
                    }
                    groups.append({"params": params_of_group, **settings, **overrides, "role": role, "lr_ratio": ratio})
        return groups, everything

    def _ratio(self, role: Role, one: Owned) -> float:
        ratio = float(self._settings.ratios[role])
        if role == "head":
            ratio *= HEAD_LR_SCALES[self._settings.head_lr_scale](one.shape[-1])
        return ratio

    def _log_routes(self, routes: list[Route]) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return

        def describe(role: Role) -> str:
            group = next(g for g in self.param_groups if g["role"] == role)
            scale = f" x {group['lr_scale']}" if self._rule(group) is not None else ""
            lr = float(group["lr"]) * group["lr_ratio"]
            return f"{group['algorithm']}, lr {lr:.3g}{scale}, wd {group['weight_decay']:g}"

        package = logging.getLogger("lightning_spectral")
        if package.level == logging.NOTSET and not package.hasHandlers():
            # Nobody configured logging: show the table anyway, as Lightning's own loggers do.
            package.addHandler(logging.StreamHandler())
            package.setLevel(logging.INFO)
        _LOG.info("%s routes:\n%s", type(self).__name__, routing_table(routes, describe))

    def _members(self) -> Iterable[tuple[nn.Parameter, Group]]:
        return chain.from_iterable(((param, group) for param in group["params"]) for group in self.param_groups)

    def _name(self, param: Tensor) -> str:
        if id(param) not in self._names:
            position = next((i for i, (p, _) in enumerate(self._members()) if p is param), -1)
            return f"param_{position:03d}"
        return self._names[id(param)]

    def _rule(self, group: Group) -> MatrixRule | None:
        return self.matrix_rules.get(group["algorithm"])

    def _companions(self, param: Tensor, group: Group, piece: Piece) -> dict[str, int]:
        rule = self._rule(group)
        return {} if rule is None else rule.companions((piece.shape[0], piece.shape[1]), group)

    def _elementwise(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if self._rule(group) is not None else VECTOR_STATE[group["algorithm"]]

    def _init_state(self, param: nn.Parameter, group: Group, index: int, piece: Piece) -> None:
        """Create all state at once: every rank, also one without a piece, then has the same keys."""
        held = local(param)
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=held.device)}
        for name in self._elementwise(group):
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
        rule = self._rule(group)
        for name, length in self._companions(param, group, piece).items():
            assert rule is not None
            initial = rule.initial_companion(name, (piece.shape[0], piece.shape[1]), group, index)
            low = min(piece.start, length)
            here = held_length(piece, length)
            state[name] = (
                torch.zeros(here, dtype=torch.float32, device=held.device)
                if initial is None
                else initial.reshape(-1)[low : low + here].to(held.device, torch.float32, copy=True)
            )
        self.state[param] = state
