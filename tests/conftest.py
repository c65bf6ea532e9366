"""Shared by all tests: one thread, no leaks of global state."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def no_mode_is_left_behind():
    """A torch function mode that a test leaves on the stack would answer in all tests after it."""
    torch = sys.modules.get("torch")
    before = torch._C._len_torch_function_stack() if torch else 0
    yield
    torch = sys.modules.get("torch")
    left = torch._C._len_torch_function_stack() - before if torch else 0
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    assert left <= 0, f"{left} torch function modes were left on the stack"
