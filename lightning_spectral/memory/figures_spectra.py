"""Figures of spectra: of the one-step update by rule, and what k Newton-Schulz steps keep of the capacity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_spectral.memory.fit import Row, by_size, cases, group, of_kind
from lightning_spectral.memory.scene import NEEDED, SPARE_COLORS, by_rule, finish, make_panels, name_ends, ticks

_MEASURES = {
    "effective_rank": "eRank (energy)", "stable_rank": "stable rank", "normalized_entropy": "normalised entropy",
    "top10_energy": "TopE_10", "quartile_ratio": "Q75/25",
}  # fmt: skip
_LOG_MEASURES = ("effective_rank", "stable_rank", "quartile_ratio")


def newton_schulz_figure(rows: Sequence[Row]) -> Figure | None:
    """Share of the exact capacity that k Newton-Schulz steps keep, measured (points) and predicted (thin lines)."""
    panels = cases(of_kind(rows, "newton-schulz"))
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    drawn = []
    for axis, (name, mine) in zip(axes, panels.items(), strict=True):
        for position, ((set_name,), same) in enumerate(group(_with_set(mine), "set").items()):
            color = ("#E69F00", *SPARE_COLORS)[position % (1 + len(SPARE_COLORS))]
            for (dtype,), typed in group(same, "ns_dtype").items():
                xs, shares = by_size(typed, "ns_steps", "capacity_share")
                solid = dtype == "float32"
                axis.plot(xs, [np.mean(values) for values in shares], color=color, linestyle="-" if solid else "--",
                          marker="o", markersize=4, markerfacecolor=color if solid else "white", linewidth=1.2,
                          label=f"{set_name}, {dtype}")  # fmt: skip
            if same[0]["steps_for_capacity"]:
                axis.axvline(same[0]["steps_for_capacity"], color=color, linestyle=":", linewidth=1)
                drawn.append(NEEDED)
        axis.axhline(1, color="#0072B2", linewidth=1)
        axis.annotate("exact polar factor", (1, 1), xytext=(2, 4), textcoords="offset points", color="#0072B2",
                      fontsize=8, xycoords=("axes fraction", "data"), ha="right")  # fmt: skip
        axis.set_ylim(0, 1.15)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        title = name if "d = " in name else f"{name}, d = {mine[0]['d']}"
        axis.set(title=title, xlabel="Newton-Schulz steps", ylabel="share of the exact capacity")
    axes[0].legend(frameon=True, framealpha=1, edgecolor="none", fontsize=7, loc="lower right")
    return finish(figure, "Capacity kept by k Newton-Schulz steps", drawn)


def update_spectrum_figure(rows: Sequence[Row]) -> Figure | None:
    """Singular values of the one-step update by rule against their rank, at the largest d that has them."""
    known = [row for row in of_kind(rows, "one-step") if row.get("update_singular_values")]
    panels = cases(known, "d")
    if not panels:
        return None
    figure, axes = make_panels(len(panels))
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        largest = max(row["d"] for row in members)
        ends = []
        for same, (color, _, rule) in by_rule([row for row in members if row["d"] == largest]):
            ranks = [rank for rank, _ in same[0]["update_singular_values"]]
            sizes = np.mean([[value for _, value in row["update_singular_values"]] for row in same], axis=0)
            axis.plot(ranks, np.maximum(sizes, 1e-8), color=color)
            ends.append((ranks[-1], max(float(sizes[-1]), 1e-8), rule, color))
        axis.set_xscale("log")
        axis.set_yscale("log")
        name_ends(axis, ends)
        axis.set(title=f"{name}, d = {largest}", xlabel="rank of the singular value", ylabel="sigma / sigma_1")
    return finish(figure, "Singular values of the one-step update, mean over seeds", [])


def update_measures_figure(rows: Sequence[Row]) -> Figure | None:
    """Spectral measures of the one-step update by rule against d, a line of panels per experiment."""
    known = [row for row in of_kind(rows, "one-step") if row.get("update_spectrum")]
    panels = {name: same for name, same in cases(known, "d").items() if len({row["d"] for row in same}) >= 2}
    if not panels:
        return None
    figure, axes = make_panels(len(panels) * len(_MEASURES))
    places = [(name, measure) for name in panels for measure in _MEASURES]
    for axis, (name, measure) in zip(axes, places, strict=True):
        ends = []
        for mine, (color, marker, rule) in by_rule(panels[name]):
            flat = [{"d": row["d"], "value": row["update_spectrum"][measure]} for row in mine]
            xs, values = by_size([row for row in flat if row["value"] is not None], "d", "value")
            if not xs:
                continue
            means = [float(np.mean(value)) for value in values]
            axis.plot(xs, means, color=color, marker=marker, markersize=4, linewidth=1)
            ends.append((xs[-1], means[-1], rule, color))
        axis.set_xscale("log")
        if measure in _LOG_MEASURES:
            axis.set_yscale("log")
        ticks(axis, [row["d"] for row in panels[name]])
        name_ends(axis, ends, log=measure in _LOG_MEASURES)
        axis.set(title=f"{_MEASURES[measure]}; {name}", xlabel="d")
    return finish(figure, "Spectrum of the one-step update", [])


def _with_set(rows: Sequence[Row]) -> list[Row]:
    return [
        {**row, "set": row["settings"]["coefficients"], "ns_dtype": row["settings"]["ns_dtype"],
         "ns_steps": row["settings"]["ns_steps"]}
        for row in rows
    ]  # fmt: skip
