"""A spectral record with what a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from lightning_spectral.records import SpectralRecord


def spectral(**changes: Any) -> SpectralRecord:
    """Layer 0, post, tail, step 0, width 64, hard rank 10, status ok."""
    fields: dict[str, Any] = {
        "run_id": "run",
        "stage": "train",
        "step": 0,
        "tokens_seen": None,
        "layer": 0,
        "module": "h.0.proj",
        "site": "post",
        "bucket": "tail",
        "num_tokens": 1000,
        "width": 64,
        "tokens_per_dim": 15.6,
        "status": "ok",
        "soft_rank": 12.0,
        "hard_rank": 10.0,
        "hard_rank_debiased": 10.0,
        "spectral_entropy": 2.5,
        "early_enrichment": 0.5,
        "top_share": 0.1,
        "trace": 1.0,
    }
    return SpectralRecord(**(fields | changes))
