"""Token ids of a pipeline stage that sees hidden states only: given by the loop, taken by forward calls in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_spectral.models.calls import ForwardCall


class GivenIds:
    """Ids of a step's batch.

    Args:
        ids: (B, T), integers.

    Raises:
        ValueError: If they are no such tensor.
    """

    def __init__(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            said = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"`ids` must be a tensor (B, T) of token ids, got {said}.")
        self._left = ids.detach()

    def __call__(self, calls: Sequence[ForwardCall]) -> tuple[list[ForwardCall], dict[str, str]]:
        """The calls, each with the next rows of the ids where it knows none itself, and what is to be said of them."""
        notes: dict[str, str] = {}
        return [self._of(call, notes) for call in calls], notes

    def _of(self, call: ForwardCall, notes: dict[str, str]) -> ForwardCall:
        if call.ids is not None:
            return call
        rows = call.shape[0] if call.shape else 0
        if len(call.shape) != 2 or call.shape[1] != self._left.shape[1] or len(self._left) < rows:
            left = tuple(self._left.shape)
            notes["given_ids"] = f"a forward call of {call.shape} tokens does not fit the ids that are left, {left}"
            return call
        ids, self._left = self._left[:rows], self._left[rows:]
        return replace(call, ids=ids.to(call.sequences_P.device), layout="given", reason="")
