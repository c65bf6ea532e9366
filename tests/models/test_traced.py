"""The order of what a compiled region leaves, from where its hooks are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_spectral.models.traced import in_order


@dataclass
class Hook:
    kind: str
    path: str
    traced: list[Any] = field(default_factory=list)


def told(*hooks: tuple[str, str, int]) -> list[str]:
    """What happened, of hooks that each recorded so many events."""
    made = [Hook(kind, path, list(range(count))) for kind, path, count in hooks]
    return [f"{hook.kind} {hook.path or 'root'} {index}" for hook, index in in_order(made)]


def test_blocks_that_run_again_inside_one_call():
    events = told(
        ("open", "", 1), ("ids", "embed", 1), ("block", "layers.0", 2), ("rows", "layers.0.down", 2),
        ("block", "layers.1", 2), ("close", "", 1),
    )  # fmt: skip
    once = ["block layers.0 {}", "rows layers.0.down {}", "block layers.1 {}"]
    inside = [one.format(turn) for turn in (0, 1) for one in once]
    assert events == ["open root 0", "ids embed 0", *inside, "close root 0"]


def test_a_module_that_is_called_again_holds_its_share():
    events = told(
        ("open", "", 1), ("open", "core", 2), ("ids", "embed", 1), ("block", "core.layers.0", 4),
        ("close", "", 1), ("close", "core", 2),
    )  # fmt: skip
    assert events == [
        "open root 0", "ids embed 0", "open core 0", "block core.layers.0 0", "block core.layers.0 1", "close core 0",
        "open core 1", "block core.layers.0 2", "block core.layers.0 3", "close core 1", "close root 0",
    ]  # fmt: skip


def test_modules_beside_each_other_are_not_inside_each_other():
    events = told(
        ("open", "", 1), ("open", "encoder", 1), ("open", "decoder", 1), ("block", "encoder.block.0", 1),
        ("block", "decoder.block.0", 1), ("close", "", 1), ("close", "encoder", 1), ("close", "decoder", 1),
    )  # fmt: skip
    assert events == [
        "open root 0", "open encoder 0", "block encoder.block.0 0", "close encoder 0", "open decoder 0",
        "block decoder.block.0 0", "close decoder 0", "close root 0",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_without_modules_around_them_round_by_round(count):
    names = ("block layers.0", "rows layers.0.down", "block layers.1")
    hooks = [(*name.split(), count) for name in names]
    assert told(*hooks) == [f"{name} {turn}" for turn in range(count) for name in names]


def test_a_call_that_an_exception_ended_has_no_end():
    assert told(("open", "", 2), ("block", "layers.0", 2), ("close", "", 1)) == [
        "open root 0", "block layers.0 0", "close root 0", "open root 1", "block layers.0 1",
    ]  # fmt: skip


def test_an_end_whose_beginning_was_seen_by_eager_code():
    assert told(("block", "layers.0", 1), ("close", "", 1)) == ["block layers.0 0", "close root 0"]
