"""What one window measured, as the records and the loggers of a run are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_spectral.probe.ranks_of import RankMeasurement


@dataclass(frozen=True)
class SiteResult:
    """One measured spectrum. Fields: ``SpectralRecord``."""

    layer: int
    module: str
    expert: int | None
    site: str
    bucket: str
    num_sequences: int
    dtype: str
    measurement: RankMeasurement
    reinjection: dict[str, float] = field(default_factory=dict)
    js_divergence: float | None = None
    stack: str = ""
    layout: str = ""
    layout_agreement: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class BucketLoss:
    """Loss and accuracy of one bucket's predictions."""

    bucket: str
    num_tokens: int
    loss: float | None
    accuracy: float | None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class WindowResult:
    """All that one window measured; equal on all ranks.

    Attributes:
        sites: One result per layer, site and bucket.
        losses: One per bucket, empty if not measured.
        world_size: Ranks whose rows are in it.
        window_s: Wall time of this rank's part of the measurement, seconds.
    """

    sites: list[SiteResult]
    losses: list[BucketLoss]
    world_size: int
    window_s: float
