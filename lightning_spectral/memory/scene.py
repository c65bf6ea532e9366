"""How the figures of the memory commands look: rules by colour, panels, ticks, names at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lightning_spectral.memory.fit import Row, group

# Okabe and Ito's palette, as in the other figures of the package
RULE_LOOKS = {
    "muon": ("#0072B2", "s", "Muon"),
    "newton": ("#009E73", "^", "Newton"),
    "ns5": ("#E69F00", "o", "Newton-Schulz 5"),
    "sgd": ("#000000", "h", "SGD"),
    "sign": ("#CC79A7", "v", "sign"),
}
SPARE_COLORS = ("#D55E00", "#56B4E9", "#7A5195", "#8B6F3E", "#666666", "#CC79A7", "#2F4B7C")
MEASURED = Line2D([], [], color="#555555", marker="o", linestyle="none", label="measured, mean and sd over seeds")
MEAN = Line2D([], [], color="#555555", marker="o", linestyle="none", label="measured, mean over seeds")
PREDICTED = Line2D([], [], color="#555555", label="predicted, no fitted number")
ASYMPTOTE = Line2D([], [], color="#555555", linestyle=":", label="asymptotic slope")
CRITICAL = Line2D([], [], color="#555555", linestyle=":", label="predicted critical batch (90 %)")
NEEDED = Line2D([], [], color="#555555", linestyle=":", label="steps that steps_for_capacity asks for")
LIMIT = Line2D([], [], color="#999999", linestyle="--", label="information limit d^2 / (2 ln N)")


def look(label: str, others: Sequence[str] = ()) -> tuple[str, str, str]:
    """Colour, marker and name of a rule; unknown ones take spare colours in order of appearance."""
    if label in RULE_LOOKS:
        return RULE_LOOKS[label]
    unknown = [other for other in others if other not in RULE_LOOKS]
    return SPARE_COLORS[unknown.index(label) % len(SPARE_COLORS) if label in unknown else 0], "D", label


def by_rule(rows: Sequence[Row]) -> Iterator[tuple[list[Row], tuple[str, str, str]]]:
    """The rows of each rule with the look of it, in order of appearance."""
    groups = group(rows, "rule_label")
    labels = [label for (label,) in groups]
    for label, members in zip(labels, groups.values(), strict=True):
        yield members, look(label, labels)


def make_panels(number: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with ``number`` panels, ``columns`` in a line."""
    columns = min(number, columns)
    lines = math.ceil(number / columns)
    figure = Figure(figsize=(4.3 * columns + 0.6, 3.5 * lines + 0.9), layout="constrained")
    axes = [figure.add_subplot(lines, columns, position + 1) for position in range(number)]
    return figure, axes


def finish(figure: Figure, title: str, handles: Sequence[Line2D]) -> Figure:
    """Title on the left, one legend for all panels below them: of what was drawn, named once."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    handles = list({str(handle.get_label()): handle for handle in handles}.values())
    if handles:
        columns = min(len(handles), 7) if figure.get_figwidth() > 7 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    for axis in figure.axes:
        if axis.get_yscale() == "log":
            _label_short_axis(axis)
    return figure


def _label_short_axis(axis: Axes) -> None:
    """A log axis of less than two decades has labels between the powers of ten as well."""
    low, high = axis.get_ylim()
    if high > 100 * low:
        return
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 4 * low else tuple(np.arange(1.0, 10.0))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def log_log(axis: Axes, xs: Sequence[float]) -> None:
    """Log scales with a tick at each measured size."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks(axis, xs)


def ticks(axis: Axes, xs: Sequence[float]) -> None:
    """Ticks at the measured sizes, and room on the right for the names."""
    sizes = sorted(set(xs))
    axis.xaxis.set_major_locator(FixedLocator([float(x) for x in sizes]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def name_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]], log: bool = True) -> None:
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
