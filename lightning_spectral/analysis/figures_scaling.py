"""Figures of the exponent: scaling laws, bucket grid, betas side by side, asymmetry, layers."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_spectral.analysis.scene import Drawing, Scene, beta_text, joined
from lightning_spectral.analysis.style import (
    BUCKET_NAMES,
    METRIC_NAMES,
    label_right,
    log2_axis,
    width_ticks,
)

_RANKS = ("hard_rank", "soft_rank")


def _limits(scene: Scene, panels: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """Y limits of (bucket, metric) panels, all of them equally many octaves long."""
    ranges = []
    for bucket, metric in panels:
        values = [p.value for key in scene.series for p in scene.points(key, bucket, metric)] or [1.0, 2.0]
        null = _null(scene, bucket, metric)
        if null is not None:
            values += [null[0], null[0] * (scene.widths[-1] / scene.widths[0]) ** null[1]]
        ranges.append((math.log2(min(values) / 1.35), math.log2(max(values) * 1.3)))
    length = max(high - low for low, high in ranges)
    return [(2 ** ((low + high - length) / 2), 2 ** ((low + high + length) / 2)) for low, high in ranges]


def _law(scene: Scene, ax: Axes, bucket: str, metric: str, limits: tuple[float, float]) -> None:
    widths = np.array(scene.widths, dtype=float)
    span = np.geomspace(widths[0], widths[-1], 60)
    log2_axis(ax, "x", widths[0] / 1.12, widths[-1] * 1.12, width_ticks(widths.tolist()))
    low, high = limits
    log2_axis(ax, "y", low, high)
    smallest = float("inf")
    low_end = float("inf")
    for key in scene.series:
        look, fit = scene.looks[key], scene.fit(key, bucket, metric)
        points = scene.points(key, bucket, metric)
        if not points:
            continue
        smallest = min(smallest, *(p.value for p in points))
        means = {x: math.exp(np.mean([math.log(p.value) for p in points if p.x == x])) for x in {p.x for p in points}}
        if len(points) > len(means):
            ax.plot([p.x for p in points], [p.value for p in points], ".", color=look.color, alpha=0.45, ms=4, zorder=3)
        for x, mean in means.items():
            spreads = [p.spread for p in points if p.x == x and np.isfinite(p.spread)]
            if spreads and np.mean(spreads) < mean:
                ends = [mean - np.mean(spreads), mean + np.mean(spreads)]
                ax.plot([x, x], ends, color=look.color, alpha=0.25, lw=1, zorder=1)
        xs, ys = list(means), list(means.values())
        ax.plot(xs, ys, look.marker, color=look.color, mfc=look.face, ms=5.5, zorder=4, mew=1.2)
        if fit is None or fit.refused:
            continue
        own = span[(span >= fit.x_min * 0.999) & (span <= fit.x_max * 1.001)]
        ax.plot(own, fit.line(own), look.line, color=look.color, zorder=3)
        if np.isfinite(fit.level_se) and fit.df > 0:
            lower, upper = fit.band(own)
            lower, upper = np.clip(lower, low / 2, high * 2), np.clip(upper, low / 2, high * 2)
            ax.fill_between(own, lower, upper, color=look.color, alpha=0.13, lw=0)
        low_end = min(low_end, float(fit.line(span[-1:])[0]))
    if smallest == float("inf"):
        ax.text(0.5, 0.5, "no numbers", transform=ax.transAxes, ha="center", color="#888888")
        return
    # below everything at the right edge, so that it crosses as few lines as it can
    guide = min(low_end, smallest * 4) / 1.25 * span / span[-1]
    ax.plot(span[guide > low], guide[guide > low], ":", color="#777777", lw=1.2, zorder=1)
    shown = np.flatnonzero(guide > low)
    k = shown[len(shown) // 2]
    at = (span[k], guide[k])
    ax.annotate("slope 1", at, xytext=(-5, 1), textcoords="offset points", color="#777777", fontsize=8, ha="right")
    null = _null(scene, bucket, metric)
    if null is not None:
        ax.plot(span, null[0] * (span / span[0]) ** null[1], "--", color="#999999", lw=1.1, zorder=1)


def _null(scene: Scene, bucket: str, metric: str) -> tuple[float, float] | None:
    """(rank at the smallest width, slope) of the untrained network."""
    fits = [scene.fit(key, bucket, metric) for key in scene.series]
    slopes = [fit.null_beta for fit in fits if fit is not None and np.isfinite(fit.null_beta)]
    found = []
    for run in scene.runs.runs:
        measured = scene.site in run.sites and bucket in run.buckets
        if run.width == scene.widths[0] and run.steps[0] in (0, 1) and measured:
            values = run.cube(metric)[run.sites.index(scene.site), run.buckets.index(bucket), 0]
            if np.isfinite(values).any():
                found.append(float(np.nanmedian(values)))
    return (float(np.exp(np.mean(np.log(found)))), float(np.mean(slopes))) if found and slopes else None


def laws(scene: Scene) -> Drawing:
    """Rank against width for the headline bucket."""
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    figure = Figure(figsize=(11.5, 4.6))
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.87, top=0.92, bottom=0.12, wspace=0.5)
    limits = _limits(scene, [(scene.focus, metric) for metric in metrics])
    for ax, metric, ends in zip(axes, metrics, limits, strict=True):
        _law(scene, ax, scene.focus, metric, ends)
        label_right(ax, [(min(y, ends[1]), text, color) for y, text, color in _ends(scene, metric)])
        ax.set_title(f"{BUCKET_NAMES.get(scene.focus, scene.focus)}: {METRIC_NAMES.get(metric, metric)}")
        ax.set_xlabel("FFN width D")
        ax.set_ylabel(f"{METRIC_NAMES.get(metric, metric)} (eigenmodes)")
    return Drawing(
        figure,
        _steepest(scene, metrics[0]),
        "Point: median of the last windows in each layer, then of the layers; thin bar: one SD over layers; small "
        "dots: single seeds. Line and band: fit with its 95 % interval over widths. Dotted: slope 1. Grey dashed: the "
        "untrained network, whose slope training must be judged against.",
    )


def _steepest(scene: Scene, metric: str) -> str:
    name = f"{BUCKET_NAMES.get(scene.focus, scene.focus)} {METRIC_NAMES.get(metric, metric)}"
    fits = [
        (fit.beta, key, fit) for key in scene.series if (fit := scene.fit(key, scene.focus, metric)) and not fit.refused
    ]
    if not fits:
        return f"No law of {name} could be fitted."
    steep, flat = max(fits), min(fits)
    text = f"{name} rises most steeply under {scene.looks[steep[1]].name}, {beta_text(steep[2])}"
    if steep is not flat:
        text += f", and least under {scene.looks[flat[1]].name}, {beta_text(flat[2])}"
    null = _null(scene, scene.focus, metric)
    return text + (f"; untrained {null[1]:.2f}." if null else ".")


def _ends(scene: Scene, metric: str) -> list[tuple[float, str, str]]:
    out = []
    for key in scene.series:
        look, fit = scene.looks[key], scene.fit(key, scene.focus, metric)
        points = scene.points(key, scene.focus, metric)
        if fit is not None and not fit.refused:
            wide = " (wide CI)" if fit.wide else ""
            out.append(
                (float(fit.line(np.array([fit.x_max]))[0]), f"{look.name} {fit.beta:.2f}{wide}", look.text_color)
            )
        elif points:
            out.append((max(points, key=lambda p: p.x).value, f"{look.name}: no fit", look.text_color))
    null = _null(scene, scene.focus, metric)
    if null is not None:
        out.append((null[0] * (scene.widths[-1] / scene.widths[0]) ** null[1], f"untrained {null[1]:.2f}", "#777777"))
    return out


def bucket_grid(scene: Scene) -> Drawing:
    """Soft and hard rank against width, for HEAD, MID and TAIL."""
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    metrics = [metric for metric in ("soft_rank", "hard_rank") if metric in scene.metrics] or scene.metrics[:2]
    figure = Figure(figsize=(11.5, 2.9 * len(metrics) + 0.5))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.93, bottom=0.15, wspace=0.18, hspace=0.32)
    for row, metric in enumerate(metrics):
        own = _limits(scene, [(bucket, metric) for bucket in buckets])
        limits = (min(low for low, _ in own), max(high for _, high in own))
        for column, bucket in enumerate(buckets):
            ax = axes[row, column]
            _law(scene, ax, bucket, metric, limits)
            ax.set_title(f"{BUCKET_NAMES.get(bucket, bucket)}, {METRIC_NAMES.get(metric, metric)}")
    for ax in axes[-1]:
        ax.set_xlabel("FFN width D")
    for ax in axes[:, 0]:
        ax.set_ylabel("eigenmodes")
    _legend(scene, figure)
    return Drawing(
        figure,
        "The same laws for frequent (HEAD), middling (MID) and rare (TAIL) tokens.",
        "One y scale in a row: levels can be compared across buckets, slopes within and across.",
    )


def betas(scene: Scene) -> Drawing:
    """Every exponent with its intervals, beside the untrained one."""
    buckets = scene.buckets
    metrics = [metric for metric in _RANKS if metric in scene.metrics] or scene.metrics[:2]
    rows = len(scene.series)
    figure = Figure(figsize=(11.5, 0.9 + len(metrics) * (0.55 + 0.24 * rows)))
    axes = figure.subplots(len(metrics), len(buckets), squeeze=False, sharex="row", sharey=True)
    figure.subplots_adjust(
        left=0.12,
        right=0.985,
        top=1 - 0.35 / figure.get_figheight(),
        bottom=0.55 / figure.get_figheight(),
        wspace=0.08,
        hspace=0.4,
    )
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
            ax.set_title(f"{BUCKET_NAMES.get(bucket, bucket)}, {METRIC_NAMES.get(metric, metric)}", fontsize=9)
            ax.set_yticks(range(rows), [scene.looks[key].name for key in reversed(scene.series)])
            ax.set_ylim(-0.6, rows - 0.4)
            ax.grid(axis="y", visible=False)
        found = [f for key in scene.series for b in buckets if (f := scene.fit(key, b, metric)) and not f.refused]
        if found:
            ends = [v for f in found for v in (f.ci_low, f.ci_high, f.null_beta) if np.isfinite(v)] or [0, 1]
            axes[r, 0].set_xlim(max(-1.6, min(*ends, -0.05) - 0.05), min(2.6, max(*ends, 1.05) + 0.05))
    for ax in axes[-1]:
        ax.set_xlabel("beta")
    return Drawing(
        figure,
        "Exponents side by side: where intervals overlap, the order of two optimizers is not settled by the points.",
        "Line: 95 % interval over widths. Pale bar below: 95 % interval over seeds (where seeds exist). Black tick: "
        "the untrained network. Differences with their p values stand in comparisons.csv.",
    )


def asymmetry(scene: Scene) -> Drawing:
    """beta_hard and beta_soft of each series as dumbbells."""
    if not {"soft_rank", "hard_rank"} <= set(scene.metrics):
        return Drawing(None, "No asymmetry: it needs soft and hard rank.", "Run the report without --metrics.")
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    rows = len(scene.series)
    figure = Figure(figsize=(11.5, 0.95 + 0.3 * rows))
    axes = figure.subplots(1, len(buckets), squeeze=False, sharex=True, sharey=True)[0]
    figure.subplots_adjust(
        left=0.12, right=0.985, top=1 - 0.35 / figure.get_figheight(), bottom=0.55 / figure.get_figheight(), wspace=0.08
    )
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
                if c.separated and bucket == scene.focus:
                    separated.append(f"{look.name} ({c.estimate:+.2f} [{c.ci_low:.2f}, {c.ci_high:.2f}])")
        ax.set_title(BUCKET_NAMES.get(bucket, bucket))
        ax.set_yticks(range(rows), [scene.looks[key].name for key in reversed(scene.series)])
        ax.set_ylim(-0.6, rows - 0.4)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("beta (filled: hard, open: soft)")
    axes[0].set_xlim(min(lows) - 0.08, max(lows) + 0.42)
    where = BUCKET_NAMES.get(scene.focus, scene.focus)
    head = (
        f"Soft rank grows faster than hard rank on {where} for {joined(separated)}."
        if separated
        else f"On {where} no asymmetry between soft and hard exponents is separated from zero."
    )
    return Drawing(
        figure, head, "Number: beta_soft - beta_hard from the same runs; * its 95 % interval leaves zero out."
    )


def layer_map(scene: Scene) -> Drawing:
    """Exponent of every layer, and ranks by layer at the widest FFN."""
    if len(scene.layers) < 2:
        return Drawing(None, "No layer map: the runs have one layer.")
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    grid = np.full((len(scene.layers), len(scene.series)), np.nan)
    for c, key in enumerate(scene.series):
        for r, layer in enumerate(scene.layers):
            fit = scene.fit(key, scene.focus, metric, layer)
            if fit is not None and not fit.refused:
                grid[r, c] = fit.beta
    figure = Figure(figsize=(11.5, 1.4 + 0.3 * max(len(scene.layers), 6)))
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    h = figure.get_figheight()
    figure.subplots_adjust(left=0.09, right=0.87, top=1 - 0.4 / h, bottom=0.75 / h, wspace=0.28)
    limit = max(1.0, float(np.nanmax(np.abs(grid)))) if np.isfinite(grid).any() else 1.0
    left.pcolormesh(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            if np.isfinite(grid[r, c]):
                shade = "white" if abs(grid[r, c]) > 0.65 * limit else "#222222"
                left.text(c + 0.5, r + 0.5, f"{grid[r, c]:.2f}", ha="center", va="center", fontsize=8, color=shade)
    left.invert_yaxis()
    left.grid(visible=False)
    left.set_xticks(np.arange(len(scene.series)) + 0.5, [scene.looks[key].name for key in scene.series], fontsize=8)
    if len(scene.series) > 5:
        left.tick_params(axis="x", rotation=20)
    left.set_yticks(np.arange(len(scene.layers)) + 0.5, [name.replace("_", " ") for name in scene.layers], fontsize=8)
    where = f"{BUCKET_NAMES.get(scene.focus, scene.focus)} {METRIC_NAMES.get(metric, metric)}"
    left.set_title(f"beta by layer, {where}")
    _ranks_by_layer(scene, right, metric)
    spans = [
        f"{scene.looks[key].name} {np.nanmin(grid[:, c]):.2f} to {np.nanmax(grid[:, c]):.2f}"
        for c, key in enumerate(scene.series)
        if np.isfinite(grid[:, c]).any()
    ]
    return Drawing(
        figure,
        f"Layers differ: beta of {where} runs over {joined(spans[:4])}." if spans else "No layer could be fitted.",
        "The median over layers can move because one layer joins or leaves the middle: look here before trusting it.",
    )


def _ranks_by_layer(scene: Scene, ax: Axes, metric: str) -> None:
    widest = scene.widths[-1]
    ends = []
    for key in scene.series:
        look = scene.looks[key]
        own = [p for p in scene.points(key, scene.focus, metric) if p.x == widest and p.layers]
        if not own:
            continue
        mean = np.exp(np.mean(np.log([p.layers for p in own]), axis=0))
        ax.plot(range(len(mean)), mean, look.line, color=look.color, marker=look.marker, mfc=look.face, ms=5)
        ends.append((float(mean[-1]), look.name, look.text_color))
    if ends:
        low, high = ax.get_ylim()
        log2_axis(ax, "y", max(low, 0.5) if low > 0 else 1.0, high * 1.1)
        values = [v for line in ax.lines for v in np.asarray(line.get_ydata(), dtype=float)]
        log2_axis(ax, "y", min(values) / 1.2, max(values) * 1.2)
        ax.set_xticks(range(len(scene.layers)), [str(k) for k in range(len(scene.layers))])
        label_right(ax, ends)
    ax.set_xlabel("layer")
    ax.set_title(f"{METRIC_NAMES.get(metric, metric)} by layer at D = {widest}")


def _legend(scene: Scene, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.color, marker=look.marker, mfc=look.face, ls=look.line, label=look.name)
        for look in (scene.looks[key] for key in scene.series)
    ]
    handles.append(Line2D([], [], color="#999999", ls="--", label="untrained"))
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 8), frameon=False, fontsize=8.5)
