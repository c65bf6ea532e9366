"""A step needs no more than the largest same-shape batch and one buffer of its size on top of what is kept."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_spectral.optim import Dion, Muon, NorMuon

WIDTH, LAYERS = 128, 12


def peak_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Largest sum of live allocations of torch's CPU allocator during one step, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_ruler_sees_a_temporary():
    class Square:
        def step(self) -> None:
            (torch.ones(1000, 1000) * 2).sum()

    assert 2 * 4_000_000 <= peak_bytes(Square()) < 2 * 4_000_000 + 1000


@pytest.mark.parametrize(
    ("make", "itemsize"),
    [
        (lambda m: Muon(m, precision="bf16"), 2),
        (lambda m: Muon(m, precision="fp32"), 4),
        (lambda m: NorMuon(m, precision="bf16"), 2),
        (lambda m: NorMuon(m, precision="fp32"), 4),
        (lambda m: Dion(m, rank_fraction=0.25), 4),
        (lambda m: Dion(m, rank_fraction=1.0), 4),
    ],
    ids=["muon-bf16", "muon-fp32", "normuon-bf16", "normuon-fp32", "dion-1/4", "dion-1"],
)
def test_peak_of_a_step_is_one_batch_and_one_buffer(make, itemsize):
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = make(model)
    optimizer.step()  # plans are made once
    batch = LAYERS * 4 * WIDTH * WIDTH * itemsize  # all matrices of the largest shape, in the dtype of the products
    assert peak_bytes(optimizer) <= 2 * batch
