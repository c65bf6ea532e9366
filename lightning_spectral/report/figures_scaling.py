"""Figures of the scaling law: rank against width, for one bucket and for all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_spectral.analysis.caveats import FEW_WIDTHS
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.points import Point
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, ReportFigure, beta_text
from lightning_spectral.report.style import (
    LETTER,
    SeriesStyle,
    label_right,
    log2_axis,
    tall,
    width_ticks,
)

_RANKS = ("hard_rank", "soft_rank")
_LEGEND_COLUMNS = 6
_WIDTH = 11.5  # inches


def _limits(scene: ReportData, panels: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """Y limits of (bucket, metric) panels, all of them equally many octaves long."""
    ranges = []
    for bucket, metric in panels:
        values = [p.value for key in scene.series for p in scene.points(key, bucket, metric)] or [1.0, 2.0]
        null = _null(scene, bucket, metric)
        if null is not None:
            values += [null[0], null[0] * (scene.widths[-1] / scene.widths[0]) ** null[1]]
        ranges.append((math.log2(min(values) / 1.35), math.log2(max(values) * 1.3)))
    length = max(high - low for low, high in ranges)
    return [(2 ** ((low + high - length) / 2), 2 ** ((low + high + length) / 2)) for low, high in ranges]


def _law(scene: ReportData, ax: Axes, bucket: str, metric: str, limits: tuple[float, float]) -> None:
    widths = np.array(scene.widths, dtype=float)
    span = np.geomspace(widths[0], widths[-1], 60)
    log2_axis(ax, "x", widths[0] / 1.12, widths[-1] * 1.12, width_ticks(widths.tolist()))
    low, high = limits
    log2_axis(ax, "y", low, high)
    smallest = float("inf")
    low_end = float("inf")
    for key in scene.series:
        fit, points = scene.fit(key, bucket, metric), scene.points(key, bucket, metric)
        if not points:
            continue
        smallest = min(smallest, *(p.value for p in points))
        _points(ax, points, scene.looks[key])
        if fit is not None and not fit.refused:
            low_end = min(low_end, _line(ax, fit, span, limits, scene.looks[key]))
    if smallest == float("inf"):
        ax.text(0.5, 0.5, "no numbers", transform=ax.transAxes, ha="center", color="#888888")
        return
    if len(widths) > 1:
        _guide(ax, span, min(low_end, smallest * 4), low)
    null = _null(scene, bucket, metric)
    if null is not None:
        ax.plot(span, null[0] * (span / span[0]) ** null[1], "--", color="#999999", lw=1.1, zorder=1)


def _points(ax: Axes, points: Sequence[Point], look: SeriesStyle) -> None:
    """Means over seeds, the seeds where there are several, and the spread over layers."""
    means = {x: math.exp(np.mean([math.log(p.value) for p in points if p.x == x])) for x in {p.x for p in points}}
    if len(points) > len(means):
        ax.plot([p.x for p in points], [p.value for p in points], ".", color=look.color, alpha=0.45, ms=4, zorder=3)
    for x, mean in means.items():
        spreads = [p.spread for p in points if p.x == x and np.isfinite(p.spread)]
        if spreads and np.mean(spreads) < mean:
            ends = [mean - np.mean(spreads), mean + np.mean(spreads)]
            ax.plot([x, x], ends, color=look.color, alpha=0.25, lw=1, zorder=1)
    xs, ys = list(means), list(means.values())
    ax.plot(xs, ys, look.marker, color=look.color, mfc=look.face, ms=5.5, zorder=4, mew=1.2, label=look.name)


def _line(
    ax: Axes, fit: PowerLawFit, span: NDArray[np.float64], limits: tuple[float, float], look: SeriesStyle
) -> float:
    """A fit and its band over its own widths; returns the line's value at the right edge."""
    low, high = limits
    own = span[(span >= fit.x_min * 0.999) & (span <= fit.x_max * 1.001)]
    ax.plot(own, fit.line(own), look.line, color=look.color, zorder=3)
    if np.isfinite(fit.level_se) and fit.num_widths >= FEW_WIDTHS:
        lower, upper = fit.band(own)
        lower, upper = np.clip(lower, low / 2, high * 2), np.clip(upper, low / 2, high * 2)
        ax.fill_between(own, lower, upper, color=look.color, alpha=0.13, lw=0)
    return float(fit.line(span[-1:])[0])


def _guide(ax: Axes, span: NDArray[np.float64], below: float, low: float) -> None:
    """A line of slope 1 under everything at the right edge, so that it crosses few lines; else from the corner."""
    guide = below / 1.25 * span / span[-1]
    if (guide > low).mean() < 0.5:
        guide = low * 1.1 * span / span[0]
    shown = np.flatnonzero(guide > low)
    ax.plot(span[shown], guide[shown], ":", color="#777777", lw=1.2, zorder=1)
    at = (span[shown[len(shown) // 2]], guide[shown[len(shown) // 2]])
    ax.annotate("slope 1", at, xytext=(-5, 1), textcoords="offset points", color="#777777", fontsize=8, ha="right")


def _null(scene: ReportData, bucket: str, metric: str) -> tuple[float, float] | None:
    """(rank at the smallest width, slope) of the untrained network."""
    fits = [scene.fit(key, bucket, metric) for key in scene.series]
    slopes = [fit.null_beta for fit in fits if fit is not None and np.isfinite(fit.null_beta)]
    found = []
    for run in scene.runs.runs:
        measured = scene.site in run.sites and bucket in run.buckets
        if run.width == scene.widths[0] and run.steps[0] in (0, 1) and measured:
            values = run.cube(metric)[run.sites.index(scene.site), run.buckets.index(bucket), 0]
            if np.isfinite(values).any():
                found.append(float(np.nanmedian(values)))
    return (float(np.exp(np.mean(np.log(found)))), float(np.mean(slopes))) if found and slopes else None


def scaling_laws(scene: ReportData) -> ReportFigure:
    """Rank against width for the headline bucket."""
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    figure = Figure(figsize=(_WIDTH, tall(4.6, len(scene.series) + 1)))
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    limits = _limits(scene, [(scene.focus, metric) for metric in metrics])
    labels = [_ends(scene, metric) for metric in metrics]
    _beside(figure, len(metrics), max((len(text) for own in labels for _, text, _ in own), default=0))
    for ax, metric, ends, own in zip(axes, metrics, limits, labels, strict=True):
        _law(scene, ax, scene.focus, metric, ends)
        label_right(ax, [(min(y, ends[1]), text, color) for y, text, color in own])
        ax.set_title(f"{bucket_name(scene.focus)}: {metric_name(metric)}")
        ax.set_xlabel("FFN width D")
    return ReportFigure(
        figure,
        _steepest(scene, metrics[0]),
        "Point: median of the last windows in each layer, then of the layers; thin bar: one SD over layers; small "
        "dots: single seeds. Line and band: fit with its 95 % interval, over widths and (where they are several) seeds "
        "(no band over fewer than 4 widths). "
        "Dotted: slope 1. Grey dashed: the untrained network, whose slope training must be judged against.",
    )


def _beside(figure: Figure, panels: int, letters: int) -> None:
    """Room at the right of each panel for labels of so many letters, and for the ticks of the next panel."""
    width, ticks = figure.get_figwidth(), 0.55
    label = max(0.2 + LETTER * letters, 0.15 * width)
    panel = (width - panels * (ticks + label)) / panels
    figure.subplots_adjust(
        left=ticks / width, right=1 - label / width, top=0.92, bottom=0.12, wspace=(label + ticks) / panel
    )


def _steepest(scene: ReportData, metric: str) -> str:
    name = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    fits = [
        (fit.beta, key, fit) for key in scene.series if (fit := scene.fit(key, scene.focus, metric)) and not fit.refused
    ]
    if not fits:
        return f"No law of {name} could be fitted."
    fits = [known for known in fits if known[2].num_widths >= FEW_WIDTHS] or fits
    steep, flat = max(fits), min(fits)
    text = f"{name} rises most steeply under {scene.looks[steep[1]].name}, {beta_text(steep[2])}"
    if steep is not flat:
        text += f", and least under {scene.looks[flat[1]].name}, {beta_text(flat[2])}"
    null = _null(scene, scene.focus, metric)
    return text + (f"; untrained {null[1]:.2f}." if null else ".")


def _ends(scene: ReportData, metric: str) -> list[tuple[float, str, str]]:
    out = []
    for key in scene.series:
        look, fit = scene.looks[key], scene.fit(key, scene.focus, metric)
        points = scene.points(key, scene.focus, metric)
        if fit is not None and not fit.refused:
            wide = " (wide)" if fit.wide else ""
            out.append(
                (float(fit.line(np.array([fit.x_max]))[0]), f"{look.name} {fit.beta:.2f}{wide}", look.text_color)
            )
        elif points:
            out.append((max(points, key=lambda p: p.x).value, f"{look.name}: no fit", look.text_color))
    null = _null(scene, scene.focus, metric)
    if null is not None:
        out.append((null[0] * (scene.widths[-1] / scene.widths[0]) ** null[1], f"untrained {null[1]:.2f}", "#777777"))
    return out


def bucket_grid(scene: ReportData) -> ReportFigure:
    """Soft and hard rank against width, for HEAD, MID and TAIL."""
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    metrics = [metric for metric in ("soft_rank", "hard_rank") if metric in scene.metrics] or scene.metrics[:2]
    legend = 0.25 * math.ceil((len(scene.series) + 1) / _legend_columns(scene))
    height = 2.9 * len(metrics) + 0.25 + legend
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 0.4 / height, bottom=(0.7 + legend) / height, wspace=0.18, hspace=0.32
    )
    for row, metric in enumerate(metrics):
        own = _limits(scene, [(bucket, metric) for bucket in buckets])
        limits = (min(low for low, _ in own), max(high for _, high in own))
        for column, bucket in enumerate(buckets):
            ax = axes[row, column]
            _law(scene, ax, bucket, metric, limits)
            ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}")
    for ax in axes[-1]:
        ax.set_xlabel("FFN width D")
    for ax in axes[:, 0]:
        ax.set_ylabel("eigenmodes")
    _legend(scene, figure)
    return ReportFigure(
        figure,
        "The same laws for frequent (HEAD), middling (MID) and rare (TAIL) tokens.",
        "One y scale in a row: levels can be compared across buckets, slopes within and across.",
    )


def _legend(scene: ReportData, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.color, marker=look.marker, mfc=look.face, ls=look.line, label=look.name)
        for look in (scene.looks[key] for key in scene.series)
    ]
    handles.append(Line2D([], [], color="#999999", ls="--", label="untrained"))
    figure.legend(handles=handles, loc="lower center", ncols=_legend_columns(scene), frameon=False, fontsize=8.5)


def _legend_columns(scene: ReportData) -> int:
    """As many as fit beside each other."""
    entry = 0.75 + LETTER * max(len(scene.looks[key].name) for key in scene.series)  # inches, with its line
    return max(1, min(len(scene.series) + 1, _LEGEND_COLUMNS, int(_WIDTH / entry)))
