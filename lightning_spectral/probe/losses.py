"""Cross-entropy and top-1 accuracy per bucket.

Axes: B sequences, T positions, V vocabulary, N kept positions, K buckets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Logits are turned into fp32 this many rows at a time: a whole batch of them would be the largest tensor around.
CHUNK_ROWS = 1_024


class BucketLosses:
    """Sums over the scored predictions of one window.

    Args:
        num_buckets: K.
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._sums_K3: Tensor | None = None

    def add(self, logits_BTV: Tensor, targets_BT: Tensor, codes_BT: Tensor, kept_N: Tensor | None = None) -> None:
        """Score predictions; a negative code or target leaves one out.

        Args:
            logits_BTV: Scores of the next token.
            targets_BT: Token to predict.
            codes_BT: Bucket of each prediction.
            kept_N: Flat positions to score, or ``None`` for all.
        """
        if hasattr(logits_BTV, "full_tensor"):
            logits_BTV = logits_BTV.full_tensor()
        scored = (codes_BT >= 0) & (targets_BT >= 0)
        positions = torch.arange(scored.numel(), device=scored.device) if kept_N is None else kept_N
        positions = positions[scored.flatten()[positions]]
        logits = logits_BTV.flatten(0, 1)
        if self._sums_K3 is None:
            self._sums_K3 = torch.zeros(self.num_buckets, 3, dtype=torch.float64, device=logits.device)
        for chunk in positions.split(CHUNK_ROWS):
            scores, targets = logits[chunk].float(), targets_BT.flatten()[chunk]
            losses = F.cross_entropy(scores, targets, reduction="none").double()
            correct = (scores.argmax(-1) == targets).double()
            rows = torch.stack((torch.ones_like(losses), losses, correct), 1)
            self._sums_K3.index_add_(0, codes_BT.flatten()[chunk], rows)

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
