"""Ranks as torchmetrics, and the reduction that the callbacks share."""

from lightning_spectral.metrics.streaming import SpectralRank, StreamingCovariance

__all__ = ["SpectralRank", "StreamingCovariance"]
