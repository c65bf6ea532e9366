"""Figures of the memory commands: points are measured, solid lines predicted, dotted lines the asymptotic law.

Every figure is a function of the rows of ``results.jsonl`` and a row of :data:`MEMORY_FIGURES`; it returns ``None``
when the rows cannot speak to it. One colour per rule in all figures, lines named where they end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_spectral.analysis.memory_fit import Row, by_size, group, local_slopes, of_kind
from lightning_spectral.analysis.style import RC

# Okabe and Ito's palette, as in the other figures of the package
RULE_LOOKS = {
    "muon": ("#0072B2", "s", "Muon"),
    "newton": ("#009E73", "^", "Newton"),
    "ns5": ("#E69F00", "o", "Newton-Schulz 5"),
    "sgd": ("#000000", "h", "SGD"),
    "sign": ("#CC79A7", "v", "sign"),
}
_SPARE = ("#D55E00", "#56B4E9", "#7A5195", "#8B6F3E", "#666666", "#CC79A7", "#2F4B7C")
_MEASURED = Line2D([], [], color="#555555", marker="o", linestyle="none", label="measured, mean and sd over seeds")
_PREDICTED = Line2D([], [], color="#555555", label="predicted, no fitted number")
_ASYMPTOTE = Line2D([], [], color="#555555", linestyle=":", label="asymptotic slope")


def look(label: str, others: Sequence[str] = ()) -> tuple[str, str, str]:
    """Colour, marker and name of a rule; unknown ones take spare colours in order of appearance."""
    if label in RULE_LOOKS:
        return RULE_LOOKS[label]
    unknown = [other for other in others if other not in RULE_LOOKS]
    return _SPARE[unknown.index(label) % len(_SPARE) if label in unknown else 0], "D", label


def counts_figure(rows: Sequence[Row]) -> Figure | None:
    """Items stored by one step against d, one panel per alpha."""
    panels = _alphas(of_kind(rows, "one-step"))
    if not panels or max(len({row["d"] for row in members}) for members in panels.values()) < 2:
        return None
    figure, axes = _panels(len(panels))
    for axis, (alpha, members) in zip(axes, panels.items(), strict=True):
        labels = list(group(members, "rule_label"))
        ends: list[tuple[float, float, str, str]] = []
        for (label,), mine in group(members, "rule_label").items():
            color, marker, name = look(label, [key[0] for key in labels])
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
        _log_log(axis, [row["d"] for row in members])
        _name_ends(axis, ends)
        axis.set(title=f"alpha = {alpha:g}, N = {_one(members, 'n_items')}", xlabel="d", ylabel="items recovered")
    return _finish(figure, "One step: items recovered", [_MEASURED, _PREDICTED, _ASYMPTOTE])


def slopes_figure(rows: Sequence[Row]) -> Figure | None:
    """Local slope between neighbouring d, measured and predicted, with the limit as a level line."""
    panels = _alphas(of_kind(rows, "one-step"))
    panels = {alpha: members for alpha, members in panels.items() if len({row["d"] for row in members}) >= 3}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for axis, (alpha, members) in zip(axes, panels.items(), strict=True):
        ends = []
        labels = [key[0] for key in group(members, "rule_label")]
        for (label,), mine in group(members, "rule_label").items():
            color, marker, name = look(label, labels)
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
        _ticks(axis, [row["d"] for row in members])
        _name_ends(axis, ends, log=False)
        axis.set(title=f"alpha = {alpha:g}", xlabel="d", ylabel="local slope of ln count")
    return _finish(figure, "Local slope of the count", [_MEASURED, _PREDICTED, _ASYMPTOTE])


def curve_figure(rows: Sequence[Row]) -> Figure | None:
    """Share recovered against rank, at the largest d."""
    members = of_kind(rows, "one-step")
    if not members:
        return None
    largest = max(row["d"] for row in members)
    panels = _alphas([row for row in members if row["d"] == largest])
    figure, axes = _panels(len(panels))
    for axis, (alpha, mine) in zip(axes, panels.items(), strict=True):
        labels = [key[0] for key in group(mine, "rule_label")]
        ends = []
        for (label,), same in group(mine, "rule_label").items():
            color, marker, name = look(label, labels)
            recall = np.mean([row["curve_recall"] for row in same], axis=0)
            ranks = np.array(same[0]["curve_rank"])
            axis.plot(ranks, recall, color=color, marker=marker, markersize=3.5, linestyle="none")
            if same[0]["predicted_curve_recall"]:
                predicted = np.mean([row["predicted_curve_recall"] for row in same], axis=0)
                axis.plot(same[0]["predicted_curve_rank"], predicted, color=color)
            half = np.flatnonzero(recall >= 0.5)
            ends.append((float(ranks[half[-1]]) if len(half) else 1.0, name, color))
        for (rank, name, color), height in zip(sorted(ends), np.linspace(0.25, 0.75, len(ends)), strict=True):
            axis.annotate(name, (rank, height), xytext=(7, 0), textcoords="offset points", color=color, fontsize=8)
        axis.set_xscale("log")
        axis.set(title=f"alpha = {alpha:g}, d = {largest}", xlabel="rank of the item", ylabel="share recovered")
    return _finish(figure, "Recovery over rank, one step", [_MEASURED, _PREDICTED])


def batch_figure(rows: Sequence[Row]) -> Figure | None:
    """Count against batch size, with the distinct items of the batch as a ceiling."""
    members = of_kind(rows, "batch")
    sampled = [row for row in members if row["batch_size"]]
    if not sampled:
        return None
    panels = group(members, "alpha", "d")
    figure, axes = _panels(len(panels))
    for axis, ((alpha, d), mine) in zip(axes, panels.items(), strict=True):
        ends = []
        labels = [key[0] for key in group(mine, "rule_label")]
        ceiling, distinct = by_size(mine, "batch_size", "distinct")
        axis.plot(ceiling, [np.mean(values) for values in distinct], color="#999999", linestyle="--", linewidth=1)
        tops = []
        for (label,), same in group(mine, "rule_label").items():
            color, marker, name = look(label, labels)
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
        axis.annotate("distinct items", (ceiling[middle], 2.6 * max(tops)), color="#777777", fontsize=8)
        _name_ends(axis, ends)
        axis.set(title=f"alpha = {alpha:g}, d = {d}", xlabel="batch size B", ylabel="items recovered")
    dotted = Line2D([], [], color="#555555", linestyle=":", label="predicted critical batch (90 %)")
    return _finish(figure, "Items recovered by one sampled step", [_MEASURED, _PREDICTED, dotted])


def steps_figure(rows: Sequence[Row]) -> Figure | None:
    """d_t against the step: deflation with prediction, and the exact dynamics."""
    members = of_kind(rows, "steps")
    if not members:
        return None
    panels = group(members, "mode", "alpha", "d")
    figure, axes = _panels(len(panels))
    for axis, ((mode, alpha, d), mine) in zip(axes, sorted(panels.items(), key=lambda item: item[0]), strict=True):
        ends = []
        labels = [key[0] for key in group(mine, "rule_label")]
        for (label,), same in group(mine, "rule_label").items():
            color, marker, name = look(label, labels)
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
        _name_ends(axis, ends)
        axis.set(title=f"{mode}, alpha = {alpha:g}, d = {d}", xlabel="step t", ylabel="items recovered, d_t")
    return _finish(figure, "Many steps", [_MEASURED, _PREDICTED])


def step_exponents_figure(rows: Sequence[Row]) -> Figure | None:
    """Exponent of d_t over d at each step, measured, predicted and asymptotic (e_t)."""
    members = [row for row in of_kind(rows, "steps") if row["mode"] == "deflation" and row["d"] >= 64]
    panels = {a: mine for a, mine in _alphas(members).items() if len({row["d"] for row in mine}) >= 2}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for axis, (alpha, mine) in zip(axes, panels.items(), strict=True):
        labels = [key[0] for key in group(mine, "rule_label")]
        ends = []
        for (label,), same in group(mine, "rule_label").items():
            color, marker, name = look(label, labels)
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
        _name_ends(axis, ends, log=False)
        axis.set_xticks(sorted({row["step"] for row in mine}))
        sizes = ", ".join(str(d) for d in sorted({row["d"] for row in mine}))
        axis.set(title=f"alpha = {alpha:g}, d = {sizes}", xlabel="step t", ylabel="exponent of d_t in d")
    law = Line2D([], [], color="#555555", linestyle=":", label="asymptotic e_t")
    return _finish(figure, "Exponent of d_t, deflation", [_MEASURED, _PREDICTED, law])


def newton_schulz_figure(rows: Sequence[Row]) -> Figure | None:
    """Share of the exact capacity that k Newton-Schulz steps keep."""
    members = of_kind(rows, "newton-schulz")
    if not members:
        return None
    panels = group(members, "alpha", "d")
    figure, axes = _panels(len(panels))
    for axis, ((alpha, d), mine) in zip(axes, panels.items(), strict=True):
        for position, ((name,), same) in enumerate(group(_with_set(mine), "set").items()):
            color = ("#E69F00", *_SPARE)[position % (1 + len(_SPARE))]
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
                      fontsize=8,                       xycoords=("axes fraction", "data"), ha="right")  # fmt: skip
        axis.set_ylim(0, 1.15)
        axis.set(
            title=f"alpha = {alpha:g}, d = {d}", xlabel="Newton-Schulz steps", ylabel="share of the exact capacity"
        )
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    dotted = Line2D([], [], color="#555555", linestyle=":", label="steps that steps_for_capacity asks for")
    return _finish(figure, "What truncated Newton-Schulz keeps of the capacity", [dotted])


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
    figure, axes = _panels(len(measures))
    labels = [key[0] for key in group(members, "rule_label")]
    for axis, (measure, title) in zip(axes, measures.items(), strict=True):
        ends = []
        for (label,), mine in group(members, "rule_label").items():
            color, marker, name = look(label, labels)
            flat = [{"d": row["d"], "value": row["update_spectrum"][measure]} for row in mine]
            xs, values = by_size(flat, "d", "value")
            means = [float(np.mean(value)) for value in values]
            axis.plot(xs, means, color=color, marker=marker, markersize=4, linewidth=1)
            ends.append((xs[-1], means[-1], name, color))
        axis.set_xscale("log")
        log = measure in ("effective_rank", "stable_rank", "quartile_ratio")
        if log:
            axis.set_yscale("log")
        _ticks(axis, [row["d"] for row in members])
        _name_ends(axis, ends, log=log)
        axis.set(title=title, xlabel="d")
    return _finish(figure, f"Spectrum of the one-step update, alpha = {alpha:g}", [])


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


def _alphas(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Isotropic population rows by alpha, or all of them where there are no such rows."""
    plain = [row for row in rows if not row["anisotropy"] and row["batch_size"] is None] or list(rows)
    return dict(sorted((key[0], members) for key, members in group(plain, "alpha").items()))


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    columns = min(number, 3)
    lines = math.ceil(number / columns)
    figure = Figure(figsize=(4.3 * columns + 0.6, 3.5 * lines + 0.9), layout="constrained")
    axes = [figure.add_subplot(lines, columns, position + 1) for position in range(number)]
    return figure, axes


def _finish(figure: Figure, title: str, handles: list[Line2D]) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if handles:
        columns = len(handles) if figure.get_figwidth() > 7 else 1
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _log_log(axis: Axes, xs: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    _ticks(axis, xs)


def _ticks(axis: Axes, xs: Sequence[float]) -> None:
    """Ticks at the measured sizes, and room on the right for the names."""
    sizes = sorted(set(xs))
    axis.xaxis.set_major_locator(FixedLocator([float(x) for x in sizes]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _name_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]], log: bool = True) -> None:
    """Write each name right of its last point, moved apart where they would touch."""
    if not ends:
        return
    low, high = axis.get_ylim()
    scale = np.log if log else (lambda value: value)
    height = float(scale(high) - scale(low))
    ordered = sorted(ends, key=lambda end: end[1])
    positions: list[float] = []
    for _, y, _, _ in ordered:
        wanted = float(scale(max(y, low)) - scale(low)) / height
        positions.append(max(wanted, positions[-1] + 0.065) if positions else wanted)
    ceiling = 0.99  # names pushed up past the frame are pushed back down
    for number in reversed(range(len(positions))):
        positions[number] = min(positions[number], ceiling)
        ceiling = positions[number] - 0.065
    for position, (_, _, name, color) in zip(positions, ordered, strict=True):
        axis.annotate(name, (1.01, position), xycoords="axes fraction", color=color, fontsize=8, va="center")


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


def _one(rows: Sequence[Row], field: str) -> str:
    values = sorted({row[field] for row in rows})
    return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"
