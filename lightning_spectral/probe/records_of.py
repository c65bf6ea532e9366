"""A window's results as records, and its eigenvalues beside them."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import save
from torch import Tensor

from lightning_spectral.probe.results import SiteResult, WindowResult
from lightning_spectral.records import (
    EIGENVALUES_FOLDER,
    STACKS_KEY,
    LossRecord,
    SpectralRecord,
    eigenvalues_key,
    layer_name,
)


@dataclass(frozen=True)
class WindowId:
    """Which window a record is of. Fields: ``SpectralRecord``."""

    run_id: str
    stage: str
    step: int | None
    tokens_seen: int | None
    loader: int | None = None
    ordinal: int = 0


def spectral_records(result: WindowResult, window: WindowId, conventions: dict[str, str]) -> list[SpectralRecord]:
    """One record per layer, site and bucket."""
    return [_record(site, result, window, conventions) for site in result.sites]


def _record(site: SiteResult, result: WindowResult, window: WindowId, conventions: dict[str, str]) -> SpectralRecord:
    measured = site.measurement
    values: dict[str, float | None] = dict(measured.values)
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
        num_tokens=measured.num_tokens,
        width=measured.width,
        tokens_per_dim=measured.num_tokens / max(measured.width, 1),
        status=measured.status,
        reason=site.reason,
        soft_rank=values.pop("soft_rank", None),
        hard_rank=values.pop("hard_rank", None),
        spectral_entropy=values.pop("spectral_entropy", None),
        early_enrichment=values.pop("early_enrichment", None),
        top_share=values.pop("top_share", None),
        soft_method=measured.soft_method,
        hard_rank_debiased=measured.hard_rank_debiased,
        trace=measured.trace,
        renyi=measured.renyi,
        reinjection=site.reinjection,
        js_divergence=site.js_divergence,
        soft_rank_debiased=measured.soft_rank_debiased,
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
        stack=site.stack,
        layout=site.layout,
        layout_agreement=site.layout_agreement,
        loader=window.loader,
        ordinal=window.ordinal,
        extra=values,  # rows of RANK_METRICS that are no fields
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
            loss.num_tokens,
            loss.loss,
            loss.accuracy,
            window.loader,
            window.ordinal,
            loss.status,
            loss.reason,
        )
        for loss in result.losses
    ]


def eigenvalue_file(window: WindowId, result: WindowResult) -> tuple[str, bytes] | None:
    """Name below the run folder and content of a window's spectra; ``None`` if there are none.

    ``eigenvalues/train_00000200.safetensors``: keys ``STACK/layer_00.post.tail``, descending, fp32. Further windows of
    one step and stage get ``_loader_1`` and ``_again_1``.
    """
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, None] = {}
    for site in result.sites:
        stacks[site.stack] = None
        if site.measurement.eigenvalues is not None:
            place = layer_name(site.layer, site.expert)
            key = eigenvalues_key(place, site.site, site.bucket, stack=site.stack)
            if key in tensors:  # a block's second network
                key = eigenvalues_key(place, site.site, site.bucket, stack=site.stack, module=site.module)
            tensors[key] = site.measurement.eigenvalues.float().contiguous()
    if not tensors:
        return None
    name = f"{window.stage}_unknown" if window.step is None else f"{window.stage}_{window.step:08d}"
    name += f"_loader_{window.loader}" if window.loader is not None else ""
    name += f"_again_{window.ordinal}" if window.ordinal else ""
    return f"{EIGENVALUES_FOLDER}/{name}.safetensors", save(tensors, metadata={STACKS_KEY: "\n".join(stacks)})
