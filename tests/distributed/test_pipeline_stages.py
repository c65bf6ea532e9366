"""Pipeline stages measure their own layers into one folder: the records of one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
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
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import lightning_spectral as ls
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.given_ids import GivenIds
from lightning_spectral.records import SpectralRecord, read_losses, read_run, read_spectral
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
VOCAB, DIM, LAYERS, BATCH, LENGTH, MICRO, STEPS = 60, 16, 4, 8, 12, 4, 5
COUNTS = np.arange(VOCAB, 0, -1) ** 2


class FeedForward(nn.Module):
    def __init__(self, width: int = 3 * DIM) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, width), nn.Linear(width, DIM)

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


def in_one_process(path: Path, replicas: int, batches: int = 1, **more: Any) -> None:
    model = whole_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: Any = {"counts": COUNTS, "num_steps": STEPS, "background": False, **more}
    with ls.observe(model, 2, out=path, **settings) as probe:
        for step in range(STEPS):
            for number in range(batches):
                for part in batch_of(step + 100 * number, replicas * BATCH).chunk(MICRO):
                    (loss_of(model(part[:, :-1]), part[:, 1:]) / MICRO).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


def part_of(layers: range, *, first: bool, last: bool) -> Part:
    part = Part(layers, first=first, last=last)
    part.load_state_dict({k: v for k, v in whole_model().state_dict().items() if k in part.state_dict()})
    return part


def staged(
    rank: int,
    world_size: int,
    path: Path,
    schedule_class: Any,
    gives_ids: Callable[[int, torch.Tensor], torch.Tensor | None] = lambda _, ids: ids,
    middle: int = 2,
    *,
    batches: int = 1,
    first_is_last: bool = False,
    loss: Any = loss_of,
    **more: Any,
) -> None:
    """Layers before ``middle`` are in the first stage, the others in the second."""
    replicas = world_size // 2
    mesh = init_device_mesh("cpu", (2, replicas), mesh_dim_names=("pp", "dp"))
    stage = 1 - mesh["pp"].get_local_rank() if first_is_last else mesh["pp"].get_local_rank()
    model = part_of((range(middle), range(middle, LAYERS))[stage], first=stage == 0, last=stage == 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipe = PipelineStage(model, stage, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    if first_is_last:
        pipe.stage_index_to_group_rank = {0: 1, 1: 0}
    schedule = schedule_class(pipe, MICRO, loss_fn=lambda *args: loss(*args) / MICRO, scale_grads=False)
    settings: Any = {"counts": COUNTS, "num_steps": STEPS, "background": False, **more}
    with ls.observe(model, 2, out=path, process_group=mesh["dp"].get_group(), **settings) as probe:
        for step in range(STEPS):
            for number in range(batches):
                whole = batch_of(step + 100 * number, replicas * BATCH)
                batch = whole.chunk(replicas)[mesh["dp"].get_local_rank()]
                given = gives_ids(step, batch[:, :-1])
                if given is not None:
                    probe.tokens(given)
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


def same_records(one: Path, staged_: Path) -> None:
    expected, found = by_place(one), by_place(staged_)
    assert found.keys() == expected.keys()
    assert {record.layer for record in found.values()} == set(range(LAYERS))
    for key, record in found.items():
        assert record.status == expected[key].status
        for name in NUMBERS:
            assert getattr(record, name) == pytest.approx(getattr(expected[key], name), rel=2e-5), (key, name)
    losses, own = losses_of(one), losses_of(staged_)
    assert [row[:3] for row in own] == [row[:3] for row in losses]
    assert [row[3] for row in own] == pytest.approx([row[3] for row in losses], rel=1e-5)


@pytest.mark.parametrize(("ranks", "schedule"), [(2, ScheduleGPipe), (2, Schedule1F1B), (4, Schedule1F1B)])
def test_the_records_of_all_stages_are_those_of_one_process(tmp_path: Path, ranks: int, schedule: Any) -> None:
    in_one_process(tmp_path / "one", ranks // 2)
    run_ranks(staged, ranks, tmp_path / "staged", schedule)
    same_records(tmp_path / "one", tmp_path / "staged")


def test_several_batches_of_a_step_each_have_their_own_ids(tmp_path: Path) -> None:
    in_one_process(tmp_path / "one", 1, batches=2)
    run_ranks(partial(staged, batches=2), 2, tmp_path / "staged", Schedule1F1B)
    same_records(tmp_path / "one", tmp_path / "staged")


@pytest.mark.parametrize(("ranks", "middle"), [(2, 0), (2, LAYERS), (4, 0), (4, LAYERS)])
def test_a_stage_without_a_feed_forward_network_takes_part(tmp_path: Path, ranks: int, middle: int) -> None:
    in_one_process(tmp_path / "one", ranks // 2)
    run_ranks(partial(staged, middle=middle), ranks, tmp_path / "staged", Schedule1F1B)
    same_records(tmp_path / "one", tmp_path / "staged")


def test_rank_0_may_hold_the_last_stage(tmp_path: Path) -> None:
    in_one_process(tmp_path / "one", 1)
    run_ranks(partial(staged, first_is_last=True), 2, tmp_path / "staged", Schedule1F1B)
    same_records(tmp_path / "one", tmp_path / "staged")


def test_layers_of_one_stage_and_an_embedding_of_another_may_be_named(tmp_path: Path) -> None:
    chosen: Any = {"modules": ["layers.[01].w2"], "embedding": "tok_emb*"}
    in_one_process(tmp_path / "one", 1, **chosen)
    run_ranks(partial(staged, **chosen), 2, tmp_path / "staged", ScheduleGPipe)
    expected, found = (by_place(tmp_path / name) for name in ("one", "staged"))
    assert {key: record.hard_rank for key, record in found.items()} == {
        key: pytest.approx(record.hard_rank, rel=2e-5) for key, record in expected.items()
    }


def test_windows_of_stages_that_are_solved_in_a_thread_are_the_same(tmp_path: Path) -> None:
    run_ranks(partial(staged, background=True, num_jackknife_groups=1), 2, tmp_path / "beside", ScheduleGPipe)
    run_ranks(partial(staged, background=False, num_jackknife_groups=1), 2, tmp_path / "now", ScheduleGPipe)
    beside, now = (by_place(tmp_path / name) for name in ("beside", "now"))
    assert {key: (r.soft_rank, r.num_tokens) for key, r in beside.items()} == {
        key: (r.soft_rank, r.num_tokens) for key, r in now.items()
    }
    assert {record.layer for record in now.values()} == set(range(LAYERS))


def by_layer(path: Path, step: int) -> dict[Any, SpectralRecord]:
    return {(r.layer, r.bucket): r for r in read_spectral(path).records if r.step == step}


def test_a_stage_without_ids_has_pooled_ranks_and_says_why_not_the_others(tmp_path: Path) -> None:
    run_ranks(staged, 2, tmp_path, ScheduleGPipe, lambda step, ids: None)
    found = by_layer(tmp_path, 2)
    assert {found[layer, "tail"].status for layer in (0, 1)} <= {"ok", "few_tokens"}
    assert {found[layer, "tail"].status for layer in (2, 3)} == {"not_matched"}
    assert all(found[layer, "pooled"].hard_rank > 1 for layer in range(LAYERS))


def test_ids_are_of_the_step_in_which_they_are_given(tmp_path: Path) -> None:
    run_ranks(staged, 2, tmp_path, ScheduleGPipe, lambda step, ids: ids if step != 2 else None)
    assert {by_layer(tmp_path, 2)[layer, "tail"].status for layer in (2, 3)} == {"not_matched"}
    assert {by_layer(tmp_path, 4)[layer, "tail"].status for layer in (2, 3)} == {"few_tokens"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            lambda ids: ids[:5],
            r"a forward call of \(2, 12\) tokens does not fit the ids that are left, \(1, 12\): give",
        ),
        (lambda ids: ids[0], r"`ids` must be a tensor \(B, T\) of token ids, got \(12,\) of torch.int64"),
        (lambda ids: ids.float(), r"`ids` must be .*, got \(8, 12\) of torch.float32"),
    ],
)
def test_ids_that_do_not_fit_later_are_a_reason_and_training_goes_on(tmp_path: Path, given: Any, reason: str) -> None:
    run_ranks(staged, 2, tmp_path, ScheduleGPipe, lambda step, ids: given(ids) if step == 2 else ids)
    found = by_layer(tmp_path, 2)
    for layer in (2, 3):
        assert found[layer, "tail"].status == "not_matched"
        assert re.fullmatch(f"{reason}.*", found[layer, "tail"].reason)
        assert found[layer, "pooled"].hard_rank > 1
    assert {by_layer(tmp_path, 4)[layer, "tail"].status for layer in range(LAYERS)} == {"few_tokens"}


def test_negative_ids_are_padding_in_every_stage(tmp_path: Path) -> None:
    run_ranks(staged, 2, tmp_path, ScheduleGPipe, lambda step, ids: F.pad(ids[:, :-5], (0, 5), value=-100))
    found = by_layer(tmp_path, 2)
    assert [found[layer, "pooled"].num_tokens for layer in range(LAYERS)] == [56, 56, 56, 56]


def test_given_padding_of_calls_that_have_ids_of_their_own() -> None:
    ids = torch.arange(24).view(4, 6)
    call = ForwardCall("", (2, 6), ids[:2], torch.arange(12) // 6, 2, {}, {})
    given, other = GivenIds(), replace(call, ids=ids[2:] + 1)
    given.add(torch.where(ids % 6 < 4, ids, -100))
    (first, unlike, last), notes = given([replace(call, mask=ids[:2] > 0), other, replace(call, ids=ids[2:])])
    assert torch.equal(first.mask, (ids[:2] % 6 < 4) & (ids[:2] > 0))  # type: ignore[arg-type]
    assert unlike is other
    assert torch.equal(last.mask, ids[2:] % 6 < 4)  # type: ignore[arg-type]
    assert torch.equal(last.ids, ids[2:])  # type: ignore[arg-type]
    assert not notes


def focal(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logs = logits.flatten(0, 1).log_softmax(-1).gather(1, targets.flatten().unsqueeze(1))
    return (-((1 - logs.exp()) ** 2) * logs).mean()


def test_why_there_is_no_loss_is_said_by_the_stage_that_has_it(tmp_path: Path) -> None:
    run_ranks(partial(staged, loss=focal), 2, tmp_path, Schedule1F1B)
    reasons = {record.reason for record in read_losses(tmp_path).records}
    assert [reason[:60] for reason in reasons] == ["the gradient of the logits is not that of a cross-entropy (s"]


def test_stages_of_unlike_width_hold_their_rows_in_their_own_way(tmp_path: Path) -> None:
    """One keeps a sample, which is not solved in a thread, so the other does not either."""
    narrow = partial(attached, memory_limit_mib=6.0, background=True)
    for message in run_ranks(narrow, 2, tmp_path, 48, 600):
        assert message == "armed, no thread", message


@pytest.mark.parametrize(
    ("ranks", "widths", "more", "said"),
    [
        (2, (48, 600), {"memory_limit_mib": 0.5}, "all rows of a window need .* MiB .*`memory_limit_mib` allows 0.5"),
        (4, (48, 48, 48, 64), {}, r"rank 2 has 1 sites \(layers.1.w2: 48 .*, rank 3 has 1 sites \(layers.1.w2: 64"),
        (2, (48, 48), {"modules": ["layers.0.w2", "layers.9.w2"]}, "No module matches `layers.9.w2` in any pipeline"),
        (2, (None, None), {}, "No feed-forward network was found in any pipeline stage. Name down projections"),
    ],
)
def test_what_one_stage_cannot_is_refused_on_every_rank(
    tmp_path: Path, ranks: int, widths: Any, more: Any, said: str
) -> None:
    for message in run_ranks(partial(attached, **more), ranks, tmp_path, *widths):
        assert re.search(said, message), message


def attached(rank: int, world_size: int, path: Path, *widths: int | None, **more: Any) -> str:
    """How a stage of one layer, as wide as is said for this rank, is observed."""
    replicas = world_size // 2
    mesh = init_device_mesh("cpu", (2, replicas), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    model = Part(range(0), first=stage == 0, last=stage == 1)
    if widths[rank] is not None:
        model.layers[str(stage)] = FeedForward(widths[rank])
    try:
        probe = ls.observe(model, 2, out=path, process_group=mesh["dp"].get_group(), counts=COUNTS, **more)
    except ValueError as error:
        return str(error)
    solver = probe._loop.observer._armed.solver
    return f"{probe._loop.observer.state}, {'no thread' if solver is None else 'a thread'}"


def test_several_stages_on_a_rank_are_observed_into_one_folder(tmp_path: Path) -> None:
    in_one_process(tmp_path / "one", 1)
    run_ranks(interleaved, 2, tmp_path)
    same_records(tmp_path / "one", tmp_path / "parts")
    assert len({record.run_id for record in read_spectral(tmp_path / "parts").records}) == 1
    about = read_run(tmp_path / "parts")
    assert (about.finished, about.num_lost_windows, about.last_step) == (True, 0, STEPS)
    assert not (tmp_path / "parts" / "previous").exists()
    assert not list((tmp_path / "parts").glob("*.lock"))


def interleaved(rank: int, world_size: int, path: Path) -> None:
    alone, both = [dist.new_group([r]) for r in range(world_size)][rank], dist.new_group([0, 1])
    parts = [part_of(range(i, i + 1), first=i == 0, last=i == LAYERS - 1) for i in (rank, rank + 2)]
    pipes = [PipelineStage(parts[i], rank + 2 * i, 4, torch.device("cpu"), group=both) for i in range(2)]
    schedule = ScheduleInterleaved1F1B(pipes, MICRO, loss_fn=loss_of)
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="`model` is an `nn.ModuleList`, which no schedule calls: with several stages"):
        ls.observe(nn.ModuleList(parts), 2, out=path, process_group=alone)
    settings: Any = {"counts": COUNTS, "num_steps": STEPS, "background": False, "process_group": alone}
    first = ls.observe(parts[0], 2, out=path / "parts", **settings)
    with pytest.raises(ValueError, match="`eigenvalues=True` writes one file a window: with `beside`"):
        ls.observe(parts[1], 2, beside=first, eigenvalues=True, **settings)
    with pytest.raises(ValueError, match="`beside` is for pipeline stages: give the `process_group`"):
        ls.observe(parts[1], 2, beside=first)
    with pytest.raises(ValueError, match="`beside` must be what `observe` returned for another stage, got 'runs/a'"):
        ls.observe(parts[1], 2, beside="runs/a", **settings)
    probes = [first, ls.observe(parts[1], 2, beside=first, **settings)]
    for step in range(STEPS):
        batch = batch_of(step, BATCH)
        for probe in probes:
            probe.tokens(batch[:, :-1])
        schedule.step(batch[:, :-1]) if rank == 0 else schedule.step(target=batch[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        for probe in probes:
            probe.step()
    for probe in probes:
        probe.close(finished=True)


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
    with pytest.raises(ValueError, match=r"`ids` must be a tensor \(B, T\) of token ids, got \(4,\) of torch.int64."):
        GivenIds().add(torch.arange(4))
    with pytest.raises(ValueError, match=r"got \(1, 4\) of torch.bool"):
        GivenIds().add(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="got list"):
        GivenIds().add([1])  # type: ignore[arg-type]


def test_counts_from_the_stream_need_every_stage_to_see_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="later stages see no ids; give an array or a file"):
        ls.observe(whole_model(), out=tmp_path, counts="stream", process_group=object())  # type: ignore[arg-type]
