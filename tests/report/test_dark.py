"""Figures on a dark screen: greys change places, colours stay and can be seen, data keep theirs."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from lightning_spectral.records.looks import BUCKET_COLORS, OPTIMIZERS, SPARE_LOOKS
from lightning_spectral.report.dark import BACKGROUND, ON_CELL, contrast, on_dark, palette, themed, variable
from lightning_spectral.report.figures import inline, svg_of
from lightning_spectral.report.style import label_right, text_color
from lightning_spectral.report.template import TEMPLATE

LOOKS = [*BUCKET_COLORS.values(), *(look[0] for look in (*OPTIMIZERS.values(), *SPARE_LOOKS))]


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the well-known grey that just fails
    assert contrast("#ffffff", "#777777") == contrast("#777777", "#ffffff")


@pytest.mark.parametrize("color", LOOKS)
def test_every_series_can_be_seen_and_keeps_its_hue(color: str) -> None:
    assert contrast(on_dark(color), BACKGROUND) >= 3
    assert contrast(on_dark(color, "text"), BACKGROUND) >= 4.5
    channels = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    dark = on_dark(color)
    lifted = [int(dark[k : k + 2], 16) for k in (1, 3, 5)]
    if max(channels) - min(channels) > 20:
        assert sorted(range(3), key=channels.__getitem__) == sorted(range(3), key=lifted.__getitem__)


def test_series_that_differ_on_white_differ_on_dark() -> None:
    assert len({on_dark(color) for color in LOOKS}) == len(set(LOOKS))


def test_greys_change_places_in_order() -> None:
    greys = [f"#{level:02x}{level:02x}{level:02x}" for level in range(255, -1, -15)]
    dark = [on_dark(grey) for grey in greys]
    assert dark[0] == BACKGROUND
    assert [contrast(one, BACKGROUND) for one in dark] == sorted(contrast(one, BACKGROUND) for one in dark)
    assert contrast(dark[-1], BACKGROUND) > 12


def test_data_keep_their_colors() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.pcolormesh([[0.0, 1.0]], cmap="viridis", edgecolors="white")
    left.text(0.5, 0.5, "cell", color="#222222", gid=f"{ON_CELL}0-0")
    right.plot([0, 1], [0, 1], color="#0072B2", label="Muon")
    right.text(0.5, 0.5, "beside", color="#222222")
    before = inline(svg_of(figure, "key"), "key")
    after = themed(before)
    assert re.sub(r"var\(--(?:ink|text)-[0-9a-f]{6}, (#\w+)\)", r"\1", after) == before  # the fallback is what it was
    cells = re.search(r'<g id="key-QuadMesh_1">.*?</g>', after, re.DOTALL)[0]
    assert "fill: #440154" in cells
    assert "fill: #fde725" in cells
    assert "stroke: var(--ink-ffffff, #ffffff)" in cells
    assert re.search(r"fill: (#222222)[^<]*>cell<", after)
    assert re.search(r"fill: var\(--text-222222, #222222\)[^<]*>beside<", after)
    assert "stroke: var(--ink-0072b2, #0072b2)" in after.lower()
    declared = palette([after])
    assert {f"--{role}-{digits}" for role, digits in re.findall(r"var\(--(ink|text)-([0-9a-f]{6})", after)} == set(
        re.findall(r"(--\w+-\w+):", declared)
    )


def test_a_variable_falls_back_to_the_color() -> None:
    assert variable("#0072B2") == "var(--ink-0072b2, #0072B2)"


def test_the_page_has_the_background_that_colors_are_made_for() -> None:
    dark = TEMPLATE[TEMPLATE.index("@media screen and (prefers-color-scheme: dark)") :]
    assert f"background: {BACKGROUND}" in dark
    assert TEMPLATE.count("{{ palette }}") == dark.count("{{ palette }}") == 1  # on paper nothing changes


@pytest.mark.parametrize("color", LOOKS)
def test_a_name_can_be_read_on_white_and_has_the_colour_of_its_line_on_a_dark_screen(color: str) -> None:
    assert contrast(text_color(color), "#ffffff") > 4.5
    assert on_dark(text_color(color), "text") == on_dark(color, "text")
    assert contrast(on_dark(text_color(color), "text"), BACKGROUND) >= 4.4  # 8 bits a channel


def test_names_beside_lines_are_dark_enough() -> None:
    figure = Figure()
    label_right(figure.add_subplot(), [(0.5, bucket, color) for bucket, color in BUCKET_COLORS.items()])
    (axes,) = figure.axes
    assert len(axes.texts) == len(BUCKET_COLORS)
    assert min(contrast(str(text.get_color()), "#ffffff") for text in axes.texts) > 4.5
