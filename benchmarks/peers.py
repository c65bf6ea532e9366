"""Ways of others to measure a spectrum, for comparison: a package if it is installed, the rest in our own words."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import importable

HAS_TELEMETRY = importable("spectral_telemetry")


class Telemetry:
    """spectral-telemetry's accumulators, one pooled and one a bucket, without its probes' overhead."""

    def __init__(self, width: int, buckets: int, dtype: torch.dtype, device: str) -> None:
        from spectral_telemetry.telemetry import StreamingCovariance

        self.pooled = StreamingCovariance(width, dtype=dtype, device=device)
        self.buckets = [StreamingCovariance(width, dtype=dtype, device=device) for _ in range(buckets)]

    def update(self, rows: Tensor, codes: Tensor) -> None:
        """All rows, then those of each bucket."""
        self.pooled.update(rows)
        for code, accumulator in enumerate(self.buckets):
            accumulator.update(rows[codes == code])

    def state_bytes(self) -> int:
        """Bytes of all tensors kept."""
        found = [v for a in (self.pooled, *self.buckets) for v in vars(a).values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in found)


class Buffering:
    """The paper's way: keep every row, and make the covariances (pooled and by bucket) when they are asked for."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.codes: list[Tensor] = []

    def update(self, rows: Tensor, codes: Tensor) -> None:
        """Copy the rows."""
        self.rows.append(rows.clone())
        self.codes.append(codes)

    def covariances(self, buckets: int) -> list[Tensor]:
        """Pooled, then by bucket."""
        rows, codes = torch.cat(self.rows), torch.cat(self.codes)
        self.rows.clear()
        self.codes.clear()
        parts = [rows, *(rows[codes == code] for code in range(buckets))]
        centred = [part - part.mean(0) for part in parts]
        return [part.mT @ part / max(len(part) - 1, 1) for part in centred]


def singular_value_rank(rows: Tensor) -> float:
    """RankMe's way: entropy of the singular values of the rows themselves."""
    values = torch.linalg.svdvals(rows)
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())
