"""The measurement as torchmetrics: usable in any loop, synchronised by all-reduce.

torchmetrics' own synchronisation gathers every rank's D x D state on every rank; this one adds them in place.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_spectral.functional import rank as ranks
from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import Moments, covariance, empty_moments, merge, pool, update_
from lightning_spectral.probe.sync import reduce_
from lightning_spectral.text.arguments import require_count

_STATES = ("shift_D", "count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G")


class StreamingCovariance(Metric):
    """Covariance of rows seen in any number of batches and processes.

    Args:
        width: Features D.
        num_groups: Groups G whose covariances are kept apart (buckets); pooled is their merge.
        dtype: Type of the products; the O(D) sums are fp64.
        kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> metric = StreamingCovariance(width=3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute().shape
        torch.Size([1, 3, 3])
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False

    def __init__(self, width: int, num_groups: int = 1, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_count("width", width)
        require_count("num_groups", num_groups)
        self.width, self.num_groups = width, num_groups
        start = empty_moments(num_groups, width, dtype=dtype)
        for name in _STATES:
            self.add_state(name, default=getattr(start, name), dist_reduce_fx=None)

    def update(self, rows_ND: Float[Tensor, "N D"], groups_N: Int[Tensor, " N"] | None = None) -> None:
        """Add rows; ``groups_N`` is each row's group, negative to leave it out (default: all in group 0).

        Raises:
            ValueError: If the rows do not have D features or a group is not in [0, G).
            TypeError: If they are no tensor.
        """
        if not isinstance(rows_ND, Tensor):
            raise TypeError(f"`rows` must be a tensor of shape (N, D), got {type(rows_ND).__name__}.")
        if groups_N is None:
            groups_N = torch.zeros(rows_ND.shape[0], dtype=torch.int64, device=rows_ND.device)
        if groups_N.shape != rows_ND.shape[:1]:
            raise ValueError(f"Need one group for each of {rows_ND.shape[0]} rows, got shape {tuple(groups_N.shape)}.")
        update_(self.moments, rows_ND, *sort_by_group(groups_N, self.num_groups))

    def compute(self) -> Tensor:
        """Centred covariance of each group, ``(G, D, D)``, fp64."""
        return torch.stack([covariance(self.moments, group) for group in range(self.num_groups)])

    @property
    def moments(self) -> Moments:
        """The state as :class:`Moments`; shares memory with it."""
        return Moments(**{name: getattr(self, name) for name in _STATES})

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Of ``metric(rows)`` and ``merge_state``: the batch's moments are here, those of all before it come in."""
        both = merge(Moments(**{name: incoming_state[name] for name in _STATES}), self.moments)
        for name in _STATES:
            setattr(self, name, getattr(both, name))
        self._computed = None  # `merge_state` keeps a value of before

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        reduce_(self.moments, process_group=process_group or self.process_group)


class SpectralRank(StreamingCovariance):
    """Ranks of the pooled covariance: :data:`~lightning_spectral.functional.rank.RANK_METRICS` by name.

    Example:
        >>> metric = SpectralRank(width=4)
        >>> metric.update(torch.eye(4).repeat(100, 1))
        >>> round(float(metric.compute()["hard_rank"]), 6)
        3.0
    """

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Every rank of the rows of all groups together.

        Raises:
            ValueError: If there are no two different finite rows yet.
        """
        if not bool(self.moments.count_G.sum() > 1):
            raise ValueError(f"{type(self).__name__} has seen no two rows yet: call `update(rows)` first.")
        eigs = ranks.spectrum(covariance(pool(self.moments)))
        return {name: metric.function(eigs) for name, metric in ranks.RANK_METRICS.items()}
