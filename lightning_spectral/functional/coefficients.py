"""Which polynomial a Newton-Schulz iteration applies, and what that does to one singular value.

A step maps ``X`` to ``a X + b (X X^T) X + c (X X^T)^2 X``. The singular vectors stay; every singular value goes through
the scalar polynomial ``a s + b s^3 + c s^5``. So all that can be said about an iteration is said by its rows
``(a, b, c)`` and by the normaliser that brings the singular values into [0, 1] before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# R number of singular values of one matrix

Row = tuple[float, float, float]
Normalizer = Literal["frobenius", "schatten4"]

_MUON: Row = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: steepest slope at zero, never settles at one
_CUBIC: Row = (1.5, -0.5, 0.0)
_QUINTIC: Row = (1.875, -1.25, 0.375)  # Taylor of z / |z| around 1: the limit of the Polar Express rows
_SETTLE: Row = (2.0, -1.5, 0.5)  # fixed point 1 with zero slope; pulls Muon's [0.68, 1.21] back to one


@dataclass(frozen=True)
class CoefficientSet:
    """One named iteration.

    Attributes:
        rows: Number of steps -> one ``(a, b, c)`` per step.
        steps: The number of steps the set is meant for.
        normalizer: ``"frobenius"`` divides by the Frobenius norm, ``"schatten4"`` by ``(sum s^4)^(1/4)``, the tightest
            upper bound on the spectral norm that the first Gram matrix gives for free.
        band: Interval that holds every singular value >= ``resolves`` after ``steps`` steps in exact arithmetic.
        resolves: Smallest normalised singular value that ``steps`` steps bring into ``band``.
        source: Where the rows come from.
    """

    rows: Callable[[int], tuple[Row, ...]]
    steps: int
    normalizer: Normalizer
    band: tuple[float, float]
    resolves: float
    source: str


def _minimax_quintic(low: float, high: float) -> tuple[Row, float]:
    """Odd quintic closest to 1 on [low, high], and its largest error there (Remez exchange on four points)."""
    if low / high > 1 - 1e-5:  # the exchange is ill-conditioned here, and the limit is known
        middle = (low + high) / 2
        return (_QUINTIC[0] / middle, _QUINTIC[1] / middle**3, _QUINTIC[2] / middle**5), 0.0
    points = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high]
    error = math.inf
    for _ in range(100):
        powers = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)]
        system = torch.tensor(powers, dtype=torch.float64, device="cpu")
        a, b, c, new_error = torch.linalg.solve(system, torch.ones_like(system[0])).tolist()
        # Inner extrema are the roots of the derivative a + 3 b x^2 + 5 c x^4.
        root = math.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        if abs(new_error - error) <= 1e-14:
            break
        error = new_error
    return (a, b, c), abs(new_error)


@lru_cache(maxsize=64)
def polar_express_rows(
    steps: int, lower: float = 1e-3, safety: float = 1.01, cushion: float = 0.024
) -> tuple[Row, ...]:
    """Greedy minimax quintics for singular values in [lower, 1] (Polar Express, arXiv:2505.16932).

    Each row is the best odd quintic on the interval that the rows before it leave, which makes the composition optimal.

    Args:
        steps: Number of rows; a longer list starts with the shorter one.
        lower: Smallest normalised singular value that the design accounts for.
        safety: Every interval is designed this much wider at its top, so that rounding (bf16: 2^-8) cannot leave it.
        cushion: Ratio low / high below which the design stops being greedy: a polynomial for a wider interval would
            amplify the bulk of the spectrum too unevenly.
    """
    rows: list[Row] = []
    low, high = lower, 1.0
    for _ in range(steps):
        top = high * safety
        (a, b, c), _ = _minimax_quintic(max(low, cushion * top), top)
        # With the cushion, or the safety margin, the image of [low, high] is no longer centred on one: centre it again.
        image_low = a * low + b * low**3 + c * low**5
        image_high = max(a * x + b * x**3 + c * x**5 for x in _extrema_and_end(a, b, c, low, high))
        scale = 2 / (image_low + image_high)
        rows.append((a * scale, b * scale, c * scale))
        low, high = image_low * scale, image_high * scale
    return tuple(rows)


def _extrema_and_end(a: float, b: float, c: float, low: float, high: float) -> list[float]:
    root = 9 * b * b - 20 * a * c
    inner = [
        math.sqrt(x) for x in ((-3 * b + sign * math.sqrt(max(root, 0.0))) / (10 * c) for sign in (-1, 1)) if x > 0
    ]
    return [high, *(x for x in inner if low < x < high)]


@lru_cache(maxsize=64)
def rows_for_band(steps: int, delta: float) -> tuple[Row, ...]:
    """The composition of ``steps`` quintics that brings the widest interval [lower, 1] into [1 - delta, 1 + delta].

    Composed minimax polynomials (CANS, arXiv:2506.10935, whose Remez iteration for a band of the orthogonaliser this
    is): every row is the best on the interval that the rows before it leave, and ``lower`` is found by bisection. So
    small singular values are lifted as far as a given flatness of the large ones allows.

    Args:
        steps: Number of rows, >= 1.
        delta: Half of the band's width, in (0, 1).
    """
    low, high = math.log(1e-8), math.log(0.9)
    for _ in range(30):
        middle = (low + high) / 2
        rows = polar_express_rows.__wrapped__(steps, math.exp(middle), cushion=0.0)
        value = math.exp(middle)
        for a, b, c in rows:
            value *= a + value**2 * (b + value**2 * c)
        low, high = (middle, high) if value < 1 - delta else (low, middle)
    return polar_express_rows(steps, math.exp(high), cushion=0.0)


def turbo_rows(steps: int = 4) -> tuple[Row, ...]:
    """Rows for a matrix that comes preconditioned (Turbo-Muon, arXiv:2512.04632), computed here: into 1 +- 0.06."""
    return rows_for_band(steps, 0.06) if steps > 0 else ()


def _cans_rows(steps: int) -> tuple[Row, ...]:
    return rows_for_band(steps, 0.3) if steps > 0 else ()


def _muon_then_settle(steps: int) -> tuple[Row, ...]:
    return (_MUON,) * max(steps - 2, 0) + (_SETTLE,) * min(steps, 2)


def _polar_express_schatten4(steps: int) -> tuple[Row, ...]:
    # The tighter normaliser lifts every singular value, so the design can start higher and ends closer to one:
    # 4e-2 instead of 1e-1 from the polar factor after five steps on Gaussian and on 1/i spectra.
    return polar_express_rows(steps, lower=1.5e-3)


# Bands and `resolves` are held by tests/functional/test_orthogonalize.py on a dense grid of scalars and on matrices.
COEFFICIENTS: dict[str, CoefficientSet] = {
    "polar_express": CoefficientSet(
        _polar_express_schatten4,
        5,
        "schatten4",
        (0.94, 1.06),
        1.5e-3,
        "Polar Express rows, Schatten-4 normaliser (ours)",
    ),
    "polar_express_frobenius": CoefficientSet(
        polar_express_rows, 5, "frobenius", (0.86, 1.14), 1e-3, "Polar Express, arXiv:2505.16932"
    ),
    "cans": CoefficientSet(
        _cans_rows,
        5,
        "frobenius",
        (0.7, 1.3),
        5.3e-4,
        "Chebyshev-type composition for a band of 1 +- 0.3, arXiv:2506.10935 (computed)",
    ),
    "muon": CoefficientSet(
        lambda steps: (_MUON,) * steps,
        5,
        "frobenius",
        (0.68, 1.21),
        1.52e-3,
        "Muon, Keller Jordan 2024; torch.optim.Muon",
    ),
    "muon_settled": CoefficientSet(
        _muon_then_settle, 10, "frobenius", (0.99, 1.01), 2.4e-5, "eight Muon steps and two that settle, as DeepSeek-V4"
    ),
    "quintic": CoefficientSet(
        lambda steps: (_QUINTIC,) * steps, 12, "frobenius", (0.95, 1.001), 8.4e-4, "Newton-Schulz of order 5, monotone"
    ),
    "cubic": CoefficientSet(
        lambda steps: (_CUBIC,) * steps, 20, "frobenius", (0.95, 1.001), 4.8e-4, "Newton-Schulz of order 3, monotone"
    ),
}


def coefficient_set(name: str) -> CoefficientSet:
    """Look a set up by name.

    Raises:
        ValueError: If the table has no such name.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"`coefficients` must be one of {sorted(COEFFICIENTS)}, got {name!r}.")
    return COEFFICIENTS[name]


def coefficient_rows(name: str, steps: int | None = None) -> tuple[Row, ...]:
    """The ``(a, b, c)`` of each step.

    Args:
        name: A name in ``COEFFICIENTS``.
        steps: Number of steps, >= 0; the set's own number when omitted.

    Raises:
        ValueError: If the name is unknown or ``steps`` is negative.
    """
    chosen = coefficient_set(name)
    steps = chosen.steps if steps is None else steps
    if steps < 0:
        raise ValueError(f"`steps` must be >= 0, got {steps}.")
    return chosen.rows(steps)


def apply_to_singular_values(coefficients: str, steps: int | None, sigma: Tensor) -> Tensor:
    """What the iteration makes of normalised singular values, in exact arithmetic.

    Args:
        coefficients: A name in ``COEFFICIENTS``.
        steps: Number of steps; the set's own number when None.
        sigma: Normalised singular values in [0, 1], any shape.

    Returns:
        Same shape, computed in fp64 and returned in the dtype of ``sigma``.
    """
    value = sigma.double()
    for a, b, c in coefficient_rows(coefficients, steps):
        square = value * value
        value = value * (a + square * (b + square * c))
    return value.to(sigma.dtype)


def normalize_singular_values(singular_values: Tensor, coefficients: str) -> Tensor:
    """Divide spectra (..., R) by the normaliser of the set; an all-zero spectrum stays zero."""
    order = {"frobenius": 2, "schatten4": 4}[coefficient_set(coefficients).normalizer]
    largest = singular_values.amax(dim=-1, keepdim=True)
    scaled = singular_values / largest.where(largest > 0, 1.0)  # the fourth power of a small value would underflow
    norm = scaled.pow(order).sum(dim=-1, keepdim=True).pow(1 / order)
    return scaled / norm.clamp(min=1.0)  # it is at least one, or zero


def flattened_share(
    singular_values: Tensor, coefficients: str, steps: int | None = None, band: tuple[float, float] | None = None
) -> Tensor:
    """Share of a spectrum that the iteration brings into its band: 1 means the update is flat, as its polar factor.

    Args:
        singular_values: Spectra (..., R) of the matrices that enter the iteration, >= 0, any scale.
        coefficients: A name in ``COEFFICIENTS``.
        steps: Number of steps; the set's own number when None.
        band: Interval that counts as flat; the set's documented band when None.

    Returns:
        Shares in [0, 1], shape (...).

    Raises:
        ValueError: If a singular value is negative or not finite, or the name is unknown.
    """
    _check_spectrum(singular_values)
    low, high = coefficient_set(coefficients).band if band is None else band
    image = apply_to_singular_values(
        coefficients, steps, normalize_singular_values(singular_values.double(), coefficients)
    )
    return ((image >= low) & (image <= high)).double().mean(dim=-1)


def steps_to_flatten(
    singular_values: Tensor,
    coefficients: str,
    share: float = 1.0,
    band: tuple[float, float] | None = None,
    max_steps: int = 60,
) -> int | None:
    """Fewest steps after which the iteration holds ``share`` of one spectrum in its band.

    Args:
        singular_values: One spectrum (R,), >= 0, any scale.
        coefficients: A name in ``COEFFICIENTS``.
        share: Share of the singular values that must be inside, in (0, 1].
        band: Interval that counts as flat; the set's documented band when None.
        max_steps: Where to stop looking.

    Returns:
        The number of steps, or None when ``max_steps`` are not enough (a zero singular value never moves).

    Raises:
        ValueError: If the spectrum is not one-dimensional, or ``share`` is outside (0, 1].
    """
    if singular_values.ndim != 1:
        raise ValueError(f"`singular_values` must be one spectrum of shape (R,), got {tuple(singular_values.shape)}.")
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}.")
    for steps in range(max_steps + 1):
        if float(flattened_share(singular_values, coefficients, steps, band)) >= share:
            return steps
    return None


def _check_spectrum(singular_values: Tensor) -> None:
    if not bool(torch.isfinite(singular_values).all()) or bool((singular_values < 0).any()):
        raise ValueError("`singular_values` must be finite and >= 0; take them from torch.linalg.svdvals.")
