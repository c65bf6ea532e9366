"""Cross-entropy and top-1 accuracy per bucket.

Axes: N predictions, K buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.probe.collectives import all_reduce
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.loss_calls import Scored
from lightning_spectral.probe.results import BucketLoss


class BucketLosses:
    """Sums over the scored predictions of one window.

    Args:
        num_buckets: K.

    Attributes:
        reason: Why a micro-batch gave no loss, where one did not.
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self.reason = ""
        self._sums_K4: Tensor | None = None

    def add(self, scored: Scored, codes_N: Tensor) -> None:
        """Add predictions that the script has scored.

        Args:
            scored: Losses, weights and hits.
            codes_N: Bucket of each prediction; a negative one leaves it out.
        """
        losses_N, weights_N = scored.losses_N, scored.weights_N
        if self._sums_K4 is None:
            self._sums_K4 = torch.zeros(self.num_buckets, 4, dtype=torch.float64, device=losses_N.device)
        kept_N = codes_N >= 0
        rows = torch.stack((torch.ones_like(losses_N), losses_N * weights_N, scored.right_N, weights_N), 1)
        self._sums_K4.index_add_(0, codes_N[kept_N], rows[kept_N])

    def reduce_(self, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
        """Add the sums of all ranks; every rank must call it."""
        if self._sums_K4 is None:
            self._sums_K4 = torch.zeros(self.num_buckets, 4, dtype=torch.float64, device=device)
        all_reduce(self._sums_K4, process_group)

    def result(self, names: Sequence[str]) -> list[BucketLoss]:
        """For each bucket, then for all together: predictions, mean loss in nats (weighted as the script's), accuracy.

        Args:
            names: Of the buckets, and of all together.
        """
        sums = torch.zeros(self.num_buckets, 4) if self._sums_K4 is None else self._sums_K4
        rows = [*sums.tolist(), sums.sum(0).tolist()]
        if not rows[-1][0]:
            return [BucketLoss(name, 0, None, None, "not_matched", self.reason) for name in names]
        return [
            _of_bucket(name, int(n), loss, hits, weight)
            for name, (n, loss, hits, weight) in zip(names, rows, strict=False)
        ]


def _of_bucket(name: str, n: int, loss: float, hits: float, weight: float) -> BucketLoss:
    """Means of the sums over ``n`` predictions."""
    if n == 0:
        return BucketLoss(name, 0, None, None, "empty")
    if weight == 0:
        return BucketLoss(name, n, None, hits / n, "degenerate", "the script gives all its targets the weight zero")
    status, reason = ("ok", "") if math.isfinite(loss / weight) else ("nonfinite", "the loss is NaN or infinite")
    return BucketLoss(name, n, loss / weight, hits / n, status, reason)


def codes_of(scored: Scored, grouping: Grouping, shape: tuple[int, ...] | None) -> Tensor | None:
    """Bucket of each prediction ``(N,)``: that of the token to be predicted.

    Args:
        scored: The predictions.
        grouping: Which bucket a token belongs to.
        shape: ``(B, T)`` of the forward call; where a bucket is a part of the sequence, a prediction's position is
            known only if there is one for each place of a call (or one less a sequence), else there are no codes.
    """
    targets = scored.targets
    if grouping.by_place:
        if shape is None:
            return None
        fitting = [s for s in (shape, (shape[0], shape[1] - 1)) if targets.numel() == s[0] * s[1]]
        if not fitting:
            return None
        targets = targets.reshape(fitting[0])
    return grouping.loss_codes(targets).flatten()
