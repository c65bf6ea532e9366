"""What the figures of a report draw from: the study in one place, with lookups by series, bucket and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure

from lightning_spectral.analysis.compare import Comparison
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.learning_rates import LearningRateSweep, ladders_of
from lightning_spectral.analysis.matched import MatchedPair
from lightning_spectral.analysis.points import LAST_WINDOWS, LAYER_MEDIAN, Point
from lightning_spectral.analysis.recipe_facts import decay_step, learning_rate
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.analysis.study import Fitted
from lightning_spectral.analysis.trajectory import SMOOTHING_WINDOWS, Trajectory, group_runs
from lightning_spectral.records.looks import OPTIMIZERS, family, ordered_buckets
from lightning_spectral.report.style import SeriesStyle, looks_of

Series = tuple[str, ...]
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
    """

    runs: RunSet
    fitted: Fitted
    comparisons: tuple[Comparison, ...]
    trajectories: tuple[Trajectory, ...]
    pairs: tuple[MatchedPair, ...]
    site: str = "post"
    last: int = LAST_WINDOWS

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
        """AdamW first, then in the palette's order; an optimizer before its variants, those by learning rate."""

        def rank(key: Series) -> tuple[int, bool, float, str]:
            base, rest = family(key[0])
            known = list(OPTIMIZERS)
            place = known.index(base) if base in known else len(known)
            rates = [rate for run in self.groups.get(key, []) if (rate := learning_rate(run)) is not None]
            return place, bool(rest), min(rates, default=0.0), " ".join(key)

        return sorted(self.groups or self._labels, key=rank)

    @cached_property
    def _labels(self) -> list[Series]:
        """Series of a table: what stands before site, bucket, metric and layer."""
        return list(dict.fromkeys(series[:-4] for series in self.fitted.table.groups()))

    def _cells(self, column: str) -> list[str]:
        place = self.fitted.table.by.index(column)
        return list(dict.fromkeys(point.series[place] for point in self.fitted.table.points))

    @property
    def any_fit(self) -> bool:
        """Whether any exponent could be fitted."""
        return not all(fit.refused for fit in self.fitted.fits)

    @cached_property
    def plain(self) -> list[Series]:
        """One series an optimizer, for headlines: variants (other learning rates, ...) are in the figures."""
        return [key for key in self.series if not self.looks[key].variant]

    @cached_property
    def looks(self) -> dict[Series, SeriesStyle]:
        """How each series is drawn."""
        return looks_of(self.series)

    @cached_property
    def buckets(self) -> list[str]:
        """Buckets measured, in house order."""
        found = {bucket for run in self.runs.runs for bucket in run.buckets} or set(self._cells("bucket"))
        return ordered_buckets(found)

    @cached_property
    def focus(self) -> str:
        """The bucket of the headline: TAIL if it was measured."""
        return next((bucket for bucket in FOCUS_BUCKETS if bucket in self.buckets), self.buckets[0])

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics fitted."""
        position = self.fitted.table.by.index("metric")
        return list(dict.fromkeys(point.series[position] for point in self.fitted.table.points))

    @cached_property
    def widths(self) -> list[int]:
        """FFN widths."""
        return sorted({run.width for run in self.runs.runs}) or sorted({round(p.x) for p in self.fitted.table.points})

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers of all runs."""
        names = {name for run in self.runs.runs for name in run.layers} or set(self._cells("layer"))
        return sorted(names - {LAYER_MEDIAN})

    @cached_property
    def ladders(self) -> list[LearningRateSweep]:
        """Configurations at several learning rates."""
        return ladders_of(self.runs)

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
