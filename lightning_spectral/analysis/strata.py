"""Intervals where runs repeat by seed: what seeds, widths and single runs each add to the error of a line.

The model of ln(value) at width x and seed s is a mixed one::

    y = level + slope (x - x0) + u_s + v_s (x - x0) + w_x + e

with a random level ``u`` and slope ``v`` a seed, a random effect ``w`` a width (shared by its runs: curvature, the same
tokens) and a residual ``e``. Level and slope are estimated by regression within seeds (a seed that covers only some of
the widths then tilts nothing); on a complete design that is the line through the means of the widths. Each variance
component has its mean square, from the difference of two projections (Henderson's method 3), complete design or not.

The variance of an estimate is a sum of mean squares, that of the residual with a minus sign. Satterthwaite's degrees of
freedom for such a sum cover 73 to 90 % where there are two or three seeds; the generalized interval (Weerahandi 1993)
replaces each mean square by what its chi-squared law says its expectation may be and averages the tail probability over
that law, here by a fixed product rule rather than by random draws, so that a number is the same at every call. It
covers too much (up to 99.5 %) where seeds do not differ, so it is averaged with the model without seeds, by how much
the data speak for seeds (:attr:`Uncertainty.weight`). With one mean square all of this is Student's t, exactly.
`benchmarks/bench_coverage.py` measures what is covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, fdtr, ndtr

from lightning_spectral.analysis.linear import LEVEL, t_quantile, two_sided_p

FloatArray = NDArray[np.float64]
MAX_POINTS: Final = 400  # projections are n x n
_NODES: Final = 11  # of the product rule, for a mean square of few degrees of freedom
_MANY_STRATA_NODES: Final = 9  # of each, where there are four or more
_FEW_NODES: Final = 5  # for the residual's
_REACH: Final = 5.4  # of the rule, in standard normal units
_TINY: Final = 1e-9
_SMALLEST: Final = 1e-280


@dataclass(frozen=True)
class Uncertainty:
    """What the error of one estimate, or of several with the same strata, is made of.

    Attributes:
        terms: (..., strata) mean squares times their coefficients; the residual's may be negative.
        df: Degrees of freedom of each stratum.
        floor: (...,) variance that the points' own errors of measurement make; residuals cannot argue it away.
        weight: (...,) weight of these terms against ``without``, in [0, 1].
        without: The same error if seeds add nothing.
    """

    terms: FloatArray
    df: tuple[int, ...]
    floor: FloatArray
    weight: FloatArray | float = 1.0
    without: Uncertainty | None = None

    @property
    def variance(self) -> FloatArray:
        """Estimated variance, at least the floor; that of the model without seeds where it is not positive."""
        own = np.maximum(self.terms.sum(-1), self.floor)
        return np.asarray(own if self.without is None else np.where(own > 0, own, self.without.variance))

    @property
    def satterthwaite_df(self) -> float:
        """Degrees of freedom of the variance, between the fewest and the sum of those behind it."""
        if not self.df:
            return math.nan
        spread = float((self.terms**2 / np.array(self.df)).sum())
        df = float(self.terms.sum()) ** 2 / spread if spread > 0 else float(sum(self.df))
        return min(max(df, float(min(self.df))), float(sum(self.df)))

    def half_width(self, level: float = LEVEL) -> float:
        """Half of the two-sided interval of one estimate; NaN without degrees of freedom."""
        if not self.df:
            return math.nan
        if len(self.df) == 1 and self.without is None:
            return float(t_quantile(self.df[0], level)) * math.sqrt(float(self.variance))
        size = max(float(np.abs(self.terms).max()), float(self.floor), _SMALLEST)
        if size <= _SMALLEST:
            return 0.0
        low = high = math.log(size) / 2
        alpha = 1 - level
        while self.p_value(math.exp(high)) > alpha:
            high += 1.0
        while self.p_value(math.exp(low)) < alpha:
            low -= 1.0
        found = brentq(lambda at: float(self.p_value(math.exp(at))) - alpha, low, high, xtol=1e-9)
        return math.exp(float(found))

    def p_value(self, estimate: float | FloatArray) -> FloatArray:
        """(...,) two-sided p of "the true value is zero"; NaN without degrees of freedom."""
        estimate = np.asarray(estimate, dtype=np.float64)
        own = self._own_p_value(estimate)
        if self.without is None:
            return own
        return np.asarray(self.weight * own + (1.0 - self.weight) * self.without.p_value(estimate), dtype=np.float64)

    def _own_p_value(self, estimate: FloatArray) -> FloatArray:
        if not self.df:
            return np.full(estimate.shape, np.nan)
        if len(self.df) == 1:
            variance = np.maximum(self.terms[..., 0], self.floor)
            certain = np.where(estimate == 0, 1.0, 0.0)
            t = estimate / np.sqrt(np.where(variance > 0, variance, 1.0))
            return np.where(variance > 0, two_sided_p(t, self.df[0]), certain)
        factors, weights = _rule(self.df)
        least = np.maximum(np.maximum(self.floor, _TINY * self.terms.max(-1)), _SMALLEST)
        variances = np.maximum(self.terms @ factors, np.asarray(least)[..., None])
        return np.asarray(2.0 * (ndtr(-np.abs(estimate)[..., None] / np.sqrt(variances)) @ weights))


@lru_cache(maxsize=256)
def _rule(df: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Nodes (strata, N) of ``df / chi2(df)`` and their weights; the trapezoid rule under a normal transformation."""
    axes, weights = [], []
    for place, own in enumerate(df):
        last = place == len(df) - 1 and len(df) > 1
        if last and own > 3:
            s, w = np.polynomial.hermite_e.hermegauss(_FEW_NODES)
        else:
            nodes = 2 * _NODES - 1 if own < 3 else _NODES
            s = np.linspace(-_REACH, _REACH, nodes if len(df) < 4 else _MANY_STRATA_NODES)
            w = np.exp(-0.5 * s * s)
        axes.append(own / np.asarray(chdtri(own, ndtr(-s))))
        weights.append(w / w.sum())
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")])
    product = np.ones(1)
    for w in weights:
        product = np.multiply.outer(product, w).ravel()
    return grid, product


@dataclass(frozen=True)
class SeedDesign:
    """Which widths and seeds a series has, and what that makes of its values.

    Attributes:
        x: (n,) ln width.
        x_mean: Where the level is taken.
        slope: (n,) coefficients of the slope.
        level: (n,) coefficients of the level at ``x_mean``.
        quadratics: (strata, n, n) mean squares, the residual's last.
        df: Their degrees of freedom.
        effects: (n, columns) of each random effect, in the order of the quadratics.
        scale: Expectation of a mean square per unit of its component's variance.
        num_seed_effects: How many of the effects, the first ones, are the seeds'.
        by_seed: (n, seeds) which point is whose, where every seed has every width once; else ``None``.
    """

    x: FloatArray
    x_mean: float
    slope: FloatArray
    level: FloatArray
    quadratics: tuple[FloatArray, ...]
    df: tuple[int, ...]
    effects: tuple[FloatArray, ...]
    scale: tuple[float, ...]
    num_seed_effects: int
    by_seed: FloatArray | None

    def at(self, distance: float | FloatArray) -> FloatArray:
        """(..., n) coefficients of the line's height at ``x_mean + distance``."""
        return np.asarray(self.level + np.asarray(distance)[..., None] * self.slope)

    def fit(self, y: FloatArray, errors: FloatArray | None = None) -> SeedFit:
        """What ``y`` (n,) makes of the design; ``errors`` are its standard errors of measurement, if known."""
        return SeedFit(self, y, errors, tuple(max(float(y @ matrix @ y), 0.0) for matrix in self.quadratics))


@dataclass(frozen=True)
class SeedFit:
    """Values at a design.

    Attributes:
        design: The design.
        y: (n,) values.
        errors: (n,) standard error of measurement of each, or ``None``.
        mean_squares: One for each stratum.
    """

    design: SeedDesign
    y: FloatArray
    errors: FloatArray | None
    mean_squares: tuple[float, ...]

    def uncertainty(self, coefficients: FloatArray) -> Uncertainty:
        """Error of ``coefficients @ y``, for coefficients (..., n)."""
        own = self.design
        sizes = (coefficients**2).sum(-1)
        floor = np.zeros_like(sizes) if self.errors is None else ((coefficients * self.errors) ** 2).sum(-1)
        shares = [
            ((coefficients @ effect) ** 2).sum(-1) / scale for effect, scale in zip(own.effects, own.scale, strict=True)
        ]
        full, kept = self._sum(shares, sizes, floor)
        first = own.num_seed_effects
        seeds = sum(k < first for k in kept)
        if own.by_seed is not None and seeds:
            full, seeds = self._complete(coefficients, full, seeds), 1
        if not seeds or len(own.df) == len(shares):
            return full
        bare, _ = self._sum([np.zeros_like(sizes)] * first + shares[first:], sizes, floor)
        noise = np.sum(shares[:first], axis=0) * self.mean_squares[-1]
        df = min(full.df[:seeds])
        ratio = full.terms[..., :seeds].sum(-1) / np.where(noise > 0, noise, 1.0)
        weight = np.where(noise > 0, fdtr(df, own.df[-1], ratio) ** df, 1.0)
        return replace(full, weight=weight, without=bare)

    def _complete(self, coefficients: FloatArray, general: Uncertainty, skipped: int) -> Uncertainty:
        """On a complete design the seeds' level and slope are one stratum: the scatter of each seed's own estimate."""
        by_seed = self.design.by_seed
        assert by_seed is not None
        seeds = by_seed.shape[1]
        own = (coefficients * self.y) @ by_seed  # a seed's share of the estimate
        scatter = own.var(-1, ddof=1) * seeds
        terms = np.concatenate([scatter[..., None], general.terms[..., skipped:]], axis=-1)
        return replace(general, terms=terms, df=(seeds - 1, *general.df[skipped:]))

    def _sum(self, shares: Sequence[FloatArray], sizes: FloatArray, floor: FloatArray) -> tuple[Uncertainty, list[int]]:
        """Uncertainty with these coefficients of the effects' mean squares, the rest being the residual's.

        Mean squares that have no part in it are left out; the second value says which are kept.
        """
        df = self.design.df
        whole = [*shares, sizes - np.sum(shares, axis=0)] if len(df) > len(shares) else list(shares)
        kept = [k for k, share in enumerate(whole) if bool((np.abs(share) > _TINY * sizes).any())]
        terms = [whole[k] * self.mean_squares[k] for k in kept]
        stacked = np.stack(terms, axis=-1) if terms else np.zeros((*sizes.shape, 0))
        return Uncertainty(stacked, tuple(df[k] for k in kept), floor), kept


def seed_design(x: FloatArray, seeds: Sequence[str]) -> SeedDesign | None:
    """The design of these ln widths and seeds; ``None`` where a line within seeds cannot be drawn.

    That is: one seed, no seed with two widths, or more points than projections are made for.
    """
    return _design(tuple(x.tolist()), tuple(seeds)) if len(x) <= MAX_POINTS else None


@lru_cache(maxsize=512)
def _design(x_values: tuple[float, ...], seeds: tuple[str, ...]) -> SeedDesign | None:
    x = np.array(x_values)
    names = sorted(set(seeds))
    by_seed = np.array([[seed == name for name in names] for seed in seeds], dtype=np.float64)
    center = x - (by_seed / by_seed.sum(0)) @ (by_seed.T @ x)
    s_xx = float(center @ center)
    if len(names) < 2 or s_xx <= _TINY * max(1.0, float(x @ x)) or len(set(x_values)) < 3:
        return None
    distinct = np.unique(x)
    by_width = (x[:, None] == distinct).astype(np.float64)
    slope, x_mean = center / s_xx, float(distinct.mean())
    # the mean over seeds of each seed's own height at x_mean, along the common slope
    per_seed = (by_seed / by_seed.sum(0)).mean(1)
    level = per_seed + (x_mean - float(per_seed @ x)) * slope
    fixed = np.column_stack([np.ones_like(x), x])
    effects = [by_seed, by_seed * (x - x_mean)[:, None], by_width]
    return _with_strata(x, x_mean, slope, level, fixed, effects)


def width_design(x: FloatArray) -> SeedDesign:
    """The design of one value a width: ordinary least squares, the residual the only mean square."""
    center = x - x.mean()
    s_xx = float(center @ center)
    left = np.eye(len(x)) - _projection(np.column_stack([np.ones_like(x), x]))
    level, df = np.full(len(x), 1.0 / len(x)), len(x) - 2
    quadratics = (left / df,) if df > 0 else ()
    return SeedDesign(x, float(x.mean()), center / s_xx, level, quadratics, (df,) if df > 0 else (), (), (), 0, None)


def _with_strata(
    x: FloatArray, x_mean: float, slope: FloatArray, level: FloatArray, fixed: FloatArray, effects: list[FloatArray]
) -> SeedDesign:
    cells = effects[0].shape[1] * effects[-1].shape[1]
    complete = len(x) == cells and bool((effects[0].T @ effects[-1] == 1).all())
    by_seed = effects[0] if complete else None
    whole = _projection(np.column_stack([fixed, *effects]))
    quadratics, df, kept, scale, seeds = [], [], [], [], 0
    for place, effect in enumerate(effects):
        rest = _projection(np.column_stack([fixed, *(other for k, other in enumerate(effects) if k != place)]))
        own = whole - rest
        rank = round(float(np.trace(own)))
        if rank > 0:
            quadratics.append(own / rank)
            df.append(rank)
            kept.append(effect)
            scale.append(float(np.trace(effect.T @ own @ effect)) / rank)
            seeds += place < len(effects) - 1
    left = np.eye(len(x)) - whole
    rank = round(float(np.trace(left)))
    if rank > 0:
        quadratics.append(left / rank)
        df.append(rank)
    return SeedDesign(x, x_mean, slope, level, tuple(quadratics), tuple(df), tuple(kept), tuple(scale), seeds, by_seed)


def _projection(columns: FloatArray) -> FloatArray:
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, values > 1e-10 * values[0]]
    return np.asarray(basis @ basis.T)
