"""What loggers get beyond scalars: rank curves in the buckets' own colours, layer x step heat maps, spectra.

TensorBoard colours runs, not tags: its charts cannot tell buckets apart by colour. Sub-runs for the buckets would;
tried, they fill the list of runs (60 for 12 runs, where Custom Scalars then selects none), and their colours depend
on the order of the runs. A picture has the same colours for 1, 3 and 12 runs and no smoothing; hover, log axes and
overlays are in the tab SPECTRAL (``lightning_spectral.tensorboard``). TensorBoard also gets a custom-scalars layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np

from lightning_spectral.callbacks.uploads import add_figure, holds_pictures, is_tensorboard, upload_records
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.scalars import place_names
from lightning_spectral.records import POOLED, RunInfo, SpectralRecord, layer_name
from lightning_spectral.records.looks import bucket_colors, bucket_name, metric_name, ordered_buckets

MAX_SERIES = 4  # more lines than this in one chart cannot be told apart
MAX_SPECTRA = 24
MAX_NAMES = 16  # of layers beside a heat map
MAX_DOTS = 60  # windows that are dots on a line
MAX_COLUMNS = 256  # of a heat map: more cannot be told apart, and drawing them takes seconds
CURVES = ("hard_rank", "soft_rank")


def layout(
    records: Sequence[SpectralRecord], *, with_losses: bool, with_layers: bool = True
) -> dict[str, dict[str, list[Any]]]:
    """Custom-scalars layout for the tags of ``probe.scalars``: front page, layers, health; at most 4 series a chart."""
    buckets = list(dict.fromkeys(record.bucket for record in records))
    layers = list(dict.fromkeys(place_names(records))) if with_layers else []
    sites = list(dict.fromkeys(record.site for record in records))
    suffixes = ["" if site == "post" else f".{site}" for site in sites]
    front: dict[str, list[Any]] = {}
    for metric in ("hard_rank", "soft_rank", "asymmetry"):
        for suffix in suffixes:
            tags = [f"spectral/{metric}{suffix}.{bucket}" for bucket in buckets]
            front |= _charts(f"{metric}{suffix} by bucket", tags)
    detail: dict[str, list[Any]] = {}
    for metric in ("hard_rank", "soft_rank"):
        for site in sites:
            for bucket in buckets:
                tags = [f"spectral.{metric}.{site}.{bucket}/{layer}" for layer in layers]
                detail |= _charts(f"{metric}.{site}.{bucket} by layer", tags)
    health = _charts("rows per dimension (N/D)", [f"spectral_health/tokens_per_dim{suffixes[0]}.{b}" for b in buckets])
    health |= _charts("share of spectra with a bad status", ["spectral_health/bad_status_share"])
    health |= _charts("seconds per window", ["spectral_health/window_s"])
    pages = {"1 Rank curves (layer median)": front, "4 Health": health}
    if with_layers:
        pages["2 Layers"] = detail
    if with_losses:
        losses = _charts("loss by bucket", [f"spectral_loss/loss.{bucket}" for bucket in buckets])
        losses |= _charts("top-1 accuracy by bucket", [f"spectral_loss/accuracy.{bucket}" for bucket in buckets])
        pages["3 Loss by bucket"] = losses
    return dict(sorted(pages.items()))


class Pictures:
    """History of one run, drawn into the loggers that hold pictures.

    Args:
        with_layers: Whether single layers have tags, that charts can be of.
    """

    def __init__(self, *, with_layers: bool = True) -> None:
        self._with_layers = with_layers
        self._curves: dict[str, dict[str, dict[int, float]]] = {metric: {} for metric in CURVES}
        self._hard: dict[str, dict[int, dict[str, float]]] = {}  # bucket -> step -> layer
        self._spectra: dict[str, dict[int, np.ndarray]] = {}
        self._num_windows = 0

    def add(self, trainer: pl.Trainer, records: Sequence[SpectralRecord], result: WindowResult) -> None:
        """Remember one window; write the layout with the first; draw now and then."""
        loggers = _loggers(trainer)
        if not loggers or not records:
            return
        step = records[0].step or 0
        self._remember_ranks(step, [record for record in records if record.site == "post"])
        self._remember_spectra(step, result)
        if self._num_windows == 0:
            described = layout(records, with_losses=bool(result.losses), with_layers=self._with_layers)
            for logger in loggers:
                if is_tensorboard(logger):
                    logger.experiment.add_custom_scalars(described)
        self._num_windows += 1
        if self._num_windows >= 8 and self._num_windows & (self._num_windows - 1) == 0:  # 8, 16, 32, ...
            self.draw(trainer, step)

    def draw(self, trainer: pl.Trainer, step: int) -> None:
        """Write the pictures of what is known so far."""
        loggers = _loggers(trainer) if self._num_windows > 1 else []
        if not loggers:
            return
        if any(self._curves[metric] for metric in CURVES):
            add_figure(loggers, "spectral_pictures/rank_by_bucket", rank_curves(self._curves), step)
        for bucket, values in self._hard.items():
            add_figure(loggers, f"spectral_pictures/hard_rank.{bucket}", heat_map(values, bucket), step)
        for name, spectra in self._spectra.items():
            add_figure(loggers, f"spectral_pictures/eigenspectrum.{name}", waterfall(spectra, name), step)

    def finish(self, trainer: pl.Trainer, step: int, folder: Path, info: RunInfo) -> None:
        """Draw once more, and give the records to loggers that keep files."""
        self.draw(trainer, step)
        upload_records(_loggers(trainer), folder, info)

    def _remember_ranks(self, step: int, records: Sequence[SpectralRecord]) -> None:
        for record, place in zip(records, place_names(records), strict=True):
            if record.hard_rank is not None:
                self._hard.setdefault(record.bucket, {}).setdefault(step, {})[place] = record.hard_rank
        for steps in self._hard.values():
            _thin(steps, MAX_COLUMNS)
        for metric in CURVES:
            for bucket in dict.fromkeys(record.bucket for record in records):
                known = [value for r in records if r.bucket == bucket and (value := r.value(metric)) is not None]
                if known:
                    self._curves[metric].setdefault(bucket, {})[step] = median(known)

    def _remember_spectra(self, step: int, result: WindowResult) -> None:
        """Of the middle layer, for the rarest bucket: one picture that shows the shape."""
        post = [s for s in result.sites if s.site == "post" and s.measurement.eigenvalues is not None]
        if not post:
            return
        bucket = "tail" if any(s.bucket == "tail" for s in post) else POOLED
        layers = sorted({s.layer for s in post})
        chosen = next((s for s in post if s.bucket == bucket and s.layer == layers[len(layers) // 2]), None)
        if chosen is None or chosen.measurement.eigenvalues is None:
            return
        eigs = chosen.measurement.eigenvalues.double().numpy()
        kept = self._spectra.setdefault(f"{layer_name(chosen.layer)}.{bucket}", {})
        kept[step] = eigs / eigs.sum()
        _thin(kept, MAX_SPECTRA)


def _thin(kept: dict[int, Any], at_most: int) -> None:
    """Evenly over the steps, keeping the first and the last: between ``at_most`` / 2 and twice as many stay."""
    if len(kept) > 2 * at_most:
        steps = np.array(sorted(kept))
        wanted = set(steps[np.searchsorted(steps, np.linspace(steps[0], steps[-1], at_most))].tolist())
        for step in steps.tolist():
            if step not in wanted:
                del kept[step]


def rank_curves(curves: dict[str, dict[str, dict[int, float]]]) -> Any:
    """Layer medians by bucket over steps, each bucket in its own colour; the untrained network is a dotted line.

    Args:
        curves: metric -> bucket -> step -> median over layers.
    """
    figure, first = _figure(width=9.6)
    first.remove()
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (metric, buckets) in zip(axes, curves.items(), strict=True):
        colors = bucket_colors(buckets)
        for bucket in ordered_buckets(buckets):
            points = sorted(buckets[bucket].items())
            name = bucket_name(bucket)
            marker = "." if len(points) <= MAX_DOTS else ""
            axis.plot(*zip(*points, strict=True), color=colors[bucket], marker=marker, label=name)
            if points[0][0] == 0:
                axis.axhline(points[0][1], color=colors[bucket], linestyle=":", linewidth=1)
        axis.set_title(f"{metric_name(metric)}, median over layers; dotted: untrained", loc="left", fontsize=10)
        _over_steps(axis)
        axis.set_ylim(bottom=0)
    axes[-1].legend(
        frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True
    )  # beside, not on, the curves
    return figure


def heat_map(values: dict[int, dict[str, float]], bucket: str) -> Any:
    """Hard rank of one bucket over steps and layers."""
    steps = sorted(values)
    layers = sorted({layer for ranks in values.values() for layer in ranks})
    grid = np.array([[values[step].get(layer, np.nan) for step in steps] for layer in layers])
    figure, axes = _figure()
    mesh = axes.pcolormesh(_edges(steps), np.arange(len(layers) + 1), grid, cmap="viridis")
    named = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), MAX_NAMES)).astype(int))
    axes.set_yticks(named + 0.5, [layers[place] for place in named])
    _over_steps(axes)
    axes.set_title(f"hard rank, {bucket}: layer x step", loc="left", fontsize=10)
    figure.colorbar(mesh, ax=axes)
    return figure


def waterfall(spectra: dict[int, np.ndarray], name: str) -> Any:
    """Normalised eigenspectra over training, dark to light."""
    from matplotlib import colormaps

    figure, axes = _figure()
    colours = colormaps["plasma"](np.linspace(0.0, 0.85, len(spectra)))
    for colour, (step, p) in zip(colours, sorted(spectra.items()), strict=True):
        first_or_last = step in (min(spectra), max(spectra))
        axes.loglog(
            np.arange(1, len(p) + 1), np.maximum(p, 1e-9), color=colour, label=f"step {step}" if first_or_last else None
        )
    axes.set_xlabel("mode i")
    axes.set_ylabel("share of variance p_i")
    axes.set_title(f"eigenspectrum, {name}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    return figure


def _figure(width: float = 6.4) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")  # not pyplot: its global state belongs to the user
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _over_steps(axes: Any) -> None:
    """An x axis of whole steps, few enough not to meet: 150000 is 150k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("optimizer step")


def _edges(steps: Sequence[int]) -> np.ndarray:
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _charts(title: str, tags: Sequence[str]) -> dict[str, list[Any]]:
    if len(tags) <= MAX_SERIES:
        return {title: ["Multiline", list(tags)]}
    charts, rest = {}, iter(tags)
    while part := list(islice(rest, MAX_SERIES)):
        charts[f"{title} {part[0].rsplit('/')[-1]} to {part[-1].rsplit('/')[-1]}"] = ["Multiline", part]
    return charts


def _loggers(trainer: pl.Trainer) -> list[Any]:
    """Loggers of this process that hold pictures."""
    return [logger for logger in trainer.loggers if holds_pictures(logger)] if trainer.is_global_zero else []
