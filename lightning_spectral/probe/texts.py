"""Sequences that are one text: two passes over a batch, several answers to one question, a batch that holds copies.

Rows of one text are no independent sample of another's: they belong into one shard, and count as one sequence. Without
a host synchronisation.

Axes: B sequences of a call, T positions, M sequences seen before, P places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.models.calls import ForwardCall

_ALIKE = 8  # ids at the least, from the first on, that make two sequences one text; else the first half
_AT_MOST = 4_096  # sequences that a window knows again
_MIXERS = (-7046029254386353131, -4417276706812531889, -49064778989728563)  # odd, from splitmix64


class Texts:
    """The texts of a window, numbered in the order in which they came."""

    def __init__(self) -> None:
        self._marks_M: Tensor | None = None
        self._numbers_M: Tensor | None = None
        self._count: Tensor | int = 0

    def of(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        """The text of each sequence of a call.

        Returns:
            Its number in the window ``(B,)``, and whether it is the first of its text ``(B,)``.
        """
        index_B = torch.arange(call.num_sequences, device=call.sequences_P.device)
        marks_B = _marks(call)
        if marks_B is None:
            numbers_B, self._count = self._count + index_B, self._count + call.num_sequences
            return numbers_B, torch.ones_like(index_B, dtype=torch.bool)
        marks_M = marks_B[:0] if self._marks_M is None else self._marks_M
        known_M = index_B[:0] if self._numbers_M is None else self._numbers_M
        marks = torch.cat([marks_M, marks_B])
        first_B = (marks_B[:, None] == marks[None, :]).to(torch.uint8).argmax(1)
        is_new_B = first_B == index_B + len(marks_M)
        numbers_B = torch.cat([known_M, self._count + is_new_B.cumsum(0) - 1])[first_B]
        if len(marks) <= _AT_MOST:
            self._marks_M, self._numbers_M = marks, torch.cat([known_M, numbers_B])
        self._count = self._count + is_new_B.sum()
        return numbers_B, is_new_B


def _marks(call: ForwardCall) -> Tensor | None:
    """A number for each sequence that copies share ``(B,)``; ``None`` where sequences are no rows of ids."""
    ids = call.ids
    if ids is None or ids.ndim != 2 or ids.shape[0] != call.num_sequences:
        return None
    ids_BT = ids[:, : max((ids.shape[1] + 1) // 2, _ALIKE)].to(torch.int64)
    position_T = torch.arange(ids_BT.shape[1], device=ids.device)
    mixed_BT = (ids_BT + 1) * _MIXERS[0] ^ (position_T + 1) * _MIXERS[1]
    mixed_BT = (mixed_BT ^ (mixed_BT >> 31)) * _MIXERS[2]
    return (mixed_BT ^ (mixed_BT >> 29)).sum(1)
