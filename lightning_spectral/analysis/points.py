"""From runs to the points of a fit: the last windows' median per layer, then the median over layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.linear import t_quantile
from lightning_spectral.analysis.recipe_facts import decay_step
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.text import did_you_mean

FloatArray = NDArray[np.float64]
LAST_WINDOWS: Final = 5
NULL_STEPS: Final = (0, 1)  # windows of the untrained, or once updated, network
LAYER_MEDIAN: Final = "median"
# metric -> the same with the bias of finite, clustered samples removed
UNBIASED: Final = {"hard_rank": "hard_rank_across_sequences", "soft_rank": "soft_rank_debiased"}
DEFAULT_METRICS: Final = ("soft_rank", "hard_rank")


@dataclass(frozen=True)
class Point:
    """One value at one width.

    Attributes:
        series: Values of the ``by`` columns, in their order.
        x: FFN width D (or the x column of a table).
        value: The measured value.
        source: Run id, or the row's own id; equal ids are the same run.
        seed: Seed of the run, or an empty string.
        spread: One standard deviation over layers, in units of the value; NaN if unknown.
        num_tokens: Rows N behind the value; NaN if unknown.
        rank: The rank found, to compare N with; NaN if unknown.
        steps: Windows that went into it.
        conventions: Convention sets of the records behind it.
        layers: Values per layer, in layer order; empty if unknown.
        missing: Number of windows without a number (status ``empty``, ``nonfinite``, ``degenerate``).
        decay_step: Last step at the full learning rate; NaN if unknown.
        error: Standard error of measurement of ln(value), over the sequences that were measured; NaN if unknown.
        num_sequences: Sequences that the rows come from; NaN if unknown.
        raw: The value as it comes out of the finite sample, where ``value`` has its bias removed; NaN otherwise.
    """

    series: tuple[str, ...]
    x: float
    value: float
    source: str = ""
    seed: str = ""
    spread: float = float("nan")
    num_tokens: float = float("nan")
    rank: float = float("nan")
    steps: tuple[int, ...] = ()
    conventions: tuple[str, ...] = ()
    layers: tuple[float, ...] = ()
    missing: int = 0
    decay_step: float = float("nan")
    error: float = float("nan")
    num_sequences: float = float("nan")
    raw: float = float("nan")


@dataclass(frozen=True)
class PointTable:
    """Points and the names of their ``by`` columns.

    Attributes:
        by: Column names; ``series`` of every point has one value for each.
        points: In file or run order.
        x_name: What x is.
    """

    by: tuple[str, ...]
    points: tuple[Point, ...]
    x_name: str = "width"

    def groups(self) -> dict[tuple[str, ...], list[Point]]:
        """Points of each series, in order of appearance; the same dictionary at every call, not to be changed."""
        return self._groups

    @cached_property
    def _groups(self) -> dict[tuple[str, ...], list[Point]]:
        out: dict[tuple[str, ...], list[Point]] = {}
        for point in self.points:
            out.setdefault(point.series, []).append(point)
        return out


def nanmedian(values: FloatArray, axis: int) -> FloatArray:
    """``numpy.nanmedian`` that takes an all-NaN slice as what it is here: no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmedian(values, axis=axis), dtype=np.float64)


def default_by(runs: RunSet, layers: bool = True) -> tuple[str, ...]:
    """``optimizer``, whatever else tells the runs apart, ``site``, ``bucket``, ``metric`` and ``layer``."""
    return ("optimizer", *runs.series_labels, "site", "bucket", "metric", *(("layer",) if layers else ()))


def points_of_runs(
    runs: RunSet,
    *,
    by: Sequence[str] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    last: int = LAST_WINDOWS,
    until_step: int | Mapping[str, int] | None = None,
    sites: Sequence[str] | None = None,
    ranks: str = "auto",
) -> PointTable:
    """Points of every run, one for each site, bucket, metric and (if ``layer`` is in ``by``) layer.

    Args:
        runs: What :func:`~lightning_spectral.analysis.reading.load_runs` found.
        by: Columns that make a series; :func:`default_by` if not given.
        metrics: Names from the records.
        last: Windows in the median.
        until_step: Take the last windows at or before this step; with a step for each run id, runs without one are
            left out, and so is the untrained state (see :func:`pre_decay`).
        sites: Sites to use; ``post`` alone when ``site`` is not in ``by``.
        ranks: ``auto``: ranks across sequences (:data:`UNBIASED`) where all runs have them; or ``raw``.

    Raises:
        ValueError: If ``last`` is not positive, or ``by`` names a column that the runs do not have.
    """
    if last < 1:
        raise ValueError(f"`last` must be >= 1, got {last}.")
    if ranks not in ("auto", "raw"):
        raise ValueError(f"`ranks` must be auto or raw, got {ranks!r}.")
    names = tuple(by) if by is not None else default_by(runs)
    known = {"optimizer", "site", "bucket", "metric", "layer", *(key for run in runs.runs for key in run.info.labels)}
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], sorted(known), otherwise="they have")
        raise ValueError(f"the runs have no column `{unknown[0]}` to group by; {hint}")
    if "metric" not in names and len(metrics) > 1:
        raise ValueError(f"`by` without `metric` needs one metric, got {', '.join(metrics)}. Pass --metrics hard_rank.")
    if sites is None and "site" not in names:
        sites = ("post",)
    columns = {metric: unbiased_column(runs, metric) if ranks == "auto" else metric for metric in metrics}
    points: list[Point] = []
    for run in runs.runs:
        usable = _usable_steps(run, until_step)
        if run.diverged_from is not None and len(usable) and usable[-1] >= run.diverged_from:
            continue  # windows before it are another state of training than those of the others
        chosen = usable[-last * run.turns :]
        if len(chosen):
            windows = _Windows(runs, run, names, chosen)
            points += [point for metric in metrics for point in windows.points(metric, columns[metric], sites)]
    return PointTable(names, tuple(points))


def unbiased_column(runs: RunSet, metric: str) -> str:
    """Name of the metric with the bias of finite, clustered samples removed, if every number of all runs has one."""
    name = UNBIASED.get(metric, metric)
    for run in runs.runs:
        values = run.columns.floats.get(name)
        if values is None or bool((np.isfinite(run.columns.floats[metric]) & ~np.isfinite(values)).any()):
            return metric
    return name


def pre_decay(runs: RunSet) -> dict[str, int]:
    """Run id -> last step at the full learning rate, for runs that were measured both before and after it."""
    out = {}
    for run in runs.runs:
        step = decay_step(run)
        if step is not None and run.steps[-1] > step and len(_usable_steps(run, {run.run_id: step})):
            out[run.run_id] = step
    return out


def _usable_steps(run: Run, until_step: int | Mapping[str, int] | None) -> NDArray[np.int64]:
    if until_step is None:
        return run.steps
    if isinstance(until_step, int):
        return run.steps[run.steps <= until_step]
    if run.run_id not in until_step:
        return run.steps[:0]  # also where the step of its window is not known, which is below all others
    trained = ~np.isin(run.steps, NULL_STEPS)
    return run.steps[trained & (run.steps <= until_step[run.run_id])]


class _Windows:
    """The last windows of one run, as points.

    Args:
        runs: All runs, for the labels.
        run: The run.
        by: Columns of a series.
        steps: Steps of its windows.
    """

    def __init__(self, runs: RunSet, run: Run, by: tuple[str, ...], steps: NDArray[np.int64]) -> None:
        self._run, self._by = run, by
        self._window = np.searchsorted(run.steps, steps)
        self._labels = {name: runs.label_of(run, name) for name in by}
        rows = run.cube("num_tokens")[:, :, self._window]
        self._measured = np.asarray((~np.isnan(rows.reshape(*rows.shape[:2], -1))).any(axis=-1))
        self._num_tokens = nanmedian(rows.reshape(*rows.shape[:2], -1), axis=-1)
        # of a layer that waited for its turn nothing is missing
        self._expected = ~np.isnan(rows) if run.turns > 1 else np.ones(rows.shape, dtype=bool)
        sequences = run.cube("num_sequences")[:, :, self._window]
        self._num_sequences = nanmedian(sequences.reshape(*rows.shape[:2], -1), axis=-1)
        decay = decay_step(run)
        self._shared = Point(
            series=(),
            x=float(run.width),
            value=float("nan"),
            source=run.run_id,
            seed=run.seed,
            steps=tuple(int(step) for step in steps),
            conventions=run.conventions,
            decay_step=float("nan") if decay is None else float(decay),
        )

    def points(self, metric: str, column: str, sites: Sequence[str] | None) -> list[Point]:
        """Layer medians of a metric, each followed by its layers if ``layer`` is a column."""
        values = self._run.cube(column)[:, :, self._window]
        missing = np.isnan(values) & self._expected
        raw = self._run.cube(metric)[:, :, self._window] if column != metric else np.full_like(values, np.nan)
        error = self._errors(metric)
        out = []
        for s, site in enumerate(self._run.sites):
            if sites is not None and site not in sites:
                continue
            for b, bucket in enumerate(self._run.buckets):
                if self._measured[s, b]:
                    shared = replace(
                        self._shared,
                        num_tokens=float(self._num_tokens[s, b]),
                        num_sequences=float(self._num_sequences[s, b]),
                        error=float(error[s, b]),
                    )
                    labels = {**self._labels, "site": site, "bucket": bucket, "metric": metric}
                    out += self._layers(shared, labels, values[s, b], raw[s, b], missing[s, b])
        return out

    def _layers(
        self, shared: Point, labels: dict[str, str], values: FloatArray, raw: FloatArray, missing: NDArray[np.bool_]
    ) -> list[Point]:
        """``values``, ``raw`` and ``missing`` are (window, layer)."""
        layers, raw_layers = nanmedian(values, axis=0), nanmedian(raw, axis=0)
        is_rank = "rank" in labels["metric"]

        def point(name: str, value: float, own_raw: float, num_missing: int) -> Point:
            return replace(
                shared,
                series=tuple({**labels, "layer": name}[column] for column in self._by),
                value=value,
                rank=value if is_rank else float("nan"),
                raw=own_raw,
                missing=num_missing,
            )

        center, own_raw = (float(nanmedian(own, axis=0)) for own in (layers, raw_layers))
        spread = float(np.nanstd(layers, ddof=1)) if np.isfinite(layers).sum() > 1 else float("nan")
        median = point(LAYER_MEDIAN, center, own_raw, int(missing.sum()))
        out = [replace(median, spread=spread, layers=tuple(float(value) for value in layers))]
        if "layer" in self._by:
            out += [
                point(name, float(layers[k]), float(raw_layers[k]), int(missing[:, k].sum()))
                for k, name in enumerate(self._run.layers)
            ]
        return out

    def _errors(self, metric: str) -> FloatArray:
        """(site, bucket) standard error of ln(metric): layers see the same tokens, windows others."""
        run, nothing = self._run, np.full(self._measured.shape, np.nan)
        low, high = (run.columns.floats.get(f"{metric}_ci_{end}") for end in ("low", "high"))
        groups = run.num_jackknife_groups
        if low is None or high is None or groups < 2:
            return nothing
        ends = [run.cube(f"{metric}_ci_{end}")[:, :, self._window] for end in ("low", "high")]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            reach = np.log(ends[1] / ends[0]) / 2
        windows = max(len(self._window), 1)
        # the median of independent windows has 1.25 times the error of their mean
        share = 1.0 if windows == 1 else 1.2533 / np.sqrt(windows)
        return nanmedian(reach.reshape(*reach.shape[:2], -1), axis=-1) * share / float(t_quantile(groups - 1))
