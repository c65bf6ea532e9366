"""Exact numbers where not all layers fit: some at a time, in turns; or all of them in the memory of the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_spectral import TailTokenProbe
from lightning_spectral.probe import attaching
from lightning_spectral.probe.memory_plan import MemoryPlan, in_host_memory, in_turns
from lightning_spectral.probe.probe import SpectralProbe
from tests.callbacks import tiny
from tests.callbacks.test_measuring import by_key, fit

LAYERS, WIDTH, STEPS = 5, 256, 5


def module() -> tiny.Module:
    return tiny.Module(intermediate_size=WIDTH, n_layer=LAYERS)


def probe(every_n_steps=1, **options) -> TailTokenProbe:
    return TailTokenProbe(every_n_steps, counts=tiny.counts(), num_jackknife_groups=2, eigenvalues=True, **options)


def numbers(record):
    return replace(record, run_id="", window_s=0.0)


ALL_MIB = LAYERS * 6 * 4 * 9 / 16 * WIDTH**2 / 2**20
LIMIT = ALL_MIB * 2.1 / LAYERS  # two layers of five


@pytest.fixture
def largest(monkeypatch):
    """Sites with a state in one window, at most."""
    seen = [0]
    settle = SpectralProbe.settle

    def watched(self, **kwargs):
        found = settle(self, **kwargs)
        seen[0] = max(seen[0], len(self.window.states))
        return found

    monkeypatch.setattr(SpectralProbe, "settle", watched)
    return seen


def test_each_record_is_that_of_the_layer_without_turns_and_the_others_say_so(tmp_path, largest):
    batches = {"batches": tiny.loader(64, 32), "max_steps": STEPS}  # more rows than features
    callback = probe(memory_limit_mib=LIMIT, background=False)
    turned = by_key(fit(tmp_path / "turns", callback, module(), **batches))
    assert largest == [2]
    whole = by_key(fit(tmp_path / "whole", probe(background=False), module(), **batches))
    assert turned.keys() == whole.keys()
    for key, record in turned.items():
        if record.layer % 3 == record.step % 3:
            assert numbers(record) == numbers(whole[key]), key
            assert record.soft_rank is not None
        else:
            assert (record.status, record.num_tokens, record.soft_rank) == ("not_in_turn", 0, None)
    assert {record.layer for record in turned.values() if record.soft_rank is not None} == set(range(LAYERS))


def test_the_choice_and_its_price_are_said_at_the_start(tmp_path, monkeypatch):
    said = []
    told = attaching.said_at_start
    monkeypatch.setattr(
        "lightning_spectral.probe.observer.said_at_start", lambda *a, **k: said.append(told(*a, **k)) or said[-1]
    )
    fit(tmp_path, probe(memory_limit_mib=LIMIT, background=False), module(), max_steps=1)
    assert "every layer in each 3. window, `not_in_turn` in the others" in said[0]


def test_windows_far_apart_take_turns_too_and_so_do_the_last_step_and_a_resumed_run(tmp_path):
    records = fit(
        tmp_path, probe(4, memory_limit_mib=LIMIT, background=False), module(), max_steps=10, batches=tiny.loader(8, 64)
    )
    turns = {r.step: {s.layer % 3 for s in records if s.step == r.step and s.status != "not_in_turn"} for r in records}
    assert turns == {0: {0}, 4: {1}, 8: {2}, 9: {0}}


def test_states_on_the_host_give_the_same_numbers(tmp_path, monkeypatch):
    """In several micro-batches and flushes; sums of fp32 products in another order."""
    step = {"max_steps": 2, "accumulate_grad_batches": 4, "batches": tiny.loader(512, 32)}
    whole = by_key(fit(tmp_path / "whole", probe(background=False), module(), **step))
    monkeypatch.setattr(attaching, "plan_of", lambda *a, **k: MemoryPlan(1e9, 1.0, on_host=True))
    hosted = by_key(fit(tmp_path / "host", probe(background=False), module(), **step))
    assert hosted.keys() == whole.keys()
    for key, record in hosted.items():
        other = whole[key]
        assert (record.num_tokens, record.status) == (other.num_tokens, other.status)
        for name in ("hard_rank", "trace"):
            assert getattr(record, name) == pytest.approx(getattr(other, name), rel=1e-5), (key, name)
        # layer 0 has one row for each distinct token: 250 of 256 modes of HEAD are fp32 rounding, 1e-4 of a soft rank
        assert record.soft_rank == pytest.approx(other.soft_rank, rel=1e-5 if record.layer else 3e-4), key
        for name in ("soft_rank_debiased", "hard_rank_debiased"):  # extrapolated: differences of ranks, times groups
            rel = 1e-4 if record.layer else 1e-3
            assert getattr(record, name) == pytest.approx(getattr(other, name), rel=rel), (key, name)


def test_layers_are_dealt_so_that_every_turn_fits():
    layers = {0: 1.0, 1: 1.0, 2: 5.0, 3: 1.0, 4: 1.0}
    for limit in (9.0, 7.0, 6.0, 5.0):
        plan = in_turns(layers, limit)
        assert plan is not None
        loads = [sum(mib for layer, mib in layers.items() if layer % plan.turns == turn) for turn in range(plan.turns)]
        assert plan.needed_mib == max(loads) <= limit
        if plan.turns > 1:  # with one turn less it does not fit
            fewer = plan.turns - 1
            assert max(sum(m for at, m in layers.items() if at % fewer == turn) for turn in range(fewer)) > limit
    assert in_turns(layers, 4.9) is None


def test_the_host_is_used_where_one_site_fits_beside_the_model_and_all_fit_there():
    assert in_host_memory(1.0, 100.0, 2.0, 100.0) == MemoryPlan(100.0, 100.0, on_host=True)
    assert in_host_memory(1.0, 100.0, 1.9, 100.0) is None
    assert in_host_memory(1.0, 100.0, 2.0, 99.0) is None
    assert "same numbers" in str(in_host_memory(1.0, 100.0, 2.0, 100.0))
