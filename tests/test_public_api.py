"""What users build on: a change here is a change for them."""

from __future__ import annotations

from dataclasses import fields

import pytest

import lightning_spectral
from lightning_spectral.cli import VERBS
from lightning_spectral.records import LossRecord, RunInfo, SpectralRecord


@pytest.mark.parametrize("name", lightning_spectral.__all__)
def test_every_public_name_loads(name):
    assert getattr(lightning_spectral, name) is not None


def test_public_names():
    assert {"SpectralRankCallback", "TailTokenProbe", "Muon", "NorMuon", "Dion", "AdamW", "SpectralRecord"} <= set(
        lightning_spectral.__all__
    )


def test_verbs():
    assert {"pretrain", "count-tokens", "sweep", "fit", "compare", "report", "memory"} <= set(VERBS)


def test_record_fields():
    assert [f.name for f in fields(SpectralRecord)] == [
        "run_id", "stage", "step", "tokens_seen", "layer", "module", "site", "bucket", "num_tokens", "width",
        "tokens_per_dim", "status", "soft_rank", "hard_rank", "hard_rank_debiased", "spectral_entropy",
        "early_enrichment",
        "top_share", "trace", "renyi", "reinjection", "js_divergence", "soft_method", "soft_rank_debiased",
        "hard_rank_ci_low", "hard_rank_ci_high", "soft_rank_ci_low", "soft_rank_ci_high", "num_sequences", "expert",
        "dtype", "world_size", "window_s", "conventions", "stack", "reason", "loader", "ordinal", "layout",
        "layout_agreement", "schema_version", "extra",
    ]  # fmt: skip
    assert [f.name for f in fields(LossRecord)] == [
        "run_id", "stage", "step", "tokens_seen", "bucket", "num_tokens", "loss", "accuracy", "loader", "ordinal",
        "status", "schema_version",
    ]  # fmt: skip
    assert {"run_id", "optimizer", "seed", "hparams", "labels"} <= {f.name for f in fields(RunInfo)}
