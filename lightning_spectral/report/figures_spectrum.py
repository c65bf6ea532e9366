"""Figures of the spectrum itself: Renyi orders, eigenvalues over training, the phase map, and the state of the data."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_spectral.analysis.health import ROWS_PER_RANK
from lightning_spectral.analysis.points import nanmedian
from lightning_spectral.analysis.runs import Run
from lightning_spectral.analysis.spectra import read_spectrum, spectrum_files
from lightning_spectral.records.looks import bucket_colors, bucket_name
from lightning_spectral.report.scene import ReportData, ReportFigure, Series
from lightning_spectral.report.style import label_right, log2_axis, plain_ticks, tall

_SMALLEST_SHARE = 1e-9


def renyi(scene: ReportData) -> ReportFigure:
    """Renyi rank against its order before and after the nonlinearity, and their ratio."""
    panels = [("pre", "renyi", "before the nonlinearity"), ("post", "renyi", "after the nonlinearity")]
    panels.append(("post", "reinjection", "reinjection: after / before"))
    curves = {
        title: {key: found for key in scene.series if (found := _mean_orders(scene, key, site, name))}
        for site, name, title in panels
    }
    shown = [title for title, found in curves.items() if found]
    if not shown:
        return ReportFigure(None, "No Renyi ranks in the records.")
    figure = Figure(figsize=(11.5, tall(3.5, len(scene.series))))
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    figure.subplots_adjust(left=0.065, right=0.86 if len(shown) > 1 else 0.55, top=0.9, bottom=0.15, wspace=0.24)
    for ax, title in zip(axes, shown, strict=True):
        for key, found in curves[title].items():
            look = scene.looks[key]
            orders = list(found)
            ax.plot(
                orders,
                list(found.values()),
                look.line,
                color=look.color,
                marker=look.marker,
                mfc=look.face,
                ms=4.5,
                label=look.name,
            )
        ax.set_title(title)
        ax.set_xlabel("order of the Renyi rank")
        ax.set_xticks([0.5, 1, 2, 3, 5])
        values = [value for found in curves[title].values() for value in found.values()]
        log2_axis(ax, "y", min(values) / 1.2, max(values) * 1.2)
        if title == panels[-1][2]:
            ax.axhline(1.0, color="#777777", lw=1)
    last = [(list(found.values())[-1], key) for key, found in curves[shown[-1]].items()]
    label_right(axes[-1], [(value, scene.looks[key].name, scene.looks[key].text_color) for value, key in last])
    axes[0].set_ylabel("effective rank")
    note = "Low orders count weak directions, high orders only the strongest. Mean over seeds of the layer median."
    if panels[0][2] not in shown:
        note += " The ranks before the nonlinearity were not measured: add `pre` to the callback's sites."
    return ReportFigure(
        figure,
        f"Renyi ranks on {bucket_name(scene.focus)} at D = {scene.widths[-1]}: "
        "order 1 is the soft, order 2 the hard rank.",
        note,
    )


def _mean_orders(scene: ReportData, key: Series, site: str, name: str) -> dict[float, float]:
    """Order -> geometric mean over the seeds at the widest FFN; empty if it was not measured."""
    runs = [run for run in scene.groups[key] if run.width == scene.widths[-1]]
    curves = [curve for run in runs if (curve := _orders(run, site, scene.focus, name, scene.last))]
    if not curves:
        return {}
    orders = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {order: float(np.exp(np.mean([np.log(curve[order]) for curve in curves]))) for order in orders}


def _orders(run: Run, site: str, bucket: str, name: str, last: int) -> dict[float, float]:
    if site not in run.sites or bucket not in run.buckets:
        return {}
    out = {}
    for order, dense in run.orders(name, last).items():
        layers = nanmedian(dense[run.sites.index(site), run.buckets.index(bucket)], axis=0)
        value = float(nanmedian(layers, axis=0))
        if np.isfinite(value) and value > 0 and np.isfinite(float(order)):
            out[float(order)] = value
    return out


def waterfall(scene: ReportData) -> ReportFigure:
    """Normalised eigenvalues over training for the widest run of each series."""
    found = []
    for key in scene.plain:
        run = max(scene.groups[key], key=lambda run: (run.width, -len(run.seed)))
        spectra = read_spectra(run, scene.site, scene.focus)
        if len(spectra) > 1:
            found.append((key, run, spectra))
    if not found:
        return ReportFigure(
            None, "No eigenspectra were saved.", "Set `eigenvalues: true` on the callback to see the spectrum move."
        )
    found = found[:5]
    figure = Figure(figsize=(11.5, 3.4))
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    figure.subplots_adjust(left=0.06, right=0.92, top=0.88, bottom=0.15, wspace=0.08)
    last = max(step for _, _, spectra in found for step in spectra)
    norm, colors = Normalize(0, last), colormaps["plasma"]
    for ax, (key, run, spectra) in zip(axes, found, strict=True):
        chosen = sorted(spectra)[:: max(1, len(spectra) // 15)]
        for step in chosen:
            p = spectra[step] / spectra[step].sum()
            modes = np.unique(np.geomspace(1, len(p), 80).astype(int))
            share = np.where(p[modes - 1] > _SMALLEST_SHARE, p[modes - 1], np.nan)  # below it is rounding
            ax.plot(modes, share, color=colors(0.9 * norm(step)), lw=1, label=f"step {step}")
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_ticks(ax.xaxis, ax.yaxis)
        ax.set_xlabel("mode i")
        ax.set_title(f"{scene.looks[key].name}, D = {run.width}", color=scene.looks[key].text_color)
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colors), ax=list(axes), pad=0.015, aspect=30)
    bar.set_label("optimizer step")
    axes[0].set_ylabel("p_i")
    layer = _middle_layer(found[0][1])
    return ReportFigure(
        figure,
        f"Eigenspectrum of {layer.replace('_', ' ')}, {bucket_name(scene.focus)}, over training.",
        "Share of the variance by mode; dark: early, bright: late.",
    )


def _middle_layer(run: Run) -> str:
    return run.layers[len(run.layers) // 2]


def read_spectra(run: Run, site: str, bucket: str) -> dict[int, NDArray[np.float64]]:
    """Step -> eigenvalues, descending, shape (D,), of the run's middle layer; empty if none were saved."""
    stage, stack = (run.columns.texts[name][0].decode() for name in ("stage", "stack"))
    read = {
        step: read_spectrum(file, _middle_layer(run), site, bucket, stack=stack)
        for step, file in spectrum_files(run.folder, stage).items()
    }
    return {step: eigs for step, eigs in read.items() if eigs is not None}


def phase_map(scene: ReportData) -> ReportFigure:
    """Soft against hard rank; hard > soft is impossible."""
    if not {"soft_rank", "hard_rank"} <= set(scene.metrics):
        return ReportFigure(None, "No phase map: it needs soft and hard rank.", "Run the report without --metrics.")
    buckets = [bucket for bucket in ("head", "mid", "tail") if bucket in scene.buckets] or scene.buckets[:3]
    figure = Figure(figsize=(11.5, tall(3.7, len(scene.series))))
    axes = figure.subplots(1, len(buckets), squeeze=False, sharex=True, sharey=True)[0]
    figure.subplots_adjust(left=0.065, right=0.88, top=0.9, bottom=0.14, wspace=0.08)
    values: list[float] = []
    for ax, bucket in zip(axes, buckets, strict=True):
        ends = []
        for key in scene.series:
            look = scene.looks[key]
            sides: list[dict[float, list[float]]] = [{}, {}]
            for side, metric in zip(sides, ("soft_rank", "hard_rank"), strict=True):
                for p in scene.points(key, bucket, metric):
                    side.setdefault(p.x, []).append(float(np.log(p.value)))
            xs = sorted(set(sides[0]) & set(sides[1]))
            if not xs:
                continue
            at = np.exp([[np.mean(sides[0][x]), np.mean(sides[1][x])] for x in xs])
            ax.plot(at[:, 0], at[:, 1], look.line, color=look.color, lw=1, alpha=0.7, label=look.name)
            sizes = 14 + 60 * np.arange(len(xs)) / max(1, len(xs) - 1)
            ax.scatter(
                at[:, 0], at[:, 1], s=sizes, marker=look.marker, color=look.face, edgecolors=look.color, zorder=3
            )
            values += at.ravel().tolist()
            ends.append((float(at[-1, 1]), look.name, look.text_color))
        ax.set_title(bucket_name(bucket))
        ax.set_xlabel("soft rank")
        if bucket == buckets[-1] and values:
            last = ends
    if not values:
        return ReportFigure(None, "No phase map: no point holds both ranks.")
    low, high = min(values) / 1.25, max(values) * 1.25
    for ax in axes:
        log2_axis(ax, "x", low, high)
        log2_axis(ax, "y", low, high)
        ax.fill_between([low, high], [low, high], [high, high], color="#EEEEEE", lw=0, zorder=0)
        ax.text(0.04, 0.93, "impossible: hard > soft", transform=ax.transAxes, color="#777777", fontsize=8, va="top")
    label_right(axes[-1], last)
    axes[0].set_ylabel("hard rank")
    return ReportFigure(
        figure,
        "Soft against hard rank: how far a spectrum is from flat.",
        "Marker grows with width. On the diagonal the spectrum is flat; far below it a few strong directions "
        "sit on many weak ones.",
    )


def health(scene: ReportData) -> ReportFigure:
    """Rows behind each number: N over D and N over the rank found."""
    figure = Figure(figsize=(11.5, 3.2))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.93, top=0.9, bottom=0.15, wspace=0.3)
    worst = np.inf
    colors = bucket_colors(scene.buckets)
    for ax, title in ((left, "rows per dimension, N / D"), (right, "rows per unit of hard rank found, N / rank")):
        ends = []
        for bucket in scene.buckets:
            by_width: dict[float, list[float]] = {}
            metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
            for key in scene.series:
                for p in (p for p in scene.points(key, bucket, metric) if p.num_tokens > 0):
                    below = p.x if ax is left else p.value
                    by_width.setdefault(p.x, []).append(p.num_tokens / below)
            xs = sorted(by_width)
            if not xs:
                continue
            ys = [min(by_width[x]) for x in xs]
            ax.plot(xs, ys, "-o", color=colors[bucket], ms=4, lw=1.3, label=bucket_name(bucket))
            ends.append((ys[-1], bucket_name(bucket), colors[bucket]))
            if ax is right:
                worst = min(worst, *ys)
        values = [v for line in ax.lines for v in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(v)] or [
            1.0,
            2.0,
        ]
        low, high = min(values) / 1.4, max(values) * 1.4
        if ax is right:
            low, high = min(low, ROWS_PER_RANK / 1.4), max(high, ROWS_PER_RANK * 1.4)
            ax.axhline(ROWS_PER_RANK, color="#C0392B", lw=1.2, ls="--")
            ax.axhspan(low, ROWS_PER_RANK, color="#C0392B", alpha=0.06, lw=0)
        log2_axis(
            ax, "x", scene.widths[0] / 1.12, scene.widths[-1] * 1.12, scene.widths if len(scene.widths) < 9 else None
        )
        log2_axis(ax, "y", low, high)
        ax.set_title(title)
        ax.set_xlabel("FFN width D")
        label_right(ax, ends)
    if not np.isfinite(worst):
        return ReportFigure(None, "No point has a rank and its rows: the sampling bias is not known.", "")
    head = f"Every point rests on at least {worst:.0f} rows per unit of hard rank"
    few = f", fewer than the {ROWS_PER_RANK} it takes to keep the bias near 2 %."
    return ReportFigure(
        figure,
        head + (": sampling bias is below 2 %." if worst >= ROWS_PER_RANK else few),
        "Worst run of each width. What biases a rank is N against the RANK, not against D.",
    )
