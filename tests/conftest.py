"""Shared by all tests: one thread, no leaks of global state; which tests are quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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


# `pytest -m quick`, for daily work: the floors that everything stands on, under 3 minutes on two cores
_QUICK = ("functional", "metrics", "text", "lightning_private", "probe", "theory", "analysis", "data", "models")
_NOT_QUICK = {"slow", "nightly", "distributed", "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick by its folder; files beside the folders are, too."""
    here = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(here).parts[0]
        if (room in _QUICK or room.endswith(".py")) and not _NOT_QUICK & {mark.name for mark in item.iter_markers()}:
            item.add_marker("quick")
