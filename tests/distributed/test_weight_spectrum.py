"""Spectra of weights, gradients, momentum and updates under DDP and FSDP2, equal to those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_spectral import WeightSpectrumCallback
from lightning_spectral.optim import Muon
from lightning_spectral.records import read_weights
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.test_callbacks import Fsdp2, loader, model_parallel

pytestmark = pytest.mark.distributed


class Sgd:
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class OurMuon:
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Muon(self, lr=0.05, weight_decay=0.0)


class SgdModule(Sgd, tiny.Module):
    pass


class SgdFsdp2(Sgd, Fsdp2):
    pass


class MuonModule(OurMuon, tiny.Module):
    pass


class MuonFsdp2(OurMuon, Fsdp2):
    pass


def fit(rank: int, world_size: int, path: str, strategy: object, module_class: type) -> dict[str, float]:
    trainer = tiny.trainer(
        path, [WeightSpectrumCallback(2, dirpath=path)], devices=world_size, use_distributed_sampler=False,
        strategy=strategy() if callable(strategy) else strategy,
    )  # fmt: skip
    trainer.fit(module_class(), loader(rank, world_size))
    return {tag: float(value) for tag, value in trainer.callback_metrics.items()}


def by_key(path: Path):
    return {(r.step, r.parameter, r.what): r for r in read_weights(path).records}


@pytest.mark.parametrize(
    ("strategy", "module_class", "plain"),
    [
        ("ddp", SgdModule, SgdModule),
        (lambda: model_parallel(2, 1), SgdFsdp2, SgdModule),
        ("ddp", MuonModule, MuonModule),
        (lambda: model_parallel(2, 1), MuonFsdp2, MuonModule),
    ],
    ids=["ddp-sgd", "fsdp2-sgd", "ddp-muon", "fsdp2-muon"],
)
def test_two_ranks_equal_one_process(strategy, module_class, plain, tmp_path):
    single = fit(0, 1, str(tmp_path / "single"), "auto", plain)
    ranks = run_ranks(fit, 2, str(tmp_path / "ranks"), strategy, module_class, init=False, timeout_s=120)
    expected, found = by_key(tmp_path / "single"), by_key(tmp_path / "ranks")
    assert {what for _, _, what in expected} == {"weight", "gradient", "momentum", "update"}
    assert found.keys() == expected.keys()
    for key, record in found.items():
        if key[0] > 0:  # later windows see weights that were trained in another order of sums
            continue
        other = expected[key]
        assert (record.status, record.rows, record.columns) == (other.status, other.rows, other.columns)
        # fp32 sums of 8 sequences in another order; an update is a difference of weights, which loses three digits
        rel = 1e-3 if record.what == "update" else 1e-4
        for measure in ("frobenius", "largest", "effective_rank", "stable_rank", "normalized_entropy", "top10_energy"):
            assert getattr(record, measure) == pytest.approx(getattr(other, measure), rel=rel), (key, measure)
    for metrics in ranks:  # every rank has the medians, so that a monitor decides alike on all of them
        assert metrics.keys() == single.keys()
        assert metrics == pytest.approx(ranks[0], rel=1e-6)
