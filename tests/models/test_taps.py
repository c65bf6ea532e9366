from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as ckpt
from torch.utils.checkpoint import checkpoint

from lightning_spectral.models.families import resolve
from lightning_spectral.models.taps import Taps
from tests.models import tiny


def step(model, ids) -> torch.Tensor:
    logits = model(ids)
    logits.square().mean().backward()
    return logits.detach()


@pytest.mark.parametrize(("backend", "token_fraction"), [("eager", 1.0), ("aot_eager", 0.25)])
def test_compiled_hooks_fire_exactly_with_two_graphs_and_no_break(backend, token_fraction):
    from torch._dynamo.testing import CompileCounterWithBackend  # half a second that collection need not wait for

    torch._dynamo.reset()
    model, counter = tiny.litgpt(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    taps = Taps(resolve(compiled, sites=("post", "pre")), token_fraction=token_fraction, with_logits=True)
    for index in range(6):
        ids = tiny.ids(seed=index)
        if index % 2 == 0:
            taps.start(seed=index)
        logits = step(compiled, ids)
        passes = taps.collect()
        assert len(passes) == (index % 2 == 0)
        for forward in passes:
            assert torch.equal(forward.ids_BT, ids)
            torch.testing.assert_close(forward.logits_BTV, logits)
            assert all(len(rows) == 24 * token_fraction for rows in forward.rows.values())
    assert counter.frame_count == 2  # armed and not
    taps.remove()


def test_compiled_rows_equal_eager_rows():
    torch._dynamo.reset()
    model = tiny.litgpt()
    taps = Taps(resolve(model))
    taps.start()
    step(model, tiny.ids())
    eager = taps.collect()[0].rows
    taps.remove()
    compiled = torch.compile(model, backend="aot_eager")
    taps = Taps(resolve(compiled))
    taps.start()
    step(compiled, tiny.ids())
    for key, rows in taps.collect()[0].rows.items():
        torch.testing.assert_close(rows, eager[key], rtol=1e-5, atol=1e-6)  # fp32 of another operation order
    taps.remove()


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "wrapper"])
def test_recomputation_is_not_counted_twice(mode):
    model = tiny.litgpt()
    calls = []
    model.transformer.h[0].mlp.proj.register_forward_pre_hook(lambda *_: calls.append(1))
    taps = Taps(resolve(model))  # before wrapping, as a strategy would
    if mode == "wrapper":
        ckpt.apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "Block")
    else:
        for block in model.transformer.h:
            inner = block.forward
            block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=mode == "reentrant", **k)
    for seed in range(3):
        taps.start()
        step(model, tiny.ids(seed=seed))
        assert len(taps.collect()) == 1
    assert len(calls) == 6, "the test must recompute"
    taps.remove()


def test_thinned_positions_cover_every_sequence_and_depend_on_the_seed_only():
    model = tiny.litgpt()
    taps = Taps(resolve(model, sites=("post", "pre")), token_fraction=0.25)

    def kept(seed: int) -> torch.Tensor:
        taps.start(seed=seed)
        model(tiny.ids(batch=4, length=16))
        forward = taps.collect()[0]
        return forward.kept_N

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kept(1)
    assert torch.equal(torch.get_rng_state(), before)  # draws from a generator of its own
    torch.manual_seed(123)
    assert torch.equal(kept(1), first)
    assert not torch.equal(kept(2), first)
    assert torch.bincount(first // 16, minlength=4).tolist() == [4, 4, 4, 4]
    assert all(0 <= position % 16 // 4 == index % 4 for index, position in enumerate(first.tolist()))
    taps.remove()


def test_thinned_rows_are_rows_of_the_whole():
    model = tiny.litgpt()
    rows = {}
    for share in (1.0, 0.5):
        taps = Taps(resolve(model), token_fraction=share)
        taps.start(seed=3)
        with torch.no_grad():
            model(tiny.ids())
        rows[share] = taps.collect()[0]
        taps.remove()
    kept = rows[0.5].kept_N
    for key, whole in rows[1.0].rows.items():
        assert torch.equal(rows[0.5].rows[key], whole[kept])


def test_a_site_that_does_not_run_is_named():
    model = tiny.litgpt()
    taps = Taps(resolve(model))
    model.transformer.h[1].mlp.forward = lambda x: x
    taps.start()
    model(tiny.ids())
    with pytest.raises(RuntimeError, match="transformer.h.1.mlp.proj` ran 0 times while the token embedding ran 1"):
        taps.collect()


def test_a_slice_of_the_features_is_refused():
    model = tiny.litgpt()
    for block in model.transformer.h:
        block.mlp.proj.in_features = 128  # what a hand-cut layer of two ranks would declare
    taps = Taps(resolve(model))
    taps.start()
    model(tiny.ids())
    with pytest.raises(RuntimeError, match="64 of its 128 features"):
        taps.collect()


def test_disarmed_after_an_error_in_forward_and_nothing_left_after_removal():
    model = tiny.litgpt()
    taps = Taps(resolve(model), with_logits=True)
    taps.start()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 4), tiny.VOCAB + 5))
    assert not taps.armed
    taps.remove()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
