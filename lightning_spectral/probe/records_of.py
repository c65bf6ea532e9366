"""A window's results as records, and its eigenvalues beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from lightning_spectral.probe.window import SiteResult, WindowResult
from lightning_spectral.records import LossRecord, SpectralRecord

EIGENVALUES_FOLDER = "eigenvalues"


@dataclass(frozen=True)
class WindowId:
    """Which window a record is of. Fields: ``SpectralRecord``."""

    run_id: str
    stage: str
    step: int
    tokens_seen: int | None


def spectral_records(result: WindowResult, window: WindowId, conventions: dict[str, str]) -> list[SpectralRecord]:
    """One record per layer, site and bucket."""
    return [_record(site, result, window, conventions) for site in result.sites]


def _record(site: SiteResult, result: WindowResult, window: WindowId, conventions: dict[str, str]) -> SpectralRecord:
    measured = site.measurement
    hard_low, hard_high = measured.hard_rank_ci or (None, None)
    soft_low, soft_high = measured.soft_rank_ci or (None, None)
    return SpectralRecord(
        run_id=window.run_id,
        stage=window.stage,
        step=window.step,
        tokens_seen=window.tokens_seen,
        layer=site.layer,
        module=site.module,
        site=site.site,
        bucket=site.bucket,
        num_rows=measured.num_rows,
        width=measured.width,
        rows_per_dim=measured.num_rows / max(measured.width, 1),
        status=measured.status,
        soft_rank=measured.soft_rank,
        soft_method=measured.soft_method,
        hard_rank=measured.hard_rank,
        hard_rank_unbiased=measured.hard_rank_unbiased,
        spectral_entropy=measured.spectral_entropy,
        eee=measured.eee,
        top_share=measured.top_share,
        trace=measured.trace,
        renyi=measured.renyi,
        reinjection=site.reinjection,
        js_divergence=site.js_divergence,
        soft_rank_unbiased=measured.soft_rank_unbiased,
        hard_rank_ci_low=hard_low,
        hard_rank_ci_high=hard_high,
        soft_rank_ci_low=soft_low,
        soft_rank_ci_high=soft_high,
        num_sequences=site.num_sequences,
        expert=site.expert,
        dtype=site.dtype,
        world_size=result.world_size,
        window_s=result.window_s,
        conventions=conventions,
    )


def loss_records(result: WindowResult, window: WindowId) -> list[LossRecord]:
    """One record per bucket that was scored."""
    return [
        LossRecord(
            window.run_id,
            window.stage,
            window.step,
            window.tokens_seen,
            loss.bucket,
            loss.num_rows,
            loss.loss,
            loss.accuracy,
        )
        for loss in result.losses
    ]


def save_eigenvalues(folder: Path, stage: str, step: int, result: WindowResult) -> None:
    """``eigenvalues/train_00000200.safetensors``: keys ``layer_00.post.tail``, descending, fp32; written atomically."""
    tensors = {}
    for site in result.sites:
        if site.measurement.eigenvalues is not None:
            expert = "" if site.expert is None else f".expert_{site.expert:02d}"
            key = f"layer_{site.layer:02d}{expert}.{site.site}.{site.bucket}"
            tensors[key] = site.measurement.eigenvalues.float().contiguous()
    if not tensors:
        return
    path = folder / EIGENVALUES_FOLDER / f"{stage}_{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, str(partial))
    os.replace(partial, path)
