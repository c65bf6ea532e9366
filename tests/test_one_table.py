"""ARCHITECTURE's "where to add things", held: one row in a table is all that a new thing needs."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_spectral.analysis.points import points_of_runs
from lightning_spectral.analysis.runs import load_runs
from lightning_spectral.functional import rank
from lightning_spectral.probe.ranks_of import measure
from lightning_spectral.probe.records_of import WindowId, spectral_records
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.scalars import detail
from lightning_spectral.probe.window import SiteResult, WindowResult
from lightning_spectral.records import RunInfo


@pytest.fixture
def second_eigenvalue(monkeypatch):
    """A metric that nobody knows but the table."""
    row = rank.RankMetric("second_share", lambda eigs: eigs[..., 1] / eigs.sum(-1), "", "[0, 1/2]", "Second share.")
    monkeypatch.setitem(rank.RANK_METRICS, "second_share", row)


def one_window(seed: int = 0) -> WindowResult:
    from lightning_spectral.functional.covariance import empty_moments, update_

    rows = torch.randn(2_000, 8, generator=torch.Generator().manual_seed(seed)) * torch.arange(8, 0, -1)
    moments = empty_moments(1, 8)
    update_(moments, rows, [len(rows)], None)
    site = SiteResult(0, "h.0.mlp.proj", None, "post", "pooled", 10, "float32", measure(moments))
    return WindowResult([site], [], 1, 0.0)


def test_a_row_of_rank_metrics_reaches_record_tag_and_table(second_eigenvalue, tmp_path):
    records = spectral_records(one_window(), WindowId("run", "train", 0, None), {})
    value = records[0].value("second_share")
    assert value == pytest.approx(49 / 204, rel=0.1)  # variances 64, 49, 36, ..., 1
    assert detail(records, "train")["spectral.second_share.post.pooled/layer_00"] == value
    run = RunFolder(tmp_path, RunInfo("run", "2026-01-01T00:00:00", "Muon"), resume=False, writes=True)
    run.append_spectral(records)
    assert json.loads((tmp_path / "spectral.jsonl").read_text())["second_share"] == value
    table = points_of_runs(load_runs([tmp_path]), metrics=["second_share"])
    assert {point.value for point in table.points} == {value}
