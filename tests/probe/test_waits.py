"""Operations that wait for a GPU, counted on any device: none in an unarmed step, a bounded number in a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.probe.grouping import by_frequency, pooled_only
from lightning_spectral.probe.memory_plan import MemoryPlan
from lightning_spectral.probe.observe import observe
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import SpectralProbe
from tests.models import tiny

# their result, or its shape, must be known to the host
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.name().partition(".")[0] in _WAITING
        return func(*args, **(kwargs or {}))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = tiny.ids(4, 17, seed)
    logits = model(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def waits_of(steps: int, watched: bool, folder: Any) -> list[int]:
    torch.manual_seed(0)
    model = tiny.litgpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = observe(model, 4, out=folder, optimizer=optimizer, background=False) if watched else None
    found = []
    for index in range(steps):
        with Waits() as waits:
            step(model, optimizer, index)
        found.append(waits.num)
    if watch is not None:
        watch.close()
    return found


def test_an_unarmed_step_waits_for_nothing(tmp_path: Any) -> None:
    bare, watched = waits_of(8, False, tmp_path / "bare"), waits_of(8, True, tmp_path / "run")
    unarmed = [index for index in range(8) if index not in (0, 4)]
    assert [watched[index] - bare[index] for index in unarmed] == [0] * len(unarmed)
    assert all(watched[index] > bare[index] for index in (0, 4))  # they would have been counted


@pytest.mark.parametrize("sampled", [False, True])
def test_taking_rows_in_waits_no_oftener_for_more_layers(sampled: bool) -> None:
    """Of one micro-batch after the layout is proven."""
    counts = torch.ones(tiny.VOCAB, dtype=torch.int64).cumsum(0)
    found = []
    for num_layers in (2, 6):
        model = tiny.litgpt(n_layer=num_layers)
        grouping = (
            by_frequency(counts, head_share=0.33, mid_share=0.67, attribute_to="input")
            if not sampled
            else pooled_only()
        )
        probe = SpectralProbe(model, grouping, ProbeOptions())
        if sampled:
            probe.hold(MemoryPlan(1.0, 1.0, 64, 64, 1e9))
        for seed in (0, 1):
            probe.start(seed=seed, training=False)
            with torch.no_grad():
                model(tiny.ids(4, 16, seed))
            with Waits() as waits:
                probe.collect()
        found.append(waits.num)
        probe.remove()
    assert found[0] <= 24
    # a sample takes its rows site by site: one look at each
    assert found[1] - found[0] <= (4 if sampled else 0)
