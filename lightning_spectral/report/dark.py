"""Figures on a dark screen: colours of an inlined SVG as CSS variables, and what each of them is there.

The file of a figure, print and notebooks keep the colours as they were drawn. Colours that are data stay everywhere:
the cells of a map, and what is written on them (:data:`ON_CELL`).
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from lightning_spectral.records.looks import BUCKET_COLORS, OPTIMIZERS, SPARE_LOOKS
from lightning_spectral.report.style import text_color

BACKGROUND: Final = "#16181c"  # of the page, in the template's style sheet
ON_CELL: Final = "on-cell-"  # begins the gid of a text on a cell, whose colour was chosen for that cell
_BRIGHTEST: Final = 0.93
_LINE_CONTRAST, _TEXT_CONTRAST = 3.0, 4.5  # WCAG 2.1: graphics, text
_COLOR: Final = re.compile(r"#[0-9a-fA-F]{6}\b")
_STYLE: Final = re.compile(r'<(?P<tag>\w+)(?P<before>[^<>]*? style=")(?P<style>[^"]*)"')
_GROUP: Final = re.compile(r'<g id="[^"]*?(?P<kind>QuadMesh_|on-cell-)[^"]*">.*?</g>', re.DOTALL)
_USED: Final = re.compile(r"var\(--(?P<role>ink|text)-(?P<digits>[0-9a-f]{6})")


def themed(svg: str) -> str:
    """An inlined SVG with its colours as variables; a variable that is not set is the colour itself."""
    parts: list[str] = []
    start = 0
    for group in _GROUP.finditer(svg):
        parts += [_STYLE.sub(_with_variables, svg[start : group.start()])]
        cells = group["kind"] == "QuadMesh_"
        parts += [re.sub(r"stroke: #ffffff", f"stroke: {variable('#ffffff')}", group[0]) if cells else group[0]]
        start = group.end()
    return "".join([*parts, _STYLE.sub(_with_variables, svg[start:])])


def variable(color: str, role: str = "ink") -> str:
    """A colour as CSS: ``var(--ink-0072b2, #0072b2)``; ``role`` is ``ink`` or ``text``, which needs more contrast."""
    return f"var(--{role}-{color[1:].lower()}, {color})"


def palette(html: Iterable[str]) -> str:
    """CSS declarations of every variable in these parts of a page, for a dark screen."""
    used = sorted({(match["role"], match["digits"]) for part in html for match in _USED.finditer(part)})
    return " ".join(f"--{role}-{digits}: {on_dark(f'#{digits}', role)};" for role, digits in used)


def on_dark(color: str, role: str = "ink") -> str:
    """What a colour that was chosen on white is on :data:`BACKGROUND`.

    Greys change places, white being the background; other colours are mixed with white until they can be seen. A name
    that was darkened to be read on white has the colour of its line.

    Args:
        color: ``#rrggbb``.
        role: ``ink`` or ``text``.
    """
    rgb = _rgb(_darkened().get(color.lower(), color) if role == "text" else color)
    _, lightness, saturation = colorsys.rgb_to_hls(*rgb)
    if saturation < 0.12 or lightness in (0.0, 1.0):
        share = 1 - lightness
        return _hex([floor + share * (_BRIGHTEST - floor) for floor in _rgb(BACKGROUND)])
    while contrast(_hex(rgb), BACKGROUND) < (_TEXT_CONTRAST if role == "text" else _LINE_CONTRAST):
        rgb = [0.94 * channel + 0.06 for channel in rgb]
    return _hex(rgb)


@lru_cache(maxsize=1)
def _darkened() -> dict[str, str]:
    """Colour of a name on white -> colour of its line."""
    colors = [*BUCKET_COLORS.values(), *(look[0] for look in (*OPTIMIZERS.values(), *SPARE_LOOKS))]
    return {text_color(color): color for color in colors}


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2.1)."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _with_variables(found: re.Match[str]) -> str:
    role = "text" if found["tag"] == "text" else "ink"
    style = _COLOR.sub(lambda color: variable(color[0], role), found["style"])
    return f'<{found["tag"]}{found["before"]}{style}"'


def _luminance(color: str) -> float:
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in _rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(color: str) -> list[float]:
    return [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def _hex(rgb: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
