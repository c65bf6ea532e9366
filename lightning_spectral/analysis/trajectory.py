"""How the exponent moves during training, and where it starts: beta(t) and the untrained null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.linear import least_squares, seed_means, t_quantile
from lightning_spectral.analysis.points import DEFAULT_METRICS, NULL_STEPS, nanmedian
from lightning_spectral.analysis.runs import Run, RunSet

FloatArray = NDArray[np.float64]
SMOOTHING_WINDOWS: Final = 3


@dataclass(frozen=True)
class Trajectory:
    """beta at every window that all runs of a series share.

    Attributes:
        series: (optimizer, other labels ..., site, bucket, metric).
        steps: (T,) optimizer steps.
        beta: (T,); NaN where a run has no number.
        low: (T,) lower end of the 95 % interval over widths (NaN with two widths).
        high: (T,) upper end.
        num_widths: Distinct widths.
        num_seeds: Runs per width, at most.
    """

    series: tuple[str, ...]
    steps: NDArray[np.int64]
    beta: FloatArray
    low: FloatArray
    high: FloatArray
    num_widths: int
    num_seeds: int

    @property
    def null(self) -> tuple[float, int] | None:
        """(beta, step) of the untrained or once updated network, if it was measured."""
        if len(self.steps) and int(self.steps[0]) in NULL_STEPS and np.isfinite(self.beta[0]):
            return float(self.beta[0]), int(self.steps[0])
        return None


def trailing_median(values: FloatArray, windows: int) -> FloatArray:
    """Median of this and the ``windows - 1`` earlier entries along the second-last axis (time)."""
    padded = np.concatenate([np.full((*values.shape[:-2], windows - 1, values.shape[-1]), np.nan), values], axis=-2)
    stacked = np.stack([padded[..., k : k + values.shape[-2], :] for k in range(windows)])
    return nanmedian(stacked, axis=0)


def group_runs(runs: RunSet) -> dict[tuple[str, ...], list[Run]]:
    """Runs of each series: same optimizer and same other labels."""
    out: dict[tuple[str, ...], list[Run]] = {}
    for run in runs.runs:
        key = (run.optimizer, *(runs.label_of(run, name) for name in runs.series_labels))
        out.setdefault(key, []).append(run)
    return out


def beta_trajectories(
    runs: RunSet, *, metrics: Sequence[str] = DEFAULT_METRICS, smoothing: int = SMOOTHING_WINDOWS
) -> list[Trajectory]:
    """beta(t) of every series, site, bucket and metric that at least two widths have."""
    out: list[Trajectory] = []
    for key, group in group_runs(runs).items():
        widths = np.log([run.width for run in group])
        if len(np.unique(widths)) < 2:
            continue
        steps = group[0].steps
        for run in group[1:]:
            steps = np.intersect1d(steps, run.steps)
        sites = [site for site in group[0].sites if all(site in run.sites for run in group)]
        buckets = [bucket for bucket in group[0].buckets if all(bucket in run.buckets for run in group)]
        if not len(steps):
            continue
        for metric in metrics:
            medians = [_layer_median(run, metric, steps, smoothing) for run in group]
            for site in sites:
                for bucket in buckets:
                    rows = [
                        median[run.sites.index(site), run.buckets.index(bucket)]
                        for run, median in zip(group, medians, strict=True)
                    ]
                    out.append(fit_windows((*key, site, bucket, metric), steps, widths, np.stack(rows, axis=1)))
    return out


def _layer_median(run: Run, metric: str, steps: NDArray[np.int64], smoothing: int) -> FloatArray:
    values = nanmedian(trailing_median(run.cube(metric), smoothing), axis=-1)
    return values[:, :, np.searchsorted(run.steps, steps)]


def fit_windows(series: tuple[str, ...], steps: NDArray[np.int64], ln_x: FloatArray, values: FloatArray) -> Trajectory:
    """The exponent at every window at once; ``ln_x`` is (run,), ``values`` (window, run)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = seed_means(ln_x, np.log(values))
    y = np.where(np.isfinite(y), y, np.nan)
    line = least_squares(x, y)
    half = t_quantile(line.df) * line.slope_se
    repeats = int(np.unique(ln_x, return_counts=True)[1].max())
    return Trajectory(series, steps, line.slope, line.slope - half, line.slope + half, len(x), repeats)
