"""A window's numbers as scalars for loggers.

Tags: ``spectral/hard_rank.tail`` (front page: median over layers), ``spectral.hard_rank.post.tail/layer_03`` (detail).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from lightning_spectral.functional.rank import RANK_METRICS
from lightning_spectral.records import LossRecord, SpectralRecord, layer_name

FRONT_PAGE = ("hard_rank", "soft_rank")


def front_page(records: Sequence[SpectralRecord], stage: str) -> dict[str, float]:
    """Layer medians by bucket, asymmetry and health, as scalar tags."""
    prefix = "spectral" if stage == "train" else f"spectral_{stage}"
    scalars: dict[str, float] = {}
    for site in dict.fromkeys(record.site for record in records):
        at_site = [record for record in records if record.site == site]
        suffix = "" if site == "post" else f".{site}"
        for bucket in dict.fromkeys(record.bucket for record in at_site):
            mine = [record for record in at_site if record.bucket == bucket]
            for metric in (*FRONT_PAGE, "asymmetry"):
                value = _median(record.value(metric) for record in mine)
                if value is not None:
                    scalars[f"{prefix}/{metric}{suffix}.{bucket}"] = value
            scalars[f"{prefix}_health/tokens_per_dim{suffix}.{bucket}"] = median(
                record.tokens_per_dim for record in mine
            )
    if records:
        scalars[f"{prefix}_health/bad_status_share"] = sum(r.status != "ok" for r in records) / len(records)
        scalars[f"{prefix}_health/window_s"] = records[0].window_s or 0.0
    tail_integrity = _tail_integrity(records)
    if tail_integrity is not None:
        scalars[f"{prefix}/tail_integrity"] = tail_integrity
    return scalars


def detail(records: Sequence[SpectralRecord], stage: str) -> dict[str, float]:
    """One scalar per metric, site, bucket and layer; a model's second and further stacks of blocks are named."""
    prefix = "spectral" if stage == "train" else f"spectral_{stage}"
    # the entropy is the logarithm of the soft rank
    metrics = [*(name for name in RANK_METRICS if name != "spectral_entropy"), "hard_rank_debiased"]
    return {
        f"{prefix}.{metric}.{record.site}.{record.bucket}/{place}": value
        for record, place in zip(records, place_names(records), strict=True)
        for metric in metrics
        if (value := record.value(metric)) is not None
    }


def place_names(records: Sequence[SpectralRecord]) -> list[str]:
    """``layer_03`` of each record of a window, behind the name of its stack if that is not the first's."""
    layers = [layer_name(record.layer, record.expert) for record in records]
    pairs = zip(records, layers, strict=True)
    return [layer if record.stack == records[0].stack else f"{record.stack}/{layer}" for record, layer in pairs]


def loss_scalars(losses: Iterable[LossRecord], stage: str) -> dict[str, float]:
    """Loss and accuracy by bucket."""
    prefix = "spectral_loss" if stage == "train" else f"spectral_loss_{stage}"
    return {
        f"{prefix}/{metric}.{record.bucket}": value
        for record in losses
        for metric in ("loss", "accuracy")
        if (value := getattr(record, metric)) is not None
    }


def finite(scalars: dict[str, float]) -> dict[str, float]:
    """Without what no logger can draw."""
    return {tag: value for tag, value in scalars.items() if math.isfinite(value)}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _tail_integrity(records: Sequence[SpectralRecord]) -> float | None:
    """Mean over layers of hard(tail) - hard(head) at the post site (arXiv:2605.21803, tail integrity index)."""
    hard = {
        ((r.module, r.layer, r.expert), r.bucket): r.hard_rank
        for r in records
        if r.site == "post" and r.hard_rank is not None
    }
    differences = [
        rank - hard[place, "head"]
        for (place, bucket), rank in hard.items()
        if bucket == "tail" and (place, "head") in hard
    ]
    return sum(differences) / len(differences) if differences else None
