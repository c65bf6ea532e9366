"""From the keywords of a public optimizer to what ``SpectralOptimizer`` is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

_COMMON = ("fallback", "head_lr_scale", "roles", "max_grad_norm", "nonfinite", "share_over_ranks")
_NOT_SETTINGS = ("self", "params", "__class__", "fallback_lr", "fallback_weight_decay", *_COMMON)


def matrix_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Split the arguments of an optimizer's ``__init__`` (its ``locals()``) into group defaults and the rest.

    Raises:
        ValueError: If a learning rate or a weight decay is out of range.
    """
    given = dict(given)
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
