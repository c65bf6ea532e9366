"""Intervals where runs repeat by seed: what seeds, widths and single runs each add to the error of a line.

The model of ln(value) at width x and seed s is a mixed one::

    y = level + slope (x - x0) + u_s + v_s (x - x0) + w_x + e

with a random level ``u`` and slope ``v`` a seed, a random effect ``w`` a width (shared by its runs: curvature, the same
tokens) and a residual ``e``. Level and slope are estimated by regression within seeds (a seed that covers only some of
the widths then tilts nothing); on a complete design that is the line through the means of the widths.

The variance of an estimate has two parts. Seeds and residual: the scatter of what each seed contributes to it, scaled
so that it is unbiased, with degrees of freedom by Satterthwaite (the cluster-robust variance of Bell and McCaffrey
2002; seeds - 1 on a complete design, where it is the scatter of each seed's own estimate). Widths: their mean square
beyond the residual's, from the difference of two projections (Henderson's method 3); zero where it comes out negative.
What is left after the residual is taken off is known less well than the mean square itself: its degrees of freedom
are those of the mean square times the cube root of the share that is left. (All of them cover 92.5 % of 95 with eight
seeds and width effects; Satterthwaite's own number, about the square of the share, 98.2 % with two seeds.)
Satterthwaite's degrees of freedom of the sum are too many where a part with one or two of them comes out small by
chance (two seeds that happen to agree): 92.6 % are covered then. So no interval is narrower than
:data:`CAUTION` times Student's t of either part alone. With one part all of this is Student's t, exactly.
Where seeds are many and widths few, the widths' part may come out small by chance, with nothing beside it that shows
how little is known: 88 % are covered with five seeds at three widths that have effects. There the interval is not
narrower than :data:`FEW_WIDTHS` times Student's t of the widths' whole mean square, as over the means of the widths.
`benchmarks/bench_coverage.py` measures what is covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.linear import LEVEL, t_quantile, two_sided_p

FloatArray = NDArray[np.float64]
MAX_POINTS: Final = 400  # projections are n x n
CAUTION: Final = 0.6  # of one part's own interval; .5 to .75 cover the same within half a point
FEW_WIDTHS: Final = 0.8  # of the interval over the means of the widths; 1 covers 99 % of 95 without effects
_SEED_LEVELS: Final = 20.0  # working variance of a seed's level, over the residual's
_WITHIN: Final = 0.25  # of the spread of the widths, what must lie within seeds
_TINY: Final = 1e-9


@dataclass(frozen=True)
class Uncertainty:
    """What the error of one estimate, or of several alike, is made of.

    Attributes:
        terms: (..., parts) what each part adds to the variance, none negative.
        df: (..., parts) their degrees of freedom.
        floor: (...,) variance that the points' own errors of measurement make; residuals cannot argue it away.
        over_widths: (...,) variance over the means of the widths alone, and its degrees of freedom, where they are few.
    """

    terms: FloatArray
    df: FloatArray
    floor: FloatArray
    over_widths: tuple[FloatArray, float] | None = None

    @property
    def variance(self) -> FloatArray:
        """(...,) estimated variance, at least the floor."""
        return np.asarray(np.maximum(self.terms.sum(-1), self.floor))

    @property
    def satterthwaite_df(self) -> FloatArray:
        """(...,) degrees of freedom of the variance, between the fewest and the sum of those behind it."""
        if not self.df.shape[-1]:
            return np.full(self.floor.shape, np.nan)
        spread, most = (self.terms**2 / self.df).sum(-1), self.df.sum(-1)
        known = spread > 0
        df = np.where(known, self.terms.sum(-1) ** 2 / np.where(known, spread, 1.0), most)
        return np.clip(df, self.df.min(-1), most)

    def _candidates(self) -> list[tuple[FloatArray, FloatArray]]:
        """Standard errors with their degrees of freedom, the widest of whose intervals counts."""
        parts = self.df.shape[-1]
        alone = [(CAUTION * np.sqrt(self.terms[..., k]), self.df[..., k]) for k in range(parts if parts > 1 else 0)]
        if self.over_widths is not None:
            variance, df = self.over_widths
            alone.append((FEW_WIDTHS * np.sqrt(variance), np.full(variance.shape, df)))
        return [(np.sqrt(self.variance), self.satterthwaite_df), *alone]

    def half_width(self, level: float = LEVEL) -> FloatArray:
        """(...,) half of the two-sided interval; NaN without degrees of freedom."""
        return np.asarray(np.max([t_quantile(df, level) * se for se, df in self._candidates()], axis=0))

    def p_value(self, estimate: float | FloatArray) -> FloatArray:
        """(...,) two-sided p of "the true value is zero"; NaN without degrees of freedom."""
        estimate = np.asarray(estimate, dtype=np.float64)
        found = []
        for se, df in self._candidates():
            p = two_sided_p(estimate / np.where(se > 0, se, 1.0), df)
            found.append(np.where((se > 0) | np.isnan(df), p, np.where(estimate == 0, 1.0, 0.0)))
        return np.asarray(np.max(found, axis=0))


@dataclass(frozen=True)
class SeedDesign:
    """Which widths and seeds a series has, and what that makes of its values.

    Attributes:
        x: (n,) ln width.
        x_mean: Where the level is taken.
        slope: (n,) coefficients of the slope.
        level: (n,) coefficients of the level at ``x_mean``.
        by_seed: (n, seeds) which point is whose; ``None`` with one value per width.
        complete: Whether every seed has every width once.
        widths: Mean square and effect of the widths; ``None`` where they cannot be told from the seeds' lines.
        residual: Mean square of what is left; ``None`` without degrees of freedom.
    """

    x: FloatArray
    x_mean: float
    slope: FloatArray
    level: FloatArray
    by_seed: FloatArray | None
    complete: bool
    widths: Widths | None
    residual: MeanSquare | None

    def at(self, distance: float | FloatArray) -> FloatArray:
        """(..., n) coefficients of the line's height at ``x_mean + distance``."""
        return np.asarray(self.level + np.asarray(distance)[..., None] * self.slope)

    @property
    def has_few_widths(self) -> bool:
        """Whether less is known of the widths' effects than of the seeds'."""
        if self.by_seed is None or self.widths is None:
            return False
        return self.by_seed.shape[1] - 1 > self.widths.square.df

    def fit(self, y: FloatArray, errors: FloatArray | None = None) -> SeedFit:
        """What ``y`` (n,) makes of the design; ``errors`` are its standard errors of measurement, if known."""
        return SeedFit(self, y, errors)

    def seeds_part(self, coefficients: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Variance of ``coefficients @ y`` (..., n) that seeds and residual make, and its degrees of freedom."""
        assert self.by_seed is not None
        left = np.eye(len(self.x)) - np.outer(np.ones_like(self.x), self.level)
        left -= np.outer(self.x - self.x_mean, self.slope)
        share = (coefficients[..., None, :] * self.by_seed.T) @ left  # (..., seeds, n): what a seed contributes
        scatter = ((share @ y) ** 2).sum(-1)
        if self.complete:
            seeds = self.by_seed.shape[1]
            return scatter * (seeds / (seeds - 1)), np.full(scatter.shape, seeds - 1.0)
        own = share @ self.by_seed
        among = share @ share.swapaxes(-1, -2) + _SEED_LEVELS * own @ own.swapaxes(-1, -2)
        expected = np.trace(among, axis1=-2, axis2=-1)
        true = (coefficients**2).sum(-1) + _SEED_LEVELS * ((coefficients @ self.by_seed) ** 2).sum(-1)
        df = expected**2 / (among**2).sum((-2, -1))
        return scatter * true / expected, np.maximum(df, 1.0)


@dataclass(frozen=True)
class MeanSquare:
    """A quadratic form ``y @ matrix @ y`` and its degrees of freedom."""

    matrix: FloatArray
    df: int

    def of(self, y: FloatArray) -> float:
        """The mean square of ``y``."""
        return max(float(y @ self.matrix @ y), 0.0)


@dataclass(frozen=True)
class Widths:
    """The mean square of widths beyond seeds' lines; its expectation is that of the residual plus ``scale`` variances.

    Attributes:
        square: The mean square.
        effect: (n, widths) which point is whose.
        scale: See above.
    """

    square: MeanSquare
    effect: FloatArray
    scale: float

    def beyond(self, y: FloatArray, residual: float) -> tuple[float, float]:
        """The mean square less the residual's, not below zero, and its degrees of freedom."""
        square = self.square.of(y)
        left = max(square - residual, 0.0)
        return left, max(self.square.df * (left / square) ** (1 / 3), 1.0) if square > 0 else float(self.square.df)


@dataclass(frozen=True)
class SeedFit:
    """Values at a design.

    Attributes:
        design: The design.
        y: (n,) values.
        errors: (n,) standard error of measurement of each, or ``None``.
    """

    design: SeedDesign
    y: FloatArray
    errors: FloatArray | None

    def uncertainty(self, coefficients: FloatArray) -> Uncertainty:
        """Error of ``coefficients @ y``, for coefficients (..., n)."""
        own, sizes = self.design, (coefficients**2).sum(-1)
        floor = np.zeros_like(sizes) if self.errors is None else ((coefficients * self.errors) ** 2).sum(-1)
        residual = 0.0 if own.residual is None else own.residual.of(self.y)
        parts: list[tuple[FloatArray, FloatArray]] = []
        over_widths = None
        if own.by_seed is not None:
            parts.append(own.seeds_part(coefficients, self.y))
        elif own.residual is not None:
            parts.append((sizes * residual, np.full(sizes.shape, float(own.residual.df))))
        if own.widths is not None:
            share = ((coefficients @ own.widths.effect) ** 2).sum(-1) / own.widths.scale
            beyond, df = own.widths.beyond(self.y, residual)
            parts.append((share * beyond, np.full(sizes.shape, df)))
            if own.has_few_widths:
                over_widths = (share * own.widths.square.of(self.y), float(own.widths.square.df))
        if not parts:
            return Uncertainty(np.zeros((*sizes.shape, 0)), np.zeros((*sizes.shape, 0)), floor)
        terms, dfs = np.stack([term for term, _ in parts], -1), np.stack([df for _, df in parts], -1)
        return Uncertainty(terms, dfs, floor, over_widths)


def seed_design(x: FloatArray, seeds: Sequence[str]) -> SeedDesign | None:
    """The design of these ln widths and seeds; ``None`` where a line within seeds cannot be drawn.

    That is: one seed, seeds that cover so few widths each that nearly all is known from widths of different seeds, or
    more points than projections are made for.
    """
    return _design(tuple(x.tolist()), tuple(seeds)) if len(x) <= MAX_POINTS else None


@lru_cache(maxsize=512)
def _design(x_values: tuple[float, ...], seeds: tuple[str, ...]) -> SeedDesign | None:
    x = np.array(x_values)
    names = sorted(set(seeds))
    by_seed = np.array([[seed == name for name in names] for seed in seeds], dtype=np.float64)
    center = x - (by_seed / by_seed.sum(0)) @ (by_seed.T @ x)
    s_xx = float(center @ center)
    total = float((x - x.mean()) @ (x - x.mean()))
    if len(names) < 2 or s_xx <= max(_TINY * max(1.0, float(x @ x)), _WITHIN * total) or len(set(x_values)) < 3:
        return None
    distinct = np.unique(x)
    by_width = (x[:, None] == distinct).astype(np.float64)
    slope, x_mean = center / s_xx, float(distinct.mean())
    # the mean over seeds of each seed's own height at x_mean, along the common slope
    per_seed = (by_seed / by_seed.sum(0)).mean(1)
    level = per_seed + (x_mean - float(per_seed @ x)) * slope
    lines = np.column_stack([by_seed, by_seed * (x - x_mean)[:, None]])  # a line per seed
    whole, bare = _projection(np.column_stack([lines, by_width])), _projection(lines)
    square, residual = _mean_square(whole - bare), _mean_square(np.eye(len(x)) - whole)
    widths = None
    if square is not None:
        scale = float(np.trace(by_width.T @ square.matrix @ by_width))
        widths = Widths(square, by_width, scale)
    complete = len(x) == len(names) * len(distinct) and bool((by_seed.T @ by_width == 1).all())
    return SeedDesign(x, x_mean, slope, level, by_seed, complete, widths, residual)


def width_design(x: FloatArray) -> SeedDesign:
    """The design of one value per width: ordinary least squares, the residual the only mean square."""
    center = x - x.mean()
    s_xx = float(center @ center)
    left = np.eye(len(x)) - _projection(np.column_stack([np.ones_like(x), x]))
    level = np.full(len(x), 1.0 / len(x))
    return SeedDesign(x, float(x.mean()), center / s_xx, level, None, False, None, _mean_square(left))


def _mean_square(projection: FloatArray) -> MeanSquare | None:
    rank = round(float(np.trace(projection)))
    return MeanSquare(projection / rank, rank) if rank > 0 else None


def _projection(columns: FloatArray) -> FloatArray:
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, values > 1e-10 * values[0]]
    return np.asarray(basis @ basis.T)
