"""The end of a window: states of all ranks added, layers solved by their owners, results shared.

A layer's owner is rank ``layer index mod world size``: the matrices travel once, to one rank, all experts of a layer
together, and the eigensolves are spread. Every rank of the group reduces and shares, whatever it has seen; solving
needs no other rank, so that it may happen in another thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.covariance import Moments, take_groups
from lightning_spectral.functional.products import full_precision
from lightning_spectral.functional.rank import js_divergence
from lightning_spectral.functional.sample import Gram
from lightning_spectral.models.sites import Site
from lightning_spectral.probe.collectives import all_gather_object
from lightning_spectral.probe.eigensolve import Eigensolver
from lightning_spectral.probe.loss_tap import NOT_SEEN
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.ranks_of import RankMeasurement, measure
from lightning_spectral.probe.ranks_of_sample import measure_sample
from lightning_spectral.probe.results import BucketLoss, SiteResult, WindowResult
from lightning_spectral.probe.row_sample import RowSample, SampledRows
from lightning_spectral.probe.sync import reduce_all_
from lightning_spectral.records import POOLED
from lightning_spectral.text import one_line


@dataclass(frozen=True)
class Buckets:
    """How the groups of a state are laid out: bucket by bucket, ``num_jackknife_groups`` groups each."""

    names: tuple[str, ...]
    num_jackknife_groups: int

    @property
    def num_groups(self) -> int:
        """Buckets x shards."""
        return len(self.names) * self.num_jackknife_groups

    @property
    def reported(self) -> tuple[str, ...]:
        """The buckets, and their merge."""
        return self.names if POOLED in self.names else (*self.names, POOLED)

    def select(self, state: Moments | Gram, bucket: str) -> tuple[Moments | Gram, list[int]]:
        """State and group indices of the shards of one bucket; pooled shards are the merge of the buckets'."""
        if bucket in self.names:
            first = self.names.index(bucket) * self.num_jackknife_groups
            return state, list(range(first, first + self.num_jackknife_groups))
        members = [
            list(range(shard, self.num_groups, self.num_jackknife_groups)) for shard in range(self.num_jackknife_groups)
        ]
        pooled = take_groups(state, members) if isinstance(state, Moments) else state.take_groups(members)
        return pooled, list(range(self.num_jackknife_groups))


@dataclass
class ClosedWindow:
    """A window that takes no more rows.

    Attributes:
        sites: In the same order on all ranks.
        states: This rank's rows by site key; with several ranks every site has moments.
        buckets: Layout of their groups.
        num_sequences: Sequences that contributed rows to each reported bucket, by stack, over all ranks.
        dtypes: Activation type by site key.
        losses: Already of all ranks.
        options: What to report.
        process_group: Ranks to reduce over.
        world_size: How many; 1 for no reduction.
        busy_s: Time that this rank has spent on the window so far.
        lost: Status and reason of a window that gives no number, else ``None``.
        unmatched: Why the buckets of a site are not those of its rows' tokens, by site key.
        unseen: Why a site that ran has no row, by site key.
        layouts: How rows were matched to tokens, and the share of rows that it was proven for, by stack.
        ids: Some of each stack's token ids.
        sample: This rank's rows where only some are kept, until :meth:`reduce`.
        waiting: Keys of sites that are measured in other windows.
        device: Where states in the memory of the host are added and solved.
        is_stage: Whether ranks outside of the process group have other layers.
    """

    sites: Sequence[Site]
    states: dict[str, Moments | Gram | SampledRows]
    buckets: Buckets
    num_sequences: Mapping[str, Mapping[str, int]]
    dtypes: Mapping[str, str]
    losses: list[BucketLoss]
    options: ProbeOptions
    process_group: dist.ProcessGroup | None
    world_size: int
    busy_s: float = 0.0
    lost: tuple[str, str] | None = None
    unmatched: Mapping[str, str] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    ids: Mapping[str, Tensor | None] = field(default_factory=dict)
    sample: RowSample | None = None
    waiting: Collection[str] = ()
    device: torch.device | None = None
    is_stage: bool = False

    def reduce(self) -> None:
        """Add the states of all ranks at each layer's owner; what a rank does not own it frees."""
        if self.lost:
            return
        if self.sample is not None:
            self.states.update(self.sample.gather(self._layers(), self.process_group, self.world_size))
            self.sample = None
        elif self.world_size > 1:
            for owner, members in self._layers():
                seen = [site.key for site in members if site.key in self.states]  # of others no rank saw a row
                states = {key: self._here(self.states.pop(key)) for key in seen}
                together = [state for state in states.values() if isinstance(state, Moments)]
                reduce_all_(together, owner, self.process_group)
                if owner == self._rank:
                    kept = states.items()
                    self.states |= {key: state.to("cpu") if self.device else state for key, state in kept}

    def solve(self) -> list[SiteResult]:
        """Results of the layers that this rank owns. No collective: may run in another thread."""
        began = time.perf_counter()
        owned: list[SiteResult] = []
        eigensolver = Eigensolver(exact=self.options.soft == "exact")
        # in the script's thread, small tensors would be made on what it has set as the default device
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            for owner, members in self._layers():
                if owner == self._rank:
                    for network in _by_network(members):
                        owned += self._solve_or_say_why(network, eigensolver)
        self.busy_s += time.perf_counter() - began
        return owned

    def share(self, owned: list[SiteResult]) -> WindowResult:
        """The results of all ranks on every rank."""
        began = time.perf_counter()
        results = owned
        if self.lost:
            results = self.without_numbers(*self.lost)
        elif not self.options.reduce:
            results = owned if self.is_stage else _from_first_rank(owned)
        elif self.world_size > 1:
            if not self.options.eigenvalues:  # nobody keeps them, and they are most of what would travel
                owned = [replace(r, measurement=replace(r.measurement, eigenvalues=None)) for r in owned]
            shared: list[list[SiteResult]] = all_gather_object(owned, self.process_group)
            results = [result for part in shared for result in part]
        results, losses = self._of_all_stages(results) if self.is_stage else (results, self.losses)
        self.busy_s += time.perf_counter() - began
        return WindowResult(results, losses, self.world_size, self.busy_s)

    def _of_all_stages(self, results: list[SiteResult]) -> tuple[list[SiteResult], list[BucketLoss]]:
        """Results and losses of every stage, from its first rank; the losses are of the stage that saw them."""
        if not self.options.eigenvalues:
            results = [replace(r, measurement=replace(r.measurement, eigenvalues=None)) for r in results]
        speaks = dist.get_rank(self.process_group) == 0
        parts: list[Any] = all_gather_object((results, self.losses) if speaks else ([], []))
        known: list[list[BucketLoss]] = [losses for _, losses in parts if losses]
        return [result for part, _ in parts for result in part], min(known, key=_how_little, default=[])

    def without_numbers(self, status: str, reason: str) -> list[SiteResult]:
        """A result for every site and bucket that says why there is no number."""
        return self._unsolved(self.sites, status, reason)

    def _unsolved(self, sites: Sequence[Site], status: str, reason: str) -> list[SiteResult]:
        return [
            replace(self._result(site, bucket, RankMeasurement(0, 0, status)), reason=reason)
            for site in sites
            for bucket in self.buckets.reported
        ]

    def _solve_or_say_why(self, members: Sequence[Site], eigensolver: Eigensolver) -> list[SiteResult]:
        if self.lost:
            return []
        try:
            return self._solve_layer(members, eigensolver)
        except Exception as error:  # a layer that cannot be solved must neither end the run nor keep the others waiting
            return self._unsolved(members, "solve_failed", one_line(f"{type(error).__name__}: {error}"))

    @property
    def _rank(self) -> int:
        return dist.get_rank(self.process_group) if self.world_size > 1 else 0

    def _layers(self) -> list[tuple[int, list[Site]]]:
        """The owner and the sites of each layer, all its experts together; owners share what is measured now."""
        layers: dict[tuple[str, int, int], list[Site]] = {}
        for site in self.sites:
            layers.setdefault((site.stack, site.layer, site.run), []).append(site)
        numbers = {waits: itertools.count() for waits in (False, True)}
        return [
            (next(numbers[members[0].key in self.waiting]) % self.world_size, members) for members in layers.values()
        ]

    def _here(self, state: Any) -> Any:
        """Moments in the memory of the host, where they are added and solved; others as they are."""
        return state.to(self.device) if self.device is not None and isinstance(state, Moments) else state

    def _solve_layer(self, members: Sequence[Site], eigensolver: Eigensolver) -> list[SiteResult]:
        solved: dict[tuple[str, str], SiteResult] = {}
        for site in members:
            state = self._here(self.states.get(site.key))
            for bucket in self.buckets.reported:
                solved[site.site, bucket] = self._solved(site, bucket, state, eigensolver)
        return [_with_reinjection(result, solved.get(("pre", result.bucket))) for result in solved.values()]

    def _solved(self, site: Site, bucket: str, state: Any, eigensolver: Eigensolver) -> SiteResult:
        if site.key in self.waiting:
            return self._result(site, bucket, RankMeasurement(0, site.width or 0, "not_in_turn"))
        reason = self.unmatched.get(site.key) if bucket != POOLED else None
        if reason is not None:
            return replace(self._result(site, bucket, RankMeasurement(0, 0, "not_matched")), reason=reason)
        if state is None and site.key in self.unseen:
            nothing = self._result(site, bucket, RankMeasurement(0, 0, "no_forward"))
            return replace(nothing, reason=self.unseen[site.key])
        num_sequences = self._num_sequences(site, bucket)
        return self._result(
            site, bucket, _measure(state, self.buckets, bucket, num_sequences, self.options, eigensolver)
        )

    def _num_sequences(self, site: Site, bucket: str) -> int:
        return self.num_sequences.get(site.stack, {}).get(bucket, 0)

    def _result(self, site: Site, bucket: str, measurement: RankMeasurement) -> SiteResult:
        matched = site.key not in self.unmatched
        layout, agreement = self.layouts.get(site.stack, ("", None)) if matched else ("", None)
        return SiteResult(
            site.layer,
            site.name,
            site.expert,
            site.site,
            bucket,
            self._num_sequences(site, bucket),
            self.dtypes.get(site.key, ""),
            measurement,
            stack=site.stack,
            layout=layout,
            layout_agreement=agreement,
        )


def _how_little(losses: Sequence[BucketLoss]) -> tuple[bool, bool]:
    """Least of the stage that computes the loss: it has a number, or a loss came by it."""
    return all(one.loss is None for one in losses), any(one.reason == NOT_SEEN for one in losses)


def _by_network(members: Sequence[Site]) -> list[list[Site]]:
    """The sites of each feed-forward network of a layer: its experts, or several beside one another."""
    networks: dict[str, list[Site]] = {}
    for site in members:
        networks.setdefault(site.unit or site.name, []).append(site)
    return list(networks.values())


def _from_first_rank(sites: list[SiteResult]) -> list[SiteResult]:
    """Rank 0's own numbers on every rank: a monitor that differs between ranks would pull them apart."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sites
    shared: list[list[SiteResult]] = all_gather_object(sites if dist.get_rank() == 0 else [])
    return shared[0]


def _measure(
    state: Moments | Gram | SampledRows | None,
    buckets: Buckets,
    bucket: str,
    num_sequences: int,
    options: ProbeOptions,
    eigensolver: Eigensolver,
) -> RankMeasurement:
    if state is None:  # an expert that no token chose
        return RankMeasurement(0, 0, "empty")
    if isinstance(state, SampledRows):
        first = buckets.names.index(bucket) * buckets.num_jackknife_groups if bucket in buckets.names else 0
        num = buckets.num_jackknife_groups if bucket in buckets.names else buckets.num_groups
        return measure_sample(state, range(first, first + num), options.renyi_orders)
    selected, shards = buckets.select(state, bucket)
    with full_precision((state.shift_D if isinstance(state, Moments) else state.inner_NN).device):
        measurement = measure(
            selected,
            shards,
            num_sequences=num_sequences,
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
