"""Figures of what happens during training: beta(t), rank curves, loss by bucket, ranks at matched loss."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_spectral.analysis.matched import MatchedPair, loss_curve
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, ReportFigure, Series, joined
from lightning_spectral.report.style import label_right, log2_axis, shown_name, tall, width_ticks


def exponent_over_training(scene: ReportData) -> ReportFigure:
    """Exponent at every window, by bucket and metric."""
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    metrics = [metric for metric in ("soft_rank", "hard_rank") if metric in scene.metrics] or scene.metrics[:2]
    if not any(len(path.steps) > 1 for path in scene.trajectories):
        return ReportFigure(
            None, "No beta(t): no two widths share two windows.", "Let the widths of a sweep run equally long."
        )
    figure = Figure(figsize=(11.5, 2.5 * len(metrics) + 0.5))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.07, right=0.88, top=0.93, bottom=0.1, wspace=0.07, hspace=0.25)
    labels: list[tuple[Axes, list[tuple[float, str, str]]]] = []
    for r, metric in enumerate(metrics):
        for c, bucket in enumerate(buckets):
            ends = _paths(scene, axes[r, c], bucket, metric)
            if c == len(buckets) - 1:
                labels.append((axes[r, c], ends))
    betas = [path.beta for path in scene.trajectories if path.series[-1] in metrics and path.series[-2] in buckets]
    everything = np.concatenate([np.zeros(1), np.ones(1), *betas])
    low, high = float(np.nanmin(everything)) - 0.15, float(np.nanmax(everything)) + 0.15
    for ax in axes.flat:
        ax.set_ylim(low, high)
    for ax, ends in labels:
        label_right(ax, ends)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    for ax in axes[:, 0]:
        ax.set_ylabel("beta")
    smoothed = f"Trailing median of {scene.smoothing} windows" if scene.smoothing > 1 else "Every window by itself"
    smoothed = smoothed if scene.runs.runs else "As in the table"
    note = f"{smoothed}; band: 95 % interval over widths at that window"
    note += "; vertical line: the learning rate starts to decay." if scene.decay_steps else "."
    return ReportFigure(figure, _moves(scene, metrics[-1]), note)


def _moves(scene: ReportData, metric: str) -> str:
    """From the untrained network's exponent to the last."""
    parts = []
    for key in scene.plain:
        path = scene.path(key, scene.focus, metric)
        if path is not None and path.null is not None:
            parts.append(f"{path.null[0]:.2f} to {path.beta[np.isfinite(path.beta)][-1]:.2f} ({scene.looks[key].name})")
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    return f"beta of {where} moves from {joined(parts)} over training." if parts else "beta over training."


def _paths(scene: ReportData, ax: Axes, bucket: str, metric: str) -> list[tuple[float, str, str]]:
    """One panel: every series' exponent with its band; returns what to write at the right edge."""
    ax.axhline(0.0, color="#999999", lw=0.9)
    ax.axhline(1.0, color="#777777", lw=0.9, ls=":")
    ends = []
    for key in scene.series:
        look, path = scene.looks[key], scene.path(key, bucket, metric)
        if path is None or not np.isfinite(path.beta).any():
            continue
        ax.plot(path.steps, path.beta, look.line, color=look.color, label=look.name)
        if path.num_widths > 2:
            ax.fill_between(path.steps, path.low, path.high, color=look.color, alpha=0.09, lw=0)
        ends.append((float(path.beta[np.isfinite(path.beta)][-1]), look.name, look.text_color))
    _decay_line(scene, ax)
    ax.set_title(f"{bucket_name(bucket)}, {metric_name(metric)}")
    ax.margins(x=0.01)
    return ends


def _decay_line(scene: ReportData, ax: Axes) -> None:
    for step in scene.decay_steps if len(scene.decay_steps) == 1 else []:
        ax.axvline(step, color="#AAAAAA", lw=1, ls="--", zorder=0)


def rank_curves(scene: ReportData) -> ReportFigure:
    """Rank over training, one panel per series, one line per width."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    curves = {key: found for key in scene.series if (found := scene.ranks_of(key, scene.focus, metric))}
    if not curves:
        return ReportFigure(None, "No rank curves: no window holds a number.")
    columns = min(len(curves), 5)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(11.5, 2.6 * rows + 0.3))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=0.055,
        right=0.955,
        top=1 - 0.3 / figure.get_figheight(),
        bottom=0.5 / figure.get_figheight(),
        wspace=0.3,
        hspace=0.3,
    )
    map_ = colormaps["viridis"]
    low, high = math.inf, 0.0
    labels: list[tuple[int, list[tuple[float, str, str]]]] = []
    for k, (key, own) in enumerate(curves.items()):
        ax = axes.flat[k]
        ends: list[tuple[float, str, str]] = []
        for width, steps, ranks in own:
            place = scene.widths.index(width) / max(1, len(scene.widths) - 1)
            color = map_(0.8 * (1 - place))
            first = not any(text == str(width) for _, text, _ in ends)
            ax.plot(steps, ranks, color=color, lw=1.3, alpha=1.0 if first else 0.45, label=f"D = {width}")
            if first:
                ends.append((float(ranks[-1]), str(width), to_hex(color)))
            low, high = min(low, float(ranks.min())), max(high, float(ranks.max()))
        labels.append((k, ends))
        _decay_line(scene, ax)
        ax.set_title(shown_name(scene.looks[key].name, 104 // columns), color=scene.looks[key].text_color)
        ax.margins(x=0.01)
    for k, ends in labels:
        log2_axis(axes.flat[k], "y", low / 1.2, high * 1.2)
        label_right(axes.flat[k], ends, size=7.5)
    for ax in list(axes.flat)[len(curves) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    where = f"{bucket_name(scene.focus)} {metric_name(metric)}"
    axes[0, 0].set_ylabel(where)
    return ReportFigure(
        figure, f"{where} over training, by FFN width.", "Number at a line: FFN width D; paler: further seeds."
    )


def bucket_losses(scene: ReportData) -> ReportFigure:
    """Final loss against width, for each bucket."""
    buckets = [b for b in scene.buckets if any(len(loss_curve(run, b)[0]) for run in scene.runs.runs)]
    if not buckets:
        return ReportFigure(
            None, "No losses: the runs have no losses.jsonl.", "TailTokenProbe and SpectralRankCallback write it."
        )
    figure = Figure(figsize=(11.5, tall(3.1, len(scene.series))))
    axes = figure.subplots(1, len(buckets), squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.89, top=0.9, bottom=0.16, wspace=0.28)
    best = ""
    for ax, bucket in zip(axes, buckets, strict=True):
        ends = []
        for key in scene.series:
            last = _final_losses(scene, ax, key, bucket)
            if last is not None:
                ends.append((last, scene.looks[key].name, scene.looks[key].text_color))
        log2_axis(
            ax,
            "x",
            scene.widths[0] / 1.12,
            scene.widths[-1] * 1.12,
            width_ticks(scene.widths)[:: 1 if len(scene.widths) < 6 else 2],
        )
        ax.set_title(bucket_name(bucket))
        ax.set_xlabel("FFN width D")
        if ends and bucket == buckets[0]:
            loss, name, _ = min(ends)
            best = f"{name} has the lowest loss at D = {scene.widths[-1]}: {loss:.3f} nats over all tokens."
        if ax is axes[-1]:
            label_right(ax, ends)
    axes[0].set_ylabel("loss, nats")
    return ReportFigure(
        figure, best or "Loss by bucket.", "Mean over seeds; small dots: single seeds. Every panel has its own scale."
    )


def _final_losses(scene: ReportData, ax: Axes, key: tuple[str, ...], bucket: str) -> float | None:
    """Draw one series: mean over seeds at each width, and the seeds; returns the mean at the widest."""
    look = scene.looks[key]
    final: dict[int, list[float]] = {}
    for run in scene.groups[key]:
        losses = loss_curve(run, bucket)[1]
        if len(losses):
            final.setdefault(run.width, []).append(float(losses[-1]))
    if not final:
        return None
    xs = sorted(final)
    ys = [float(np.mean(final[x])) for x in xs]
    for x in xs:
        if len(final[x]) > 1:
            ax.plot([x] * len(final[x]), final[x], ".", color=look.color, alpha=0.45, ms=4)
    ax.plot(xs, ys, look.line, color=look.color, marker=look.marker, mfc=look.face, ms=5, label=look.name)
    return ys[-1]


def matched(scene: ReportData) -> ReportFigure:
    """Rank ratio to a reference optimizer at equal loss."""
    metrics = [metric for metric in ("hard_rank", "soft_rank") if metric in scene.metrics] or scene.metrics[:1]
    reference = scene.series[0]
    others = [key for key in scene.series if key != reference]
    own = [pair for pair in scene.pairs if reference in (pair.a, pair.b) and pair.bucket == scene.focus]
    if not own:
        return ReportFigure(
            None,
            "No runs of two series could be matched on loss.",
            "It needs `losses.jsonl`, two series with common widths and seeds, and windows whose losses differ by less "
            "than `--tolerance`; `--match-on step` compares them at equal steps.",
        )
    figure = Figure(figsize=(11.5, tall(3.6, len(scene.series))))
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    figure.subplots_adjust(left=0.07, right=0.86, top=0.9, bottom=0.14, wspace=0.42)
    ratios = [1.0, *(_ratio(pair, reference) for pair in own if pair.metric in metrics)]
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    ticks = [t for t in (0.0625, 0.125, 0.25, 0.5, 0.71, 1, 1.41, 2, 2.83, 4, 8, 16) if low <= t <= high]
    for ax, metric in zip(axes, metrics, strict=True):
        ends = []
        for key in others:
            by_width: dict[int, list[float]] = {}
            for pair in own:
                if key in (pair.a, pair.b) and pair.metric == metric:
                    by_width.setdefault(pair.width, []).append(_ratio(pair, reference))
            if not by_width:
                continue
            look, xs = scene.looks[key], sorted(by_width)
            ys = [float(np.exp(np.mean(np.log(by_width[x])))) for x in xs]
            for x in xs:
                if len(by_width[x]) > 1:
                    ax.plot([x] * len(by_width[x]), by_width[x], ".", color=look.color, alpha=0.45, ms=4)
            ax.plot(xs, ys, look.line, color=look.color, marker=look.marker, mfc=look.face, ms=5.5, label=look.name)
            ends.append((ys[-1], f"{look.name} {ys[-1]:.2f}x", look.text_color))
        log2_axis(ax, "x", scene.widths[0] / 1.12, scene.widths[-1] * 1.12, width_ticks(scene.widths))
        log2_axis(ax, "y", low, high, ticks if len(ticks) < 8 else ticks[::2])
        ax.axhline(1.0, color="#777777", lw=1)
        ax.set_title(f"{bucket_name(scene.focus)} {metric_name(metric)} at equal loss")
        ax.set_xlabel("FFN width D")
        label_right(ax, ends)
    axes[0].set_ylabel(f"ratio to {scene.looks[reference].name}")
    return ReportFigure(
        figure,
        _matched_headline(scene, reference),
        "Each pair of runs (same width and seed) is read off, by interpolation, at the lowest validation loss "
        "both reached.",
    )


def _ratio(pair: MatchedPair, reference: Series) -> float:
    """Rank of the other run over that of the reference."""
    return pair.rank_b / pair.rank_a if pair.a == reference else pair.rank_a / pair.rank_b


def _matched_headline(scene: ReportData, reference: Series) -> str:
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    name = " ".join(filter(None, reference))
    parts = []
    found = scene.compared("matched_loss_slope", scene.focus, metric)
    for key in scene.plain:
        other = " ".join(filter(None, key))
        for c in found:
            if {c.a, c.b} == {name, other} and math.isfinite(c.ci_low):
                sign = 1 if c.b == name else -1
                low, high = sorted((sign * c.ci_low, sign * c.ci_high))
                star = " *" if c.separated else ""
                parts.append(f"{scene.looks[key].name} {sign * c.estimate:+.2f} [{low:.2f}, {high:.2f}]{star}")
    if not parts:
        return f"Ranks at equal validation loss, relative to {name}."
    return f"At equal validation loss, slope minus {name}'s: {joined(parts)} (*: separated from zero)."
