"""Figures of the memory commands: points are measured, solid lines predicted, dotted lines the asymptotic law.

Every figure is a function of the rows of ``results.jsonl`` and a row of :data:`MEMORY_FIGURES`; it returns ``None``
when the rows cannot speak to it. A panel is one experiment (:func:`lightning_spectral.memory.fit.cases`): rows that
differ in any input but the axis, the rule and the seed are never put into one point. One colour per rule in all
figures, lines named where they end, a legend of what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_spectral.memory.figures_spectra import (
    newton_schulz_figure,
    update_measures_figure,
    update_spectrum_figure,
)
from lightning_spectral.memory.fit import Row, by_size, cases, local_slopes, of_kind
from lightning_spectral.memory.scene import (
    ASYMPTOTE,
    CRITICAL,
    LIMIT,
    MEAN,
    MEASURED,
    PREDICTED,
    by_rule,
    finish,
    log_log,
    make_panels,
    name_ends,
    ticks,
)
from lightning_spectral.report.style import RC


def counts_figure(rows: Sequence[Row]) -> Figure | None:
    """Items stored by one step against d, one panel per experiment."""
    panels = {name: members for name, members in cases(of_kind(rows, "one-step"), "d").items() if _sizes(members) >= 2}
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    drawn = [MEASURED]
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        for mine, (color, marker, rule) in by_rule(members):
            xs, counts = by_size(mine, "d", "count")
            means = _means(counts)
            spread = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in counts]
            axis.errorbar(xs, means, yerr=spread, color=color, marker=marker, linestyle="none", markersize=5, capsize=2)
            predicted = _predictions(mine, "d")
            if predicted:
                axis.plot(xs, predicted, color=color)
                drawn.append(PREDICTED)
            else:
                axis.plot(xs, means, color=color, linewidth=0.8, alpha=0.5)
            exponent = mine[0].get("asymptotic_exponent")
            if exponent:
                axis.plot(xs, [means[-1] * (x / xs[-1]) ** exponent for x in xs], color=color, linestyle=":")
                drawn.append(ASYMPTOTE)
            ends.append((xs[-1], means[-1], rule, color))
        log_log(axis, [row["d"] for row in members])
        name_ends(axis, ends)
        axis.set(title=name, xlabel="d", ylabel="items recovered")
    return finish(figure, "One step: items recovered", drawn)


def slopes_figure(rows: Sequence[Row]) -> Figure | None:
    """Local slope between neighbouring d, measured and predicted, with the limit as a level line."""
    panels = {name: members for name, members in cases(of_kind(rows, "one-step"), "d").items() if _sizes(members) >= 3}
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    drawn = [MEAN]
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        ends = []
        for mine, (color, marker, rule) in by_rule(members):
            xs, counts = by_size(mine, "d", "count")
            middles, slopes = local_slopes(xs, _means(counts))
            axis.plot(middles, slopes, color=color, marker=marker, linestyle="none", markersize=5)
            predicted = _predictions(mine, "d")
            if predicted:
                axis.plot(*local_slopes(xs, predicted), color=color)
                drawn.append(PREDICTED)
            exponent = mine[0].get("asymptotic_exponent")
            if exponent:
                axis.axhline(exponent, color=color, linestyle=":", linewidth=1)
                drawn.append(ASYMPTOTE)
            if slopes:
                ends.append((middles[-1], slopes[-1], rule, color))
        axis.set_xscale("log")
        ticks(axis, [row["d"] for row in members])
        name_ends(axis, ends, log=False)
        axis.set(title=name, xlabel="d", ylabel="local slope of ln count")
    return finish(figure, "Local slope of the count", drawn)


def curve_figure(rows: Sequence[Row]) -> Figure | None:
    """Share recovered against rank, at the largest d of each experiment."""
    panels = cases(of_kind(rows, "one-step"), "d")
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    named: list[Line2D] = []
    drawn = [MEAN]
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        largest = max(row["d"] for row in members)
        for same, (color, marker, rule) in by_rule([row for row in members if row["d"] == largest]):
            recall = np.mean([row["curve_recall"] for row in same], axis=0)
            axis.plot(same[0]["curve_rank"], recall, color=color, marker=marker, markersize=3.5, linestyle="none")
            if same[0]["predicted_curve_recall"]:
                predicted = np.mean([row["predicted_curve_recall"] for row in same], axis=0)
                axis.plot(same[0]["predicted_curve_rank"], predicted, color=color)
                drawn.append(PREDICTED)
            named.append(Line2D([], [], color=color, marker=marker, markersize=4, linestyle="none", label=rule))
        axis.set_xscale("log")
        axis.set(title=f"{name}, d = {largest}", xlabel="rank of the item", ylabel="share recovered")
    return finish(figure, "Recovery over rank, one step", [*named, *drawn])


def batch_figure(rows: Sequence[Row]) -> Figure | None:
    """Count against batch size, with the distinct items of the batch as a ceiling."""
    members = of_kind(rows, "batch")
    if not any(row["batch_size"] for row in members):
        return None
    panels = cases(members, "batch_size")
    figure, axes = make_panels(len(panels))
    drawn = [MEAN]
    for axis, (name, mine) in zip(axes, panels.items(), strict=True):
        ends, tops = [], [1.0]
        for same, (color, marker, rule) in by_rule(mine):
            batches = [row for row in same if row["batch_size"]]
            xs, counts = by_size(batches, "batch_size", "count")
            if not xs:
                continue
            means = _means(counts)
            axis.plot(xs, means, color=color, marker=marker, markersize=5, linestyle="none")
            predicted = _predictions(batches, "batch_size")
            if predicted:
                axis.plot(xs, predicted, color=color)
                drawn.append(PREDICTED)
            critical = next((row.get("predicted_critical_batch") for row in same if row["batch_size"] is None), None)
            if critical:
                axis.axvline(critical, color=color, linestyle=":", linewidth=1)
                drawn.append(CRITICAL)
            tops.append(max(means))
            ends.append((xs[-1], means[-1], rule, color))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(1, 4 * max(tops))
        _draw_ceiling(axis, mine, 2.2 * max(tops))
        name_ends(axis, ends)
        axis.set(title=f"{name}, d = {mine[0]['d']}", xlabel="batch size B", ylabel="items recovered")
    return finish(figure, "Items recovered by one sampled step", drawn)


def _draw_ceiling(axis: Axes, rows: Sequence[Row], top: float) -> None:
    """The distinct items of the batches, and their name where the line leaves the panel."""
    ceiling, distinct = by_size(rows, "batch_size", "distinct")
    axis.plot(ceiling, _means(distinct), color="#999999", linestyle="--", linewidth=1)
    middle = min(int(np.searchsorted(_means(distinct), top)), len(ceiling) - 1)
    axis.annotate("distinct items", (ceiling[middle], 1.18 * top), xytext=(12, -4), textcoords="offset points",
                  color="#777777", fontsize=8)  # fmt: skip


def steps_figure(rows: Sequence[Row]) -> Figure | None:
    """d_t against the step: deflation with prediction, and the exact dynamics; the information limit above."""
    panels = cases(of_kind(rows, "steps"), "step")
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    drawn = [MEAN]
    for axis, (name, mine) in zip(axes, panels.items(), strict=True):
        ends = []
        for same, (color, marker, rule) in by_rule(mine):
            xs, counts = by_size(same, "step", "count")
            means = _means(counts)
            predicted = _predictions(same, "step")
            axis.plot(xs, means, color=color, marker=marker, markersize=5, linestyle="none" if predicted else "-",
                      linewidth=0.8)  # fmt: skip
            if predicted:
                axis.plot(xs, predicted, color=color)
                drawn.append(PREDICTED)
            ends.append((xs[-1], means[-1], rule, color))
        axis.set_yscale("log")
        limit = mine[0].get("information_limit")
        if limit:
            axis.axhline(limit, color="#999999", linestyle="--", linewidth=1)
            drawn.append(LIMIT)
        axis.set_xticks(sorted({row["step"] for row in mine})[:: max(1, mine[0]["steps"] // 8)])
        name_ends(axis, ends)
        title = f"{mine[0]['mode']}, {name}" if mine[0]["mode"] not in name else name
        axis.set(title=f"{title}, d = {mine[0]['d']}" if "d = " not in title else title)
        axis.set(xlabel="step t", ylabel="items recovered, d_t")
    return finish(figure, "Many steps", drawn)


def step_exponents_figure(rows: Sequence[Row]) -> Figure | None:
    """Exponent of d_t over d at each step, measured, predicted and asymptotic (e_t)."""
    members = [row for row in of_kind(rows, "steps") if row["mode"] == "deflation" and row["d"] >= 64]
    panels = {name: mine for name, mine in cases(members, "d", "step").items() if _sizes(mine) >= 2}
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    drawn = [MEAN]
    law = Line2D([], [], color="#555555", linestyle=":", label="asymptotic e_t")
    for axis, (name, mine) in zip(axes, panels.items(), strict=True):
        ends = []
        for same, (color, marker, rule) in by_rule(mine):
            points = _exponents(same)
            for key, style, handle in (("measured", marker, None), ("predicted", "-", PREDICTED), ("limit", ":", law)):
                known = [(point["step"], point[key]) for point in points if point[key] is not None]
                if not known:
                    continue
                look: dict[str, Any] = (
                    {"marker": style, "linestyle": "none"} if handle is None else {"linestyle": style}
                )
                axis.plot(*zip(*known, strict=True), color=color, markersize=5, **look)
                drawn += [handle] if handle is not None else []
            if points:
                ends.append((points[-1]["step"], points[-1]["measured"], rule, color))
        name_ends(axis, ends, log=False)
        axis.set_xticks(sorted({row["step"] for row in mine}))
        sizes = ", ".join(str(d) for d in sorted({row["d"] for row in mine}))
        axis.set(title=f"{name}, d = {sizes}", xlabel="step t", ylabel="exponent of d_t in d")
    return finish(figure, "Exponent of d_t, deflation", drawn)


def _exponents(rows: Sequence[Row]) -> list[Row]:
    """Exponent of one rule's count at each step: measured, predicted, limit."""
    points: list[Row] = []
    for step in sorted({row["step"] for row in rows}):
        at = [row for row in rows if row["step"] == step]
        xs, counts = by_size(at, "d", "count")
        slope = _slope(xs, _means(counts))
        if slope is not None:
            guess = _predictions(at, "d")
            points.append({"step": step, "measured": slope, "predicted": _slope(xs, guess) if guess else None,
                           "limit": at[0]["asymptotic_exponent"]})  # fmt: skip
    return points


MEMORY_FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "count_vs_d": counts_figure,
    "local_slopes": slopes_figure,
    "recovery_curve": curve_figure,
    "count_vs_batch": batch_figure,
    "steps": steps_figure,
    "step_exponents": step_exponents_figure,
    "newton_schulz": newton_schulz_figure,
    "update_spectrum": update_spectrum_figure,
    "update_measures": update_measures_figure,
}
FIGURE_FILES = tuple(f"{name}.png" for name in (*MEMORY_FIGURES, "claims", "recall"))


def draw_all(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Write every figure that the rows can speak to as PNG; returns the paths."""
    written = []
    for name, draw in MEMORY_FIGURES.items():
        with matplotlib.rc_context(RC):
            figure = draw(rows)
            if figure is None:
                continue
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _sizes(rows: Sequence[Row]) -> int:
    return len({row["d"] for row in rows})


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    return [float(np.mean(of)) for of in values]


def _predictions(rows: Sequence[Row], axis: str) -> list[float] | None:
    """Mean predicted count at each value of ``axis``, if all of them are known."""
    values = by_size(rows, axis, "predicted_count")[1]
    return _means(values) if values and all(v is not None for of in values for v in of) else None


def _slope(xs: Sequence[float], values: Sequence[float]) -> float | None:
    if len(xs) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(xs), np.log(values), 1)[0])
