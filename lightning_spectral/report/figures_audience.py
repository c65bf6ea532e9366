"""When each group of tokens is learned: the recall front as a heat map, one panel per optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from lightning_spectral.analysis.matched import loss_curve
from lightning_spectral.analysis.runs import Run
from lightning_spectral.records.looks import bucket_name
from lightning_spectral.report.scene import ReportData, ReportFigure, Series, joined
from lightning_spectral.text import parse_json

AUDIENCE_FILE: Final = "audience.jsonl"
_PANELS_AT_MOST: Final = 4
Curves = dict[str, dict[int, float]]  # group of tokens -> step -> loss


def recall_front(scene: ReportData) -> ReportFigure:
    """Share of its way that each group's loss has gone, over steps, at the widest FFN; mean over runs."""
    fronts: dict[Series, Curves] = {}
    for key in scene.series:
        runs = [run for run in scene.groups[key] if run.width == scene.widths[-1]]
        found = _mean([_curves(scene, run) for run in runs])
        if any(len(curve) > 1 for curve in found.values()):
            fronts[key] = found
    if not fronts:
        return ReportFigure(
            None, "No recall front: the runs have no losses by token frequency at two steps.",
            "TailTokenProbe and UpdateAudience write them.",
        )  # fmt: skip
    shown = list(fronts)[:_PANELS_AT_MOST]
    rows = max(len(fronts[key]) for key in shown)
    height = 1.5 + 0.3 * max(rows, 4)
    figure = Figure(figsize=(11.5, height))
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.9, top=1 - 0.35 / height, bottom=0.6 / height, wspace=0.2)
    for ax, key in zip(axes, shown, strict=True):
        curves = fronts[key]
        steps = sorted({step for curve in curves.values() for step in curve})
        grid = np.array([[share_gone(curve).get(step, np.nan) for step in steps] for curve in curves.values()])
        mesh = ax.pcolormesh(np.clip(grid, 0, 1), cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        for row, curve in enumerate(curves.values()):
            half = half_way(curve)
            if half is not None:
                ax.plot(steps.index(half) + 0.5, row + 0.5, "o", color="white", mec="#222222", ms=5)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.set_title(scene.looks[key].name)
        every = max(1, len(steps) // 6)
        ax.set_xticks(np.arange(len(steps))[::every] + 0.5, [str(step) for step in steps[::every]], fontsize=8)
        names = [bucket_name(group).replace("_", " ") for group in curves] if ax is axes[0] else []
        ax.set_yticks(np.arange(len(curves)) + 0.5, names or [""] * len(curves), fontsize=8)
        ax.set_xlabel("step")
    right = figure.add_axes((0.915, 0.6 / height, 0.012, 1 - 0.95 / height))
    figure.colorbar(mesh, cax=right, label="share of the way")
    spans = [f"{scene.looks[key].name} {_span(fronts[key])}" for key in shown]
    return ReportFigure(
        figure,
        f"Half of their way down, at D = {scene.widths[-1]}: {joined(spans)}.",
        "From each group's first loss (0) to its lowest (1); dots: the first step at half the way. Losses are those of "
        "UpdateAudience where a run has them (held-out tokens), else the losses that the ranks were recorded with.",
    )


def share_gone(curve: dict[int, float]) -> dict[int, float]:
    """Share of the way from the first loss to the lowest, by step; zeros for a loss that only rose."""
    first, lowest = curve[min(curve)], min(curve.values())
    way = first - lowest
    return {step: (first - loss) / way if way > 0 else 0.0 for step, loss in curve.items()}


def half_way(curve: dict[int, float]) -> int | None:
    """The first step at half the way, or ``None`` for a loss that only rose."""
    gone = share_gone(curve)
    return next((step for step in sorted(gone) if gone[step] >= 0.5), None)


def _span(curves: Curves) -> str:
    """``HEAD at step 20, TAIL at step 60``."""
    ends = dict.fromkeys((next(iter(curves)), list(curves)[-1]))
    found = [(bucket_name(group).replace("_", " "), half_way(curves[group])) for group in ends]
    return joined([f"{name} at step {step}" if step is not None else f"{name} never" for name, step in found])


def _curves(scene: ReportData, run: Run) -> Curves:
    path = run.folder / AUDIENCE_FILE
    if path.is_file():
        return _of_audience(path)
    frequent = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets]
    made = {bucket: loss_curve(run, bucket, ("train", "validation")) for bucket in frequent}
    return {
        bucket: dict(zip((int(step) for step in steps), (float(loss) for loss in losses), strict=True))
        for bucket, (steps, losses) in made.items()
        if len(steps)
    }


def _of_audience(path: Path) -> Curves:
    curves: Curves = {}
    for line in path.read_bytes().splitlines():
        try:
            row = parse_json(line)
            if row["loss"] is not None:
                curves.setdefault(str(row["bucket"]), {})[int(row["step"])] = float(row["loss"])
        except (ValueError, KeyError, TypeError, OverflowError):  # a line that was cut short
            continue
    order = {"head": "0", "mid": "1", "tail": "2"}
    return dict(sorted(curves.items(), key=lambda item: order.get(item[0], item[0])))


def _mean(runs: list[Curves]) -> Curves:
    """Mean over runs at the steps that all of them have."""
    if not runs:
        return {}
    made: Curves = {}
    for group in runs[0]:
        mine = [curves[group] for curves in runs if group in curves]
        steps = set.intersection(*(set(curve) for curve in mine))
        if steps:
            made[group] = {step: float(np.mean([curve[step] for curve in mine])) for step in sorted(steps)}
    return made
