"""From the keywords of a public optimizer to what ``SpectralOptimizer`` is built from, and what is allowed in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_spectral.functional.orthogonalize import check_method
from lightning_spectral.optim.matrix_rule import LR_SCALES, MOMENTUM_STYLES, PRECISIONS
from lightning_spectral.optim.param_groups import Role
from lightning_spectral.optim.vector_rules import VECTOR_RULES

NONFINITE = ("propagate", "raise", "skip")
HEAD_LR_SCALES: dict[str, Callable[[int], float]] = {"none": lambda width: 1.0, "inverse_sqrt_width": lambda d: d**-0.5}


@dataclass(frozen=True)
class Settings:
    """What holds for the whole optimizer; everything that may differ between parameters is in its groups."""

    algorithm: str
    fallback: str
    ratios: dict[Role, float]
    weight_decays: dict[Role, float]
    head_lr_scale: str
    roles: dict[str, str]
    max_grad_norm: float | None
    nonfinite: str
    share_over_ranks: bool


# arXiv:2605.21803, hidden matrices and embedding / head, shared by Muon, NorMuon and Dion
MATRIX_PAPER: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.01,
    "momentum": 0.95,
    "nesterov": True,
    "lr_scale": "spectral",
    "fallback": "lion",
    "fallback_lr": 0.02,
    "fallback_weight_decay": 0.0,
    "head_lr_scale": "inverse_sqrt_width",
    "betas": (0.95, 0.98),
}

_NUMBERS = ("lr", "weight_decay", "momentum", "eps", "fallback_lr", "fallback_weight_decay", "max_grad_norm")
_COMMON = ("fallback", "head_lr_scale", "roles", "max_grad_norm", "nonfinite", "share_over_ranks")
_NOT_SETTINGS = ("self", "params", "__class__", "fallback_lr", "fallback_weight_decay", *_COMMON)


def matrix_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Split the arguments of an optimizer's ``__init__`` (its ``locals()``) into group defaults and the rest.

    Raises:
        ValueError: If a learning rate or a weight decay is out of range or no number.
    """
    given = dict(given)
    for name in _NUMBERS:
        _require_number(name, given.get(name))
    lr, fallback_lr = given["lr"], given.get("fallback_lr")
    if fallback_lr is not None and not (lr > 0 and fallback_lr >= 0):
        raise ValueError(
            f"`fallback_lr` is kept as a ratio to `lr`, so both must be positive; got {fallback_lr!r} and {lr!r}."
        )
    ratio = 1.0 if fallback_lr is None else fallback_lr / lr
    decay = given["weight_decay"] if given.get("fallback_weight_decay") is None else given["fallback_weight_decay"]
    if not decay >= 0:
        raise ValueError(f"`fallback_weight_decay` must be >= 0, got {decay!r}.")
    defaults = {name: value for name, value in given.items() if name not in _NOT_SETTINGS}
    # A tuple: schedulers (OneCycleLR) read and rewrite `betas`, and YAML gives a list.
    defaults["betas"] = tuple(given["betas"])
    # Every group carries every setting: a scheduler may look into any of them.
    for name, value in _ALWAYS.items():
        defaults.setdefault(name, value)
    rest: tuple[str, ...] = ("embedding", "head", "vector")
    return {
        "defaults": {**defaults, "algorithm": "", "role": "", "lr_ratio": 1.0},
        "ratios": {"matrix": 1.0, **dict.fromkeys(rest, ratio)},
        "weight_decays": {"matrix": given["weight_decay"], **dict.fromkeys(rest, decay)},
        **{name: given[name] for name in _COMMON if name in given},
    }


_ALWAYS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "momentum_style": "ema",
    "orthogonalize": "polar_express",
    "steps": None,
    "precision": "auto",
    "lr_scale": "match_rms_adamw",
    "eps": 1e-8,
}


def check_settings(
    defaults: dict[str, Any], fallback: str, max_grad_norm: float | None, nonfinite: str, head_lr_scale: str
) -> None:
    """Refuse settings out of range; raises ValueError with the name, the value and what is allowed."""
    for name in ("lr", "weight_decay", "eps"):
        if not (math.isfinite(defaults[name]) and defaults[name] >= 0):
            raise ValueError(f"`{name}` must be finite and >= 0, got {defaults[name]!r}.")
    betas = defaults["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"`betas` must be two numbers in [0, 1), got {betas!r}.")
    if not 0 <= defaults["momentum"] < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {defaults['momentum']!r}.")
    choices: dict[str, tuple[Any, Iterable[str]]] = {
        "fallback": (fallback, VECTOR_RULES),
        "nonfinite": (nonfinite, NONFINITE),
        "head_lr_scale": (head_lr_scale, HEAD_LR_SCALES),
        "lr_scale": (defaults["lr_scale"], LR_SCALES),
        "precision": (defaults["precision"], PRECISIONS),
        "momentum_style": (defaults["momentum_style"], MOMENTUM_STYLES),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be > 0 or None, got {max_grad_norm!r}.")
    check_method(defaults["orthogonalize"])
    steps = defaults["steps"]
    if steps is not None and steps < 0:
        raise ValueError(f"`steps` must be >= 0 or None, got {steps!r}.")


def _require_number(name: str, value: Any) -> None:
    if value is None or isinstance(value, Tensor) or (isinstance(value, Real) and not isinstance(value, bool)):
        return
    hint = " YAML reads `3e-4` as text: write `3.0e-4`." if isinstance(value, str) else ""
    raise ValueError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}.{hint}")
