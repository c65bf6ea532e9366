"""What one of 64 ranks sends in a window, counted on torch's fake process group: messages and bytes, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.functional.covariance import empty_moments
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.stacks import Site
from lightning_spectral.probe import collectives
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.row_sample import RowSample
from lightning_spectral.probe.window import Buckets, ClosedWindow
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
RANKS, LAYERS, WIDTH, GROUPS = 64, 3, 40, 3


def site(layer: int, expert: int | None) -> Site:
    router = None if expert is None else nn.Identity()
    return Site(f"h.{layer}.{expert}", layer, "post", nn.Linear(WIDTH, 2), expert, "h", WIDTH, routed_by=router)


def sites(num_experts: int) -> list[Site]:
    return [
        site(layer, expert) for layer in range(LAYERS) for expert in (range(num_experts) if num_experts > 1 else [None])
    ]


def recorded(sent: list[tuple[str, int]]) -> None:
    """Note every collective with the bytes of this rank's part."""

    def wrapped(name: str, run: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            own = args[1] if name == "all_gather" else args[0]
            sent.append((name, own.numel() * own.element_size() if isinstance(own, Tensor) else 0))
            return run(*args, **kwargs)

        return noting

    for name in ("gather", "all_gather", "all_reduce", "reduce"):
        setattr(dist, name, wrapped(name, getattr(dist, name)))


def window(num_experts: int, sample: RowSample | None) -> ClosedWindow:
    own = sites(num_experts)
    states = {} if sample is not None else {s.key: empty_moments(GROUPS, WIDTH) for s in own}
    buckets = Buckets(("head", "mid", "tail"), 1)
    return ClosedWindow(own, states, buckets, {}, {}, [], ProbeOptions(), None, RANKS, sample=sample)  # type: ignore[arg-type]


def reduced(rank: int, world_size: int, num_experts: int, sampled: bool) -> list[tuple[str, int]]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    sent: list[tuple[str, int]] = []
    sample = None
    if sampled:
        sample = RowSample(1e9, GROUPS, seed=0)
        places = torch.arange(16)
        rows = {s.key: torch.zeros(16, WIDTH, dtype=torch.bfloat16) for s in sites(num_experts)}
        call = ForwardCall("h", (2, 8), None, places // 8, 2, rows, dict.fromkeys(rows, places))
        sample.add(call, sites(num_experts), *torch.zeros(2, 16, dtype=torch.int64))
    closed = window(num_experts, sample)
    recorded(sent)
    collectives._finish = lambda begin, num_bytes: begin()  # work of the fake group never completes
    closed.reduce()
    return sent


@pytest.mark.parametrize("num_experts", [1, 16])
def test_moments(num_experts: int) -> None:
    [sent] = run_ranks(reduced, 1, num_experts, False, init=False)
    shift, small = 8 * (WIDTH + 1), 8 * GROUPS * (2 * WIDTH + 2)
    matrices = 4 * GROUPS * packed_size(WIDTH)
    layer = [("all_reduce", shift), ("reduce", small), ("reduce", matrices)]
    assert sent == [(name, num_experts * size) for name, size in layer] * LAYERS


@pytest.mark.parametrize("num_experts", [1, 16])
def test_a_sample(num_experts: int) -> None:
    [sent] = run_ranks(reduced, 1, num_experts, True, init=False)
    num_sites = LAYERS * num_experts
    agreed = [("all_reduce", 8), ("all_gather", 8 * num_sites * (3 + GROUPS))]
    assert sent[:2] == agreed
    assert [name for name, _ in sent[2:]] == ["gather"] * (2 * LAYERS)
    rows, known = sent[2], sent[3]
    assert rows == ("gather", num_experts * 16 * WIDTH * 2)  # bf16, as the model has them
    assert known == ("gather", num_experts * 16 * 2 * 8)  # group and sequence
