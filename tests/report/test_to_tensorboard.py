from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.analysis.trajectory import beta_trajectories
from lightning_spectral.report.to_tensorboard import write_events
from tests.analysis.synthetic import write_study


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_hold_beta_and_its_band(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    write_study(tmp_path / "runs", {"muon": 0.9, "adamw": 0.3}, widths=(128, 256, 512))
    paths = beta_trajectories(load_runs([tmp_path / "runs"]), metrics=["hard_rank"])
    assert write_events(paths, tmp_path / "tb") == 2 * 4
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (path,) = [p for p in paths if p.series == ("muon", "post", "tail", "hard_rank")]
    for suffix, column in (("", path.beta), ("_low", path.low), ("_high", path.high)):
        scalars = events.Scalars(f"beta/hard_rank.post.tail/muon{suffix}")
        assert [event.step for event in scalars] == path.steps.tolist()
        assert [event.value for event in scalars] == pytest.approx(column.tolist(), rel=1e-6)  # fp32 on disk
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    margins = [chart.margin.series[0] for category in layout.category for chart in category.chart]
    assert "beta/hard_rank.post.tail/muon_low" in {margin.lower for margin in margins}
