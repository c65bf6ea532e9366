"""What a notebook shows of runs: the curves of the tab SPECTRAL and the table of ``pretrain``, by the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_spectral.analysis.last_window import summary
from lightning_spectral.analysis.load import as_paths
from lightning_spectral.analysis.points import nanmedian
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.runs import Run
from lightning_spectral.records.looks import bucket_colors, bucket_name, metric_name, optimizer_colors, ordered_buckets
from lightning_spectral.report.figures import inline, picture_of, svg_of
from lightning_spectral.report.style import REPORT_RC, label_right
from lightning_spectral.text.tables import Table

FEW: Final = 3  # so many runs share a panel of all buckets, told apart by their lines, as in the tab
_LINES: Final = ("-", "--", ":")


@dataclass(frozen=True)
class RunView:
    """Curves of some runs, and the last window of a single one.

    Attributes:
        figure: Median over layers by bucket; the untrained network is dotted, nothing is smoothed.
        table: One row per bucket of the last training window; ``None`` for several runs.
    """

    figure: Figure
    table: Table | None

    def _repr_html_(self) -> str:
        drawn = inline(svg_of(self.figure, "ranks"), "ranks")
        return f'<div style="max-width: 62em">{drawn}</div>' + (self.table._repr_html_() if self.table else "")

    def _repr_png_(self) -> bytes:
        """For viewers that show no HTML."""
        return picture_of(self.figure, "png")


def show(
    runs: str | Path | Iterable[str | Path], *, metrics: Sequence[str] = ("hard_rank", "soft_rank"), site: str = "post"
) -> RunView:
    """Rank curves of run folders, to be the last line of a notebook's cell.

    Args:
        runs: One run folder or several, or folders that hold them at any depth.
        metrics: Fields of the records, a panel (or, of more than three runs, a row of panels) each.
        site: ``post`` or ``pre`` the nonlinearity.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there is no run, or none has such numbers.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    found = load_runs(as_paths(runs)).runs
    usable = [run for run in found if site in run.sites]
    if not usable:
        sites = ", ".join(sorted({name for run in found for name in run.sites})) or "none"
        raise ValueError(f"no run has ranks of the site `{site}`; sites measured: {sites}.")
    buckets = ordered_buckets(bucket for run in usable for bucket in run.buckets)
    with rc_context(REPORT_RC):
        few = len(usable) <= FEW
        figure = _together(usable, metrics, site, buckets) if few else _apart(usable, metrics, site, buckets)
    return RunView(figure, summary(usable[0].folder) if len(usable) == 1 else None)


def curve(run: Run, metric: str, site: str, bucket: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and medians over the layers (T,), without the windows that have no number."""
    if bucket not in run.buckets or site not in run.sites:
        return np.array([]), np.array([])
    median = nanmedian(run.cube(metric)[run.sites.index(site), run.buckets.index(bucket)], axis=-1)
    known = np.isfinite(median)
    return run.steps[known], median[known]


def _together(runs: Sequence[Run], metrics: Sequence[str], site: str, buckets: Sequence[str]) -> Figure:
    colors = bucket_colors(buckets)
    figure = Figure(figsize=(5.2 * len(metrics), 3.1), layout="constrained")
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for run, line in zip(runs, _LINES, strict=False):
            for bucket in buckets:
                _draw(ax, curve(run, metric, site, bucket), colors[bucket], line, bucket_name(bucket), run is runs[0])
        ax.set_title(metric_name(metric))
        ax.set_xlabel("optimizer step")
        _label_lines(ax)
    if len(runs) > 1:
        handles = [Line2D([], [], color="#555555", ls=line) for line in _LINES[: len(runs)]]
        figure.legend(handles, [run.run_id for run in runs], loc="outside lower left", ncols=3, frameon=False)
    return figure


def _apart(runs: Sequence[Run], metrics: Sequence[str], site: str, buckets: Sequence[str]) -> Figure:
    colors = optimizer_colors(run.optimizer for run in runs)
    widths = sorted({run.width for run in runs})
    figure = Figure(figsize=(3.2 * len(buckets), 2.7 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex=True)
    for row, metric in zip(axes, metrics, strict=True):
        for ax, bucket in zip(row, buckets, strict=True):
            for run in runs:
                place = (1 + widths.index(run.width)) / len(widths)
                steps, medians = curve(run, metric, site, bucket)
                ax.plot(steps, medians, color=colors[run.optimizer], alpha=0.3 + 0.7 * place, lw=1.2)
            ax.set_title(f"{metric_name(metric)}, {bucket_name(bucket)}")
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    handles = [Line2D([], [], color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower left", ncols=6, frameon=False)
    return figure


def _draw(ax: Axes, points: tuple[np.ndarray, np.ndarray], color: str, line: str, name: str, first: bool) -> None:
    steps, medians = points
    if not len(steps):
        return
    ax.plot(steps, medians, line, color=color, marker=".", label=name if first else "_")
    if steps[0] == 0:  # the untrained network
        ax.axhline(medians[0], color=color, ls=":", lw=0.9)


def _label_lines(ax: Axes) -> None:
    shown = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    ends = [(float(np.asarray(line.get_ydata())[-1]), str(line.get_label()), str(line.get_color())) for line in shown]
    label_right(ax, ends)
