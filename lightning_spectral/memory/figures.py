"""Figures of the memory commands: points are measured, solid lines predicted, dotted lines the asymptotic law.

Every figure is a function of the rows of ``results.jsonl`` and a row of :data:`MEMORY_FIGURES`; it returns ``None``
when the rows cannot speak to it. One colour per rule in all figures, lines named where they end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_spectral.memory.fit import Row, by_size, group, local_slopes, of_kind
from lightning_spectral.memory.scene import (
    ASYMPTOTE,
    MEAN,
    MEASURED,
    PREDICTED,
    SPARE_COLORS,
    by_alpha,
    by_rule,
    finish,
    log_log,
    make_panels,
    name_ends,
    span,
    ticks,
)
from lightning_spectral.report.style import RC


def counts_figure(rows: Sequence[Row]) -> Figure | None:
    """Items stored by one step against d, one panel per alpha."""
    panels = by_alpha(of_kind(rows, "one-step"))
    if not panels or max(len({row["d"] for row in members}) for members in panels.values()) < 2:
        return None
    figure, axes = make_panels(len(panels))
    for axis, (alpha, members) in zip(axes, panels.items(), strict=True):
        ends: list[tuple[float, float, str, str]] = []
        for mine, (color, marker, name) in by_rule(members):
            xs, counts = by_size(mine, "d", "count")
            means = [float(np.mean(values)) for values in counts]
            spread = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in counts]
            axis.errorbar(xs, means, yerr=spread, color=color, marker=marker, linestyle="none", markersize=5, capsize=2)
            _, predicted = by_size(mine, "d", "predicted_count")
            if predicted[0][0] is not None:
                axis.plot(xs, [float(np.mean(values)) for values in predicted], color=color)
            else:
                axis.plot(xs, means, color=color, linewidth=0.8, alpha=0.5)
            exponent = mine[0]["asymptotic_exponent"]
            if exponent and predicted[0][0] is not None:
                axis.plot(xs, [means[-1] * (x / xs[-1]) ** exponent for x in xs], color=color, linestyle=":")
            ends.append((xs[-1], means[-1], name, color))
        log_log(axis, [row["d"] for row in members])
        name_ends(axis, ends)
        axis.set(title=f"alpha = {alpha:g}, N = {span(members, 'n_items')}", xlabel="d", ylabel="items recovered")
    return finish(figure, "One step: items recovered", [MEASURED, PREDICTED, ASYMPTOTE])


def slopes_figure(rows: Sequence[Row]) -> Figure | None:
    """Local slope between neighbouring d, measured and predicted, with the limit as a level line."""
    panels = by_alpha(of_kind(rows, "one-step"))
    panels = {alpha: members for alpha, members in panels.items() if len({row["d"] for row in members}) >= 3}
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    for axis, (alpha, members) in zip(axes, panels.items(), strict=True):
        ends = []
        for mine, (color, marker, name) in by_rule(members):
            xs, counts = by_size(mine, "d", "count")
            middles, slopes = local_slopes(xs, [float(np.mean(values)) for values in counts])
            axis.plot(middles, slopes, color=color, marker=marker, linestyle="none", markersize=5)
            _, predicted = by_size(mine, "d", "predicted_count")
            if predicted[0][0] is not None:
                axis.plot(*local_slopes(xs, [float(np.mean(values)) for values in predicted]), color=color)
                axis.axhline(mine[0]["asymptotic_exponent"], color=color, linestyle=":", linewidth=1)
            if slopes:
                ends.append((middles[-1], slopes[-1], name, color))
        axis.set_xscale("log")
        ticks(axis, [row["d"] for row in members])
        name_ends(axis, ends, log=False)
        axis.set(title=f"alpha = {alpha:g}", xlabel="d", ylabel="local slope of ln count")
    return finish(figure, "Local slope of the count", [MEAN, PREDICTED, ASYMPTOTE])


def curve_figure(rows: Sequence[Row]) -> Figure | None:
    """Share recovered against rank, at the largest d."""
    members = of_kind(rows, "one-step")
    if not members:
        return None
    largest = max(row["d"] for row in members)
    panels = by_alpha([row for row in members if row["d"] == largest])
    figure, axes = make_panels(len(panels))
    named: dict[str, Line2D] = {}
    for axis, (alpha, mine) in zip(axes, panels.items(), strict=True):
        for same, (color, marker, name) in by_rule(mine):
            recall = np.mean([row["curve_recall"] for row in same], axis=0)
            ranks = np.array(same[0]["curve_rank"])
            axis.plot(ranks, recall, color=color, marker=marker, markersize=3.5, linestyle="none")
            if same[0]["predicted_curve_recall"]:
                predicted = np.mean([row["predicted_curve_recall"] for row in same], axis=0)
                axis.plot(same[0]["predicted_curve_rank"], predicted, color=color)
            named[name] = Line2D([], [], color=color, marker=marker, markersize=4, linestyle="none", label=name)
        axis.set_xscale("log")
        axis.set(title=f"alpha = {alpha:g}, d = {largest}", xlabel="rank of the item", ylabel="share recovered")
    return finish(figure, "Recovery over rank, one step", [*named.values(), MEAN, PREDICTED])


def batch_figure(rows: Sequence[Row]) -> Figure | None:
    """Count against batch size, with the distinct items of the batch as a ceiling."""
    members = of_kind(rows, "batch")
    sampled = [row for row in members if row["batch_size"]]
    if not sampled:
        return None
    panels = group(members, "alpha", "d")
    figure, axes = make_panels(len(panels))
    for axis, ((alpha, d), mine) in zip(axes, panels.items(), strict=True):
        ends = []
        ceiling, distinct = by_size(mine, "batch_size", "distinct")
        axis.plot(ceiling, [np.mean(values) for values in distinct], color="#999999", linestyle="--", linewidth=1)
        tops = []
        for same, (color, marker, name) in by_rule(mine):
            batches = [row for row in same if row["batch_size"]]
            xs, counts = by_size(batches, "batch_size", "count")
            means = [float(np.mean(values)) for values in counts]
            axis.plot(xs, means, color=color, marker=marker, markersize=5, linestyle="none")
            _, predicted = by_size(batches, "batch_size", "predicted_count")
            if predicted and predicted[0][0] is not None:
                axis.plot(xs, [float(np.mean(values)) for values in predicted], color=color)
            whole = [row for row in same if row["batch_size"] is None]
            if whole:
                critical = whole[0].get("predicted_critical_batch")
                if critical:
                    axis.axvline(critical, color=color, linestyle=":", linewidth=1)
            tops.append(max(means))
            ends.append((xs[-1], means[-1], name, color))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(1, 4 * max(tops))
        middle = int(np.searchsorted([float(np.mean(values)) for values in distinct], 2.2 * max(tops)))
        middle = min(middle, len(ceiling) - 1)
        axis.annotate("distinct items", (ceiling[middle], 2.6 * max(tops)), xytext=(12, -4), textcoords="offset points",
                      color="#777777", fontsize=8)  # fmt: skip
        name_ends(axis, ends)
        axis.set(title=f"alpha = {alpha:g}, d = {d}", xlabel="batch size B", ylabel="items recovered")
    dotted = Line2D([], [], color="#555555", linestyle=":", label="predicted critical batch (90 %)")
    return finish(figure, "Items recovered by one sampled step", [MEAN, PREDICTED, dotted])


def steps_figure(rows: Sequence[Row]) -> Figure | None:
    """d_t against the step: deflation with prediction, and the exact dynamics."""
    members = of_kind(rows, "steps")
    if not members:
        return None
    panels = group(members, "mode", "alpha", "d")
    figure, axes = make_panels(len(panels))
    for axis, ((mode, alpha, d), mine) in zip(axes, sorted(panels.items(), key=lambda item: item[0]), strict=True):
        ends = []
        for same, (color, marker, name) in by_rule(mine):
            xs, counts = by_size(same, "step", "count")
            means = [float(np.mean(values)) for values in counts]
            line = "none" if same[0]["predicted_count"] else "-"
            axis.plot(xs, means, color=color, marker=marker, markersize=5, linestyle=line, linewidth=0.8)
            if same[0]["predicted_count"]:
                steps, predicted = by_size(same, "step", "predicted_count")
                axis.plot(steps, [values[0] for values in predicted], color=color)
            ends.append((xs[-1], means[-1], name, color))
        axis.set_yscale("log")
        axis.set_xticks(sorted({row["step"] for row in mine})[:: max(1, mine[0]["steps"] // 8)])
        name_ends(axis, ends)
        axis.set(title=f"{mode}, alpha = {alpha:g}, d = {d}", xlabel="step t", ylabel="items recovered, d_t")
    return finish(figure, "Many steps", [MEAN, PREDICTED])


def step_exponents_figure(rows: Sequence[Row]) -> Figure | None:
    """Exponent of d_t over d at each step, measured, predicted and asymptotic (e_t)."""
    members = [row for row in of_kind(rows, "steps") if row["mode"] == "deflation" and row["d"] >= 64]
    panels = {a: mine for a, mine in by_alpha(members).items() if len({row["d"] for row in mine}) >= 2}
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    for axis, (alpha, mine) in zip(axes, panels.items(), strict=True):
        ends = []
        for same, (color, marker, name) in by_rule(mine):
            points: list[tuple[float, float, float | None, float | None]] = []
            for (step,), at in sorted(group(same, "step").items()):
                xs, counts = by_size(at, "d", "count")
                _, predicted = by_size(at, "d", "predicted_count")
                slope = _slope(xs, [float(np.mean(values)) for values in counts])
                if len(xs) < 2 or slope is None:
                    continue
                guess = _slope(xs, [values[0] for values in predicted]) if predicted[0][0] else None
                points.append((step, slope, guess, at[0]["asymptotic_exponent"]))
            if not points:
                continue
            steps, slopes, guesses, limits = zip(*points, strict=True)
            axis.plot(steps, slopes, color=color, marker=marker, linestyle="none", markersize=5)
            if guesses[0] is not None:
                axis.plot(steps, guesses, color=color)
            if limits[0] is not None:
                axis.plot(steps, limits, color=color, linestyle=":")
            ends.append((steps[-1], slopes[-1], name, color))
        name_ends(axis, ends, log=False)
        axis.set_xticks(sorted({row["step"] for row in mine}))
        sizes = ", ".join(str(d) for d in sorted({row["d"] for row in mine}))
        axis.set(title=f"alpha = {alpha:g}, d = {sizes}", xlabel="step t", ylabel="exponent of d_t in d")
    law = Line2D([], [], color="#555555", linestyle=":", label="asymptotic e_t")
    return finish(figure, "Exponent of d_t, deflation", [MEAN, PREDICTED, law])


def newton_schulz_figure(rows: Sequence[Row]) -> Figure | None:
    """Share of the exact capacity that k Newton-Schulz steps keep."""
    members = of_kind(rows, "newton-schulz")
    if not members:
        return None
    panels = group(members, "alpha", "d")
    figure, axes = make_panels(len(panels))
    for axis, ((alpha, d), mine) in zip(axes, panels.items(), strict=True):
        for position, ((name,), same) in enumerate(group(_with_set(mine), "set").items()):
            color = ("#E69F00", *SPARE_COLORS)[position % (1 + len(SPARE_COLORS))]
            for (dtype,), typed in group(_with_set(same), "ns_dtype").items():
                xs, shares = by_size(typed, "ns_steps", "capacity_share")
                solid = dtype == "float32"
                filled = color if solid else "white"
                axis.plot(xs, [np.mean(values) for values in shares], color=color, linestyle="-" if solid else "--",
                          marker="o", markersize=4, markerfacecolor=filled, linewidth=1.2,
                          label=f"{name}, {dtype}")  # fmt: skip
            needed = same[0]["steps_for_capacity"]
            if needed:
                axis.axvline(needed, color=color, linestyle=":", linewidth=1)
        axis.axhline(1, color="#0072B2", linewidth=1)
        axis.annotate("exact polar factor", (1, 1), xytext=(2, 4), textcoords="offset points", color="#0072B2",
                      fontsize=8, xycoords=("axes fraction", "data"), ha="right")  # fmt: skip
        axis.set_ylim(0, 1.15)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(
            title=f"alpha = {alpha:g}, d = {d}", xlabel="Newton-Schulz steps", ylabel="share of the exact capacity"
        )
    axes[0].legend(frameon=True, framealpha=1, edgecolor="none", fontsize=7, loc="lower right")
    dotted = Line2D([], [], color="#555555", linestyle=":", label="steps that steps_for_capacity asks for")
    return finish(figure, "Capacity kept by k Newton-Schulz steps", [dotted])


def update_spectrum_figure(rows: Sequence[Row]) -> Figure | None:
    """Spectral measures of the one-step update by rule, against d."""
    members = [row for row in of_kind(rows, "one-step") if row.get("update_spectrum")]
    if not members:
        return None
    alpha = sorted({row["alpha"] for row in members}, key=lambda a: abs(a - 1.5))[0]
    members = [row for row in members if row["alpha"] == alpha]
    measures = {
        "effective_rank": "eRank (energy)", "stable_rank": "stable rank", "normalized_entropy": "normalised entropy",
        "top10_energy": "TopE_10", "quartile_ratio": "Q75/25",
    }  # fmt: skip
    figure, axes = make_panels(len(measures))
    for axis, (measure, title) in zip(axes, measures.items(), strict=True):
        ends = []
        for mine, (color, marker, name) in by_rule(members):
            flat = [{"d": row["d"], "value": row["update_spectrum"][measure]} for row in mine]
            xs, values = by_size(flat, "d", "value")
            means = [float(np.mean(value)) for value in values]
            axis.plot(xs, means, color=color, marker=marker, markersize=4, linewidth=1)
            ends.append((xs[-1], means[-1], name, color))
        axis.set_xscale("log")
        log = measure in ("effective_rank", "stable_rank", "quartile_ratio")
        if log:
            axis.set_yscale("log")
        ticks(axis, [row["d"] for row in members])
        name_ends(axis, ends, log=log)
        axis.set(title=title, xlabel="d")
    return finish(figure, f"Spectrum of the one-step update, alpha = {alpha:g}", [])


MEMORY_FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "count_vs_d": counts_figure,
    "local_slopes": slopes_figure,
    "recovery_curve": curve_figure,
    "count_vs_batch": batch_figure,
    "steps": steps_figure,
    "step_exponents": step_exponents_figure,
    "newton_schulz": newton_schulz_figure,
    "update_spectrum": update_spectrum_figure,
}


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


def _with_set(rows: Sequence[Row]) -> list[Row]:
    return [
        {**row, "set": row["settings"]["coefficients"], "ns_dtype": row["settings"]["ns_dtype"],
         "ns_steps": row["settings"]["ns_steps"]}
        for row in rows
    ]  # fmt: skip


def _slope(xs: Sequence[float], values: Sequence[float]) -> float | None:
    if len(xs) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(xs), np.log(values), 1)[0])
