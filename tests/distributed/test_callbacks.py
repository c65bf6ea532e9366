"""The callbacks under every strategy that runs on CPU, equal to one process."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_spectral import TailTokenProbe, read_spectral
from lightning_spectral.records import read_losses
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed


def loader(rank: int, world_size: int) -> DataLoader:
    """Step s of all ranks together is batch s of one process; each rank takes every n-th sequence of it."""
    data = tiny.data()
    mine = [index for index in range(len(data)) if index % world_size == rank]
    return DataLoader(Subset(data, mine), batch_size=8 // world_size)


def measure_strategy(
    rank: int, world_size: int, path: str, strategy: object, module_class: type, background: bool | None = None
) -> None:
    callback = TailTokenProbe(
        2, counts=tiny.counts(), sites=["pre", "post"], dirpath=path, num_jackknife_groups=2, background=background
    )
    trainer = tiny.trainer(
        path, [callback], strategy=strategy() if callable(strategy) else strategy, devices=world_size,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module_class(), loader(rank, world_size))


def by_key(path: Path):
    return {record.key: record for record in read_spectral(path).records}


class Fsdp2(tiny.Module):
    def configure_model(self) -> None:
        from torch.distributed._composable.fsdp import fully_shard

        if not getattr(self, "sharded", False):
            self.sharded = True
            for block in self.gpt.transformer.h:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.gpt, mesh=self.device_mesh["data_parallel"])


class TensorParallel(tiny.Module):
    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if not getattr(self, "sharded", False):
            self.sharded = True
            for block in self.gpt.transformer.h:
                plan = {"mlp.fc": ColwiseParallel(), "mlp.proj": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)


def model_parallel(data: int, tensor: int):
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo")


@pytest.fixture
def single(tmp_path):
    measure_strategy(0, 1, str(tmp_path / "single"), "auto", tiny.Module)
    return by_key(tmp_path / "single")


def check(single, path: Path, *, rel: float, world_size: int) -> None:
    found = by_key(path)
    assert found.keys() == single.keys()
    for key, record in found.items():
        assert record.num_tokens == single[key].num_tokens
        assert record.num_sequences == single[key].num_sequences
        assert record.world_size == world_size
        if key[1] == 0:  # later windows see weights that were trained in another order of sums
            assert record.status == single[key].status
            assert record.hard_rank == pytest.approx(single[key].hard_rank, rel=rel, abs=1e-6)
            assert record.soft_rank == pytest.approx(single[key].soft_rank, rel=rel, abs=1e-6)
            assert record.tokens_seen == single[key].tokens_seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp(tmp_path, single, world_size):
    path = tmp_path / "ddp"
    run_ranks(measure_strategy, world_size, str(path), "ddp", tiny.Module, init=False)
    check(single, path, rel=1e-5, world_size=world_size)
    losses = {record.key: record for record in read_losses(path).records}
    for record in read_losses(tmp_path / "single").records:
        assert losses[record.key].num_tokens == record.num_tokens
        if record.step == 0:
            assert losses[record.key].loss == pytest.approx(record.loss, rel=1e-6)


def test_ddp_solves_beside_training(tmp_path):
    """The windows of steps 0, 2 and 3, on two ranks that finish when they finish."""
    run_ranks(measure_strategy, 2, str(tmp_path / "beside"), "ddp", tiny.Module, True, init=False)
    run_ranks(measure_strategy, 2, str(tmp_path / "within"), "ddp", tiny.Module, False, init=False)
    beside, within = by_key(tmp_path / "beside"), by_key(tmp_path / "within")
    assert {key[1] for key in beside} == {0, 2, 3}
    assert beside.keys() == within.keys()
    for key, record in beside.items():
        assert replace(record, run_id="", window_s=None) == replace(within[key], run_id="", window_s=None)


def stopped(rank: int, world_size: int, path: str) -> list[str]:
    class Failing(tiny.Module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise InterruptedError

    callback = TailTokenProbe(1, counts=tiny.counts(), dirpath=path, background=True)
    trainer = tiny.trainer(path, [callback], strategy="ddp", devices=world_size, use_distributed_sampler=False)
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(InterruptedError):
        warnings.simplefilter("always")
        trainer.fit(Failing(), loader(rank, world_size))
    return [str(warning.message) for warning in caught]


def test_after_an_error_no_rank_waits_for_another(tmp_path):
    """The window being solved is given up: an error on one rank alone must not become a deadlock."""
    messages = run_ranks(stopped, 2, str(tmp_path), init=False)[0]
    assert any("the window that was being solved is lost" in message for message in messages)
    assert {record.step for record in read_spectral(tmp_path).records} == {0}


class Wide(tiny.Module):
    """More features than a window has rows: one process needs no covariance, several do."""

    def __init__(self) -> None:
        super().__init__(intermediate_size=192)


def test_ddp_of_fewer_rows_than_features(tmp_path):
    measure_strategy(0, 1, str(tmp_path / "single"), "auto", Wide)
    run_ranks(measure_strategy, 2, str(tmp_path / "ddp"), "ddp", Wide, init=False)
    check(by_key(tmp_path / "single"), tmp_path / "ddp", rel=1e-5, world_size=2)


def test_fsdp2(tmp_path, single):
    run_ranks(measure_strategy, 2, str(tmp_path / "fsdp2"), lambda: model_parallel(2, 1), Fsdp2, init=False)
    check(single, tmp_path / "fsdp2", rel=1e-5, world_size=2)


def test_tensor_parallel_slices_are_assembled_and_peers_not_added(tmp_path):
    run_ranks(measure_same_data, 2, str(tmp_path / "tp"), lambda: model_parallel(1, 2), TensorParallel, init=False)
    measure_strategy(0, 1, str(tmp_path / "single"), "auto", tiny.Module)
    check(by_key(tmp_path / "single"), tmp_path / "tp", rel=1e-5, world_size=1)


def measure_same_data(rank: int, world_size: int, path: str, strategy: object, module_class: type) -> None:
    callback = TailTokenProbe(2, counts=tiny.counts(), sites=["pre", "post"], dirpath=path, num_jackknife_groups=2)
    trainer = tiny.trainer(path, [callback], strategy=strategy(), devices=world_size, use_distributed_sampler=False)
    trainer.fit(module_class(), loader(0, 1))


def uneven(rank: int, world_size: int, path: str) -> None:
    from lightning_spectral.probe.grouping import by_frequency
    from lightning_spectral.probe.options import ProbeOptions
    from lightning_spectral.probe.probe import SpectralProbe

    grouping = by_frequency(tiny.counts(), head_share=0.33, mid_share=0.67, attribute_to="input")
    model = tiny.Module().gpt
    probe = SpectralProbe(model, grouping, ProbeOptions())
    parts = {
        1: [tiny.data()[:8]],
        2: [tiny.data()[:8], None],
        4: [tiny.data()[:5], tiny.data()[5:7], tiny.data()[7:8], None],
    }
    ids = parts[world_size][rank]
    probe.begin()
    if ids is not None:
        probe.start(seed=0)
        model(ids[:, :-1])
        probe.collect()
    result = probe.end()
    return [
        (r.layer, r.bucket, r.measurement.num_tokens, r.measurement.hard_rank, r.num_sequences) for r in result.sites
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_uneven_and_empty_ranks(tmp_path, world_size):
    expected = sorted(uneven(0, 1, ""))
    for result in run_ranks(uneven, world_size, ""):
        for (layer, bucket, rows, hard, sequences), reference in zip(sorted(result), expected, strict=True):
            assert (layer, bucket, rows, sequences) == (*reference[:3], reference[4])
            assert hard == pytest.approx(reference[3], rel=1e-6)  # fp32 sums in another order


def one_rank_poisoned(rank: int, world_size: int, path: str) -> list[str]:
    class Poisoned(tiny.Module):
        def training_step(self, batch, batch_idx):
            if rank == 1:
                batch = batch.clone()
                with torch.no_grad():
                    self.gpt.transformer.h[1].mlp.fc.weight.fill_(torch.nan)
            return super().training_step(batch, batch_idx)

    callback = TailTokenProbe(1, counts=tiny.counts(), dirpath=path, on_nonfinite="raise")
    trainer = tiny.trainer(path, [callback], strategy="ddp", devices=world_size, use_distributed_sampler=False)
    try:
        trainer.fit(Poisoned(), loader(rank, world_size))
    except RuntimeError as error:
        return [str(error), os.environ["RANK"]]
    return []


def test_nan_on_one_rank_raises_on_all_without_a_deadlock(tmp_path):
    results = run_ranks(one_rank_poisoned, 2, str(tmp_path), init=False)
    assert [rank for _, rank in results] == ["0", "1"]
    assert all(
        "NaN or Inf activations at step 0 in `gpt.transformer.h.1.mlp.proj`" in message for message, _ in results
    )


def rank_0_only(rank: int, world_size: int, path: str) -> float:
    callback = TailTokenProbe(1, counts=tiny.counts(), dirpath=path, convention="paper")
    trainer = tiny.trainer(
        path, [callback], strategy="ddp", devices=world_size, max_steps=1, use_distributed_sampler=False
    )
    trainer.fit(tiny.Module(), loader(rank, world_size))
    return float(trainer.callback_metrics["spectral/hard_rank.tail"])


def test_the_papers_convention_takes_rank_0s_rows_and_says_so(tmp_path):
    values = run_ranks(rank_0_only, 2, str(tmp_path), init=False)
    assert values[0] == values[1]
    records = read_spectral(tmp_path).records
    assert {r.conventions["reduction"] for r in records} == {"rank0_local"}
    assert {r.num_tokens for r in records if r.bucket == "pooled"} == {4 * tiny.LENGTH}
