"""What the figures of a report draw from: the study in one place, with lookups by series, bucket and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_spectral.analysis.compare import Comparison
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.learning_rates import LearningRateSweep, learning_rate_sweeps
from lightning_spectral.analysis.matched import MatchedPair
from lightning_spectral.analysis.points import LAST_WINDOWS, LAYER_MEDIAN, Point, nanmedian
from lightning_spectral.analysis.published import Estimate, RankCurve
from lightning_spectral.analysis.recipe_facts import decay_step, learning_rate
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.analysis.study import Fitted
from lightning_spectral.analysis.trajectory import SMOOTHING_WINDOWS, Trajectory, group_runs
from lightning_spectral.records.looks import OPTIMIZERS, family, ordered_buckets
from lightning_spectral.report.style import SeriesStyle, looks_of

Series = tuple[str, ...]
FloatArray = NDArray[np.float64]
FOCUS_BUCKETS = ("tail", "pooled", "mid", "head")


@dataclass(frozen=True)
class ReportFigure:
    """A finished figure, or the reason why there is none.

    Attributes:
        figure: The figure, or ``None``.
        headline: One sentence: what it shows, with the interval.
        note: How to read it; or what to do to get it.
    """

    figure: Figure | None
    headline: str
    note: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything a figure may show.

    Attributes:
        runs: The runs.
        fitted: Points and fits by optimizer, other labels, site, bucket, metric and layer.
        comparisons: Pairs, asymmetries, matched loss.
        trajectories: beta(t).
        pairs: Runs at matched loss.
        site: Site of the headline figures.
        last: Windows in the median of a point.
        curves: Ranks over training, from a table; those of runs are in the runs.
        estimates: Exponents without their points.
    """

    runs: RunSet
    fitted: Fitted
    comparisons: tuple[Comparison, ...]
    trajectories: tuple[Trajectory, ...]
    pairs: tuple[MatchedPair, ...]
    site: str = "post"
    last: int = LAST_WINDOWS
    curves: tuple[RankCurve, ...] = ()
    estimates: tuple[Estimate, ...] = ()

    def holds(self, what: str) -> bool:
        """Whether there are ``runs``, ``one_run``, ``points``, ``paths``, ``curves`` or ``estimates`` to draw."""
        if self.runs.runs:
            alone = len(self.runs.runs) == 1  # a law needs widths: of one run its own curves are shown
            return what in ("runs", "one_run") if alone else what not in ("one_run", "estimates")
        found = {"points": self.fitted.fits, "paths": self.trajectories, "curves": self.curves}
        return bool({**found, "estimates": self.estimates}.get(what))

    @property
    def smoothing(self) -> int:
        """Windows in the trailing median of beta(t); not more than in a point, so that it ends at the tables' beta."""
        return min(SMOOTHING_WINDOWS, self.last)

    @cached_property
    def groups(self) -> dict[Series, list[Run]]:
        """Runs of each series."""
        return group_runs(self.runs)

    @cached_property
    def series(self) -> list[Series]:
        """Series that the figures show; of a learning-rate sweep only the main rate: its section shows the others."""
        out = {point.series for sweep in self.learning_rate_sweeps for point in sweep.points}
        out -= {self.main_rate(sweep) for sweep in self.learning_rate_sweeps}
        return [key for key in self.all_series if key not in out]

    def main_rate(self, sweep: LearningRateSweep) -> Series:
        """The learning rate with the most runs; of several the one that comes first, which has the shortest name."""
        best = max(sweep.points, key=lambda point: (len(self.groups[point.series]), -len(" ".join(point.series))))
        return best.series

    @cached_property
    def all_series(self) -> list[Series]:
        """AdamW first, then in the palette's order; an optimizer before its variants, those by learning rate.

        Of a table, series with points before those that are only an exponent or a curve.
        """
        with_points = {series[:-4] for series in self.fitted.table.groups()}

        def rank(key: Series) -> tuple[int, bool, bool, float, str]:
            base, rest = family(key[0])
            known = list(OPTIMIZERS)
            place = known.index(base) if base in known else len(known)
            rates = [rate for run in self.groups.get(key, []) if (rate := learning_rate(run)) is not None]
            return place, key not in with_points, bool(rest), min(rates, default=0.0), " ".join(key)

        return sorted(self.groups or self._labels, key=rank)

    @cached_property
    def _labels(self) -> list[Series]:
        """Series of tables: what stands before site, bucket and metric."""
        return list(dict.fromkeys(series[:-3] for series in self._measured))

    @cached_property
    def _measured(self) -> list[Series]:
        """(labels ..., site, bucket, metric) of everything that a table holds."""
        points = [series[:-1] for series in self.fitted.table.groups()]
        rest = (own.series for part in (self.trajectories, self.curves, self.estimates) for own in part)
        return list(dict.fromkeys([*points, *rest]))

    def ranks_of(self, series: Series, bucket: str, metric: str) -> list[tuple[int, FloatArray, FloatArray]]:
        """(width, steps, layer median of the ranks) of every run of a series, where there is a positive number."""
        found: list[tuple[int, FloatArray, FloatArray]] = []
        for run in self.groups.get(series, []):
            if self.site in run.sites and bucket in run.buckets:
                cube = run.cube(metric)[run.sites.index(self.site), run.buckets.index(bucket)]
                found.append((run.width, run.steps.astype(np.float64), nanmedian(cube, axis=-1)))
        own = (curve for curve in self.curves if curve.series == (*series, self.site, bucket, metric))
        found += [(round(curve.width), curve.steps.astype(np.float64), curve.values) for curve in own]
        shown = [(width, steps, ranks, np.isfinite(ranks) & (ranks > 0)) for width, steps, ranks in found]
        return [(width, steps[keep], ranks[keep]) for width, steps, ranks, keep in shown if keep.any()]

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Training tokens of a step, if they are counted and all runs have the same number, to a percent."""
        rates = []
        for run in self.runs.runs:
            steps, tokens = run.columns.ints["step"], run.columns.floats["tokens_seen"]
            known = (steps > 0) & (tokens > 0)
            rates += [float(np.median(tokens[known] / steps[known]))] if known.any() else []
        same = len(rates) == len(self.runs.runs) > 0 and max(rates) <= 1.01 * min(rates)
        return rates[0] if same else None

    @property
    def any_fit(self) -> bool:
        """Whether any exponent could be fitted."""
        return not all(fit.refused for fit in self.fitted.fits)

    @cached_property
    def plain(self) -> list[Series]:
        """One series an optimizer, for headlines: variants (other learning rates, ...) are in the figures."""
        return [key for key in self.series if not self.looks[key].variant]

    @cached_property
    def fitted_series(self) -> list[Series]:
        """Series with points in any bucket, for the figures of exponents."""
        with_points = {series[:-4] for series in self._points}
        return [key for key in self.series if key in with_points]

    @cached_property
    def looks(self) -> dict[Series, SeriesStyle]:
        """How each series is drawn."""
        return looks_of(self.all_series)

    @cached_property
    def buckets(self) -> list[str]:
        """Buckets measured, in house order."""
        found = {bucket for run in self.runs.runs for bucket in run.buckets} or {own[-2] for own in self._measured}
        return ordered_buckets(found)

    @cached_property
    def focus(self) -> str:
        """The bucket of the headline: TAIL if it was measured."""
        return next((bucket for bucket in FOCUS_BUCKETS if bucket in self.buckets), self.buckets[0])

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics fitted, or held by a table; those of every run where no window has a number."""
        return list(dict.fromkeys(own[-1] for own in self._measured)) or ["soft_rank", "hard_rank"]

    @cached_property
    def widths(self) -> list[int]:
        """FFN widths; none for a table of exponents."""
        of_tables = {round(p.x) for p in self.fitted.table.points} | {round(curve.width) for curve in self.curves}
        return sorted({run.width for run in self.runs.runs}) or sorted(of_tables)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers of all runs."""
        of_tables = {series[-1] for series in self.fitted.table.groups()}
        names = {name for run in self.runs.runs for name in run.layers} or of_tables
        return sorted(names - {LAYER_MEDIAN})

    @cached_property
    def learning_rate_sweeps(self) -> list[LearningRateSweep]:
        """Configurations at several learning rates."""
        return learning_rate_sweeps(self.runs)

    @cached_property
    def decay_steps(self) -> list[int]:
        """Where the learning rate starts to fall, over the runs that record it."""
        return sorted({step for run in self.runs.runs if (step := decay_step(run)) is not None})

    @cached_property
    def _fits(self) -> dict[Series, PowerLawFit]:
        return {fit.series: fit for fit in self.fitted.fits}

    @cached_property
    def _points(self) -> dict[Series, list[Point]]:
        return self.fitted.table.groups()

    @cached_property
    def _paths(self) -> dict[Series, Trajectory]:
        return {path.series: path for path in self.trajectories}

    def fit(
        self, series: Series, bucket: str, metric: str, layer: str = LAYER_MEDIAN, site: str | None = None
    ) -> PowerLawFit | None:
        """The fit of one series, if there is one."""
        return self._fits.get((*series, site or self.site, bucket, metric, layer))

    def points(self, series: Series, bucket: str, metric: str, layer: str = LAYER_MEDIAN) -> list[Point]:
        """Its points that hold a positive number."""
        found = self._points.get((*series, self.site, bucket, metric, layer), [])
        return [point for point in found if point.value > 0]

    def path(self, series: Series, bucket: str, metric: str) -> Trajectory | None:
        """Its beta(t)."""
        return self._paths.get((*series, self.site, bucket, metric))

    def sides(self, c: Comparison) -> tuple[str, str]:
        """Full names of what a comparison compares: with the labels that both have in common, as ``Dion 1/2``."""
        return self._side(c, c.a), self._side(c, c.b)

    def _side(self, c: Comparison, own: str) -> str:
        labels = self.fitted.table.by[:-4]
        for key in self.all_series:
            cells = list(zip(labels, key, strict=False))
            differing = " ".join(filter(None, (cell for name, cell in cells if name not in c.where)))
            if differing == own and all(c.where.get(name, cell) == cell for name, cell in cells):
                return " ".join(filter(None, key))
        return own

    def compared(self, kind: str, bucket: str, metric: str | None = None) -> list[Comparison]:
        """Comparisons of layer medians at the headline's site."""
        wanted = {"bucket": bucket, "site": self.site, "layer": LAYER_MEDIAN} | ({"metric": metric} if metric else {})
        return [
            c for c in self.comparisons if c.kind == kind and all(c.where.get(k, v) == v for k, v in wanted.items())
        ]


def beta_text(fit: PowerLawFit | None) -> str:
    """``0.42 [0.30, 0.54]``, or why there is no number."""
    if fit is None:
        return "not measured"
    if fit.refused:
        return "no fit (" + fit.status.removeprefix("refused:").replace("_", " ") + ")"
    return f"{fit.beta:.2f} [{fit.ci_low:.2f}, {fit.ci_high:.2f}]"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
