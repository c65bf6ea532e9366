"""What an optimizer makes of one gradient: the direction it adds to W.

One row of :data:`RULES` each. ``muon`` is the exact polar factor (or the smoothed map h_lambda), ``ns<k>`` what k
Newton-Schulz steps make of it, ``power<p>`` raises singular values to p, ``newton`` is the exact Newton step at W = 0,
``sign`` also Adam's first step.
"""

# N items, D features of v, M features of u, R items that carry weight

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_spectral.functional.orthogonalize import (
    apply_to_singular_values,
    coefficient_set,
    newton_schulz,
)
from lightning_spectral.functional.polar import SingularMatrixError, polar_newton, smoothed_polar_newton
from lightning_spectral.theory.embeddings import Embeddings
from lightning_spectral.theory.problem import MemoryProblem, require_integer, require_real

POLAR_BACKENDS = ("newton", "svd")
NS_DTYPES = ("float32", "bfloat16", "float64")
_NULL_DIRECTION = 1e-12  # sigma / sigma_max below it belongs to no item: left out of the pseudo-polar
_FP32_SCALE = 1e-12  # variance of an input, relative to the mean one
_FP64 = torch.float64


class SingularInputError(ValueError):
    """Newton without a ridge has fewer distinct items than inputs have features."""


@dataclass(frozen=True)
class RuleSettings:
    """Options that some rules take; a rule ignores those that are not its own.

    Args:
        lam: Absolute lambda of ``h(s) = s / sqrt(s^2 + lambda^2)`` in ``muon``, >= 0; 0 is the polar factor.
        lam_scale: lambda in units of ``p_1 d^-alpha``, d the smaller side of W; added to nothing: give one of the two.
        coefficients: Name of the Newton-Schulz coefficient set, for ``ns``.
        ns_steps: Steps of ``ns``; ``None`` takes as many as the smallest predicted singular value needs.
        ns_dtype: Type of the Newton-Schulz products.
        ridge: Added to the input covariance in ``newton``, in units of its mean eigenvalue, >= 0.
        polar: How ``muon`` finds the polar factor: ``newton`` (matrix products, inversions) or ``svd``.
        power: p of ``h(s) = s^p`` in ``power``, 0 < p < 1: between ``muon`` (0) and ``sgd`` (1).

    Raises:
        ValueError: A value is out of range; the message names the field.
    """

    lam: float = 0.0
    lam_scale: float | None = None
    coefficients: str = "muon"
    ns_steps: int | None = 5
    ns_dtype: str = "float32"
    ridge: float = 0.0
    polar: str = "newton"
    power: float = 0.5

    def __post_init__(self) -> None:
        for field in ("lam", "lam_scale", "ridge"):
            value = getattr(self, field)
            if value is None:
                continue
            require_real(field, value)
            if value < 0:
                raise ValueError(f"`{field}` must be >= 0, got {value}.")
        require_real("power", self.power)
        if not 0 < self.power < 1:
            raise ValueError(f"`power` must lie between 0 and 1, got {self.power}; use `muon` for 0, `sgd` for 1.")
        if self.lam_scale is not None and self.lam > 0:
            raise ValueError(f"`lam` ({self.lam}) and `lam_scale` ({self.lam_scale}) both set lambda; give one.")
        if self.ns_steps is not None:
            require_integer("ns_steps", self.ns_steps, 1, "no step leaves the gradient as it is: use the rule `sgd`")
        coefficient_set(self.coefficients)
        if self.ns_dtype not in NS_DTYPES:
            raise ValueError(f"`ns_dtype` must be one of {', '.join(NS_DTYPES)}, got {self.ns_dtype!r}.")
        if self.polar not in POLAR_BACKENDS:
            raise ValueError(f"`polar` must be one of {', '.join(POLAR_BACKENDS)}, got {self.polar!r}.")

    def lambda_of(self, problem: MemoryProblem) -> float:
        """The absolute lambda for one problem."""
        if self.lam_scale is None:
            return self.lam
        return float(self.lam_scale * problem.frequencies()[0] * min(problem.shape) ** -problem.alpha)


@dataclass(frozen=True)
class Gradient:
    """What a rule sees: minus the gradient, and the items it came from.

    Attributes:
        matrix_MD: Minus the gradient, shape (M, D), fp64.
        weights: Weight of each item in it, shape (N,).
        embeddings: The items.
        at_zero: Whether W was 0, where rank and Hessian are known in closed form.
    """

    matrix_MD: Tensor
    weights: NDArray[np.float64]
    embeddings: Embeddings
    at_zero: bool = True

    @property
    def problem(self) -> MemoryProblem:
        """The problem the items come from."""
        return self.embeddings.problem


Direction = Callable[[Gradient, RuleSettings], Tensor]


def direction(rule: str, gradient: Gradient, settings: RuleSettings | None = None) -> Tensor:
    """What ``rule`` adds to W, shape (M, D), fp64, not rescaled.

    Args:
        rule: ``sgd``, ``sign``, ``muon``, ``newton``, ``ns`` or ``ns<k>`` (k steps), ``power`` or ``power<p>``.
        gradient: Minus the gradient and its items.
        settings: Options of the rules.

    Raises:
        SingularInputError: A singular input covariance in ``newton``.
        ValueError: Unknown rule, a non-finite or an all-zero gradient (its polar factor does not exist).
    """
    name, settings = parse_rule(rule, settings or RuleSettings())
    matrix_MD = gradient.matrix_MD
    if not torch.isfinite(matrix_MD).all():
        raise ValueError("The gradient must be finite, got NaN or Inf; lower the step size.")
    if not matrix_MD.any():
        raise ValueError(f"The gradient is exactly zero: `{rule}` has no direction. Is every item masked?")
    return RULES[name](gradient, settings)


def parse_rule(rule: str, settings: RuleSettings) -> tuple[str, RuleSettings]:
    """Name in :data:`RULES` and settings, with the k of ``ns<k>`` and the p of ``power<p>`` read."""
    match = re.fullmatch(r"ns(\d+)", rule)
    if match:
        return "ns", replace(settings, ns_steps=int(match.group(1)))
    match = re.fullmatch(r"power(0?\.\d+)", rule)
    if match:
        return "power", replace(settings, power=float(match.group(1)))
    if rule not in RULES:
        raise ValueError(
            f"`rules` must be among {', '.join(RULES)}, ns<steps> (ns5, ns10) or power<p> (power0.5), got {rule!r}."
        )
    return rule, settings


def settings_dict(rule: str, settings: RuleSettings, problem: MemoryProblem) -> dict[str, Any]:
    """The settings that ``rule`` really used, for ``results.jsonl``; those of other rules are left out."""
    name, settings = parse_rule(rule, settings)
    values = asdict(settings)
    used: dict[str, Any] = {}
    if name == "muon":
        used = {"lam": settings.lambda_of(problem), "lam_scale": settings.lam_scale, "polar": settings.polar}
    elif name == "ns":
        used = {key: values[key] for key in ("coefficients", "ns_dtype")}
        used["ns_steps"] = ns_steps_of(settings, problem)
    elif name == "power":
        used = {"power": settings.power}
    elif name == "newton":
        used = {"ridge": settings.ridge}
    return used


def ns_steps_of(settings: RuleSettings, problem: MemoryProblem) -> int:
    """``settings.ns_steps``, or the steps that flatten down to the smallest predicted singular value."""
    if settings.ns_steps is not None:
        return settings.ns_steps
    return steps_for_capacity(min(problem.shape), problem.alpha + problem.anisotropy / 2, settings.coefficients)


def steps_for_capacity(d: int, alpha: float, coefficients: str = "muon") -> int:
    """Newton-Schulz steps that lose no capacity: enough to flatten singular values of ``||G||_F / (4 d^alpha)``.

    The gradient of a power-law memory has singular values down to that size, and the items at the capacity limit live
    in the smallest ones. Each early step multiplies small values by the first coefficient, so that the number grows as
    ``ln(4 d^alpha) / ln a``: 5 steps of Muon's quintic (a = 3.4445) reach down to 1/485 only.

    Raises:
        ValueError: Unknown coefficient set.
        RuntimeError: 200 steps are not enough (the set cannot reach that far).
    """
    require_integer("d", d, 2, "a map needs at least two features")
    sigma = torch.logspace(-math.log10(4 * d**alpha), 0, 400, dtype=_FP64)
    for steps in range(1, 201):
        image = apply_to_singular_values(coefficients, steps, sigma)
        if float(image.min()) >= 0.65 and float(image.max()) <= 1.35:  # as even as Muon's own band
            return steps
    raise RuntimeError(f"{coefficients} does not flatten 1/{4 * d**alpha:.3g} within 200 steps; choose another set.")


def _sgd(gradient: Gradient, settings: RuleSettings) -> Tensor:
    return gradient.matrix_MD


def _sign(gradient: Gradient, settings: RuleSettings) -> Tensor:
    return gradient.matrix_MD.sign()


def _muon(gradient: Gradient, settings: RuleSettings) -> Tensor:
    lam = settings.lambda_of(gradient.problem)
    if settings.polar == "svd":
        return _by_svd(gradient.matrix_MD, lam)
    if lam > 0:
        return smoothed_polar_newton(gradient.matrix_MD, lam)
    try:
        num_active = int((gradient.weights > 0).sum())
        if gradient.at_zero and num_active <= min(gradient.problem.shape):
            return _polar_of_few_items(gradient)
        return polar_newton(gradient.matrix_MD)
    except SingularMatrixError:  # documented: null directions are dropped, as the SVD route does
        return _by_svd(gradient.matrix_MD, 0.0)


def _by_svd(matrix_MD: Tensor, lam: float) -> Tensor:
    def flat(sigma_R: Tensor) -> Tensor:
        return sigma_R / torch.hypot(sigma_R, torch.full_like(sigma_R, lam)) if lam else torch.ones_like(sigma_R)

    return _on_singular_values(matrix_MD, flat)


def _power(gradient: Gradient, settings: RuleSettings) -> Tensor:
    return _on_singular_values(gradient.matrix_MD, lambda sigma_R: (sigma_R / sigma_R[0]) ** settings.power)


def _on_singular_values(matrix_MD: Tensor, image_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``U h(S) V^T`` without the null directions."""
    left_MR, sigma_R, right_RD = torch.linalg.svd(matrix_MD.double(), full_matrices=False)
    image_R = torch.where(sigma_R > _NULL_DIRECTION * sigma_R[0], image_of(sigma_R), 0.0)
    return (left_MR * image_R) @ right_RD


def _polar_of_few_items(gradient: Gradient) -> Tensor:
    """Pseudo-polar of a gradient of rank R <= min(M, D), through the R x R core between bases of its items."""
    embeddings = gradient.embeddings
    active_R = torch.from_numpy(np.flatnonzero(gradient.weights)).to(embeddings.device)
    weight_R = torch.from_numpy(gradient.weights).to(embeddings.device)[active_R]
    mean_u_M = sum(block.sum(0, dtype=_FP64) for _, block in embeddings.blocks("u")) / gradient.problem.n_items
    left_MR, left_RR = torch.linalg.qr((embeddings.select("u", active_R).double() - mean_u_M).mT)
    right_DR, right_RR = torch.linalg.qr(embeddings.select("v", active_R).double().mT)
    core_RR = (left_RR * weight_R) @ right_RR.mT
    return left_MR @ polar_newton(core_RR) @ right_DR.mT


def _newton_schulz(gradient: Gradient, settings: RuleSettings) -> Tensor:
    steps = ns_steps_of(settings, gradient.problem)
    scaled_MD = gradient.matrix_MD / gradient.matrix_MD.abs().amax()  # fp32 and bf16 have a range to stay in
    dtype = getattr(torch, settings.ns_dtype)
    return newton_schulz(scaled_MD.to(dtype), settings.coefficients, steps, dtype).double()


def _newton(gradient: Gradient, settings: RuleSettings) -> Tensor:
    """``Cov_u^+ G (Sigma_v + ridge)^-1``: the Hessian of the loss at W = 0 is ``Cov_u (x) Sigma_v``."""
    if not gradient.at_zero:
        raise ValueError("`newton` has a closed form at W = 0 only: use it in one-step runs or with mode `deflation`.")
    problem = gradient.problem
    num_active = int((gradient.weights > 0).sum())
    if is_singular("newton", settings, num_active, problem.d):
        raise SingularInputError(
            f"`ridge` must be > 0 for `newton` here: the gradient holds {num_active} distinct items, fewer than d="
            f"{problem.d}, so the input covariance is singular. Pass --ridge 1e-3, enlarge `batch_size` or `n_items`, "
            "or take fewer steps."
        )
    cov_u_MM, cov_v_DD = _covariances(gradient)
    diagonal_D = cov_v_DD.diagonal()
    diagonal_D.add_(settings.ridge * diagonal_D.mean())
    half_MD = _solve_symmetric(cov_u_MM, gradient.matrix_MD)
    # in units of each input's own spread: else the few directions of anisotropic inputs hide the others
    scale_D = diagonal_D.sqrt()
    return _solve_symmetric(cov_v_DD / torch.outer(scale_D, scale_D), (half_MD / scale_D).mT).mT / scale_D


def is_singular(rule: str, settings: RuleSettings, num_active: int, d: int) -> bool:
    """Whether ``rule`` has no direction for a gradient of ``num_active`` distinct items and inputs of d features."""
    return parse_rule(rule, settings)[0] == "newton" and settings.ridge == 0 and num_active < d


def _covariances(gradient: Gradient) -> tuple[Tensor, Tensor]:
    """Uniform covariance of u, (M, M), and weighted second moment of v, (D, D), fp64."""
    embeddings, problem = gradient.embeddings, gradient.problem
    dtype = getattr(torch, problem.dtype)
    weight_N = torch.from_numpy(gradient.weights).to(embeddings.device)
    cov_u_MM, cov_v_DD = (torch.zeros(size, size, dtype=_FP64, device=embeddings.device) for size in problem.shape)
    sum_M = torch.zeros(problem.shape[0], dtype=_FP64, device=embeddings.device)
    steep = float(problem.input_scales()[-1]) < _FP32_SCALE  # squares of such inputs leave the range of fp32
    for start, u_CM in embeddings.blocks("u"):
        sum_M += u_CM.sum(0, dtype=_FP64)
        cov_u_MM += u_CM.to(dtype).mT @ u_CM.to(dtype)
        weight_C = weight_N[start : start + len(u_CM)]
        if not weight_C.any():
            continue
        # the heads outweigh the smallest eigenvalue by d^alpha: their products are in fp64
        inner = _FP64 if start == 0 or steep else dtype
        root_CD = embeddings.rows("v", start, start + len(u_CM)).to(inner) * weight_C.sqrt().to(inner)[:, None]
        cov_v_DD += root_CD.mT @ root_CD
    mean_M = sum_M / problem.n_items
    return cov_u_MM / problem.n_items - torch.outer(mean_M, mean_M), cov_v_DD


def _solve_symmetric(matrix_DD: Tensor, right_DD: Tensor) -> Tensor:
    """``matrix^+ right`` for a positive semi-definite matrix."""
    factor_DD, info = torch.linalg.cholesky_ex(matrix_DD)
    smallest, largest = float(factor_DD.diagonal().min()), float(factor_DD.diagonal().max())
    if int(info) == 0 and smallest > 1e-7 * largest:
        return torch.cholesky_solve(right_DD, factor_DD)
    # fewer items than features: the pseudo-inverse drops directions that no item has
    value_D, basis_DD = torch.linalg.eigh(matrix_DD)
    inverse_D = torch.where(value_D > 1e-12 * value_D[-1], 1.0 / value_D.clamp(min=1e-300), 0.0)
    return (basis_DD * inverse_D) @ (basis_DD.mT @ right_DD)


RULES: dict[str, Direction] = {
    "sgd": _sgd,
    "sign": _sign,
    "muon": _muon,
    "ns": _newton_schulz,
    "power": _power,
    "newton": _newton,
}
