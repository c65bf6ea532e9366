"""Figures by layer: the exponent of each, and the ranks at the widest FFN."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.dark import ON_CELL
from lightning_spectral.report.scene import ReportData, ReportFigure, joined
from lightning_spectral.report.style import label_right, log2_axis, tall


def layer_map(scene: ReportData) -> ReportFigure:
    """Exponent of every layer, and ranks by layer at the widest FFN."""
    if len(scene.layers) < 2:
        return ReportFigure(None, "No layer map: the runs have one layer.")
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    grid = np.full((len(scene.layers), len(scene.series)), np.nan)
    for c, key in enumerate(scene.series):
        for r, layer in enumerate(scene.layers):
            fit = scene.fit(key, scene.focus, metric, layer)
            if fit is not None and not fit.refused:
                grid[r, c] = fit.beta
    if not np.isfinite(grid).any():
        return _only_ranks(scene, metric)
    figure = Figure(figsize=(11.5, tall(1.4 + 0.3 * max(len(scene.layers), 6), len(scene.series))))
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    h = figure.get_figheight()
    figure.subplots_adjust(left=0.09, right=0.87, top=1 - 0.4 / h, bottom=0.75 / h, wspace=0.28)
    limit = max(1.0, float(np.nanmax(np.abs(grid))))
    left.pcolormesh(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            if np.isfinite(grid[r, c]):
                shade = "white" if abs(grid[r, c]) > 0.65 * limit else "#222222"
                name = f"{ON_CELL}{r}-{c}"
                at = (c + 0.5, r + 0.5, f"{grid[r, c]:.2f}")
                left.text(*at, ha="center", va="center", fontsize=8, color=shade, gid=name)
    left.invert_yaxis()
    left.grid(visible=False)
    left.set_xticks(np.arange(len(scene.series)) + 0.5, [scene.looks[key].name for key in scene.series], fontsize=8)
    if len(scene.series) > 5:
        left.tick_params(axis="x", rotation=20 if len(scene.series) < 10 else 60)
    left.set_yticks(np.arange(len(scene.layers)) + 0.5, [name.replace("_", " ") for name in scene.layers], fontsize=8)
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    left.set_title(f"beta by layer, {where}")
    _ranks_by_layer(scene, right, metric)
    spans = [
        f"{scene.looks[key].name} {np.nanmin(grid[:, c]):.2f} to {np.nanmax(grid[:, c]):.2f}"
        for c, key in enumerate(scene.series)
        if key in scene.plain and np.isfinite(grid[:, c]).any()
    ]
    return ReportFigure(
        figure,
        f"Layers differ: beta of {where} runs over {joined(spans)}.",
        "The median over layers can move because one layer joins or leaves the middle: look here before trusting it.",
    )


def _only_ranks(scene: ReportData, metric: str) -> ReportFigure:
    figure = Figure(figsize=(11.5, tall(3.4, len(scene.series))))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.065, right=0.6, top=0.9, bottom=0.14)
    _ranks_by_layer(scene, ax, metric)
    return ReportFigure(figure, "Ranks by layer; no exponent of a layer could be fitted.", "Mean over seeds.")


def _mean_over_seeds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(layer,) geometric mean of (seed, layer), of the seeds that have a number there; NaN without one."""
    known = np.isfinite(values) & (values > 0)
    logs = np.log(np.where(known, values, 1.0)).sum(axis=0)
    return np.where(known.any(axis=0), np.exp(logs / np.maximum(known.sum(axis=0), 1)), np.nan)


def _ranks_by_layer(scene: ReportData, ax: Axes, metric: str) -> None:
    widest = scene.widths[-1]
    ends, values = [], []
    for key in scene.series:
        look = scene.looks[key]
        own = [p for p in scene.points(key, scene.focus, metric) if p.x == widest and p.layers]
        if not own:
            continue
        deepest = max(len(p.layers) for p in own)  # a run that lacks a layer has no place for the others
        mean = _mean_over_seeds(np.array([p.layers for p in own if len(p.layers) == deepest]))
        known = mean[np.isfinite(mean)]
        if not len(known):
            continue
        ax.plot(
            range(len(mean)),
            mean,
            look.line,
            color=look.color,
            marker=look.marker,
            mfc=look.face,
            ms=5,
            label=look.name,
        )
        ends.append((float(known[-1]), look.name, look.text_color))
        values += known.tolist()
    if ends:
        log2_axis(ax, "y", min(values) / 1.2, max(values) * 1.2)
        ax.set_xticks(range(len(scene.layers)), [str(k) for k in range(len(scene.layers))])
        label_right(ax, ends)
    ax.set_xlabel("layer")
    ax.set_title(f"{metric_name(metric)} by layer at D = {widest}")
