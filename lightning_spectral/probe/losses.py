"""Cross-entropy and top-1 accuracy per bucket.

Axes: N predictions, K buckets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class BucketLosses:
    """Sums over the scored predictions of one window.

    Args:
        num_buckets: K.
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._sums_K3: Tensor | None = None

    def add(self, losses_N: Tensor, right_N: Tensor, codes_N: Tensor) -> None:
        """Add predictions that the script has scored.

        Args:
            losses_N: Cross-entropies, nats, fp64.
            right_N: 1 where the most likely token was right, else 0, fp64.
            codes_N: Bucket of each prediction; a negative one leaves it out.
        """
        if self._sums_K3 is None:
            self._sums_K3 = torch.zeros(self.num_buckets, 3, dtype=torch.float64, device=losses_N.device)
        scored_N = codes_N >= 0
        rows = torch.stack((torch.ones_like(losses_N), losses_N, right_N), 1)
        self._sums_K3.index_add_(0, codes_N[scored_N], rows[scored_N])

    def reduce_(self, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
        """Add the sums of all ranks; every rank must call it."""
        if self._sums_K3 is None:
            self._sums_K3 = torch.zeros(self.num_buckets, 3, dtype=torch.float64, device=device)
        dist.all_reduce(self._sums_K3, group=process_group)

    def result(self) -> list[tuple[int, float | None, float | None]]:
        """For each bucket, then for all together: rows, mean loss in nats, accuracy."""
        sums = torch.zeros(self.num_buckets, 3) if self._sums_K3 is None else self._sums_K3
        rows = [*sums.tolist(), sums.sum(0).tolist()]
        return [(int(n), loss / n if n else None, hits / n if n else None) for n, loss, hits in rows]
