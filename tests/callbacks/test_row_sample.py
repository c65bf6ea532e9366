"""A window in bounded memory: an even sample of its rows gives the numbers of all of them, within the stated error."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_spectral import SpectralRankCallback, TailTokenProbe
from lightning_spectral.probe.memory_plan import MIN_ROWS, sample_mib
from lightning_spectral.probe.probe import SpectralProbe
from tests.callbacks import tiny
from tests.callbacks.test_measuring import by_key, fit

WIDTH = 768


def module() -> tiny.Module:
    return tiny.Module(intermediate_size=WIDTH)


GROUPS = 4  # all rows take 10 MiB a bucket, 256 of them 6
LIMIT = sample_mib([WIDTH, WIDTH], MIN_ROWS, 1, 4) * 1.01


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Bytes of rows that the sample has held, at most."""
    seen = [0.0, 0.0]
    collect = SpectralProbe.collect

    def watched(self, *args, **kwargs):
        calls = collect(self, *args, **kwargs)
        assert self.plan is not None
        seen[:] = [max(seen[0], self.window.sample.num_bytes), self.plan.limit_bytes]
        assert not self.window.states
        return calls

    monkeypatch.setattr(SpectralProbe, "collect", watched)
    return seen


def probe(**options) -> TailTokenProbe:
    return TailTokenProbe(1, counts=tiny.counts(), num_jackknife_groups=GROUPS, **options)


def test_numbers_of_all_rows_within_the_stated_error_in_bounded_memory(tmp_path, largest, monkeypatch):
    """A step of 4,096 tokens in 8 micro-batches, 256 rows kept."""
    step = {"max_steps": 1, "accumulate_grad_batches": 8, "batches": tiny.loader(256, 32)}
    sampled = by_key(fit(tmp_path / "few", probe(memory_limit_mib=LIMIT), module(), **step))
    assert 0.5 * largest[1] < largest[0] <= largest[1]
    monkeypatch.undo()
    dense = by_key(fit(tmp_path / "all", probe(), module(), **step))
    assert sampled.keys() == dense.keys()
    for key, record in sampled.items():
        whole = dense[key]
        assert (record.num_tokens, record.width) == (whole.num_tokens, WIDTH)
        assert 0.5 * whole.num_sequences < record.num_sequences <= whole.num_sequences  # those with rows in the sample
        assert (record.soft_method, whole.soft_method) == ("sample", "exact")
        assert 0 < record.extra["sampled_rows"] <= MIN_ROWS
        # layer 0 sees one row per distinct token: its buckets hold a handful, and nothing is left to estimate
        for name in ("soft_rank", "hard_rank"):
            error = max(record.extra.get(f"{name}_error", math.inf), 0.02)
            assert abs(math.log(getattr(record, name) / getattr(whole, name))) < 4 * error, (key, name)
    assert sum(r.extra["sampled_rows"] for k, r in sampled.items() if k[3] != "pooled") == sum(
        r.extra["sampled_rows"] for k, r in sampled.items() if k[3] == "pooled"
    )


def test_a_window_that_is_kept_whole_is_exact(tmp_path):
    options = {"max_steps": 1}
    callback = probe(memory_limit_mib=LIMIT)
    kept = by_key(fit(tmp_path / "kept", callback, module(), **options))  # 128 tokens: fewer than 256
    whole = by_key(
        fit(
            tmp_path / "whole",
            probe(),
            module(),
            **options,
        )
    )
    assert kept.keys() == whole.keys()
    for key, record in kept.items():
        assert record.soft_method == "exact"
        for name in ("soft_rank", "hard_rank", "hard_rank_debiased", "trace"):
            # fp32 products about another shift
            assert getattr(record, name) == pytest.approx(getattr(whole[key], name), rel=1e-5, abs=1e-4), (key, name)


def test_training_is_the_same_and_so_is_a_second_run(tmp_path):
    def trained(name, callbacks):
        own = module()
        records = fit(tmp_path / name, callbacks, own, batches=tiny.loader(64, 32), max_steps=2)
        return [p.detach().clone() for p in own.parameters()], records

    first, records = trained("first", [SpectralRankCallback(1, num_jackknife_groups=GROUPS, memory_limit_mib=LIMIT)])
    second, again = trained("second", [SpectralRankCallback(1, num_jackknife_groups=GROUPS, memory_limit_mib=LIMIT)])
    own = module()
    tiny.trainer(tmp_path / "bare", [], max_steps=2).fit(own, tiny.loader(64, 32))
    for ours, theirs, none in zip(first, second, own.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, none)
    assert [(r.key, r.soft_rank, r.hard_rank) for r in records] == [(r.key, r.soft_rank, r.hard_rank) for r in again]
    assert {r.soft_method for r in records} == {"sample"}


def test_what_needs_all_rows_is_refused_before_step_1(tmp_path):
    with pytest.raises(Exception, match="`eigenvalues=True` needs them all"):
        fit(
            tmp_path,
            SpectralRankCallback(1, num_jackknife_groups=GROUPS, memory_limit_mib=2.0, eigenvalues=True),
            module(),
            max_steps=1,
        )
    with pytest.raises(Exception, match="a sample of 256 takes 7 MiB, `memory_limit_mib` allows 2:"):
        fit(tmp_path, SpectralRankCallback(1, num_jackknife_groups=GROUPS, memory_limit_mib=2.0), module(), max_steps=1)
