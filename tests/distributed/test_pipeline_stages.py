"""Pipeline stages measure their own layers into one folder: the records of one process."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import lightning_spectral as ls
from lightning_spectral.probe.given_ids import GivenIds
from lightning_spectral.records import SpectralRecord, read_losses, read_spectral
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
VOCAB, DIM, LAYERS, BATCH, LENGTH, MICRO, STEPS = 60, 16, 4, 8, 12, 4, 5
COUNTS = np.arange(VOCAB, 0, -1) ** 2


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, 3 * DIM), nn.Linear(3 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.relu(self.w1(x)))


class Part(nn.Module):
    """Some of a model's layers, as torchtitan cuts it: layers keep their numbers."""

    def __init__(self, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM) if first else None
        self.layers = nn.ModuleDict({str(k): FeedForward() for k in layers})
        self.output = nn.Linear(DIM, VOCAB) if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.tok_embeddings is None else self.tok_embeddings(x)
        for layer in self.layers.values():
            x = x + layer(x)
        return x if self.output is None else self.output(x)


def whole_model() -> Part:
    torch.manual_seed(0)
    return Part(range(LAYERS), first=True, last=True)


def batch_of(step: int, size: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (size, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def in_one_process(path: Path, replicas: int) -> None:
    model = whole_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ls.observe(model, 2, out=path, counts=COUNTS, num_steps=STEPS, background=False) as probe:
        for step in range(STEPS):
            batch = batch_of(step, replicas * BATCH)
            for part in batch.chunk(MICRO):
                (loss_of(model(part[:, :-1]), part[:, 1:]) / MICRO).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


def staged(rank: int, world_size: int, path: Path, schedule_class: Any, gives_ids: bool = True, **more: Any) -> None:
    replicas = world_size // 2
    mesh = init_device_mesh("cpu", (2, replicas), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    layers = range(2) if stage == 0 else range(2, LAYERS)
    model = Part(layers, first=stage == 0, last=stage == 1)
    model.load_state_dict({k: v for k, v in whole_model().state_dict().items() if k in model.state_dict()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipe = PipelineStage(model, stage, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = schedule_class(pipe, MICRO, loss_fn=loss_of)
    settings: Any = {"counts": COUNTS, "num_steps": STEPS, "background": False, **more}
    with ls.observe(model, 2, out=path, process_group=mesh["dp"].get_group(), **settings) as probe:
        for step in range(STEPS):
            batch = batch_of(step, replicas * BATCH).chunk(replicas)[mesh["dp"].get_local_rank()]
            if gives_ids:
                probe.tokens(batch[:, :-1])
            if stage == 0:
                schedule.step(batch[:, :-1])
            else:
                schedule.step(target=batch[:, 1:])
            for p in model.parameters():
                dist.all_reduce(p.grad, group=mesh["dp"].get_group())
                p.grad /= replicas
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


def by_place(path: Path) -> dict[Any, SpectralRecord]:
    return {(record.step, record.module, record.bucket): record for record in read_spectral(path).records}


def losses_of(path: Path) -> list[tuple[Any, ...]]:
    return [(record.step, record.bucket, record.num_tokens, record.loss) for record in read_losses(path).records]


NUMBERS = ("soft_rank", "hard_rank", "trace", "num_tokens", "num_sequences", "tokens_seen")


@pytest.mark.parametrize(("ranks", "schedule"), [(2, ScheduleGPipe), (2, Schedule1F1B), (4, Schedule1F1B)])
def test_the_records_of_all_stages_are_those_of_one_process(tmp_path: Path, ranks: int, schedule: Any) -> None:
    in_one_process(tmp_path / "one", ranks // 2)
    run_ranks(staged, ranks, tmp_path / "staged", schedule)
    expected, found = (by_place(tmp_path / name) for name in ("one", "staged"))
    assert found.keys() == expected.keys()
    assert {record.layer for record in found.values()} == set(range(LAYERS))
    for key, record in found.items():
        assert record.status == expected[key].status
        for name in NUMBERS:
            assert getattr(record, name) == pytest.approx(getattr(expected[key], name), rel=2e-5), (key, name)
    losses, own = (losses_of(tmp_path / name) for name in ("one", "staged"))
    assert [row[:3] for row in own] == [row[:3] for row in losses]
    assert [row[3] for row in own] == pytest.approx([row[3] for row in losses], rel=1e-5)


def test_windows_of_stages_that_are_solved_in_a_thread_are_the_same(tmp_path: Path) -> None:
    run_ranks(partial(staged, background=True, num_jackknife_groups=1), 2, tmp_path / "beside", ScheduleGPipe)
    run_ranks(partial(staged, background=False, num_jackknife_groups=1), 2, tmp_path / "now", ScheduleGPipe)
    beside, now = (by_place(tmp_path / name) for name in ("beside", "now"))
    assert {key: (r.soft_rank, r.num_tokens) for key, r in beside.items()} == {
        key: (r.soft_rank, r.num_tokens) for key, r in now.items()
    }
    assert {record.layer for record in now.values()} == set(range(LAYERS))


def test_a_stage_without_ids_has_pooled_ranks_and_says_why_not_the_others(tmp_path: Path) -> None:
    run_ranks(staged, 2, tmp_path, ScheduleGPipe, False)
    by_layer = {(r.layer, r.bucket): r for r in read_spectral(tmp_path).records if r.step == 2}
    assert {by_layer[layer, "tail"].status for layer in (0, 1)} <= {"ok", "few_tokens"}
    assert {by_layer[layer, "tail"].status for layer in (2, 3)} == {"not_matched"}
    assert all(by_layer[layer, "pooled"].hard_rank > 1 for layer in range(LAYERS))


def attach(rank: int, world_size: int, path: Path, kind: str) -> str:
    groups = [dist.new_group([0]), dist.new_group([1])]
    names = {"same names": range(2), "one without": range(2 * rank, 2 * rank + 2)}[kind]
    model = Part(names, first=rank == 0, last=rank == 1)
    given = None if kind == "one without" and rank == 1 else groups[rank]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ls.observe(model, 2, out=path, counts=COUNTS, process_group=given)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "same names",
            r"`layers.0.w2.post` is held by the ranks \[0\] and \[1\]: layers of pipeline stages keep their",
        ),
        ("one without", r"rank 1 was given the `process_group` None, and the ranks say \[\[0\], None\]"),
    ],
)
def test_stages_that_cannot_be_told_apart_are_refused_on_every_rank(tmp_path: Path, kind: str, said: str) -> None:
    for message in run_ranks(attach, 2, tmp_path, kind):
        assert re.search(said, message), message


def test_given_ids_must_be_ids() -> None:
    with pytest.raises(ValueError, match=r"`ids` must be a tensor \(B, T\) of token ids, got \(4,\) of torch.int64"):
        GivenIds(torch.arange(4))
    with pytest.raises(ValueError, match="got list"):
        GivenIds([1])  # type: ignore[arg-type]


def test_counts_from_the_stream_need_every_stage_to_see_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="later stages see no ids; give an array or a file"):
        ls.observe(whole_model(), out=tmp_path, counts="stream", process_group=object())  # type: ignore[arg-type]
