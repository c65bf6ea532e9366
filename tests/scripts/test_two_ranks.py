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

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, read_spectral
from lightning_spectral.probe import agreement
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.records import SpectralRecord
from tests.distributed.harness import run_ranks
from tests.scripts import toys
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
