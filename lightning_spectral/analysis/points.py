"""From runs to the points of a fit: the last windows' median per layer, then the median over layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.recipe_facts import decay_step
from lightning_spectral.analysis.runs import Run, RunSet

FloatArray = NDArray[np.float64]
LAST_WINDOWS: Final = 5
NULL_STEPS: Final = (0, 1)  # windows of the untrained, or once updated, network
LAYER_MEDIAN: Final = "median"
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
) -> PointTable:
    """Points of every run, one for each site, bucket, metric and (if ``layer`` is in ``by``) layer.

    Args:
        runs: What :func:`~lightning_spectral.analysis.runs.load_runs` found.
        by: Columns that make a series; :func:`default_by` if not given.
        metrics: Names from the records.
        last: Windows in the median.
        until_step: Take the last windows at or before this step; with a step for each run id, runs without one are
            left out, and so is the untrained state (see :func:`pre_decay`).
        sites: Sites to use; ``post`` alone when ``site`` is not in ``by``.

    Raises:
        ValueError: If ``last`` is not positive, or ``by`` names a column that the runs do not have.
    """
    if last < 1:
        raise ValueError(f"`last` must be >= 1, got {last}.")
    names = tuple(by) if by is not None else default_by(runs)
    if "metric" not in names and len(metrics) > 1:
        raise ValueError(f"`by` without `metric` needs one metric, got {', '.join(metrics)}. Pass --metrics hard_rank.")
    known = {"optimizer", "site", "bucket", "metric", "layer", *(key for run in runs.runs for key in run.info.labels)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the runs have no column `{unknown[0]}` to group by; they have {', '.join(sorted(known))}.")
    if sites is None and "site" not in names:
        sites = ("post",)
    points: list[Point] = []
    for run in runs.runs:
        points += _points_of_run(runs, run, names, metrics, last, until_step, sites)
    return PointTable(names, tuple(points))


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
    trained = ~np.isin(run.steps, NULL_STEPS)
    return run.steps[trained & (run.steps <= until_step.get(run.run_id, -1))]


def _points_of_run(
    runs: RunSet,
    run: Run,
    by: tuple[str, ...],
    metrics: Sequence[str],
    last: int,
    until_step: int | Mapping[str, int] | None,
    sites: Sequence[str] | None,
) -> list[Point]:
    usable = _usable_steps(run, until_step)
    if not len(usable):
        return []
    chosen = usable[-last:]
    window = np.searchsorted(run.steps, chosen)
    steps = tuple(int(step) for step in chosen)
    decay = decay_step(run)
    labels = {name: runs.label_of(run, name) for name in by}
    rows = run.cube("num_tokens")[:, :, window]
    num_tokens = nanmedian(rows.reshape(*rows.shape[:2], -1), axis=-1)
    out = []
    for metric in metrics:
        values = run.cube(metric)[:, :, window]
        per_layer = nanmedian(values, axis=2)
        center = nanmedian(per_layer, axis=2)
        for s, site in enumerate(run.sites):
            if sites is not None and site not in sites:
                continue
            for b, bucket in enumerate(run.buckets):
                layers = per_layer[s, b]
                if np.isnan(rows[s, b]).all():
                    continue  # never measured at this site and bucket
                labels |= {"site": site, "bucket": bucket, "metric": metric}
                missing = int(np.isnan(values[s, b]).sum())
                spread = float(np.nanstd(layers, ddof=1)) if np.isfinite(layers).sum() > 1 else float("nan")

                is_rank = "rank" in metric
                median = Point(
                    series=tuple({**labels, "layer": LAYER_MEDIAN}[name] for name in by),
                    x=float(run.width),
                    value=float(center[s, b]),
                    source=run.run_id,
                    seed=run.seed,
                    spread=spread,
                    num_tokens=float(num_tokens[s, b]),
                    rank=float(center[s, b]) if is_rank else float("nan"),
                    steps=steps,
                    conventions=run.conventions,
                    layers=tuple(float(value) for value in layers),
                    missing=missing,
                    decay_step=float("nan") if decay is None else float(decay),
                )
                out.append(median)
                if "layer" not in by:
                    continue
                for index, name in enumerate(run.layers):
                    value = float(layers[index])
                    out.append(
                        replace(
                            median,
                            series=tuple({**labels, "layer": name}[column] for column in by),
                            value=value,
                            rank=value if is_rank else float("nan"),
                            spread=float("nan"),
                            layers=(),
                            missing=int(np.isnan(values[s, b, :, index]).sum()),
                        )
                    )
    return out
