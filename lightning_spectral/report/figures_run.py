"""One run by itself: its ranks by bucket, its layers over steps, its losses; and what to run for a law."""

from __future__ import annotations

import shlex
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lightning_spectral.analysis.matched import loss_curve
from lightning_spectral.analysis.points import nanmedian
from lightning_spectral.analysis.runs import Run
from lightning_spectral.records.looks import bucket_colors, bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, ReportFigure
from lightning_spectral.report.style import counted, label_right, short_count

RECIPE_FILE: Final = "hyperparameters.yaml"
_MULTIPLIERS: Final = (1.0, 2.0, 4.0, 8.0)
_FEW_WINDOWS: Final = 12
_MANY_CELLS: Final = 1000  # as shapes they are megabytes of page, each view anew


def one_run(scene: ReportData) -> ReportFigure:
    """Ranks of every bucket, a map of layers over steps, and the losses of the run."""
    run = scene.runs.runs[0]
    site = scene.site if scene.site in run.sites else run.sites[0]
    metrics = [metric for metric in scene.metrics if metric in ("hard_rank", "soft_rank")] or scene.metrics[:1]
    metrics.sort()  # hard rank first: the solid line
    figure = Figure(figsize=(11.5, 3.6))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1.15, 0.9])
    figure.subplots_adjust(left=0.06, right=0.94, top=0.9, bottom=0.15, wspace=0.5)
    head = _ranks(run, left, site, metrics)
    focus = next((bucket for bucket in ("tail", *run.buckets) if bucket in run.buckets), run.buckets[0])
    cube = run.cube(metrics[0])[run.sites.index(site), run.buckets.index(focus)]
    as_picture = cube.size > _MANY_CELLS
    image = middle.pcolormesh(cube.T, cmap="viridis", shading="flat", edgecolors="face", rasterized=as_picture)
    if np.isfinite(cube).any():
        figure.colorbar(image, ax=middle, pad=0.02, format=FuncFormatter(lambda value, _: short_count(value)))
    places = np.unique(np.linspace(0, len(run.steps) - 1, min(len(run.steps), 5)).astype(int))
    middle.set_xticks(places + 0.5, [short_count(run.steps[place]) for place in places])
    shown = np.unique(np.linspace(0, len(run.layers) - 1, min(len(run.layers), 12)).astype(int))
    middle.set_yticks(shown + 0.5, [str(place) for place in shown])
    middle.grid(visible=False)
    middle.set_title(f"{bucket_name(focus)} {metric_name(metrics[0])} of every layer")
    middle.set_xlabel("window at step")
    middle.set_ylabel("layer")
    _losses(run, right)
    return ReportFigure(
        figure,
        head,
        "Left: median over layers; solid: hard rank, broken: soft rank. Middle: every layer at every window.",
    )


def _ranks(run: Run, ax: Axes, site: str, metrics: list[str]) -> str:
    """Curves by bucket; returns the figure's headline."""
    colors, ends, head = bucket_colors(run.buckets), [], []
    for bucket in run.buckets:
        for metric, line in zip(metrics, ("-", "--"), strict=False):
            ranks = nanmedian(run.cube(metric)[run.sites.index(site), run.buckets.index(bucket)], axis=-1)
            shown = np.isfinite(ranks)
            if not shown.any():
                continue
            label = f"{bucket_name(bucket)} {metric_name(metric)}"
            ax.plot(
                run.steps[shown], ranks[shown], line, marker=_marker(shown.sum()), color=colors[bucket], label=label
            )
            if line == "-":
                ends.append((float(ranks[shown][-1]), bucket_name(bucket), colors[bucket]))
                first, last = ranks[shown][0], ranks[shown][-1]
                way = f"from {_rank(first)} to {_rank(last)}" if shown.sum() > 1 else _rank(last)
                head.append(f"{bucket_name(bucket)} {way}")
    ax.set_xlabel("optimizer step")
    counted(ax.xaxis)
    ax.set_title(f"rank at {site}, D = {run.width}")
    ax.set_ylim(bottom=0)
    label_right(ax, ends)
    if head:
        return f"{metric_name(metrics[0])} of {run.run_id}: {', '.join(head)} of D = {run.width}."
    statuses = sorted({status.decode() for status in run.columns.texts["status"]})
    return f"No window of {run.run_id} has a rank (status: {', '.join(statuses)})."


def _rank(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _marker(count: int) -> str:
    """A dot at each of a few windows: a line through one is not seen."""
    return "." if count <= _FEW_WINDOWS else ""


def _losses(run: Run, ax: Axes) -> None:
    colors = bucket_colors(run.buckets)
    ends: dict[str, tuple[float, str, str]] = {}
    for bucket in run.buckets:
        for stage, line in (("validation", "-"), ("train", ":")):
            steps, losses = loss_curve(run, bucket, (stage,))
            if len(steps):
                label = f"{bucket_name(bucket)} {stage} loss"
                ax.plot(steps, losses, line, marker=_marker(len(steps)), color=colors[bucket], label=label)
                ends[bucket] = (float(losses[-1]), bucket_name(bucket), colors[bucket])
    ax.set_title("loss, nats (dotted: training)")
    ax.set_xlabel("optimizer step")
    counted(ax.xaxis, most=4)
    label_right(ax, list(ends.values()))
    if not ends:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no losses were logged", transform=ax.transAxes, ha="center", color="#888888")


def sweep_command(run: Run) -> str:
    """The command that makes a law of this run: the same recipe at other widths and seeds."""
    recipe = run.folder / RECIPE_FILE
    architecture = run.info.hparams.get("architecture")
    own = architecture.get("ffn_multiplier") if isinstance(architecture, dict) else None
    if not recipe.is_file() or not isinstance(own, (int, float)):
        return ""
    values = ",".join(f"{value:g}" for value in sorted({*_MULTIPLIERS, float(own)}))
    words = ["lightning-spectral", "sweep", str(recipe), "--axis", f"architecture.ffn_multiplier={values}"]
    return shlex.join([*words, "--axis", "seed=0,1,2", "--out", f"{run.folder}_widths"])
