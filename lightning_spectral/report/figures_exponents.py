"""Figures of the exponents: side by side, before and after the decay, by learning rate, soft against hard."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_spectral.analysis.published import Estimate, effect_of, shifts_of
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.numbers import ON_X
from lightning_spectral.report.scene import ReportData, ReportFigure, joined
from lightning_spectral.report.style import LETTER, SeriesStyle

_RANKS = ("hard_rank", "soft_rank")
_NO_FIT = "A slope needs at least 3 FFN widths with positive ranks."


def betas(scene: ReportData) -> ReportFigure:
    """Every exponent with its intervals, beside the untrained one."""
    if not scene.any_fit:
        return ReportFigure(None, "No exponent could be fitted.", _NO_FIT)
    buckets = scene.buckets
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    rows = len(scene.fitted_series)
    figure = Figure(figsize=(11.5, 0.9 + len(metrics) * (0.6 + 0.26 * rows)))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex="row", sharey=True)
    _tight(figure, scene, scene.fitted_series, len(metrics))
    for r, metric in enumerate(metrics):
        for c, bucket in enumerate(buckets):
            ax = axes[r, c]
            ax.axvline(1.0, color="#777777", lw=1, ls=":")
            ax.axvline(0.0, color="#BBBBBB", lw=1)
            for k, key in enumerate(scene.fitted_series):
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
                ax.plot(
                    [fit.beta], [y], look.marker, color=look.color, mfc=look.face, ms=6, label=look.name, picker=ON_X
                )
                if np.isfinite(fit.null_beta):
                    ax.plot([fit.null_beta] * 2, [y - 0.35, y + 0.35], color="#555555", lw=1.6)
            ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}", fontsize=9)
            _rows(scene, ax, scene.fitted_series)
        found = [
            f for key in scene.fitted_series for b in buckets if (f := scene.fit(key, b, metric)) and not f.refused
        ]
        if found:
            ends = [v for f in found for v in (f.ci_low, f.ci_high, f.null_beta) if np.isfinite(v)] or [0, 1]
            axes[r, 0].set_xlim(max(-1.6, min(*ends, -0.05) - 0.05), min(2.6, max(*ends, 1.05) + 0.05))
    for ax in axes[-1]:
        ax.set_xlabel("beta")
    return ReportFigure(
        figure,
        "Exponents side by side: where intervals overlap, the order of two optimizers is not settled by the points.",
        "Line: 95 % interval, over widths and (where there are several) seeds. Pale bar below: over seeds alone. Tick: "
        "the untrained network. Differences with their p values stand in comparisons.csv.",
    )


def asymmetry(scene: ReportData) -> ReportFigure:
    """beta_hard and beta_soft of each series as dumbbells."""
    if not {"soft_rank", "hard_rank"} <= set(scene.metrics):
        return ReportFigure(None, "No asymmetry: it needs soft and hard rank.", "Run the report without --metrics.")
    if not scene.any_fit:
        return ReportFigure(None, "No asymmetry: no exponent could be fitted.", _NO_FIT)
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    rows = len(scene.fitted_series)
    figure = Figure(figsize=(11.5, 0.95 + 0.3 * rows))
    axes = figure.subplots(1, len(buckets), squeeze=False, sharex=True, sharey=True)[0]
    _tight(figure, scene, scene.fitted_series)
    separated = []
    lows: list[float] = [0.0, 1.05]
    for ax, bucket in zip(axes, buckets, strict=True):
        ax.axvline(1.0, color="#777777", lw=1, ls=":")
        by_series = {
            tuple(c.where[name] for name in scene.fitted.table.by[: len(scene.series[0])]): c
            for c in scene.compared("asymmetry", bucket)
        }
        for k, key in enumerate(scene.fitted_series):
            look, y = scene.looks[key], rows - 1 - k
            hard, soft = scene.fit(key, bucket, "hard_rank"), scene.fit(key, bucket, "soft_rank")
            if hard is None or soft is None or hard.refused or soft.refused:
                continue
            _dumbbell(ax, look, y, hard.beta, soft.beta)
            lows += [hard.beta, soft.beta]
            c = by_series.get(key)
            if c is not None:
                text, at = f"{c.estimate:+.2f}{'*' if c.separated else ''}", (0.985, (y + 0.6) / (rows + 0.2))
                beside: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "center"}
                ax.text(*at, text, color=look.text_color, fontsize=8.5, **beside)
                if c.separated and bucket == scene.focus and not look.variant:
                    separated.append(f"{look.name} ({c.estimate:+.2f} [{c.ci_low:.2f}, {c.ci_high:.2f}])")
        ax.set_title(bucket_name(bucket))
        _rows(scene, ax, scene.fitted_series)
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


def _dumbbell(ax: Axes, look: SeriesStyle, y: float, hard: float, soft: float) -> None:
    ax.plot([hard, soft], [y, y], color=look.color, lw=3, alpha=0.45, solid_capstyle="butt")
    for beta, face, name in ((hard, look.color, "hard"), (soft, "white", "soft")):
        marks = ax.plot([beta], [y], "o", color=look.color, mfc=face, mew=1.4, ms=6.5, label=f"{look.name}, {name}")
        marks[0].set_picker(ON_X)


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
    _tight(figure, scene, keys, len(metrics))
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
                    label = f"{look.name}, {'before the decay' if face == 'white' else 'at the end'}"
                    marks = ax.plot([beta], [at], look.marker, color=look.color, mfc=face, ms=5.5, mew=1.3, label=label)
                    marks[0].set_picker(ON_X)
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
        "interval over widths; tick: untrained. The change itself, run by run, is `decay_change` in "
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


def estimates(scene: ReportData) -> ReportFigure:
    """Exponents of a table that has no points: a row per series, a marker per level of what else was varied."""
    own = [e for e in scene.estimates if e.series[-3] == scene.site]
    buckets = [bucket for bucket in scene.buckets if any(e.series[-2] == bucket for e in own)]
    metrics = [metric for metric in scene.metrics if any(e.series[-1] == metric for e in own)]
    if not own:
        return ReportFigure(None, "No exponent of this site.", "Choose with --site.")
    levels = list(dict.fromkeys(e.factor for e in own))
    keys = [key for key in scene.series if any(e.series[:-3] == key for e in own)]
    figure = Figure(figsize=(11.5, 0.9 + len(metrics) * (0.6 + 0.3 * len(keys))))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex="row", sharey=True)
    _tight(figure, scene, keys, len(metrics))
    for r, metric in enumerate(metrics):
        for c, bucket in enumerate(buckets):
            ax = axes[r, c]
            ax.axvline(1.0, color="#777777", lw=1, ls=":")
            here = [e for e in own if e.series[-2:] == (bucket, metric)]
            _dumbbells(scene, ax, keys, levels, here)
            ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}", fontsize=9)
            _rows(scene, ax, keys)
    for ax in axes[-1]:
        ax.set_xlabel("beta")
    marks = ", ".join(
        f"{sign}: {level}" for sign, level in zip(("filled", "open", "grey", "cross"), levels, strict=False)
    )
    note = "Line: 95 % interval, where the table has one." + (f" {marks}." if levels != [""] else "")
    focus = [e for e in own if e.series[-2:] == (scene.focus, metrics[0])]
    return ReportFigure(figure, _effect(scene, focus, metrics[0]), note)


def _dumbbells(
    scene: ReportData, ax: Axes, keys: list[tuple[str, ...]], levels: list[str], here: list[Estimate]
) -> None:
    for k, key in enumerate(keys):
        look, y = scene.looks[key], len(keys) - 1 - k
        own = [e for e in here if e.series[:-3] == key]
        if len(own) > 1:
            ax.plot([min(e.beta for e in own), max(e.beta for e in own)], [y, y], color=look.color, lw=3, alpha=0.35)
        for e in own:
            face = (look.color, "white", "#D0D0D0")[min(levels.index(e.factor), 2)]
            if np.isfinite(e.low):
                ax.plot([e.low, e.high], [y, y], color=look.color, lw=1.4, alpha=0.6)
            label = f"{look.name}, {e.factor}" if e.factor else look.name
            ax.plot([e.beta], [y], look.marker, color=look.color, mfc=face, ms=6, mew=1.3, label=label, picker=ON_X)


def _effect(scene: ReportData, own: list[Estimate], metric: str) -> str:
    """Optimizer against what else was varied, with the interval if the table has standard errors."""
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    shifts, effect = shifts_of(own), effect_of(own)
    if effect is not None:
        text = (
            f"beta of {where}: root mean square shift {effect.row_shift:.2f} between series, {effect.column_shift:.2f}"
        )
        gap = f"{effect.difference:.3f} [{effect.ci_low:.3f}, {effect.ci_high:.3f}]"
        return f"{text} between levels; difference of squares {gap}."
    if shifts is None:
        return f"Exponents of {where}, as published."
    text = f"beta of {where} moves by {shifts[0]:.2f} (root mean square) between series and by {shifts[1]:.2f}"
    return f"{text} between levels; without standard errors nobody can say whether they differ."


def _rows(scene: ReportData, ax: Axes, keys: list[tuple[str, ...]]) -> None:
    """One row per series, the first on top."""
    ax.set_yticks(range(len(keys)), [scene.looks[key].name for key in reversed(keys)])
    ax.set_ylim(-0.6, len(keys) - 0.4)
    ax.grid(axis="y", visible=False)


def _tight(figure: Figure, scene: ReportData, keys: list[tuple[str, ...]], rows: int = 1) -> None:
    """Margins in inches, so that titles and ticks of panels a few rows high do not meet, and names have their room."""
    height, width = figure.get_figheight(), figure.get_figwidth()
    names = 0.25 + 1.15 * LETTER * max((len(scene.looks[key].name) for key in keys), default=0)
    top, bottom, between = 0.35, 0.55, 0.55
    panel = (height - top - bottom - (rows - 1) * between) / rows
    figure.subplots_adjust(
        left=max(0.12, names / width),
        right=0.985,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.08,
        hspace=between / panel,
    )
