"""The end of a window: states of all ranks added, layers solved by their owners, results shared.

A layer's owner is rank ``layer index mod world size``: the matrices travel once, to one rank, and the eigensolves are
spread. Every rank of the group enters every function here, whatever it has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.callbacks.options import ProbeOptions
from lightning_spectral.functional.covariance import Moments, take_groups
from lightning_spectral.functional.products import full_precision
from lightning_spectral.functional.rank import js_divergence
from lightning_spectral.functional.sample import Gram
from lightning_spectral.metrics.eigensolve import Eigensolver
from lightning_spectral.metrics.measure import RankMeasurement, measure
from lightning_spectral.metrics.sync import reduce_
from lightning_spectral.models.families import Site
from lightning_spectral.records import POOLED


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


@dataclass(frozen=True)
class BucketLoss:
    """Loss and accuracy of one bucket's predictions."""

    bucket: str
    num_rows: int
    loss: float | None
    accuracy: float | None


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


@dataclass(frozen=True)
class Buckets:
    """How the groups of a state are laid out: bucket by bucket, ``num_shards`` groups each."""

    names: tuple[str, ...]
    num_shards: int

    @property
    def num_groups(self) -> int:
        """Buckets x shards."""
        return len(self.names) * self.num_shards

    @property
    def reported(self) -> tuple[str, ...]:
        """The buckets, and their merge."""
        return self.names if POOLED in self.names else (*self.names, POOLED)

    def select(self, state: Moments | Gram, bucket: str) -> tuple[Moments | Gram, list[int]]:
        """State and group indices of the shards of one bucket; pooled shards are the merge of the buckets'."""
        if bucket in self.names:
            first = self.names.index(bucket) * self.num_shards
            return state, list(range(first, first + self.num_shards))
        members = [list(range(shard, self.num_groups, self.num_shards)) for shard in range(self.num_shards)]
        pooled = take_groups(state, members) if isinstance(state, Moments) else state.take_groups(members)
        return pooled, list(range(self.num_shards))


def solve_window(
    sites: Sequence[Site],
    states: Mapping[str, Moments | Gram],
    buckets: Buckets,
    *,
    num_sequences: Mapping[str, int],
    dtypes: Mapping[str, str],
    options: ProbeOptions,
    process_group: dist.ProcessGroup | None,
    world_size: int,
) -> list[SiteResult]:
    """Results of all sites on every rank.

    Args:
        sites: In the same order on all ranks.
        states: This rank's rows by site key; with several ranks every site has moments.
        buckets: Layout of their groups.
        num_sequences: Sequences that contributed rows to each reported bucket, over all ranks.
        dtypes: Activation type by site key.
        options: What to report.
        process_group: Ranks to reduce over.
        world_size: Its size; 1 for no reduction.
    """
    rank = dist.get_rank(process_group) if world_size > 1 else 0
    owned: list[SiteResult] = []
    eigensolver = Eigensolver()
    for index, layer in enumerate(dict.fromkeys((site.layer, site.expert) for site in sites)):
        owner = index % world_size
        members = [site for site in sites if (site.layer, site.expert) == layer]
        if world_size > 1:
            for site in members:
                moments = states[site.key]
                assert isinstance(moments, Moments)
                reduce_(moments, owner, process_group)
        if rank != owner:
            continue
        solved: dict[tuple[str, str], SiteResult] = {}
        for site in members:
            for bucket in buckets.reported:
                solved[site.site, bucket] = SiteResult(
                    site.layer,
                    site.name,
                    site.expert,
                    site.site,
                    bucket,
                    num_sequences.get(bucket, 0),
                    dtypes.get(site.key, ""),
                    _measure(states.get(site.key), buckets, bucket, options, eigensolver),
                )
        owned += [_with_reinjection(result, solved.get(("pre", result.bucket))) for result in solved.values()]
    if world_size == 1:
        return owned
    shared: list[list[SiteResult] | None] = [None] * world_size
    dist.all_gather_object(shared, owned, group=process_group)
    return [result for part in shared if part for result in part]


def _measure(
    state: Moments | Gram | None, buckets: Buckets, bucket: str, options: ProbeOptions, eigensolver: Eigensolver
) -> RankMeasurement:
    if state is None:  # an expert that no token chose
        return RankMeasurement(0, 0, "empty")
    selected, shards = buckets.select(state, bucket)
    with full_precision((state.shift_D if isinstance(state, Moments) else state.inner_NN).device):
        measurement = measure(
            selected,
            shards,
            renyi_orders=options.renyi_orders,
            absolute_epsilon=options.absolute_epsilon,
            soft=options.soft,
            eigensolver=eigensolver,
        )
    eigenvalues = measurement.eigenvalues
    return replace(measurement, eigenvalues=None if eigenvalues is None else eigenvalues.cpu())


def _with_reinjection(result: SiteResult, pre: SiteResult | None) -> SiteResult:
    if result.site != "post" or pre is None:
        return result
    post_eigs, pre_eigs = result.measurement.eigenvalues, pre.measurement.eigenvalues
    if post_eigs is None or pre_eigs is None:
        return result
    pre_renyi = pre.measurement.renyi
    return replace(
        result,
        reinjection={order: value / pre_renyi[order] for order, value in result.measurement.renyi.items()},
        js_divergence=_divergence(post_eigs, pre_eigs),
    )


def _divergence(post_eigs: Tensor, pre_eigs: Tensor) -> float | None:
    """Defined mode by mode, so only where both sites are equally wide (not behind a fused gate and up projection)."""
    if post_eigs.shape != pre_eigs.shape:
        return None
    return float(js_divergence(post_eigs.to(torch.float64), pre_eigs.to(torch.float64)))
