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
    ("make", "batches"),
    [
        # the directions, a buffer of their size, two Gram matrices of a quarter of it
        (lambda m: Muon(m, precision="bf16"), 2.5),
        (lambda m: Muon(m, precision="fp32"), 2.5),
        (lambda m: NorMuon(m, precision="bf16"), 2.5),
        (lambda m: NorMuon(m, precision="fp32"), 2.5),
        (lambda m: Dion(m, rank_fraction=0.25), 2.0),
        (lambda m: Dion(m, rank_fraction=1.0), 4.3),  # factors as large as the matrix
    ],
    ids=["muon-bf16", "muon-fp32", "normuon-bf16", "normuon-fp32", "dion-1/4", "dion-1"],
)
def test_peak_of_a_step_is_a_few_buffers_of_the_largest_batch(make, batches):
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = make(model)
    optimizer.step()  # plans are made once
    largest = max(len(run) * run[0].numel * run[0].dtype.itemsize for run in optimizer._matrix_step[1]._runs_of[1])
    assert largest <= 2 * 2**20
    one = 4 * WIDTH * WIDTH * 4  # a direction in fp32 on its way into the batch
    assert peak_bytes(optimizer) <= batches * largest + one
