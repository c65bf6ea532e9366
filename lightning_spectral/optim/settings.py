"""What can be set, written once: types for editors and checkers, defaults, meaning and allowed values.

The ``...Arguments`` dictionaries tell mypy and editors the types of ``**shared``; the frozen ``...Settings`` hold
defaults, documentation and checks. A test holds the two together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, TypedDict

from lightning_spectral.functional.orthogonalize import METHODS
from lightning_spectral.models.layouts import SPLITS
from lightning_spectral.optim.matrix_rule import EPS_STYLES, LR_SCALES, MOMENTUM_STYLES, PRECISIONS
from lightning_spectral.optim.vector_rules import VECTOR_RULES
from lightning_spectral.optim.weights import BF16_WEIGHTS
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.arguments import require_choice, require_kinds

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:

    class Unpack:
        """Nothing at run time: jsonargparse takes every key of an unpacked TypedDict as required."""

        def __class_getitem__(cls, arguments: Any) -> Any:
            return Any


NONFINITE = ("propagate", "raise", "skip")
HEAD_LR_SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda width: 1.0,
    "inverse_sqrt_width": lambda width: width**-0.5,
    "inverse_width": lambda width: 1 / width,
}


class CommonArguments(TypedDict, total=False):
    """Types of the settings in ``CommonSettings``."""

    weight_decay: float
    betas: tuple[float, float]
    eps: float
    fallback_lr: float | None
    fallback_weight_decay: float | None
    head_lr_scale: str
    roles: dict[str, str] | None
    max_grad_norm: float | None
    nonfinite: str
    bf16_weights: str


class MatrixArguments(CommonArguments, total=False):
    """Types of the settings in ``MatrixSettings``."""

    momentum: float
    norm_eps: float
    norm_eps_style: str
    precision: str
    lr_scale: str
    fallback: str
    split: str
    share_over_ranks: bool
    bucket_mib: float


class OrthogonalArguments(MatrixArguments, total=False):
    """Types of the settings in ``OrthogonalSettings``."""

    nesterov: bool
    momentum_style: str
    orthogonalize: str
    steps: int | None


def refuse_unknown(optimizer: type, settings: type[CommonSettings], shared: Mapping[str, Any]) -> None:
    """Refuse what is no argument of an optimizer; before ``settings(**shared)``, which would name itself.

    Every constructor then calls ``settings(**shared)`` itself: jsonargparse follows ``**shared`` in its source.

    Raises:
        TypeError: With the nearest that the optimizer takes.
    """
    own = inspect.signature(vars(optimizer)["__init__"]).parameters if "__init__" in vars(optimizer) else {}
    known = [*(name for name in own if name not in ("self", "params", "shared")), *(f.name for f in fields(settings))]
    for name in shared:
        if name not in known:
            meant = next((own for own in _HABITS.get(name, ()) if own in known), None)
            hint = did_you_mean(name, known) if meant is None else f"here it is `{meant}`."
            raise TypeError(f"{optimizer.__name__} has no argument `{name}`: {hint}")


# what other libraries call an argument -> what it may be here
_HABITS: Final[dict[str, tuple[str, ...]]] = {
    "beta2": ("moment_beta", "betas"),
    "beta1": ("momentum", "betas"),
    "ns_steps": ("steps",),
    "mu": ("momentum",),
    "rank": ("rank_fraction",),
    "precondition_frequency": ("basis_every",),
    "adamw_lr": ("fallback_lr",),
    "adam_lr": ("fallback_lr",),
    "embed_lr": ("fallback_lr",),
    "adamw_betas": ("betas",),
    "adam_betas": ("betas",),
    "adjust_lr_fn": ("lr_scale",),
    "grad_clip": ("max_grad_norm",),
}


@dataclass(frozen=True)
class CommonSettings:
    """Settings of every optimizer.

    Args:
        weight_decay: Decoupled weight decay of matrices (and of the rest, see ``fallback_weight_decay``).
        betas: Decay of the first and second moment of AdamW, or of Lion.
        eps: Added to the root of AdamW's second moment.
        fallback_lr: Learning rate of what is not a hidden matrix; ``lr`` when None. Kept as a ratio to ``lr``.
        fallback_weight_decay: Weight decay of what is not a hidden matrix; ``weight_decay`` when None.
        head_lr_scale: ``none``, or ``inverse_sqrt_width`` or ``inverse_width`` to divide the head's learning rate by
            sqrt(fan_in) or fan_in.
        roles: Regular expression searched in parameter names -> ``matrix``, ``transposed matrix``, ``embedding``,
            ``head`` or ``vector``, where the routing table is not what you want.
        max_grad_norm: Clip to this global norm, under every strategy; ``p.grad`` stays as it is.
        nonfinite: ``propagate`` NaN and Inf like torch, ``raise``, or ``skip`` the step on all ranks.
        bf16_weights: How a bf16 weight takes an update smaller than its rounding: ``nearest`` (it is lost),
            ``stochastic`` rounding, or ``compensated`` (16 more bits per weight: exactly an fp32 copy).
    """

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fallback_lr: float | None = None
    fallback_weight_decay: float | None = None
    head_lr_scale: str = "none"
    roles: dict[str, str] | None = None
    max_grad_norm: float | None = None
    nonfinite: str = "propagate"
    bf16_weights: str = "nearest"

    def __post_init__(self) -> None:
        """Raise ValueError with the name, the value and what is allowed."""
        require_kinds(type(self), vars(self))
        object.__setattr__(self, "betas", tuple(self.betas))  # schedulers rewrite a tuple; YAML gives a list
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {self.betas!r}.")
        for name in ("weight_decay", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be finite and >= 0, got {value!r}.")
        if self.fallback_weight_decay is not None and not 0 <= self.fallback_weight_decay < math.inf:
            raise ValueError(f"`fallback_weight_decay` must be >= 0, got {self.fallback_weight_decay!r}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be > 0 or None, got {self.max_grad_norm!r}.")
        require_choice("nonfinite", self.nonfinite, NONFINITE)
        require_choice("head_lr_scale", self.head_lr_scale, HEAD_LR_SCALES)
        require_choice("bf16_weights", self.bf16_weights, BF16_WEIGHTS)


@dataclass(frozen=True)
class MatrixSettings(CommonSettings):
    """Settings of every optimizer with an algorithm of its own for hidden matrices: ``CommonSettings`` and these.

    Args:
        momentum: Momentum of matrices, in [0, 1).
        norm_eps: A matrix whose direction is smaller than this fades out instead of moving at full size on noise.
        norm_eps_style: ``relative`` to the largest entry of the last thousand steps or so, or ``absolute``: a
            Frobenius norm, as in torch.optim.Muon.
        precision: Of the products: ``auto`` (bf16 where the hardware multiplies it), ``bf16``, ``fp32`` or ``fp64``.
        lr_scale: ``match_rms_adamw`` (0.2 sqrt(max(m, n)): an AdamW learning rate fits), ``original``
            (sqrt(max(1, m/n))), ``spectral`` (sqrt(m/n), as in the paper) or ``none``.
        fallback: ``adamw`` or ``lion`` for everything that is not a hidden matrix.
        split: Matrices of fused projections: ``none``, ``projections`` (q, k, v, gate and up each) or ``heads``
            (every head of q, k and v).
        share_over_ranks: Divide the orthogonalisation among the ranks that hold the same weights.
        bucket_mib: Size of the buckets in which matrices are exchanged between ranks; two are in flight at a time.
    """

    momentum: float = 0.95
    norm_eps: float = 1e-3
    norm_eps_style: str = "relative"
    precision: str = "auto"
    lr_scale: str = "match_rms_adamw"
    fallback: str = "adamw"
    split: str = "none"
    share_over_ranks: bool = True
    bucket_mib: float = 32.0

    def __post_init__(self) -> None:
        """Raise ValueError with the name, the value and what is allowed."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}.")
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(f"`norm_eps` must be finite and >= 0, got {self.norm_eps!r}.")
        if not self.bucket_mib > 0:
            raise ValueError(f"`bucket_mib` must be > 0, got {self.bucket_mib!r}.")
        require_choice("norm_eps_style", self.norm_eps_style, EPS_STYLES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("lr_scale", self.lr_scale, LR_SCALES)
        require_choice("fallback", self.fallback, VECTOR_RULES)
        require_choice("split", self.split, SPLITS)


@dataclass(frozen=True)
class OrthogonalSettings(MatrixSettings):
    """Settings of optimizers that orthogonalise the momentum: ``MatrixSettings`` and these.

    Args:
        nesterov: Look one gradient ahead.
        momentum_style: ``ema`` (``m += (1 - momentum) (g - m)``, torch) or ``heavy_ball`` (``m = momentum m + g``).
        orthogonalize: A coefficient set of ``functional.orthogonalize`` (``polar_express``, ``muon``, ...), ``svd`` or
            ``identity``.
        steps: Number of iterations; the set's own (5) when None.
    """

    nesterov: bool = True
    momentum_style: str = "ema"
    orthogonalize: str = "polar_express"
    steps: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError with the name, the value and what is allowed."""
        super().__post_init__()
        require_choice("momentum_style", self.momentum_style, MOMENTUM_STYLES)
        require_choice("orthogonalize", self.orthogonalize, METHODS)
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"`steps` must be >= 0 or None, got {self.steps!r}.")


# arXiv:2605.21803, hidden matrices and embedding / head, shared by Muon, NorMuon and Dion
MATRIX_PAPER: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.01,
    "momentum": 0.95,
    "lr_scale": "spectral",
    "fallback": "lion",
    "fallback_lr": 0.02,
    "fallback_weight_decay": 0.0,
    "head_lr_scale": "inverse_sqrt_width",
    "betas": (0.95, 0.98),
}
ORTHOGONAL_PAPER: dict[str, Any] = {**MATRIX_PAPER, "nesterov": True, "orthogonalize": "muon", "steps": 5}

# Settings of the whole optimizer; the others are in its groups, where they may differ and schedulers see them.
_OF_THE_OPTIMIZER = (
    "roles",
    "max_grad_norm",
    "nonfinite",
    "bf16_weights",
    "fallback",
    "fallback_lr",
    "fallback_weight_decay",
    "head_lr_scale",
    "split",
    "share_over_ranks",
    "bucket_mib",
)


def group_settings(settings: CommonSettings) -> dict[str, Any]:
    """The settings that every parameter group carries: a scheduler may look into any of them."""
    everything = {field.name: getattr(OrthogonalSettings, field.name) for field in fields(OrthogonalSettings)}
    everything.update({field.name: getattr(settings, field.name) for field in fields(settings)})
    return {name: value for name, value in everything.items() if name not in _OF_THE_OPTIMIZER}


def check_group(settings: CommonSettings, given: Mapping[str, Any]) -> None:
    """Refuse a group dict whose settings cannot be honoured; keys that are no settings are the user's own.

    Raises:
        ValueError: If a value is out of range, belongs to the whole optimizer, or asks to maximise.
    """
    misplaced = sorted(given.keys() & set(_OF_THE_OPTIMIZER) - {"fallback_weight_decay"})
    if misplaced:
        raise ValueError(
            f"{misplaced} in a parameter group: these are settings of the whole optimizer. Pass them to it."
        )
    if given.get("maximize"):
        raise ValueError("`maximize` in a parameter group is not supported: minimise the negative.")
    replace(settings, **{name: given[name] for name in given.keys() & {field.name for field in fields(settings)}})
    if "lr" in given:
        fallback_ratio(given["lr"], None)


def fallback_ratio(lr: float, fallback_lr: float | None) -> float:
    """``fallback_lr / lr``, which schedulers leave alone.

    Raises:
        ValueError: If a learning rate is no number, or out of range.
    """
    require_kinds(fallback_ratio, {"lr": lr})
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"`lr` must be finite and >= 0, got {lr!r}.")
    if fallback_lr is None:
        return 1.0
    if not (lr > 0 and fallback_lr >= 0):
        raise ValueError(
            f"`fallback_lr` is kept as a ratio to `lr`, so both must be positive; got {fallback_lr!r} and {lr!r}."
        )
    return float(fallback_lr / lr)


def full_signature(own: Callable[..., Any], settings: type[CommonSettings]) -> inspect.Signature:
    """The signature of an optimizer with its ``**shared`` spelled out: for help(), litgpt and checks of recipes."""
    parameters = list(inspect.signature(own, eval_str=False).parameters.values())
    named = [p for p in parameters[1:] if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in named}
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(settings)
        if f.name not in known
    ]
    return inspect.Signature([*named, *shared])
