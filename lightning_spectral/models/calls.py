"""What one forward call of one stack left behind: rows, and which token each row is of.

Axes: P places of a call (its tokens, or its rows where it has no tokens), N rows of a site, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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
        logits: Output of the head, if it is tapped.
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
    logits: Tensor | None = None
