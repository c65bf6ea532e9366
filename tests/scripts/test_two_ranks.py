"""Two gloo ranks, the odd thing on one of them: both end as they would without us, and nobody waits for long."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, observe, read_spectral
from lightning_spectral.probe import agreement, collectives
from lightning_spectral.probe.open_window import sequence_counts
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.records import SpectralRecord
from tests.distributed.harness import run_ranks
from tests.scripts import models, steps, toys
from tests.scripts.late import BareMatrices
from tests.scripts.steps import Retries

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]
ROWS = 8 * toys.T


class Odd(toys.Lit):
    """Does something else on rank 1 in step 2."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 2:
            return self.odd(batch)
        return self.loss(batch)

    def odd(self, batch: Tensor) -> Any:
        return self.loss(batch)


class NoForward(Odd):
    """Its loss touches every parameter, but the model does not run."""

    def odd(self, batch: Tensor) -> Tensor:
        return sum(parameter.sum() for parameter in self.parameters()) * 0.0


class OneRetries(Retries):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx if self.global_rank == 1 else 0)


def fit(
    rank: int, world: int, path: str, module: type, callbacks: Any, broken: Any = contextlib.nullcontext
) -> tuple[str, int, float, list[str], Tensor]:
    torch.manual_seed(1)
    data = DataLoader(toys.ids(64, seed=rank), batch_size=8)  # type: ignore[arg-type]
    ended, lit = "ok", module()
    with warnings.catch_warnings(record=True) as caught, broken(rank):
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            default_root_dir=path, callbacks=callbacks(rank, path), strategy="ddp_find_unused_parameters_true",
            devices=world, max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        began = time.monotonic()
        try:
            trainer.fit(lit, data)
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
    weights = torch.cat([weight.flatten() for weight in lit.state_dict().values()])
    return ended, trainer.global_step, time.monotonic() - began, [str(w.message) for w in caught], weights


def rank_and_tail(rank: int, path: str) -> list[Any]:
    settings: dict[str, Any] = {"dirpath": path, "background": False}
    return [SpectralRankCallback(1, **settings), TailTokenProbe(2, counts=toys.counts(), **settings)]


def nothing(rank: int, path: str) -> list[Any]:
    return []


def compare(tmp_path: Path, module: type, callbacks: Any = rank_and_tail, **options: Any) -> list[Any]:
    """Both ranks end as without us, with the same weights; returns what each told."""
    without = run_ranks(fit, 2, str(tmp_path / "without"), module, nothing, init=False)
    ours = run_ranks(fit, 2, str(tmp_path / "ours"), module, callbacks, *options.values(), init=False)
    for plain, measured in zip(without, ours, strict=True):
        assert measured[:2] == plain[:2]
        assert torch.equal(measured[4], plain[4])
        assert measured[2] < 30
    return [result[3] for result in ours]


def pooled(tmp_path: Path) -> dict[int | None, SpectralRecord]:
    records = read_spectral(tmp_path / "ours").records
    return {r.step: r for r in records if r.bucket == "pooled" and r.layer == 0}


def test_one_rank_without_a_forward_adds_nothing(tmp_path: Path) -> None:
    compare(tmp_path, NoForward)
    found = pooled(tmp_path)
    assert {step: record.num_tokens for step, record in found.items()} == {
        0: 2 * ROWS,
        1: 2 * ROWS,
        2: ROWS,
        3: 2 * ROWS,
    }
    assert {record.hard_rank is None for record in found.values()} == {False}


class BareNoForward(NoForward, BareMatrices):
    """Matrices that are parameters: nothing declares their up projection's width."""


def pre_and_post(rank: int, path: str) -> list[Any]:
    return [SpectralRankCallback(1, sites=["pre", "post"], dirpath=path, background=False)]


def test_one_rank_without_a_forward_of_bare_matrices(tmp_path: Path) -> None:
    compare(tmp_path, BareNoForward, pre_and_post)
    records = read_spectral(tmp_path / "ours").records
    found = {(r.step, r.site): (r.num_tokens, r.width) for r in records if r.bucket == "pooled" and r.layer == 0}
    wanted = {0: 2 * ROWS, 1: 2 * ROWS, 2: ROWS, 3: 2 * ROWS}
    assert found == {(step, site): (rows, 32) for step, rows in wanted.items() for site in ("pre", "post")}


def test_one_rank_that_retries_after_a_failure(tmp_path: Path) -> None:
    compare(tmp_path, OneRetries)
    found = pooled(tmp_path)
    assert {0, 1, 3} <= {step for step, record in found.items() if record.num_tokens == 2 * ROWS}
    assert found[2].num_tokens == 2 * ROWS or found[2].reason  # the failed forward left half of its rows


@contextlib.contextmanager
def failing_collect(rank: int) -> Any:
    """Rank 1 runs out of memory when it accumulates its third micro-batch."""
    calls, collect = [0], SpectralProbe.collect

    def collect_or_fail(probe: SpectralProbe, *args: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            probe.recorder.discard()
            raise torch.OutOfMemoryError("none left")
        return collect(probe, *args)

    SpectralProbe.collect = collect_or_fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpectralProbe.collect = collect  # type: ignore[method-assign]


def rank_only(rank: int, path: str) -> list[Any]:
    return [SpectralRankCallback(1, dirpath=path, background=False)]


def test_a_failure_on_one_rank_loses_the_window_on_all(tmp_path: Path) -> None:
    compare(tmp_path, toys.Lit, rank_only, broken=failing_collect)
    found = pooled(tmp_path)
    assert [found[step].status in ("not_matched", "solve_failed") for step in range(4)] == [False, False, True, False]
    assert "rank 1: accumulating activations: OutOfMemoryError: none left" in found[2].reason


@contextlib.contextmanager
def failing_solve(rank: int) -> Any:
    from lightning_spectral.probe import window

    measure = window.measure

    def measure_or_fail(*args: Any, **options: Any) -> Any:
        if rank == 1:
            raise ArithmeticError("no convergence")
        return measure(*args, **options)

    window.measure = measure_or_fail
    try:
        yield
    finally:
        window.measure = measure


def test_a_solver_that_fails_on_one_rank_loses_its_layers(tmp_path: Path) -> None:
    told = compare(tmp_path, toys.Lit, rank_only, broken=failing_solve)
    records = read_spectral(tmp_path / "ours").records
    assert {(r.layer, r.status) for r in records if r.layer == 1} == {(1, "solve_failed")}
    assert all(r.hard_rank for r in records if r.layer == 0)
    assert len([text for text in told[0] if "no convergence" in text]) == 1


@contextlib.contextmanager
def short_limit(rank: int) -> Any:
    agreement.LIMIT_S, before = 1.0, agreement.LIMIT_S
    init = agreement.Agreement.__init__

    def quick(self: Any, name: str, *, limit_s: float = 1.0) -> None:
        init(self, name, limit_s=limit_s)

    agreement.Agreement.__init__ = quick  # type: ignore[method-assign]
    try:
        yield
    finally:
        agreement.Agreement.__init__ = init  # type: ignore[method-assign]
        agreement.LIMIT_S = before


def only_on_rank_0(rank: int, path: str) -> list[Any]:
    return rank_only(rank, path) if rank == 0 else []


def only_on_rank_1(rank: int, path: str) -> list[Any]:
    return [*rank_only(rank, path), WeightSpectrumCallback(1, dirpath=path)] if rank == 1 else []


@pytest.mark.parametrize("callbacks", [only_on_rank_0, only_on_rank_1])
def test_a_callback_on_one_rank_alone_measures_nothing(tmp_path: Path, callbacks: Any) -> None:
    """It is told at the start, once, within the limit (20 s; here 1 s)."""
    told = compare(tmp_path, toys.Lit, callbacks, broken=short_limit)
    rank = 0 if callbacks is only_on_rank_0 else 1
    messages = [text for text in told[rank] if f"rank(s) {1 - rank} did not come" in text]
    assert len(messages) == (1 if rank == 0 else 2)
    assert not (tmp_path / "ours" / "spectral.jsonl").exists()


class Uneven(toys.Lit):
    """Rank 1 has a mask of another shape in step 2."""


def masked(rank: int, path: str) -> list[Any]:
    def mask(batch: Tensor) -> Tensor | None:
        masked.calls += 1  # type: ignore[attr-defined]
        return torch.ones(3, 3) if rank == 1 and masked.calls == 3 else None  # type: ignore[attr-defined]

    masked.calls = 0  # type: ignore[attr-defined]
    return [SpectralRankCallback(1, dirpath=path, background=True, mask_fn=mask)]


def test_background_solves_survive_a_lost_window(tmp_path: Path) -> None:
    compare(tmp_path, Uneven, masked)
    statuses = {step: record.status for step, record in pooled(tmp_path).items()}
    assert statuses[2] == "not_matched"
    assert "not_matched" not in [statuses[step] for step in (0, 1, 3)]


@contextlib.contextmanager
def dead_in_the_reduction(rank: int) -> Any:
    """Rank 1 agrees that the window of step 2 ends, and then is not there."""
    limit, close, calls = collectives.LIMIT_S, SpectralProbe.close, [0]

    def close_or_not(probe: SpectralProbe, *args: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            time.sleep(2.5)
            # late: what the other has given up ends, so that both can leave
            collectives.all_reduce(sequence_counts(probe.window, {"blocks"}, probe.buckets.reported, probe.device))
            raise collectives.MissingRankError("this one")
        return close(probe, *args)

    collectives.LIMIT_S, SpectralProbe.close = 1.0, close_or_not  # type: ignore[method-assign]
    try:
        yield
    finally:
        collectives.LIMIT_S, SpectralProbe.close = limit, close  # type: ignore[method-assign]


def lone(rank: int, world: int, path: str) -> tuple[list[str], str, float]:
    """A loop without collectives of its own: the only wait is ours."""
    model = toys.LM()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught, dead_in_the_reduction(rank):
        warnings.simplefilter("always")
        with observe(model, 1, out=path, optimizer=optimizer, background=False) as probe:
            for batch in toys.ids(32).split(8):
                toys.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
                optimizer.step()
            state = probe._loop.observer.state
    return [str(w.message) for w in caught], state, time.monotonic() - began


def test_a_rank_that_is_lost_in_a_reduction_is_waited_for_in_bounded_time(tmp_path: Path) -> None:
    for told, state, seconds in run_ranks(lone, 2, str(tmp_path)):
        assert state == "failed"
        assert seconds < 30
        assert len([text for text in told if "when a window ended; nothing more is measured" in text]) == 1
    assert {r.step for r in read_spectral(tmp_path).records} == {0, 1}


def on_one_rank(kind: type[toys.Lit]) -> type[toys.Lit]:
    """Rank 1 does what the kind does, rank 0 what the plain script does."""

    class One(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if self.global_rank == 1 else self.loss(batch)

        def loss(self, ids: Tensor) -> Tensor:
            return super().loss(ids) if self.global_rank == 1 else toys.Lit.loss(self, ids)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx) if self.global_rank == 1 else self.loss(batch)

    return One


KINDS = {
    "generates in the step": steps.Generates,
    "eval forward in the step": steps.EvalForward,
    "teacher copied in a step": steps.Teacher,
    "per-sample gradients": steps.PerSample,
    "contrastive pair": steps.Contrastive,
    "whole model checkpointed": steps.WholeCheckpoint,
    "loss inside a checkpoint": steps.LossInCheckpoint,
    "functional_call": steps.Functional,
    "dropout": steps.Dropout,
    "NaN loss": steps.Nan,
    "saves the whole model": steps.SavesWhole,
    "head on the last position": models.LastOnly,
    "head on masked positions": models.Masked,
    "chunked cross-entropy": models.Chunked,
    "tied head": models.Tied,
    "two ahead": models.TwoAhead,
    "loss by hand": models.ByHand,
    "ignored targets": models.Ignored,
    "generate() in validation": models.Generating,
    "validation without a forward": models.OnlyLogs,
}


def fit_kinds(rank: int, world: int, path: str) -> dict[str, Any]:
    """Every kind without us and with us, one after the other in the same two processes."""
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        ends = []
        for way in ("without", "ours"):
            folder = f"{path}/{name}/{way}"
            settings: dict[str, Any] = {"dirpath": folder, "background": False, "on": ["train", "validation"]}
            ours = [TailTokenProbe(2, counts=toys.counts(), **settings)] if way == "ours" else []
            torch.manual_seed(1)
            lit = on_one_rank(kind)()
            trainer = pl.Trainer(
                default_root_dir=folder, callbacks=ours, strategy="ddp_find_unused_parameters_true", devices=world,
                max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, val_check_interval=3,
            )  # fmt: skip
            began = time.monotonic()
            trainer.fit(lit, DataLoader(toys.ids(24, seed=rank), batch_size=8), toys.loader(8))  # type: ignore[arg-type]
            weights = torch.cat([weight.flatten() for weight in lit.state_dict().values()])
            ends.append((trainer.global_step, weights, time.monotonic() - began))
        found[name] = ends
    return found


@pytest.mark.slow  # forty fits, in two processes
def test_the_odd_thing_on_one_rank_only(tmp_path: Path) -> None:
    results = run_ranks(fit_kinds, 2, str(tmp_path), init=False, timeout_s=400)
    for name in KINDS:
        for rank in range(2):
            (plain_step, plain_weights, _), (step, weights, seconds) = results[rank][name]
            assert step == plain_step, name
            assert torch.allclose(weights, plain_weights, rtol=0, atol=0, equal_nan=True), name
            assert seconds < 30, name
        records = read_spectral(tmp_path / name / "ours").records
        pooled = {(r.stage, r.step): r for r in records if r.bucket == "pooled" and r.layer == 0}
        assert {("train", 0), ("train", 2), ("validation", 3)} <= pooled.keys(), name
        for record in pooled.values():
            assert record.hard_rank is not None or record.reason or record.status == "nonfinite", (name, record)
        assert pooled["train", 0].num_tokens == 2 * ROWS - 8 * (name == "two ahead"), name
