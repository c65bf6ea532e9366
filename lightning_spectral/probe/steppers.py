"""Whose steps are followed where an optimizer wraps another one: Accelerate's, Lookahead, sharpness-aware ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def steppers(optimizer: Any) -> list[Optimizer]:
    """An optimizer and those that it wraps, outermost first, as far as torch tells of their steps.

    A wrapper that has not called ``Optimizer.__init__`` tells of none. One that holds several optimizers is followed no
    further, nor is what is no optimizer: DeepSpeed's steps its inner one for every parameter group.
    """
    found: list[Optimizer] = []
    seen: set[int] = set()
    while isinstance(optimizer, Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        own = vars(optimizer)
        # a wrapper's own plain dictionary of hooks is no place where one can be taken off again
        if isinstance(own.get("_optimizer_step_post_hooks"), OrderedDict):
            found.append(optimizer)
        held = {id(value): value for value in own.values() if isinstance(value, Optimizer)}
        optimizer = next(iter(held.values())) if len(held) == 1 else None
    return found


class Follower:
    """Tells of each step of an optimizer once, also where it comes from, or goes to, one that it wraps.

    Args:
        stepped: Called after each.
    """

    def __init__(self, stepped: Callable[[], Any]) -> None:
        self._stepped = stepped
        self._outermost: Optimizer | None = None
        self._handles: list[Any] = []

    def follow(self, optimizer: Any) -> None:
        """From now on."""
        for one in steppers(optimizer):
            self._handles.append(one.register_step_pre_hook(self._before))
            self._handles.append(one.register_step_post_hook(self._after))

    def remove(self) -> None:
        """No longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where a loop compiles the optimizer's step
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._outermost = self._outermost or optimizer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._outermost is None or self._outermost is optimizer:
            self._outermost = None
            self._stepped()
