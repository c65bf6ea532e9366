"""Token ids of a pipeline stage that sees hidden states only: given by the loop, taken by forward calls in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_spectral.models.calls import ForwardCall

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class GivenIds:
    """Ids of one optimizer step: of each of its batches, in the order in which the loop gives and runs them."""

    def __init__(self) -> None:
        self._waiting: deque[Tensor] = deque()
        self._refused = ""

    def add(self, ids: Tensor) -> None:
        """Ids of the next batch of the step.

        Args:
            ids: (B, T), integers; negative ones are padding.

        Raises:
            ValueError: If they are no such tensor; calls then say so instead of having ids.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in _INTEGERS:
            said = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            self._refused = f"`ids` must be a tensor (B, T) of token ids, got {said}"
            raise ValueError(f"{self._refused}.")
        self._waiting.append(ids.detach())

    def clear(self) -> None:
        """The step is over: what its forward calls have not taken is of no other step."""
        self._waiting.clear()
        self._refused = ""

    def __call__(self, calls: Sequence[ForwardCall]) -> tuple[list[ForwardCall], dict[str, str]]:
        """The calls, each with the next rows of the ids where it knows none itself, and what is to be said of them.

        A call that has ids of its own takes the padding of those that were given.
        """
        notes: dict[str, str] = {}
        return [self._of(call, notes) for call in calls], notes

    def _of(self, call: ForwardCall, notes: dict[str, str]) -> ForwardCall:
        if not (self._waiting or self._refused):
            return call
        rows = call.shape[0] if call.shape else 0
        left = self._waiting[0] if self._waiting else None
        if call.ids is not None:
            return call if left is None else self._masked(call, left)
        if left is None or len(call.shape) != 2 or call.shape[1] != left.shape[1] or len(left) < rows:
            given = f"the ids that are left, {tuple(left.shape)}" if left is not None else "what was given"
            notes["given_ids"] = self._refused or (
                f"a forward call of {call.shape} tokens does not fit {given}: give `tokens` the ids that the first "
                "stage is given, once for each batch"
            )
            return replace(call, reason=notes["given_ids"])
        return replace(call, ids=self._take(rows).to(call.sequences_P.device), layout="given", reason="")

    def _masked(self, call: ForwardCall, left: Tensor) -> ForwardCall:
        given = left[: call.shape[0]].to(call.sequences_P.device)
        real = given >= 0
        if given.shape != call.shape or not bool(((given == call.ids) | ~real).all()):
            return call  # of another text
        self._take(call.shape[0])
        return replace(call, mask=real if call.mask is None else real & call.mask) if not bool(real.all()) else call

    def _take(self, rows: int) -> Tensor:
        ids, self._waiting[0] = self._waiting[0][:rows], self._waiting[0][rows:]
        if not len(self._waiting[0]):
            self._waiting.popleft()
        return ids
