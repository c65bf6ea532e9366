"""Figures of the exponents: side by side, before and after the decay, by learning rate, soft against hard."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_spectral.analysis.learning_rates import level
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, ReportFigure, joined
from lightning_spectral.report.style import label_right, log2_axis, tall

_RANKS = ("hard_rank", "soft_rank")
_NO_FIT = "A slope needs at least 3 FFN widths with positive ranks."


def betas(scene: ReportData) -> ReportFigure:
    """Every exponent with its intervals, beside the untrained one."""
    if not scene.any_fit:
        return ReportFigure(None, "No exponent could be fitted.", _NO_FIT)
    buckets = scene.buckets
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    rows = len(scene.series)
    figure = Figure(figsize=(11.5, 0.9 + len(metrics) * (0.6 + 0.26 * rows)))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex="row", sharey=True)
    _tight(figure, len(metrics))
    for r, metric in enumerate(metrics):
        for c, bucket in enumerate(buckets):
            ax = axes[r, c]
            ax.axvline(1.0, color="#777777", lw=1, ls=":")
            ax.axvline(0.0, color="#BBBBBB", lw=1)
            for k, key in enumerate(scene.series):
                look, fit = scene.looks[key], scene.fit(key, bucket, metric)
                y = rows - 1 - k
                if fit is None or fit.refused:
                    ax.text(0.02, y, "no fit", color="#999999", fontsize=8, va="center")
                    continue
                if np.isfinite(fit.seed_low):
                    ax.plot(
                        [fit.seed_low, fit.seed_high],
                        [y - 0.22] * 2,
                        color=look.color,
                        lw=4,
                        alpha=0.3,
                        solid_capstyle="butt",
                    )
                ax.plot([fit.ci_low, fit.ci_high], [y, y], color=look.color, lw=1.6)
                ax.plot([fit.beta], [y], look.marker, color=look.color, mfc=look.face, ms=6)
                if np.isfinite(fit.null_beta):
                    ax.plot([fit.null_beta] * 2, [y - 0.35, y + 0.35], color="#555555", lw=1.6)
            ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}", fontsize=9)
            _rows(scene, ax, scene.series)
        found = [f for key in scene.series for b in buckets if (f := scene.fit(key, b, metric)) and not f.refused]
        if found:
            ends = [v for f in found for v in (f.ci_low, f.ci_high, f.null_beta) if np.isfinite(v)] or [0, 1]
            axes[r, 0].set_xlim(max(-1.6, min(*ends, -0.05) - 0.05), min(2.6, max(*ends, 1.05) + 0.05))
    for ax in axes[-1]:
        ax.set_xlabel("beta")
    return ReportFigure(
        figure,
        "Exponents side by side: where intervals overlap, the order of two optimizers is not settled by the points.",
        "Line: 95 % interval over widths. Pale bar below: 95 % interval over seeds (where seeds exist). Black tick: "
        "the untrained network. Differences with their p values stand in comparisons.csv.",
    )


def asymmetry(scene: ReportData) -> ReportFigure:
    """beta_hard and beta_soft of each series as dumbbells."""
    if not {"soft_rank", "hard_rank"} <= set(scene.metrics):
        return ReportFigure(None, "No asymmetry: it needs soft and hard rank.", "Run the report without --metrics.")
    if not scene.any_fit:
        return ReportFigure(None, "No asymmetry: no exponent could be fitted.", _NO_FIT)
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    rows = len(scene.series)
    figure = Figure(figsize=(11.5, 0.95 + 0.3 * rows))
    axes = figure.subplots(1, len(buckets), squeeze=False, sharex=True, sharey=True)[0]
    _tight(figure)
    separated = []
    lows: list[float] = [0.0, 1.05]
    for ax, bucket in zip(axes, buckets, strict=True):
        ax.axvline(1.0, color="#777777", lw=1, ls=":")
        by_series = {
            tuple(c.where[name] for name in scene.fitted.table.by[: len(scene.series[0])]): c
            for c in scene.compared("asymmetry", bucket)
        }
        for k, key in enumerate(scene.series):
            look, y = scene.looks[key], rows - 1 - k
            hard, soft = scene.fit(key, bucket, "hard_rank"), scene.fit(key, bucket, "soft_rank")
            if hard is None or soft is None or hard.refused or soft.refused:
                continue
            ax.plot([hard.beta, soft.beta], [y, y], color=look.color, lw=3, alpha=0.45, solid_capstyle="butt")
            ax.plot([hard.beta], [y], "o", color=look.color, ms=6.5)
            ax.plot([soft.beta], [y], "o", color=look.color, mfc="white", mew=1.4, ms=6.5)
            lows += [hard.beta, soft.beta]
            c = by_series.get(key)
            if c is not None:
                star = "*" if c.separated else ""
                ax.text(
                    0.985,
                    (y + 0.6) / (rows + 0.2),
                    f"{c.estimate:+.2f}{star}",
                    transform=ax.transAxes,
                    ha="right",
                    va="center",
                    color=look.text_color,
                    fontsize=8.5,
                )
                if c.separated and bucket == scene.focus and not look.variant:
                    separated.append(f"{look.name} ({c.estimate:+.2f} [{c.ci_low:.2f}, {c.ci_high:.2f}])")
        ax.set_title(bucket_name(bucket))
        _rows(scene, ax, scene.series)
        ax.set_xlabel("beta (filled: hard, open: soft)")
    axes[0].set_xlim(min(lows) - 0.08, max(lows) + 0.42)
    where = bucket_name(scene.focus)
    head = (
        f"Soft rank grows faster than hard rank on {where} for {joined(separated)}."
        if separated
        else f"On {where} no asymmetry between soft and hard exponents is separated from zero."
    )
    return ReportFigure(
        figure, head, "Number: beta_soft - beta_hard from the same runs; * its 95 % interval leaves zero out."
    )


def decay(scene: ReportData) -> ReportFigure:
    """Exponents before the learning rate decays and at the end."""
    if scene.fitted.before is None:
        return ReportFigure(
            None,
            "No state before the learning-rate decay.",
            "It needs runs whose recipe holds the rate and then lets it fall (`lr_schedule`), with a window at the end "
            "of the full rate: let the interval divide that step.",
        )
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    keys = [key for key in scene.series if any(_has_before(scene, key, b, m) for b in buckets for m in metrics)]
    rows = len(keys)
    figure = Figure(figsize=(11.5, 0.9 + len(metrics) * (0.6 + 0.34 * rows)))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex="row", sharey=True)
    _tight(figure, len(metrics))
    for r, metric in enumerate(metrics):
        ends = [0.0]
        for ax, bucket in zip(axes[r], buckets, strict=True):
            ax.axvline(0.0, color="#BBBBBB", lw=1)
            for k, key in enumerate(keys):
                fit, look, y = scene.fit(key, bucket, metric), scene.looks[key], rows - 1 - k
                if fit is None or fit.refused or not np.isfinite(fit.before_beta):
                    continue
                for at, low, high, beta, face in (
                    (y + 0.17, fit.before_low, fit.before_high, fit.before_beta, "white"),
                    (y - 0.17, fit.ci_low, fit.ci_high, fit.beta, look.color),
                ):
                    ax.plot([low, high], [at, at], color=look.color, lw=1.4, alpha=0.55)
                    ax.plot([beta], [at], look.marker, color=look.color, mfc=face, ms=5.5, mew=1.3)
                    ends += [value for value in (low, high, beta) if np.isfinite(value)]
                if np.isfinite(fit.null_beta):
                    ax.plot([fit.null_beta] * 2, [y - 0.4, y + 0.4], color="#555555", lw=1.6)
                    ends.append(fit.null_beta)
            _rows(scene, ax, keys)
            ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}", fontsize=9)
        axes[r, 0].set_xlim(max(-1.6, min(ends) - 0.08), min(2.6, max(ends) + 0.08))
    for ax in axes[-1]:
        ax.set_xlabel("beta (open: before the decay, filled: at the end)")
    return ReportFigure(
        figure,
        _decay_headline(scene, metrics[0]),
        "Same runs, same method: open at the last window of the full learning rate, filled at the end; line: 95 % "
        "interval over widths; black tick: untrained. The change itself, run by run, is `decay_change` in "
        "comparisons.csv.",
    )


def _has_before(scene: ReportData, key: tuple[str, ...], bucket: str, metric: str) -> bool:
    fit = scene.fit(key, bucket, metric)
    return fit is not None and not fit.refused and bool(np.isfinite(fit.before_beta))


def _decay_headline(scene: ReportData, metric: str) -> str:
    labels = scene.fitted.table.by[: len(scene.series[0])]
    parts = []
    for c in scene.compared("decay_change", scene.focus, metric):
        look = scene.looks.get(tuple(c.where[name] for name in labels))
        if look is not None and not look.variant and np.isfinite(c.ci_low):
            parts.append(f"{look.name} {c.estimate:+.2f} [{c.ci_low:.2f}, {c.ci_high:.2f}]")
    what = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    return f"The decay changes beta of {what} by {joined(parts)}." if parts else f"beta of {what} before and after."


def learning_rates(scene: ReportData) -> ReportFigure:
    """Exponent, rank and loss against the learning rate, for runs that differ in nothing else."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    if not scene.ladders:
        return ReportFigure(
            None,
            "No learning-rate sensitivity: no two series differ in nothing but the learning rate.",
            "Add an axis with other learning rates to the sweep, at some widths.",
        )
    groups = scene.fitted.table.groups()
    rest = (scene.site, scene.focus, metric, "median")
    fits = {
        ladder.name: [(rung.rate, fit) for rung in ladder.rungs if (fit := rung.fit(groups, rest)) and not fit.refused]
        for ladder in scene.ladders
    }
    panels = ["slopes", "levels", "losses"] if any(fits.values()) else ["levels", "losses"]
    figure = Figure(figsize=(11.5, tall(3.6, 2 * len(scene.ladders))))
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    figure.subplots_adjust(left=0.06, right=0.88, top=0.9, bottom=0.14, wspace=0.55)
    ends: dict[str, list[tuple[float, str, str]]] = {name: [] for name in panels}
    sentences = []
    for ladder in scene.ladders:
        look = scene.looks[max((rung.series for rung in ladder.rungs), key=lambda key: len(scene.groups[key]))]
        rates = [rung.rate for rung in ladder.rungs]
        if fits[ladder.name]:
            for rate, fit in fits[ladder.name]:
                axes["slopes"].plot([rate] * 2, [fit.ci_low, fit.ci_high], color=look.color, lw=1, alpha=0.4)
            betas = [fit.beta for _, fit in fits[ladder.name]]
            at = [rate for rate, _ in fits[ladder.name]]
            axes["slopes"].plot(at, betas, "-", color=look.color, marker=look.marker, ms=5)
            ends["slopes"].append((betas[-1], ladder.name, look.text_color))
            sentences.append(f"{ladder.name} {min(betas):.2f} to {max(betas):.2f} ({ladder.where})")
        for width in {ladder.widths[0], ladder.widths[-1]}:
            style = "-" if width == ladder.widths[-1] else ":"
            name = f"{ladder.name}, {width}" if len(ladder.widths) > 1 else ladder.name
            curves = {
                "levels": [level(rung.points(groups, rest), width) for rung in ladder.rungs],
                "losses": [rung.loss(width) for rung in ladder.rungs],
            }
            for panel, values in curves.items():
                axes[panel].plot(rates, values, style, color=look.color, marker=look.marker, ms=5)
                ends[panel].append((values[-1], name, look.text_color))
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    titles = {"slopes": f"beta, {where}", "levels": where, "losses": "last loss, nats"}
    every = [rung.rate for ladder in scene.ladders for rung in ladder.rungs]
    for panel, ax in axes.items():
        ax.set_xscale("log")
        ax.set_xlim(min(every) / 1.3, max(every) * 1.3)
        ax.xaxis.set_major_locator(FixedLocator(_rate_ticks(every)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(titles[panel])
        ax.set_xlabel("learning rate")
        found = [v for line in ax.lines for v in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(v)]
        if panel == "levels" and found:
            log2_axis(ax, "y", min(found) / 1.2, max(found) * 1.2)
        label_right(ax, [end for end in ends[panel] if np.isfinite(end[0])], size=8)
    head = (
        f"With the learning rate alone, beta of {where} runs over {joined(sentences)}."
        if sentences
        else f"{where} and loss at each learning rate ({scene.ladders[0].where}); no slope below 3 widths."
    )
    return ReportFigure(
        figure,
        head,
        "Only runs whose recipes differ in nothing but the learning rate, on the widths and seeds that all of them "
        "have. Solid: the widest FFN, dotted: the narrowest; thin bar: 95 % interval over widths.",
    )


def _rate_ticks(rates: list[float]) -> list[float]:
    """Learning rates to write at an axis, none closer than a fifth of its length to another."""
    gap = np.log(max(rates) / min(rates)) / 5
    out: list[float] = []
    for rate in sorted(set(rates)):
        if not out or np.log(rate / out[-1]) > gap:
            out.append(rate)
    return out


def _rows(scene: ReportData, ax: Axes, keys: list[tuple[str, ...]]) -> None:
    """One row a series, the first on top."""
    ax.set_yticks(range(len(keys)), [scene.looks[key].name for key in reversed(keys)])
    ax.set_ylim(-0.6, len(keys) - 0.4)
    ax.grid(axis="y", visible=False)


def _tight(figure: Figure, rows: int = 1) -> None:
    """Margins in inches, so that titles and ticks of panels that are a few rows high do not meet."""
    height = figure.get_figheight()
    top, bottom, between = 0.35, 0.55, 0.55
    panel = (height - top - bottom - (rows - 1) * between) / rows
    figure.subplots_adjust(
        left=0.12, right=0.985, top=1 - top / height, bottom=bottom / height, wspace=0.08, hspace=between / panel
    )
