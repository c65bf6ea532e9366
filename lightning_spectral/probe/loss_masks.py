"""Masks and weights behind losses that a script asked for one by one, where no gradient will tell.

Follows ``cross_entropy(..., reduction="none")`` of an evaluation through reshaping to what weighs or selects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.probe.loss_calls import Scored

_SAME = {
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "float",
    "double",
    "to",
    "view_as",
    "detach",
}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_CHOICES = {"__getitem__", "masked_select"}


class Followed:
    """Losses one by one, and the tensors that are these losses in another shape."""

    def __init__(self) -> None:
        self._scored: dict[int, tuple[Tensor, Scored]] = {}  # the tensor is kept, so that its id stays its own

    def __bool__(self) -> bool:
        return bool(self._scored)

    def add(self, losses: Tensor, scored: Scored) -> None:
        """Follow a call's result."""
        self._scored[id(losses)] = losses, scored

    def forget(self) -> None:
        """Follow nothing any more."""
        self._scored.clear()

    def look(self, func: Any, args: Any, out: Any) -> None:
        """One function of the script: is it one that reshapes, weighs or selects losses?"""
        place = next((i for i, value in enumerate(args[:2]) if id(value) in self._scored), None)
        if place is None:
            return
        losses, scored = self._scored[id(args[place])]
        name, other = getattr(func, "__name__", ""), args[1 - place] if len(args) > 1 else None
        if name in _SAME and isinstance(out, Tensor) and out.numel() == losses.numel():
            self.add(out, scored)
        if not isinstance(other, Tensor):
            return
        if name in _PRODUCTS and out.shape == losses.shape:
            scored.weigh(other.expand(losses.shape).reshape(-1))
            self.add(out, scored)
        elif name in _CHOICES and other.dtype == torch.bool and other.shape == losses.shape:
            scored.weigh(other.reshape(-1))
        elif name == "masked_fill" and other.dtype == torch.bool and len(args) > 2 and args[2] == 0:
            scored.weigh(~other.expand(losses.shape).reshape(-1))
            self.add(out, scored)
