"""How many more widths or seeds it takes to tell two slopes apart: planning from the scatter of what there is.

The error of a difference of slopes has three parts: seeds that differ in slope (falls with the number of seeds), widths
with effects of their own (falls with the number of widths over the same range), and the runs' own scatter (falls with
both). Each is read off the fit of ln(a/b); the interval of a larger study is then that of ``strata``, its degrees of
freedom included, which matter more than the error itself where seeds or widths are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lightning_spectral.analysis.compare import ratio_of
from lightning_spectral.analysis.points import Point
from lightning_spectral.analysis.strata import SeedFit, Uncertainty

MOST: Final = 64  # seeds or widths; more is no plan


@dataclass(frozen=True)
class Scatter:
    """What makes the error of a difference of slopes, and the study that it was read off.

    Attributes:
        slopes: Variance that seeds' own slopes add.
        widths: Variance that effects of widths add.
        runs: Variance that the runs' own scatter adds.
        num_seeds: Seeds; 1 where they are not told apart.
        num_widths: Widths.
    """

    slopes: float
    widths: float
    runs: float
    num_seeds: int
    num_widths: int

    def uncertainty(self, num_seeds: int, num_widths: int) -> Uncertainty:
        """Of the difference in a study of so many seeds and widths over the same range."""
        of_seeds, of_widths = self.num_seeds / num_seeds, self.num_widths / num_widths
        runs = self.runs * of_seeds * of_widths
        over_widths = None
        if num_seeds < 2:
            terms, df = [runs + (self.slopes + self.widths) * of_widths], [num_widths - 2]
        else:
            terms = [self.slopes * of_seeds + runs, self.widths * of_widths]
            df = [num_seeds - 1, num_widths - 2]
            if num_seeds > num_widths - 1:  # as `strata` has it
                over_widths = (np.asarray(terms[1] + runs), float(num_widths - 2))
        return Uncertainty(np.array(terms), np.array(df, dtype=np.float64), np.zeros(()), over_widths)

    def separates(self, amount: float, power: float, num_seeds: int, num_widths: int) -> bool:
        """Whether such a study finds slopes that differ by ``amount`` in a share ``power`` of cases."""
        own = self.uncertainty(num_seeds, num_widths)
        return float(own.half_width() + own.half_width(2 * power - 1)) <= amount


@dataclass(frozen=True)
class Need:
    """Seeds and widths that separate two slopes.

    Attributes:
        half_width: Half of the interval of the difference now.
        now: (seeds, widths) now.
        seeds: Seeds at the same widths; ``None`` if :data:`MOST` are not enough.
        widths: Widths over the same range at the same seeds, likewise.
    """

    half_width: float
    now: tuple[int, int]
    seeds: int | None
    widths: int | None


def scatter_of(points_a: Sequence[Point], points_b: Sequence[Point]) -> Scatter | None:
    """Scatter of the difference of two series; ``None`` with fewer than three widths in common."""
    ratio = ratio_of(points_a, points_b)
    return None if ratio is None or ratio.fit.design.residual is None else _scatter(ratio.fit)


def _scatter(fit: SeedFit) -> Scatter:
    design = fit.design
    own, widths = fit.uncertainty(design.slope), len(np.unique(design.x))
    assert design.residual is not None
    runs = design.residual.of(fit.y) * float(design.slope @ design.slope)
    if design.by_seed is None:
        return Scatter(0.0, 0.0, float(own.variance), 1, widths)
    of_widths = float(own.terms[1]) if len(own.terms) > 1 else 0.0
    return Scatter(max(float(own.terms[0]) - runs, 0.0), of_widths, runs, design.by_seed.shape[1], widths)


def needed(scatter: Scatter, amount: float, power: float = 0.8) -> Need:
    """How many seeds, or how many widths, separate two slopes that differ by ``amount``.

    Args:
        scatter: Of the study there is.
        amount: Difference of slopes.
        power: Share of studies that should find it, in (.5, 1).

    Raises:
        ValueError: If ``amount`` is not positive or ``power`` not in (.5, 1).
    """
    if not amount > 0 or not 0.5 < power < 1:
        raise ValueError(f"the amount must be > 0 and the power in (.5, 1), got {amount:g} and {power:g}.")
    seeds, widths = scatter.num_seeds, scatter.num_widths
    of_seeds = (n for n in range(seeds, MOST + 1) if scatter.separates(amount, power, n, widths))
    of_widths = (n for n in range(max(widths, 3), MOST + 1) if scatter.separates(amount, power, seeds, n))
    half = float(scatter.uncertainty(seeds, widths).half_width())
    return Need(half, (seeds, widths), next(of_seeds, None), next(of_widths, None))
