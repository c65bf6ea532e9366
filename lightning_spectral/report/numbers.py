"""The numbers of a figure: its data table, the values that a pointer shows, and its axes drawn otherwise."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lightning_spectral.report.style import REPORT_RC, plain_ticks
from lightning_spectral.text import visible

STEP_LABEL: Final = "optimizer step"
ON_X: Final = True  # picker of a line whose number is its x; its y is only a row of the figure
_SVG: Final = "{http://www.w3.org/2000/svg}"
_MOST_POINTS: Final = 80  # of a line that a pointer can find


@dataclass(frozen=True)
class DataRow:
    """One number of a figure.

    Attributes:
        panel: Title of its axes.
        series: Label of its line.
        x: Where; NaN where the panel has no such axis.
        y: The number.
    """

    panel: str
    series: str
    x: float
    y: float


def rows_of(figure: Figure) -> list[DataRow]:
    """Every finite point of every labelled line, panel by panel."""
    return [
        DataRow(ax.get_title(loc="left") or ax.get_title(), str(line.get_label()), *_value(line, x, y))
        for ax in figure.axes
        for line in ax.lines
        if _is_labelled(line)
        for x, y in _points(line)
    ]


def _value(line: Line2D, x: float, y: float) -> tuple[float, float]:
    """(where, number)."""
    return (math.nan, x) if line.get_picker() is ON_X else (x, y)


def _is_labelled(line: Line2D) -> bool:
    return not str(line.get_label()).startswith("_")


def _points(line: Line2D) -> list[tuple[float, float]]:
    xs, ys = (np.asarray(values, dtype=float) for values in line.get_data())
    known = np.isfinite(xs) & np.isfinite(ys)
    return list(zip(xs[known].tolist(), ys[known].tolist(), strict=True))


def svg_with_values(figure: Figure, key: str) -> str:
    """The figure as SVG whose points have a title, which browsers show under the pointer and readers read."""
    texts: dict[str, list[str]] = {}
    added: list[Line2D] = []
    for a, ax in enumerate(figure.axes):
        for k, line in enumerate([line for line in ax.lines if _is_labelled(line)]):
            points = _points(line)
            step = -(-len(points) // _MOST_POINTS) or 1
            kept, name = points[::step], f"{key}-points-{a}-{k}"
            if kept:
                marks = ax.plot(*zip(*kept, strict=True), "o", ms=7, alpha=0.0, label="_values")[0]
                marks.set_gid(name)
                added.append(marks)
                texts[name] = [_text(str(line.get_label()), *_value(line, x, y)) for x, y in kept]
    picture = _svg(figure, key)
    for marks in added:
        marks.remove()
    return _titled(picture, texts)


def _text(label: str, x: float, y: float) -> str:
    return f"{label}: {y:.4g}" if math.isnan(x) else f"{label}: {y:.4g} at {x:.6g}"


def _titled(svg: str, texts: dict[str, list[str]]) -> str:
    ET.register_namespace("", _SVG[1:-1])
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)  # noqa: S314 - drawn by us
    for group in root.iter(f"{_SVG}g"):
        own = texts.get(group.get("id", ""), [])
        marks = list(group.iter(f"{_SVG}use"))
        if len(marks) == len(own):  # a point outside the axes has no mark: better no values than wrong ones
            for mark, text in zip(marks, own, strict=True):
                ET.SubElement(mark, f"{_SVG}title").text = text
    return ET.tostring(root, encoding="unicode")


def views_over_steps(figure: Figure, key: str, tokens_per_step: float | None) -> dict[str, str]:
    """The same figure over other x, as SVG by what x is; nothing for a figure that is not over steps.

    Args:
        figure: It is changed, and drawn for the last time here.
        key: Its name.
        tokens_per_step: Training tokens per step, if all runs have the same number.
    """
    last = [ax for ax in figure.axes if ax.get_xlabel() == STEP_LABEL]
    axes = [ax for ax in figure.axes if any(ax is one or one.get_shared_x_axes().joined(one, ax) for one in last)]
    found: dict[str, str] = {}
    if axes and tokens_per_step:
        kept = [ax.xaxis.get_major_formatter() for ax in axes]
        for ax in axes:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step * tokens_per_step:.3g}"))
        for ax in last:
            ax.set_xlabel("training tokens")
        found["tokens"] = _svg(figure, f"{key}-tokens")
        for ax, formatter in zip(axes, kept, strict=True):
            ax.xaxis.set_major_formatter(formatter)
        for ax in last:
            ax.set_xlabel(STEP_LABEL)
    for ax in axes:
        low, high = ax.get_xlim()
        ax.set_xscale("symlog", linthresh=1, linscale=0.3)
        plain_ticks(ax.xaxis)
        ax.set_xlim(max(low, 0), high)
    if axes:
        found["steps, log"] = _svg(figure, f"{key}-log")
    return found


def _svg(figure: Figure, key: str) -> str:
    buffer = io.StringIO()
    with rc_context({**REPORT_RC, "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": key})
    return visible(buffer.getvalue())


def thinned(rows: Sequence[DataRow], most: int = 300) -> list[DataRow]:
    """At most so many rows, evenly; for a table that a person reads."""
    step = -(-len(rows) // most) or 1
    return list(rows[::step])
