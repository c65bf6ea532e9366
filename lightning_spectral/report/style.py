"""How series look: one colour and one marker per optimizer in every figure, log2 axes with equal decades."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from lightning_spectral.records.looks import OPTIMIZERS, SPARE_LOOKS, family

_LINES: Final = ("-", "--", ":", "-.")

RC: Final[Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "figure.facecolor": "white",
}
REPORT_RC: Final[Any] = {**RC, "text.parse_math": False}  # a label is anybody's: its dollar signs are no formula


@dataclass(frozen=True)
class SeriesStyle:
    """How one series is drawn.

    Attributes:
        name: What people read.
        color: Line and marker colour.
        marker: Matplotlib marker.
        variant: 0 for the first series of a colour; its variations (1, 2, ...) are broken lines with open markers.
    """

    name: str
    color: str
    marker: str
    variant: int = 0

    @property
    def text_color(self) -> str:
        """The colour, dark enough to read on white."""
        return text_color(self.color)

    @property
    def line(self) -> str:
        """Line style."""
        return _LINES[min(self.variant, len(_LINES) - 1)]

    @property
    def face(self) -> str:
        """Marker fill."""
        return self.color if not self.variant else "white" if self.variant == 1 else "#D0D0D0"


def text_color(color: str) -> str:
    """A colour, dark enough to read on white."""
    rgb = np.array(to_rgb(color))
    while float(rgb @ (0.2126, 0.7152, 0.0722)) > 0.36:
        rgb = rgb * 0.92
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


# explicit directions of bidirectional text: embeddings, overrides, isolates and their ends
_DIRECTIONS: Final = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


LETTER = 0.07  # inches of a label


def shown_name(label: str, longest: int = 40) -> str:
    """A label that fits a figure: cut in its middle (names differ at their ends), nothing that turns text backwards."""
    clean = "".join(sign for sign in label if unicodedata.bidirectional(sign) not in _DIRECTIONS)
    end = longest // 2
    return clean if len(clean) <= longest else clean[: longest - 1 - end] + "\u2026" + clean[-end:]


def short_labels(labels: Sequence[str], longest: int = 24) -> list[str]:
    """Labels of series without the words that all of them have, where one is longer than ``longest``."""
    words = [re.split(r"[_/ ]+", label) for label in labels]
    if len(set(labels)) < 2 or max(map(len, labels)) <= longest or len({len(own) for own in words}) > 1:
        return list(labels)
    differs = [len(set(column)) > 1 for column in zip(*words, strict=True)]
    is_key = [  # what a number is of, as in `seed_3`
        column[0].isalpha() and k + 1 < len(differs) and differs[k + 1] and words[0][k + 1][:1].isdigit()
        for k, column in enumerate(zip(*words, strict=True))
    ]
    kept = [k for k, own in enumerate(differs) if own or is_key[k]]
    return [" ".join(own[k] for k in kept) for own in words]


def looks_of(series: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], SeriesStyle]:
    """A look for each series (optimizer, other labels ...); the same optimizer looks the same in every report."""
    out: dict[tuple[str, ...], SeriesStyle] = {}
    spare = cycle(SPARE_LOOKS)
    seen: Counter[str] = Counter()
    own_labels = short_labels([" ".join(filter(None, key[1:])) for key in series])
    for key, labels in zip(series, own_labels, strict=True):
        base, rest = family(key[0])
        if not base:
            color, marker = next(spare)
            out[key] = SeriesStyle(shown_name(" ".join(filter(None, (key[0], labels)))), color, marker)
            continue
        color, marker, first = OPTIMIZERS[base]
        name = shown_name(" ".join(filter(None, (first, rest, labels))))
        out[key] = SeriesStyle(name, color, marker, variant=seen[base])
        seen[base] += 1
    return out


def log2_axis(ax: Axes, which: str, low: float, high: float, values: Sequence[float] | None = None) -> None:
    """A log2 axis with ticks at powers of two, or at the given values."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=2)
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
    ticks = list(values) if values else [2.0**k for k in range(int(np.ceil(np.log2(low))), int(np.log2(high)) + 1)]
    if values is None and len(ticks) > 8:
        ticks = ticks[::2]
    if values is None and len(ticks) < 2:
        ticks = round_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 100 else f"{value:.0f}"))
    axis.set_minor_locator(NullLocator())


def round_ticks(low: float, high: float) -> list[float]:
    """Numbers of few digits inside (low, high), which is shorter than two octaves."""
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low < tick < high]


def counted(axis: Axis, most: int = 5) -> None:
    """Whole numbers at the ticks of steps or tokens, few enough not to meet: 150000 is 150k."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def short_count(value: float) -> str:
    """``150k`` for 150000, ``2.5M`` for 2500000; as it is below 10000."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{unit}"
    return f"{value:.6g}"


def plain_ticks(*axes: Axis) -> None:
    """Numbers at the ticks of logarithmic axes, where matplotlib writes formulas."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def width_ticks(widths: Sequence[float]) -> list[float]:
    """Widths to write at an axis, none closer than a fifth of a doubling to another."""
    out: list[float] = []
    for width in sorted(widths):
        if not out or np.log2(width / out[-1]) > 0.38:
            out.append(width)
    return out


def spread_labels(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least ``gap``, keeping their order and staying inside [low, high]."""
    order = np.argsort(positions)
    placed = np.array(positions, dtype=float)[order]
    for _ in range(200):
        moved = False
        for k in range(len(placed) - 1):
            short = gap - (placed[k + 1] - placed[k])
            if short > 1e-9:
                placed[k] -= short / 2
                placed[k + 1] += short / 2
                moved = True
        if not moved:
            break
    if len(placed):
        placed += max(0.0, low - placed[0])
        placed -= max(0.0, placed[-1] - high)
    out = np.empty(len(placed))
    out[order] = placed
    return out.tolist()


def tall(height: float, labels: int) -> float:
    """Height of a figure, in inches, with room for so many labels one above the other."""
    return max(height, 0.165 * labels + 0.9)


def label_right(ax: Axes, entries: Sequence[tuple[float, str, str]], size: float = 8.5) -> None:
    """Write (y, text, colour) just right of the axes, moved apart where they would overlap."""
    if not entries:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    wanted = [float(to_axes.transform((x, y))[1]) for y, _, _ in entries]
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    placed = spread_labels(wanted, size * 1.25 / height, 0.0, 1.0)
    for (_, text, color), at in zip(entries, placed, strict=True):
        ax.text(
            1.015, at, text, transform=ax.transAxes, color=text_color(color), fontsize=size, va="center", clip_on=False
        )
