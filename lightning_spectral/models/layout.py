"""Which row of a stack's input is which token: candidates by shape, proven by content.

The embedding's output and the first block's input are looked at together. A layout (a map from rows to ids) is believed
where the id decoded from each row agrees with the id that the layout says: by the nearest of the embedded ids, or,
where the input is not as wide as the embedding, by the nearest mean of the rows that the layout gives the same id.

Axes: B sequences, T positions, N rows, S rows looked at, U distinct ids, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_spectral.functional.buckets import occurrences

NUM_ROWS = 512  # rows looked at
ENOUGH = 0.7  # share of rows that must agree
_MARGIN = 0.3  # by which a layout must beat another one on the rows where they differ
_NO_TOKEN = -1
_BY_CHANCE = 0.15  # share of an id's rows below which its agreement is chance
_FAR = 0.25  # of the typical length of what is embedded: what stands in the place of a token is as far from it
_MAX_REPLACED = 3  # ids whose rows hold something else (image features at place holders)


@dataclass(frozen=True)
class Ids:
    """One call of an embedding.

    Attributes:
        ids: Token ids of any shape.
        embedded: Its output.
        mask: False where a token is padding, if known.
    """

    ids: Tensor
    embedded: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """A map from rows to ids.

    Attributes:
        name: For the record: ``(B, T)``, ``(T, B)``, ``4 before (B, T)``, ...
        tokens_N: Flat index of each row's id, -1 for a row that is no token.
        agreement: Share of the rows looked at that agree.
    """

    name: str
    tokens_N: Tensor
    agreement: float


def candidates(ids: Ids, num_rows: int) -> Iterator[tuple[str, Tensor]]:
    """Layouts of ``num_rows`` rows that the shapes allow, the likeliest first."""
    shape = tuple(ids.ids.shape)
    batch, length = (math.prod(shape[:-1]), shape[-1]) if shape else (0, 0)
    index_BT = torch.arange(batch * length, device=ids.ids.device).view(batch, length)
    if num_rows == batch * length:
        yield _name("(B, T)", shape), index_BT.flatten()
        if batch > 1 and length > 1:
            yield "(T, B)", index_BT.T.flatten()
    elif num_rows > batch * length > 0 and num_rows % batch == 0:
        yield from _with_others(index_BT, num_rows // batch - length)
    elif 0 < num_rows < batch * length:
        yield from _with_fewer(index_BT, num_rows, ids)


def prove(ids: Ids, rows: Tensor) -> Layout | None:
    """The layout of rows ``(..., D)`` that their content proves, or ``None``."""
    if looks_like_positions(ids.ids):
        return None
    rows_ND = rows.reshape(-1, rows.shape[-1])
    flat_M = ids.ids.flatten()
    found = list(candidates(ids, len(rows_ND)))
    if not found:
        return None
    looked_S = _rows_to_look_at(rows.shape[:-1], rows.device)
    scored = [_Scored(name, tokens_N, looked_S, flat_M) for name, tokens_N in found]
    _decode(scored, ids, rows_ND, looked_S)
    best = max(scored, key=lambda candidate: candidate.agreement)
    if best.agreement < ENOUGH or best.num_ids < 3 or not all(best.beats(other) for other in scored):
        return None
    return Layout(best.name, best.without_replaced(), best.agreement)


def looks_like_positions(ids: Tensor) -> bool:
    """Whether ids count up along their last axis, as those of a position table do."""
    if ids.ndim == 0 or ids.shape[-1] < 4:
        return ids.ndim == 0
    steps = ids[..., 1:] - ids[..., :-1]
    return float((steps == 1).float().mean()) > 0.9


def _decode(scored: Sequence[_Scored], ids: Ids, rows_ND: Tensor, looked_S: Tensor) -> None:
    """Which id each row looked at is of: as it is, and where no layout agrees, without the mean of its position."""
    same_width = ids.embedded.shape[-1] == rows_ND.shape[-1]
    table = _Table(ids, torch.cat([candidate.labels_S for candidate in scored])) if same_width else None
    rows_SD = rows_ND[looked_S].float()
    decoded_S = None if table is None else table.nearest(rows_SD)
    for candidate in scored:
        real_S = candidate.real_S
        if table is not None and 0 < int(real_S.sum()) < len(real_S):  # prefixes may be far larger than tokens
            candidate.look(table.nearest(rows_SD, about_SD=rows_SD[real_S]))
        else:
            candidate.look(_by_means(rows_SD, candidate.labels_S) if decoded_S is None else decoded_S)
    if max(candidate.share for candidate in scored) < 0.95 and ids.ids.numel() >= 2 * ids.ids.shape[-1]:
        for candidate in scored:
            rows_SD = _centred(rows_ND, looked_S, candidate.tokens_N, ids)
            decoded_S = _by_means(rows_SD, candidate.labels_S) if table is None else table.nearest(rows_SD)
            candidate.look(decoded_S, _says_nothing(candidate.tokens_N[looked_S], ids))
    for candidate in scored:
        misfit_S = _misfit(rows_ND, looked_S, candidate.tokens_N, ids) if same_width else None
        candidate.judge(misfit_S)


class _Scored:
    """One candidate and how well content agrees with it."""

    def __init__(self, name: str, tokens_N: Tensor, looked_S: Tensor, flat_M: Tensor) -> None:
        self.name, self.tokens_N, self._flat_M = name, tokens_N, flat_M
        tokens_S = tokens_N[looked_S]
        self.labels_S = torch.where(tokens_S >= 0, flat_M[tokens_S.clamp(min=0)], _NO_TOKEN)
        self.real_S = self.labels_S >= 0
        self.agrees_S = self._silent_S = torch.zeros_like(self.real_S)

    @property
    def share(self) -> float:
        """Of the rows that are tokens, those that agree."""
        return float(self.agrees_S.sum()) / max(float(self.real_S.sum()), 1.0)

    def look(self, decoded_S: Tensor, silent_S: Tensor | None = None) -> None:
        """Compare with decoded ids, but for rows that say nothing; the better of several looks counts."""
        silent_S = torch.zeros_like(self.real_S) if silent_S is None else silent_S
        agrees_S = (decoded_S == self.labels_S) & self.real_S & ~silent_S
        if int(agrees_S.sum()) > int(self.agrees_S.sum()):
            self.agrees_S, self._silent_S = agrees_S, silent_S

    def judge(self, misfit_S: Tensor | None) -> None:
        """After the last look: which rows count, and how many of them agree.

        Args:
            misfit_S: How far each row is from what was embedded, in typical lengths of that; ``None`` for other widths.
        """
        self._replaced, faint = self._odd_ids(misfit_S)
        counted_S = self.real_S & ~self._silent_S & ~torch.isin(self.labels_S, torch.cat([self._replaced, faint]))
        self.counted_S = counted_S if misfit_S is not None else counted_S & _repeated(self.labels_S)
        num_counted = int(self.counted_S.sum())
        self.agreement = float((self.agrees_S & self.counted_S).sum()) / num_counted if num_counted else 0.0
        self.num_ids = len(torch.unique(self.labels_S[self.counted_S]))

    def beats(self, other: _Scored) -> bool:
        """Whether this layout is right, and the other one wrong, where they say different ids."""
        differ_S = (self.labels_S != other.labels_S) & (self.counted_S | other.counted_S)
        if other is self or not bool(differ_S.any()):
            return True
        ours, theirs = self.agrees_S[differ_S].float().mean(), other.agrees_S[differ_S].float().mean()
        return float(ours - theirs) > _MARGIN

    def without_replaced(self) -> Tensor:
        """The map, with rows that hold something else than their id marked as no token."""
        if not len(self._replaced):
            return self.tokens_N
        labels_N = self._flat_M[self.tokens_N.clamp(min=0)]
        return torch.where(torch.isin(labels_N, self._replaced), _NO_TOKEN, self.tokens_N)

    def _odd_ids(self, misfit_S: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids of at least four rows of which hardly one agrees, while others do: place holders, and faint ones.

        What stands in a place holder's rows looks like one id or another, now and then like the place holder itself,
        and is far from what was embedded. An id that is embedded as next to nothing (``padding_idx``) agrees as rarely,
        but is near: it says nothing.
        """
        values, inverse = torch.unique(self.labels_S, return_inverse=True)
        totals = occurrences(inverse[~self._silent_S], len(values)).double()
        hits = occurrences(inverse[self.agrees_S], len(values)).double()
        odd = (totals >= 4) & (hits < _BY_CHANCE * totals) & (values >= 0)
        if int(odd.sum()) > _MAX_REPLACED or not bool(hits.any()):
            return values[:0], values[:0]
        if misfit_S is None:
            return values[odd], values[:0]
        usual = float(misfit_S[self.agrees_S].median())
        sums = torch.zeros(len(values), dtype=misfit_S.dtype, device=misfit_S.device).index_add_(0, inverse, misfit_S)
        far = sums / occurrences(inverse, len(values)) > 2 * usual + _FAR
        return values[odd & far], values[odd & ~far]


def _rows_to_look_at(lead: torch.Size, device: torch.device) -> Tensor:
    """Flat indices spread over all leading indices and positions."""
    num_rows = math.prod(lead)
    if num_rows <= NUM_ROWS:
        return torch.arange(num_rows, device=device)
    step = num_rows / NUM_ROWS  # not a whole number in general, so that no position is left out
    spread = (torch.arange(NUM_ROWS, device=device, dtype=torch.float64) * step).long()
    shift = torch.arange(NUM_ROWS, device=device) * 7 % max(int(step), 1)
    return (spread + shift).clamp(max=num_rows - 1)


def _centred(rows_ND: Tensor, looked_S: Tensor, tokens_N: Tensor, ids: Ids) -> Tensor:
    """The rows looked at without what is added to all tokens at one position.

    Where ``x = s e + p``, rows minus their mean at each position are ``s`` times the same of what was embedded: with
    ``s`` by least squares this gives back ``e``.
    """
    centred_SD, mean_embedded_SD, scale = _about_positions(rows_ND, looked_S, tokens_N, ids)
    return centred_SD if mean_embedded_SD is None else centred_SD + scale * mean_embedded_SD


def _about_positions(
    rows_ND: Tensor, looked_S: Tensor, tokens_N: Tensor, ids: Ids
) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """Rows without the mean of their position, that of what was embedded, and the scale between both."""
    length = ids.ids.shape[-1]
    real_N = tokens_N >= 0
    whole = bool(real_N.all())  # the common case needs no copy of the rows
    tokens_M, rows_MD = (tokens_N, rows_ND) if whole else (tokens_N[real_N], rows_ND[real_N])
    means_TD = _means_by_position(rows_MD, tokens_M % length, length)
    tokens_S = tokens_N[looked_S].clamp(min=0)
    centred_SD = rows_ND[looked_S].float() - means_TD[tokens_S % length]
    if ids.embedded.shape[-1] != rows_ND.shape[-1]:
        return centred_SD, None, 1.0
    embedded_MD = ids.embedded.reshape(-1, rows_ND.shape[-1])
    if len(tokens_M) == len(embedded_MD):  # every token has its row, in whatever order
        mean_embedded_TD = embedded_MD.view(-1, length, embedded_MD.shape[-1]).float().mean(0)
    else:
        mean_embedded_TD = _means_by_position(embedded_MD[tokens_M], tokens_M % length, length)
    mean_embedded_SD = mean_embedded_TD[tokens_S % length]
    expected_SD = embedded_MD[tokens_S].float() - mean_embedded_SD
    scale = (centred_SD * expected_SD).sum() / expected_SD.square().sum().clamp(min=1e-30)
    return centred_SD, mean_embedded_SD, scale


def _misfit(rows_ND: Tensor, looked_S: Tensor, tokens_N: Tensor, ids: Ids) -> Tensor:
    """Length of what each row looked at holds beyond its token and its position, in typical lengths of a token's."""
    centred_SD, mean_embedded_SD, scale = _about_positions(rows_ND, looked_S, tokens_N, ids)
    assert mean_embedded_SD is not None  # of one width
    embedded_MD = ids.embedded.reshape(-1, rows_ND.shape[-1]).float()
    expected_SD = scale * (embedded_MD[tokens_N[looked_S].clamp(min=0)] - mean_embedded_SD)
    typical = expected_SD.norm(dim=-1).median().clamp(min=1e-30)
    return (centred_SD - expected_SD).norm(dim=-1) / typical


def _means_by_position(rows_ND: Tensor, position_N: Tensor, length: int) -> Tensor:
    rows_ND = rows_ND.float()
    sums_TD = rows_ND.new_zeros(length, rows_ND.shape[1]).index_add_(0, position_N, rows_ND)
    return sums_TD / occurrences(position_N, length).clamp(min=1)[:, None]


def _says_nothing(tokens_S: Tensor, ids: Ids) -> Tensor:
    """Rows at positions where all sequences have one id: without what is common to a position nothing is left of it."""
    ids_BT = ids.ids.reshape(-1, ids.ids.shape[-1])
    same_T = (ids_BT == ids_BT[:1]).all(0)
    return same_T[tokens_S.clamp(min=0) % ids_BT.shape[1]] & (tokens_S >= 0)


class _Table:
    """One embedded row for each id, to find the nearest by cosine about the mean.

    Args:
        ids: What was embedded.
        labels: Ids that are looked for.
    """

    def __init__(self, ids: Ids, labels: Tensor) -> None:
        embedded_MD = ids.embedded.reshape(-1, ids.embedded.shape[-1])
        flat_M = ids.ids.flatten()
        values_U, inverse_M = torch.unique(flat_M, return_inverse=True)
        first_U = torch.full((len(values_U),), len(flat_M), device=flat_M.device, dtype=torch.int64)
        first_U.scatter_reduce_(0, inverse_M, torch.arange(len(flat_M), device=flat_M.device), "amin")
        if len(values_U) > 2 * NUM_ROWS:  # enough to be mistaken for, with every id that is looked for
            keep_U = torch.isin(values_U, labels) | (torch.arange(len(values_U), device=flat_M.device) % 8 == 0)
            values_U, first_U = values_U[keep_U], first_U[keep_U]
        self._values_U, self._directions_UD = values_U, _direction(embedded_MD[first_U].float())

    def nearest(self, rows_SD: Tensor, about_SD: Tensor | None = None) -> Tensor:
        """Id of the nearest embedded row; ``about_SD``: the rows whose mean is taken off, by default all."""
        return self._values_U[(_direction(rows_SD, about_SD) @ self._directions_UD.T).argmax(1)]


def _by_means(rows_SD: Tensor, labels_S: Tensor) -> Tensor:
    """Id whose other rows have the nearest mean."""
    values_U, inverse_S = torch.unique(labels_S, return_inverse=True)
    rows_SD = rows_SD - rows_SD.mean(0)
    sums_UD = rows_SD.new_zeros(len(values_U), rows_SD.shape[1]).index_add_(0, inverse_S, rows_SD)
    counts_U = occurrences(inverse_S, len(values_U)).to(rows_SD.dtype)
    means_UD = F.normalize(sums_UD / counts_U[:, None], dim=-1)
    unit_SD = F.normalize(rows_SD, dim=-1)
    cosines_SU = unit_SD @ means_UD.T
    others_SD = F.normalize(sums_UD[inverse_S] - rows_SD, dim=-1)  # a row does not vouch for itself
    own_S1 = (unit_SD * others_SD).sum(-1, keepdim=True)
    own_S1 = torch.where(counts_U[inverse_S][:, None] > 1, own_S1, torch.full_like(own_S1, -2.0))
    cosines_SU.scatter_(1, inverse_S[:, None], own_S1)
    return values_U[cosines_SU.argmax(1)]


def _direction(rows: Tensor, about: Tensor | None = None) -> Tensor:
    return F.normalize(rows - (rows if about is None else about).mean(0), dim=-1)


def _repeated(labels_S: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(labels_S, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _name(layout: str, shape: tuple[int, ...]) -> str:
    return layout if len(shape) == 2 else "(N)" if len(shape) == 1 else f"({', '.join('B' * (len(shape) - 1))}, T)"


def _with_others(index_BT: Tensor, num_others: int) -> Iterator[tuple[str, Tensor]]:
    """Rows that are no tokens before and behind the tokens: prompts, class tokens, registers, image patches."""
    batch = len(index_BT)
    splits = range(num_others + 1) if num_others <= 8 else (num_others, 0, 1, num_others - 1)
    for before in dict.fromkeys((num_others, 0, *splits)):
        left = index_BT.new_full((batch, before), _NO_TOKEN)
        right = index_BT.new_full((batch, num_others - before), _NO_TOKEN)
        whole = torch.cat([left, index_BT, right], 1)
        parts = [f"{before} before"] * (before > 0) + [f"{num_others - before} behind"] * (num_others > before)
        yield f"{', '.join(parts)} (B, T)", whole.flatten()
        if batch > 1:
            yield f"{', '.join(parts)} (T, B)", whole.T.flatten()


def _with_fewer(index_BT: Tensor, num_rows: int, ids: Ids) -> Iterator[tuple[str, Tensor]]:
    """Fewer rows than ids: padding taken out, every k-th token, the first ones, the last ones."""
    batch, length = index_BT.shape
    flat = index_BT.flatten()
    if ids.mask is not None and ids.mask.numel() == flat.numel() and int(ids.mask.sum()) == num_rows:
        yield "unpadded", flat[ids.mask.flatten().bool()]
    ids_M = ids.ids.flatten()
    for padding in torch.unique(torch.stack([ids_M[0], ids_M[-1], ids_M[length - 1]])).tolist():
        if int((ids_M != padding).sum()) == num_rows:
            yield "unpadded", flat[ids_M != padding]
    for step in (2, 3, 4):
        if num_rows == batch * -(-length // step):
            yield f"every {step} (B, T)", index_BT[:, ::step].flatten()
    if num_rows % batch == 0:
        kept = num_rows // batch
        yield f"first {kept} (B, T)", index_BT[:, :kept].flatten()
        yield f"last {kept} (B, T)", index_BT[:, length - kept :].flatten()
        if batch > 1 and kept > 1:
            yield f"first {kept} (T, B)", index_BT[:, :kept].T.flatten()
