"""beta(t) with its band as TensorBoard events, written by TensorBoard's own writer: no torch, no TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral.analysis.trajectory import Trajectory


def write_events(trajectories: Sequence[Trajectory], folder: str | Path) -> int:
    """Write ``beta/METRIC.BUCKET/SERIES`` with ``_low`` and ``_high``, and a chart of each band.

    Args:
        trajectories: What to write; series without a finite window are left out.
        folder: Log folder for ``tensorboard --logdir``.

    Returns:
        Number of series written.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar import metadata as custom_scalar
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))
    charts: dict[str, list[Any]] = {}
    written = 0
    try:
        for path in trajectories:
            *series, site, bucket, metric = path.series
            name = "_".join(filter(None, series)).replace(" ", "_").replace("/", "_")
            tag = f"beta/{metric}.{site}.{bucket}/{name}"
            band = path.num_widths > 2
            if not np.isfinite(path.beta).any():
                continue
            values = {tag: path.beta} | ({f"{tag}_low": path.low, f"{tag}_high": path.high} if band else {})
            for key, column in values.items():
                for step, value in zip(path.steps, column, strict=True):
                    if np.isfinite(value):
                        scalar = Summary(value=[Summary.Value(tag=key, simple_value=float(value))])
                        writer.add_event(Event(step=int(step), summary=scalar, wall_time=float(step)))
            if band:
                margin = layout_pb2.MarginChartContent.Series(value=tag, lower=f"{tag}_low", upper=f"{tag}_high")
                chart = layout_pb2.Chart(
                    title=f"{metric} {bucket} {name}", margin=layout_pb2.MarginChartContent(series=[margin])
                )
                charts.setdefault(f"beta, {site} {bucket}", []).append(chart)
            written += 1
        categories = [layout_pb2.Category(title=title, chart=own) for title, own in charts.items()]
        layout = layout_pb2.Layout(category=categories).SerializeToString()
        value = Summary.Value(
            tag=custom_scalar.CONFIG_SUMMARY_TAG,
            tensor=make_tensor_proto(layout, shape=()),
            metadata=custom_scalar.create_summary_metadata(),
        )
        writer.add_event(Event(summary=Summary(value=[value])))
        writer.flush()
    finally:
        writer.close()
    return written
