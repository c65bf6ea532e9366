"""Who runs now: the script's forward, a backward pass that recomputes it, or the forward of an autograd function."""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache
from types import CodeType

import torch


def in_backward() -> bool:
    """Whether an autograd engine runs on this thread: what runs forward now is recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_function_forward() -> bool:
    """Whether a ``torch.autograd.Function`` runs its forward (re-entrant checkpointing), which turns gradients off."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_forward(frame.f_code):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@lru_cache(maxsize=4096)
def _is_forward(code: CodeType) -> bool:
    """Whether this is the forward of a ``torch.autograd.Function``: its ``apply`` has no frame from torch 2.14 on."""
    kinds = [torch.autograd.Function]
    for kind in kinds:  # grows
        kinds += kind.__subclasses__()
    return any(getattr(inspect.unwrap(kind.forward), "__code__", None) is code for kind in kinds)
