"""From events to forward calls: which rows belong together, how deep a layer was run, which token each row is of.

Pure: nothing here hooks anything. Axes: P places of a call (its tokens, or its rows where it has no tokens), N rows
of a site, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_spectral.models.layout import Ids, Layout
from lightning_spectral.models.runs import Piece, RawCall, Run, depths
from lightning_spectral.models.sites import Site

UNPROVEN = "no arrangement of the token ids agrees with what entered the first block"


@dataclass(frozen=True)
class ForwardCall:
    """One forward call of one stack of blocks.

    A *place* is a token of the call where its ids are known and the layout was proven, and a row of the stack's input
    where they are not. Everything that is said of a token (bucket, mask, target, sequence) is said of a place;
    :attr:`places` says for every row which place it is of.

    Attributes:
        stack: ``Site.stack`` of the sites in :attr:`rows`.
        shape: Shape of the places: that of the ids, or the leading shape of the stack's input.
        ids: Token ids, of :attr:`shape`; ``None`` if the call has none, or if their layout could not be proven.
        sequences_P: Sequence of each place, numbered from 0 inside this call.
        num_sequences: How many there are.
        rows: ``(N, D)`` by ``Site.key``. A site that did not run in this call (a dropped layer, an expert that no
            token chose) is absent.
        places: ``(N,)`` by ``Site.key``: the flat place of each row, -1 for a row that is no token (a prefix, a
            register, padding of a kernel). Sites that share their rows' order share one tensor.
        mask: False where a place is padding, as far as the call's own arguments say; ``None`` if they do not.
        arguments: Tensors that the enclosing modules were called with, by name, innermost first.
        layout: How rows were matched to ids, e.g. ``(B, T)``; empty where they were not.
        agreement: Share of rows that the match was proven for; ``None`` where there was nothing to prove.
        reason: Why there are no ids; empty if there are.
        unmatched: Sites of this call whose rows could not be matched to places, each with the reason; all their rows
            are at place 0.
        unseen: Sites that ran where their rows could not be seen, each with the reason.
        deeper: Sites of layers that ran a second time and more often.
    """

    stack: str
    shape: tuple[int, ...]
    ids: Tensor | None
    sequences_P: Tensor
    num_sequences: int
    rows: dict[str, Tensor]
    places: dict[str, Tensor]
    mask: Tensor | None = None
    arguments: tuple[Mapping[str, Tensor], ...] = ()
    layout: str = ""
    agreement: float | None = None
    reason: str = ""
    unmatched: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    deeper: tuple[Site, ...] = ()


def assemble(
    call: RawCall, layout: Layout | None, ids: Ids | None, reason: str, kept: Mapping[tuple[int, ...], Tensor]
) -> ForwardCall:
    """One forward call from its runs.

    Args:
        call: The runs.
        layout: Which row of the stack's input is which token, if that was proven.
        ids: The embedding call that it was proven for.
        reason: Why not, if it was not.
        kept: Flat indices of the rows kept, by the leading shape that they were kept of; empty for all rows.
    """
    lead = tuple(call.entered.shape[:-1])
    every = Places(call.entered, layout, kept)
    rows: dict[str, Tensor] = {}
    places: dict[str, Tensor] = {}
    unmatched: dict[str, str] = {}
    deeper: list[Site] = []
    for run, (depth, occurrence) in zip(call.runs, depths(call), strict=True):
        for site, pieces in _by_site(run).items():
            at_depth = site if occurrence == 0 else replace(site, layer=depth, run=occurrence)
            deeper += [at_depth] * (occurrence > 0)
            found = every.of(pieces, run)
            if found is None:
                unmatched[at_depth.key] = f"{sum(map(_num_rows, pieces))} rows for an input of {math.prod(lead)}"
                found = [torch.zeros(len(piece.rows), dtype=torch.int64, device=piece.rows.device) for piece in pieces]
            rows[at_depth.key] = _cat([piece.rows for piece in pieces])
            places[at_depth.key] = found[0] if len(found) == 1 else torch.cat(found)
    shape = lead if layout is None or ids is None else tuple(ids.ids.shape)
    arguments = () if call.frame is None else tuple(frame.arguments for frame in call.frame.chain())
    if layout is None and len(lead) == 1 and reason == UNPROVEN:  # tokens of any number of texts, in any order
        sequences_P, num_sequences = torch.zeros(lead[0], dtype=torch.int64, device=call.entered.device), 1
    else:
        sequences_P, num_sequences = _sequences(shape, None if layout is None else ids, arguments, call.entered.device)
    return ForwardCall(
        stack=call.stack.name,
        shape=shape,
        ids=None if layout is None or ids is None else ids.ids,
        sequences_P=sequences_P,
        num_sequences=num_sequences,
        rows=rows,
        places=places,
        mask=None if layout is None or ids is None else ids.mask,
        arguments=arguments,
        layout="" if layout is None else layout.name,
        agreement=None if layout is None else layout.agreement,
        reason=reason,
        unmatched=unmatched,
        unseen=dict(call.unseen),
        deeper=tuple(deeper),
    )


class Places:
    """Which place each row of a call is of."""

    def __init__(self, entered: Tensor, layout: Layout | None, kept: Mapping[tuple[int, ...], Tensor]) -> None:
        self._num_rows = math.prod(entered.shape[:-1])
        self._map = torch.arange(self._num_rows, device=entered.device) if layout is None else layout.tokens_N
        self._kept = kept
        self._lead = tuple(entered.shape[:-1])
        self._by_lead: dict[tuple[int, ...], Tensor] = {}

    def of(self, pieces: Sequence[Piece], run: Run) -> list[Tensor] | None:
        """The places of the rows of one site in one run of its block, or ``None`` if that cannot be told."""
        if pieces[0].site.is_routed:
            return self._routed(pieces, run)
        if all(math.prod(piece.lead) == self._num_rows for piece in pieces):
            return [self._whole(piece.lead) for piece in pieces]  # a network that runs several times in its block
        axis = self._axis_of(pieces)
        if axis is None or self._kept:
            return None
        index = torch.arange(self._num_rows, device=self._map.device).view(self._lead)
        parts = index.split([piece.lead[axis] for piece in pieces], axis)
        return [self._map[part.flatten()] for part in parts]

    def _whole(self, lead: tuple[int, ...]) -> Tensor:
        if lead not in self._by_lead:
            self._by_lead[lead] = self._map[self._kept[lead]] if lead in self._kept else self._map
        return self._by_lead[lead]

    def _axis_of(self, pieces: Sequence[Piece]) -> int | None:
        """The axis along which chunks of a feed-forward network make up the input again."""
        for axis in range(len(self._lead)):
            total = sum(piece.lead[axis] for piece in pieces if len(piece.lead) == len(self._lead))
            others = [piece.lead[:axis] + piece.lead[axis + 1 :] for piece in pieces]
            rest = self._lead[:axis] + self._lead[axis + 1 :]
            if total == self._lead[axis] and all(other == rest for other in others):
                return axis
        return None

    def _routed(self, pieces: Sequence[Piece], run: Run) -> list[Tensor] | None:
        found = []
        for piece in pieces:
            sources = [piece.sent, run.routed.get(id(piece.site.routed_by))]
            flat = [source.reshape(-1, source.shape[-1]) for source in sources if source is not None]
            source = next((rows for rows in flat if len(rows) == self._num_rows), None)
            if source is None or piece.arrived is None:
                return None
            index = match_rows(piece.arrived.reshape(-1, piece.arrived.shape[-1]), source)
            if index is None or len(index) != len(piece.rows):
                return None
            found.append(torch.where(index >= 0, self._map[index.clamp(min=0)], -1))
        return found


def match_rows(arrived_ND: Tensor, source_MD: Tensor) -> Tensor | None:
    """Index of the source row that each arrived row is a copy of, -1 for none; ``None`` where nothing tells.

    Where every expert gets all tokens, scaled (zero for those that it was not sent), the order is that of the source.
    """
    index_N = _copies(arrived_ND, source_MD)
    if index_N is not None and bool((index_N >= 0).float().mean() > 0.5):
        return index_N
    if len(arrived_ND) % max(len(source_MD), 1) == 0 and len(source_MD):
        index_N = torch.arange(len(arrived_ND), device=arrived_ND.device) % len(source_MD)
        cosine_N = torch.nn.functional.cosine_similarity(arrived_ND.float(), source_MD[index_N].float(), dim=-1)
        sent_N = arrived_ND.abs().amax(-1) > 0
        if bool(sent_N.any()) and bool((cosine_N[sent_N] > 0.98).all()):
            return torch.where(sent_N, index_N, -1)
    return None


def _copies(arrived_ND: Tensor, source_MD: Tensor) -> Tensor | None:
    """By a number per row that equal rows share: their bytes as whole numbers, times fixed odd ones, added up."""
    if arrived_ND.shape[-1] != source_MD.shape[-1] or arrived_ND.dtype != source_MD.dtype or not len(source_MD):
        return None
    sources_M, arrived_N = _row_number(source_MD), _row_number(arrived_ND)
    ordered_M, order_M = sources_M.sort(stable=True)
    place_N = torch.searchsorted(ordered_M, arrived_N).clamp(max=len(ordered_M) - 1)
    return torch.where(ordered_M[place_N] == arrived_N, order_M[place_N], -1)


def _row_number(rows_ND: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows_ND.element_size()]
    bits_ND = rows_ND.contiguous().view(whole).to(torch.int64)
    position_D = torch.arange(1, rows_ND.shape[-1] + 1, device=rows_ND.device, dtype=torch.int64)
    weights_D = position_D * 6364136223846793005 + 1442695040888963407  # Knuth's generator; sums wrap around
    return ((bits_ND + 12345) * (weights_D | 1)).sum(-1)


def _by_site(run: Run) -> dict[Site, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in run.pieces:
        grouped.setdefault(piece.site.key, []).append(piece)
    return {pieces[0].site: pieces for pieces in grouped.values()}


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _num_rows(piece: Piece) -> int:
    return math.prod(piece.lead)


def _sequences(
    shape: tuple[int, ...], ids: Ids | None, arguments: Sequence[Mapping[str, Tensor]], device: torch.device
) -> tuple[Tensor, int]:
    """Sequence of each place: the leading index; of packed ids, where positions start again."""
    num_places = math.prod(shape)
    if ids is not None and (len(shape) == 1 or math.prod(shape[:-1]) == 1):
        return _packed(num_places, arguments, device)
    inner = shape[-1] if ids is not None else max(math.prod(shape[1:]), 1)
    return torch.arange(num_places, device=device) // max(inner, 1), num_places // max(inner, 1)


def _packed(num_places: int, arguments: Sequence[Mapping[str, Tensor]], device: torch.device) -> tuple[Tensor, int]:
    for named in arguments:
        positions = named.get("position_ids")
        if positions is not None and positions.numel() == num_places and num_places:
            flat = positions.flatten()
            starts = torch.cat([flat.new_zeros(1), (flat[1:] <= flat[:-1]).to(flat.dtype)])
            sequences_P = starts.cumsum(0).to(torch.int64)
            return sequences_P, int(sequences_P[-1]) + 1
        bounds = next((named[name] for name in named if name.startswith(("cu_seqlens", "cu_seq_lens"))), None)
        if bounds is not None and bounds.ndim == 1 and len(bounds) > 1:
            inside = torch.arange(num_places, device=device)
            return torch.searchsorted(bounds[1:].to(device).contiguous(), inside, right=True), len(bounds) - 1
    return torch.zeros(num_places, dtype=torch.int64, device=device), 1
