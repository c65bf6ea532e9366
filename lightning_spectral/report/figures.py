"""The table of figures: one row per figure. To add one, write a function of a :class:`ReportData` and give it a row."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from lightning_spectral.report import (
    figures_audience,
    figures_exponents,
    figures_layers,
    figures_learning_rates,
    figures_run,
    figures_scaling,
    figures_spectrum,
    figures_training,
)
from lightning_spectral.report.numbers import svg_with_values
from lightning_spectral.report.scene import ReportData, ReportFigure
from lightning_spectral.report.style import REPORT_RC


@dataclass(frozen=True)
class FigureRow:
    """One figure of the report.

    Attributes:
        title: Section heading.
        draw: Makes it.
        needs: What it is drawn from: ``runs``, ``law`` (more than one run), ``one_run`` (and no other), ``points``,
            ``paths``, ``curves`` or ``estimates``.
    """

    title: str
    draw: Callable[[ReportData], ReportFigure]
    needs: str = "runs"


# key (also the file name) -> figure, in the order of the page
FIGURES: Final[dict[str, FigureRow]] = {
    "one_run": FigureRow("Curves of the run", figures_run.one_run, "one_run"),
    "scaling_laws": FigureRow("Scaling laws", figures_scaling.scaling_laws, "points"),
    "betas": FigureRow("Exponents", figures_exponents.betas, "points"),
    "decay": FigureRow("Before and after the learning-rate decay", figures_exponents.decay, "law"),
    "bucket_grid": FigureRow("Soft and hard rank by token frequency", figures_scaling.bucket_grid, "points"),
    "asymmetry": FigureRow("Asymmetry of soft and hard exponents", figures_exponents.asymmetry, "points"),
    "beta_over_training": FigureRow("Exponents over training", figures_training.exponent_over_training, "paths"),
    "rank_curves": FigureRow("Rank curves by width", figures_training.rank_curves, "curves"),
    "layers": FigureRow("Layers", figures_layers.layer_map, "points"),
    "learning_rates": FigureRow("Learning-rate sensitivity", figures_learning_rates.learning_rates),
    "matched_loss": FigureRow("Matched loss", figures_training.matched, "law"),
    "bucket_losses": FigureRow("Loss by token frequency", figures_training.bucket_losses, "law"),
    "recall_front": FigureRow("Recall front: when each group of tokens is learned", figures_audience.recall_front),
    "renyi": FigureRow("Renyi ranks", figures_spectrum.renyi),
    "phase_map": FigureRow("Phase map", figures_spectrum.phase_map),
    "waterfall": FigureRow("Eigenspectra over training", figures_spectrum.waterfall),
    "estimates": FigureRow("Published exponents", figures_exponents.estimates, "estimates"),
    "health": FigureRow("Health of the data", figures_spectrum.health),
}


def draw_all(scene: ReportData) -> dict[str, ReportFigure]:
    """Every row of :data:`FIGURES` that the data are enough for."""
    with rc_context(REPORT_RC):
        return {key: row.draw(scene) for key, row in FIGURES.items() if scene.holds(row.needs)}


def svg_of(figure: Figure, key: str) -> str:
    """The figure as an SVG file; the same figure gives the same bytes. Its points have titles with their values."""
    return svg_with_values(figure, key)


def inline(svg: str, key: str) -> str:
    """An SVG file as a part of a page: no header, no fixed size, ids that no other figure has."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= )id="', f'id="{key}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def picture_of(figure: Figure, kind: str, dpi: int = 110) -> bytes:
    """The figure as ``png`` or ``pdf``: vectors, fonts embedded as TrueType; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    about = {"CreationDate": None} if kind == "pdf" else {}
    with rc_context({**REPORT_RC, "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=about)
    return buffer.getvalue()
