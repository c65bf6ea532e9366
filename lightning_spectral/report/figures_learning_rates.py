"""The learning rate alone: sweeps of runs that differ in nothing else, in a section of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_spectral.analysis.learning_rates import Groups, LearningRateSweep, level
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, ReportFigure, joined
from lightning_spectral.report.style import label_right, log2_axis, tall


def learning_rates(scene: ReportData) -> ReportFigure:
    """Exponent, rank and loss against the learning rate, for runs that differ in nothing else."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    if not scene.learning_rate_sweeps:
        return ReportFigure(
            None,
            "No learning-rate sensitivity: no two series differ in nothing but the learning rate.",
            "Add an axis with other learning rates to the sweep, at some widths.",
        )
    groups = scene.fitted.table.groups()
    rest = (scene.site, scene.focus, metric, "median")
    fits = {
        sweep.name: [
            (point.rate, fit) for point in sweep.points if (fit := point.fit(groups, rest)) and not fit.refused
        ]
        for sweep in scene.learning_rate_sweeps
    }
    panels = ["slopes", "levels", "losses"] if any(fits.values()) else ["levels", "losses"]
    figure = Figure(figsize=(11.5, tall(3.6, 2 * len(scene.learning_rate_sweeps))))
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    figure.subplots_adjust(left=0.06, right=0.88, top=0.9, bottom=0.14, wspace=0.55)
    ends: dict[str, list[tuple[float, str, str]]] = {name: [] for name in panels}
    sentences = []
    for sweep in scene.learning_rate_sweeps:
        look = scene.looks[scene.main_rate(sweep)]
        rates = [point.rate for point in sweep.points]
        if fits[sweep.name]:
            for rate, fit in fits[sweep.name]:
                axes["slopes"].plot([rate] * 2, [fit.ci_low, fit.ci_high], color=look.color, lw=1, alpha=0.4)
            betas = [fit.beta for _, fit in fits[sweep.name]]
            at = [rate for rate, _ in fits[sweep.name]]
            axes["slopes"].plot(at, betas, "-", color=look.color, marker=look.marker, ms=5, label=sweep.name)
            ends["slopes"].append((betas[-1], sweep.name, look.text_color))
            sentences.append(f"{sweep.name} {min(betas):.2f} to {max(betas):.2f} ({sweep.where})")
        _cross_out(axes["losses"], sweep, look.color)
        for name, style, curves in _curves(sweep, groups, rest):
            for panel, values in curves.items():
                axes[panel].plot(rates, values, style, color=look.color, marker=look.marker, ms=5, label=name)
                ends[panel].append((values[-1], name, look.text_color))
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    titles = {"slopes": f"beta, {where}", "levels": where, "losses": "last loss, nats"}
    every = [point.rate for sweep in scene.learning_rate_sweeps for point in sweep.points]
    for panel, ax in axes.items():
        _rate_axis(ax, every)
        ax.set_title(titles[panel])
        found = [v for line in ax.lines for v in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(v)]
        if panel == "levels" and found:
            log2_axis(ax, "y", min(found) / 1.2, max(found) * 1.2)
        label_right(ax, [end for end in ends[panel] if np.isfinite(end[0])], size=8)
    head = (
        f"With the learning rate alone, beta of {where} runs over {joined(sentences)}."
        if sentences
        else f"{where} and loss at each learning rate ({scene.learning_rate_sweeps[0].where}); no slope below 3 widths."
    )
    return ReportFigure(
        figure,
        head,
        "Only runs whose recipes differ in nothing but the learning rate, on the widths and seeds that all of them "
        "have. Solid: the widest FFN, dotted: the narrowest; bar: 95 % interval over widths; cross: a run diverged.",
    )


def _cross_out(losses: Axes, sweep: LearningRateSweep, color: str) -> None:
    """A cross at the top for each learning rate at which a run of the widest or the narrowest FFN diverged."""
    rates = [point.rate for point in sweep.points if any(map(point.diverged, {sweep.widths[0], sweep.widths[-1]}))]
    losses.plot(rates, [0.96] * len(rates), "x", color=color, ms=8, mew=2, transform=losses.get_xaxis_transform())


def _curves(
    sweep: LearningRateSweep, groups: Groups, rest: tuple[str, ...]
) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(label, line, ranks and losses by learning rate) at the widest and the narrowest FFN."""
    for width in {sweep.widths[0], sweep.widths[-1]}:
        name = f"{sweep.name}, {width}" if len(sweep.widths) > 1 else sweep.name
        levels = [level(point.points(groups, rest), width) for point in sweep.points]
        losses = [point.loss(width) for point in sweep.points]
        yield name, "-" if width == sweep.widths[-1] else ":", {"levels": levels, "losses": losses}


def _rate_axis(ax: Axes, rates: list[float]) -> None:
    ax.set_xscale("log")
    ax.set_xlim(min(rates) / 1.3, max(rates) * 1.3)
    ax.xaxis.set_major_locator(FixedLocator(_rate_ticks(rates)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("learning rate")


def _rate_ticks(rates: list[float]) -> list[float]:
    """Learning rates to write at an axis, none closer than a fifth of its length to another."""
    gap = np.log(max(rates) / min(rates)) / 5
    out: list[float] = []
    for rate in sorted(set(rates)):
        if not out or np.log(rate / out[-1]) > gap:
            out.append(rate)
    return out
