"""Shape before slope: a straight line in ln-ln, a bent one, or a law with a floor, and which of them the data prefer.

* ``power``: ``A x^b``;
* ``bent``: ``ln y`` a parabola in ``ln x`` (its ``exponent`` is the slope in the middle);
* ``floor``: ``E + A x^-a``, the usual law of a loss with an irreducible part; in two variables
  ``E + A N^-a + B D^-b`` (the form of Hoffmann et al. 2022).

All are fitted to ln(y) by least squares, so that their AICc (small-sample Akaike criterion) can be compared: lower is
better, and a difference under 2 says nothing. Intervals are Student's t from the linearised fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult
from scipy.optimize import least_squares as solve

from lightning_spectral.analysis.linear import t_quantile

FloatArray = NDArray[np.float64]
NAN: Final = float("nan")
MODELS: Final = ("power", "bent", "floor")
FAR: Final = 6.0
_ROUNDS: Final = 20
_ROUNDING: Final = 1e-9
_EXPONENTS: Final = (0.1, 0.3, 0.7, 1.5)  # starting points
_FLOORS: Final = (0.2, 0.7, 0.95)  # of the smallest value


@dataclass(frozen=True)
class Shape:
    """One model of one series.

    Attributes:
        model: Name of the model.
        names: Its parameters.
        values: Their estimates.
        low: Lower ends of their 95 % intervals; NaN without degrees of freedom.
        high: Upper ends.
        aicc: Small-sample Akaike criterion; NaN with too few points.
        n: Points.
        rms: Root of the mean squared residual of ln y.
    """

    model: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    aicc: float
    n: int
    rms: float = NAN


def shapes_of(x: FloatArray, y: FloatArray) -> list[Shape]:
    """Every model of one series, best first; those with more parameters than the points can bear are left out.

    Args:
        x: (n,) positive.
        y: (n,) positive.
    """
    if len(np.unique(x)) < 2:
        return []
    found = [polynomial(x, y, 1), polynomial(x, y, 2), floor([x], y)]
    usable = [shape for shape in found if shape is not None]
    return sorted(usable, key=lambda shape: shape.aicc if math.isfinite(shape.aicc) else math.inf)


def polynomial(x: FloatArray, y: FloatArray, degree: int) -> Shape | None:
    """``power`` (degree 1) or ``bent`` (2); ``None`` without a degree of freedom."""
    u = np.log(x) - np.log(x).mean()
    columns = np.stack([u**k for k in range(degree + 1)], axis=1)
    n, k = columns.shape
    if len(np.unique(x)) <= k:
        return None
    values = np.linalg.lstsq(columns, np.log(y), rcond=None)[0]
    rss = float(((np.log(y) - columns @ values) ** 2).sum())
    name, names = ("power", ("level", "exponent")) if degree == 1 else ("bent", ("level", "exponent", "bend"))
    return _shape(name, names, values, columns, rss, n)


def floor(xs: Sequence[FloatArray], y: FloatArray) -> Shape | None:
    """``E + sum_i A_i x_i^-a_i``; ``None`` where no decreasing law can be fitted.

    Args:
        xs: One or more variables, each (n,).
        y: (n,) positive.
    """
    scales = [float(np.exp(np.log(x).mean())) for x in xs]
    z = [x / scale for x, scale in zip(xs, scales, strict=True)]
    n, k = len(y), 1 + 2 * len(xs)
    if n <= k or any(len(np.unique(x)) < 3 for x in xs):
        return None

    def residual(parameters: FloatArray) -> FloatArray:
        """``parameters``: ln E, then ln A_i and a_i in turn."""
        terms = [np.exp(parameters[1 + 2 * i]) * x ** -parameters[2 + 2 * i] for i, x in enumerate(z)]
        return np.asarray(np.log(np.exp(parameters[0]) + sum(terms)) - np.log(y))

    best: OptimizeResult | None = None
    for share, exponent in itertools.product(_FLOORS, _EXPONENTS):
        rest = max(float(np.median(y)) - share * float(y.min()), 1e-6 * float(y.min())) / len(xs)
        start = [math.log(share * float(y.min())), *[math.log(rest), exponent] * len(xs)]
        with np.errstate(all="ignore"):
            if not np.isfinite(residual(np.array(start))).all():  # a variable over hundreds of decades
                continue
            found = solve(residual, start, method="lm", max_nfev=400)
        if np.isfinite(found.cost) and (best is None or found.cost < best.cost):
            best = found
    if best is None or any(best.x[2 + 2 * i] <= 0 for i in range(len(xs))):
        return None
    names = ["E", *itertools.chain(*([f"A{i or ''}", f"exponent{i or ''}"] for i in range(len(xs))))]
    in_units = np.eye(k)  # ln A_i of a variable is that of the scaled one plus exponent times ln scale
    for i, scale in enumerate(scales):
        in_units[1 + 2 * i, 2 + 2 * i] = math.log(scale)
    shape = _shape("floor", tuple(names), best.x, best.jac, 2 * float(best.cost), n, in_units)
    values, low, high = (_without_ln(own) for own in (shape.values, shape.low, shape.high))
    return replace(shape, values=values, low=low, high=high)


def without_far(xs: Sequence[FloatArray], y: FloatArray, law: Shape) -> tuple[Shape | None, NDArray[np.bool_]]:
    """A law of :func:`floor` fitted again without the points far off it, until these stay the same.

    A handful of points (digitised wrongly, diverged) can carry least squares far beyond the interval.

    Returns:
        The law without them (``None`` if there is none), and (n,) whether a point lies more than :data:`FAR` robust
        standard deviations (1.4826 median absolute deviations) of ln y off it.
    """
    far, own = np.zeros(len(y), dtype=np.bool_), law
    for _ in range(_ROUNDS):
        terms = [own.values[1 + 2 * i] * x ** -own.values[2 + 2 * i] for i, x in enumerate(xs)]
        left = np.abs(np.log(own.values[0] + np.sum(terms, axis=0)) - np.log(y))
        now = left > FAR * max(1.4826 * float(np.median(left)), _ROUNDING)
        if (now == far).all():
            break
        again = floor([x[~now] for x in xs], y[~now])
        if again is None:
            return None, now
        far, own = now, again
    return own, far


def _shape(
    model: str,
    names: tuple[str, ...],
    values: FloatArray,
    jacobian: FloatArray,
    rss: float,
    n: int,
    in_units: FloatArray | None = None,
) -> Shape:
    """Intervals from the linearised fit; ``in_units @ values`` are the parameters reported."""
    k, df = len(values), n - len(values)
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * (rss / df if df > 0 else NAN)
    if in_units is not None:
        values, covariance = in_units @ values, in_units @ covariance @ in_units.T
    half = float(t_quantile(df)) * np.sqrt(np.diag(covariance))
    free = n - k - 2  # the variance is a parameter, too
    aicc = n * math.log(max(rss, 1e-300) / n) + 2 * (k + 1) * n / free if free > 0 else NAN
    low, high = values - half, values + half
    fitted, lower, upper = (tuple(map(float, own)) for own in (values, low, high))
    return Shape(model, names, fitted, lower, upper, aicc, n, math.sqrt(rss / n))


def _without_ln(parameters: tuple[float, ...]) -> tuple[float, ...]:
    """Ln E, then ln A_i and a_i in turn -> E, A_i and a_i."""
    return tuple(
        value if place and place % 2 == 0 else math.exp(min(value, 700.0)) for place, value in enumerate(parameters)
    )
