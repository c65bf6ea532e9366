"""Whether modules run again on what came out of them: a further pass of a loop, and no call over other data."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

_LOOK = 256  # autograd nodes looked at between an output and the next input, and beside them


class Outputs:
    """The latest output of each module that encloses blocks, and what entered a stack's latest down projection."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[weakref.ref[Tensor], Any]] = {}
        self._rows: dict[str, Any] = {}

    def leave(self, path: str, output: Tensor | None) -> None:
        """A module has returned."""
        if output is not None:
            self._latest[path] = weakref.ref(output), output.grad_fn

    def lead_to(self, path: str, entering: Tensor | None) -> bool | None:
        """Whether what enters a module is made of what it returned last; ``None`` where no gradient tells."""
        if entering is None or path not in self._latest:
            return False
        output, node = self._latest[path]
        if output() is entering:
            return True
        return None if node is None or entering.grad_fn is None else _descends(entering.grad_fn, node)

    def leave_rows(self, stack: str, rows: Tensor) -> None:
        """A down projection of a stack is entered."""
        self._rows[stack] = rows.grad_fn

    def may_lead_to(self, stack: str, entering: Tensor) -> bool:
        """Whether what enters a block can be made of what the stack's blocks returned: not where gradients deny it."""
        node = self._rows.get(stack)
        return node is None or entering.grad_fn is None or _descends(entering.grad_fn, node)

    def clear(self) -> None:
        """Forget them."""
        self._latest.clear()
        self._rows.clear()


def _descends(node: Any, ancestor: Any) -> bool:
    """Whether an autograd node is made of another one, a few operations before."""
    level, seen = [node], 0
    while level and seen < _LOOK:
        if any(one is ancestor for one in level):
            return True
        seen += len(level)
        level = [before for one in level if one is not None for before, _ in one.next_functions]
    return False
