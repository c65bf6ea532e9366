"""A window in bounded memory: an even sample of its rows, sent to the layers' owners when it ends.

Every place (token) of the window draws a number, and those with the smallest are kept, as many as fit: one choice for
all sites, whatever the number of micro-batches. Ranks agree on the largest number kept by all of them, so that their
rows together are an even sample, too. At the end each layer's rows travel to its owner, in two gathers per layer,
however many experts it has.

Axes: P places of a call, N rows, D features, S sites, G groups, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.buckets import EXCLUDED, occurrences
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.sites import Site
from lightning_spectral.probe.collectives import all_gather, all_reduce, gather

_SLACK = 0.9  # of the memory, after rows were dropped: not at every micro-batch
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SEQUENCES_PER_RANK = 1 << 24


@dataclass(frozen=True)
class SampledRows:
    """Rows of one site.

    Attributes:
        rows_ND: In the model's type.
        groups_N: Bucket and shard of each.
        sequences_N: Sequence of each, over all ranks.
        seen_G: Rows of each group that they were drawn from.
    """

    rows_ND: Tensor
    groups_N: Tensor
    sequences_N: Tensor
    seen_G: Tensor

    @property
    def width(self) -> int:
        """Number of features D."""
        return self.rows_ND.shape[1]


@dataclass
class _Kept:
    """Rows of one site and what is known of each."""

    rows: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)

    def cut(self, threshold: float) -> int:
        """Keep what is below; returns the bytes that are left."""
        for place, keys_N in enumerate(self.keys):
            below_M = torch.nonzero(keys_N < threshold).squeeze(1)
            if len(below_M) < len(keys_N):
                for values in (self.rows, self.keys, self.groups, self.sequences):
                    values[place] = values[place].index_select(0, below_M)
        return self.num_bytes

    @property
    def num_bytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in self.rows)


class RowSample:
    """Rows of the window that is open.

    Args:
        limit_bytes: Memory of the rows.
        num_groups: G.
        seed: Of the draws; must differ between ranks.
        token_fraction: Share of the places that the user wants measured.

    Attributes:
        threshold: Places that drew less are kept: their share of all.
    """

    def __init__(self, limit_bytes: float, num_groups: int, seed: int, token_fraction: float = 1.0) -> None:
        self.threshold = 1.0
        self._limit, self._num_groups, self._fraction = limit_bytes, num_groups, token_fraction
        self._kept: dict[str, _Kept] = {}
        self._seen: dict[str, Tensor] = {}
        self._seed, self._num_calls, self._num_bytes = seed, 0, 0

    @property
    def widths(self) -> dict[str, int]:
        """Features of each site of which a row was kept, by key."""
        return {key: kept.rows[0].shape[1] for key, kept in self._kept.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of the rows now."""
        return self._num_bytes

    def add_all(self, call: ForwardCall, sites: Sequence[Site], groups_P: Tensor, texts_P: Tensor) -> None:
        """:meth:`add`; rows of a site that could not be matched to places are drawn one by one, in the first group."""
        self.add(call, [site for site in sites if site.key not in call.unmatched], groups_P, texts_P)
        for site in sites:
            if site.key in call.unmatched:
                rows_ND = call.rows[site.key]
                every_N = torch.arange(len(rows_ND), device=rows_ND.device)
                alone = replace(call, rows={site.key: rows_ND}, places={site.key: every_N})
                self.add(alone, [site], every_N * 0, every_N * 0 + texts_P[:1])

    def add(self, call: ForwardCall, sites: Sequence[Site], groups_P: Tensor, texts_P: Tensor) -> None:
        """Draw for the places of a call and keep the rows of those that are in.

        Args:
            call: The call.
            sites: All sites of the model.
            groups_P: Group of each place, ``EXCLUDED`` for none.
            texts_P: Which text of the window each place is of.
        """
        generator = torch.Generator(groups_P.device)
        generator.manual_seed(self._seed * 1_000_003 + self._num_calls)
        self._num_calls += 1
        drawn_P = torch.rand(len(groups_P), generator=generator, device=groups_P.device)
        present = [site for site in sites if site.key in call.rows]
        indices: dict[int, tuple[Tensor, Tensor]] = {}
        for site in present:
            places_N = call.places[site.key]
            if id(places_N) not in indices:
                indices[id(places_N)] = self._drawn(places_N, drawn_P, groups_P, site.is_routed)
            self._count(site, places_N, groups_P)
        self._make_room(call, present, indices)
        for site in present:
            places_N, rows_ND = call.places[site.key], call.rows[site.key]
            keys_N, _ = indices[id(places_N)]
            index_M = torch.nonzero(keys_N < self.threshold).squeeze(1)
            kept, places_M = self._kept.setdefault(site.key, _Kept()), places_N[index_M].clamp(min=0)
            kept.rows.append(rows_ND.detach().index_select(0, index_M))
            kept.keys.append(keys_N[index_M])
            kept.groups.append(groups_P[places_M])
            kept.sequences.append(texts_P[places_M])
            self._num_bytes += kept.rows[-1].numel() * kept.rows[-1].element_size()

    def _drawn(self, places_N: Tensor, drawn_P: Tensor, groups_P: Tensor, is_routed: bool) -> tuple[Tensor, Tensor]:
        """The number of each row (endless where it is not measured), sorted numbers of those that are."""
        share = 1.0
        if not is_routed:  # hooks have kept this share of the places already, evenly: it counts as drawn
            share = min(1.0, len(places_N) / max(len(groups_P), 1) / self._fraction)
            self.threshold = min(self.threshold, share)
        valid_N = (places_N >= 0) & (groups_P[places_N.clamp(min=0)] != EXCLUDED)
        keys_N = torch.where(valid_N, drawn_P[places_N.clamp(min=0)] * share, torch.inf)
        return keys_N, keys_N[valid_N].sort().values

    def _count(self, site: Site, places_N: Tensor, groups_P: Tensor) -> None:
        """Rows that could have been kept, by group."""
        groups_N = groups_P[places_N[places_N >= 0]] if site.is_routed else groups_P
        seen_G = occurrences(groups_N[groups_N >= 0], self._num_groups).double()
        seen_G = seen_G if site.is_routed else (seen_G * self._fraction).round()
        before = self._seen.get(site.key)
        self._seen[site.key] = seen_G if before is None else before + seen_G

    def _make_room(
        self, call: ForwardCall, present: Sequence[Site], indices: Mapping[int, tuple[Tensor, Tensor]]
    ) -> None:
        """Lower the threshold until the call's rows fit, and drop what is no longer below it."""
        row_bytes: dict[int, int] = {}
        for site in present:
            rows_ND, places = call.rows[site.key], id(call.places[site.key])
            row_bytes[places] = row_bytes.get(places, 0) + rows_ND.shape[1] * rows_ND.element_size()

        def needed(threshold: float) -> float:
            return sum(
                size * int(torch.searchsorted(indices[places][1], threshold)) for places, size in row_bytes.items()
            )

        before = self.threshold
        while self._num_bytes + needed(self.threshold) > self._limit:
            total = self._num_bytes + needed(self.threshold)
            self.cut(self.threshold * min(_SLACK, _SLACK * self._limit / total))
        if self.threshold < before:
            self.cut(self.threshold)

    def cut(self, threshold: float) -> None:
        """Keep only places that drew less than this; what ranks have agreed on."""
        self.threshold = min(threshold, self.threshold)
        self._num_bytes = sum(kept.cut(self.threshold) for kept in self._kept.values())

    def gather(
        self, layers: Sequence[tuple[int, list[Site]]], process_group: dist.ProcessGroup | None, world_size: int
    ) -> dict[str, SampledRows]:
        """The rows of all ranks at each layer's owner. Every rank must call it, with the same layers.

        Args:
            layers: Owner (rank in the group) and sites of each layer.
            process_group: The ranks.
            world_size: How many.

        Returns:
            Rows of the sites that this rank owns.
        """
        if world_size > 1:
            self._agree(process_group)
        sites = [site for _, members in layers for site in members]
        table_RSC = self._tables(sites, process_group, world_size)
        place = {site.key: index for index, site in enumerate(sites)}
        rank = dist.get_rank(process_group) if world_size > 1 else 0
        owned: dict[str, SampledRows] = {}
        for owner, members in layers:
            table_RMC = table_RSC[:, [place[site.key] for site in members]]
            parts = self._gathered(members, table_RMC, owner, process_group, world_size)
            for site in members:
                self._kept.pop(site.key, None)
            if rank == owner:
                owned |= _assembled(members, table_RMC, parts)
        return owned

    def _agree(self, process_group: dist.ProcessGroup | None) -> None:
        """Keep the same share of the rows on every rank."""
        lowest = torch.tensor(self.threshold, dtype=torch.float64, device=_collective_device(process_group))
        all_reduce(lowest, process_group, dist.ReduceOp.MIN)
        self.cut(float(lowest))

    def _tables(self, sites: Sequence[Site], process_group: dist.ProcessGroup | None, world_size: int) -> Tensor:
        """For each rank and site: rows kept, width, type, and rows seen by group; ``(R, S, 3 + G)``, on the CPU."""
        table_SC = torch.zeros(len(sites), 3 + self._num_groups, dtype=torch.int64)
        for index, site in enumerate(sites):
            kept, seen_G = self._kept.get(site.key), self._seen.get(site.key)
            if kept is not None and seen_G is not None:
                rows = kept.rows[0]
                num_rows = sum(map(len, kept.rows))
                table_SC[index, :3] = torch.tensor([num_rows, rows.shape[1], 1 + _DTYPES.index(rows.dtype)])
                table_SC[index, 3:] = seen_G.long().cpu()
        if world_size == 1:
            return table_SC.unsqueeze(0)
        device = _collective_device(process_group)
        return torch.stack(all_gather(table_SC.to(device), process_group)).cpu()

    def _gathered(
        self,
        members: Sequence[Site],
        table_RMC: Tensor,
        owner: int,
        process_group: dist.ProcessGroup | None,
        world_size: int,
    ) -> list[tuple[Tensor, Tensor]]:
        """Rows (flat, of all members in turn) and what is known of them (``2 x rows``), by rank; empty if not owned."""
        dtype = _DTYPES[max(int(table_RMC[:, :, 2].max()) - 1, 0)]
        own = [self._kept.get(site.key, _Kept()) for site in members]
        device = next((rows.device for kept in own for rows in kept.rows), torch.device("cpu"))
        device = _collective_device(process_group) if world_size > 1 else device
        none = torch.zeros(0, dtype=dtype, device=device)
        flat = torch.cat([none, *(rows.flatten().to(none) for kept in own for rows in kept.rows)])
        known = torch.zeros(2, 0, dtype=torch.int64, device=device)
        for kept in own:
            facts = [torch.stack(pair).to(device) for pair in zip(kept.groups, kept.sequences, strict=True)]
            known = torch.cat([known, *facts], 1)
        if world_size == 1:
            return [(flat, known)]
        rows_R = table_RMC[:, :, 0].sum(1).tolist()
        sizes_R = (table_RMC[:, :, 0] * table_RMC[:, :, 1]).sum(1).tolist()
        all_flat = _gather_padded(flat, sizes_R, owner, process_group)
        all_known = _gather_padded(known.flatten(), [2 * size for size in rows_R], owner, process_group)
        return [(one, two.view(2, -1)) for one, two in zip(all_flat, all_known, strict=True)]


def _gather_padded(
    own: Tensor, sizes: Sequence[int], owner: int, process_group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The rows of all ranks, at the owner; nothing is sent where no rank has any."""
    largest = max(sizes)
    if not largest:
        return [own.new_zeros(0) for _ in sizes] if dist.get_rank(process_group) == owner else []
    padded = torch.cat([own, own.new_zeros(largest - len(own))])
    parts = gather(padded, owner, process_group)
    return [part[:size] for part, size in zip(parts, sizes, strict=False)]


def _assembled(
    members: Sequence[Site], table_RMC: Tensor, parts: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, SampledRows]:
    owned: dict[str, SampledRows] = {}
    taken = [[0, 0] for _ in parts]
    for index, site in enumerate(members):
        width = int(table_RMC[:, index, 1].max())
        if not width:
            continue  # no rank has a row of it
        rows, known = [], []
        for rank, (flat, facts) in enumerate(parts):
            num = int(table_RMC[rank, index, 0])
            first, start = taken[rank]
            rows.append(flat[first : first + num * width].view(num, width))
            known.append(facts[:, start : start + num] + facts.new_tensor([[0], [rank * _SEQUENCES_PER_RANK]]))
            taken[rank] = [first + num * width, start + num]
        groups_N, sequences_N = torch.cat(known, 1)
        owned[site.key] = SampledRows(torch.cat(rows), groups_N, sequences_N, table_RMC[:, index, 3:].sum(0))
    return owned


def _collective_device(process_group: dist.ProcessGroup | None) -> torch.device:
    """Where this group's collectives want tensors, equal on ranks with and without rows."""
    if "nccl" in str(dist.get_backend(process_group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
