from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as ckpt
from torch.utils.checkpoint import checkpoint

from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
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
    recorder = Recorder(compiled, find_stacks(compiled, sites=("post", "pre")), token_fraction=token_fraction)
    for index in range(6):
        ids = tiny.ids(seed=index)
        if index % 2 == 0:
            recorder.start(seed=index)
        step(compiled, ids)
        passes = recorder.collect()
        assert len(passes) == (index % 2 == 0)
        for forward in passes:
            assert torch.equal(forward.ids, ids)
            assert all(len(rows) == 24 * token_fraction for rows in forward.rows.values())
    assert counter.frame_count == 2  # armed and not
    recorder.remove()


def test_compiled_rows_equal_eager_rows():
    torch._dynamo.reset()
    model = tiny.litgpt()
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    step(model, tiny.ids())
    eager = recorder.collect()[0].rows
    recorder.remove()
    compiled = torch.compile(model, backend="aot_eager")
    recorder = Recorder(compiled, find_stacks(compiled))
    recorder.start()
    step(compiled, tiny.ids())
    for key, rows in recorder.collect()[0].rows.items():
        torch.testing.assert_close(rows, eager[key], rtol=1e-5, atol=1e-6)  # fp32 of another operation order
    recorder.remove()


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "wrapper"])
def test_recomputation_is_not_counted_twice(mode):
    model = tiny.litgpt()
    calls = []
    model.transformer.h[0].mlp.proj.register_forward_pre_hook(lambda *_: calls.append(1))
    recorder = Recorder(model, find_stacks(model))  # before wrapping, as a strategy would
    if mode == "wrapper":
        ckpt.apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "Block")
    else:
        for block in model.transformer.h:
            inner = block.forward
            block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=mode == "reentrant", **k)
    for seed in range(3):
        recorder.start()
        step(model, tiny.ids(seed=seed))
        assert len(recorder.collect()) == 1
    assert len(calls) == 6, "the test must recompute"
    recorder.remove()


def test_thinned_positions_cover_every_sequence_and_depend_on_the_seed_only():
    model = tiny.litgpt()
    recorder = Recorder(model, find_stacks(model, sites=("post", "pre")), token_fraction=0.25)

    def kept(seed: int) -> torch.Tensor:
        recorder.start(seed=seed)
        model(tiny.ids(batch=4, length=16))
        (call,) = recorder.collect()
        places = {tuple(places.tolist()) for places in call.places.values()}
        assert len(places) == 1  # the same for all sites
        return next(iter(call.places.values()))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kept(1)
    assert torch.equal(torch.get_rng_state(), before)  # draws from a generator of its own
    torch.manual_seed(123)
    assert torch.equal(kept(1), first)
    assert not torch.equal(kept(2), first)
    assert torch.bincount(first // 16, minlength=4).tolist() == [4, 4, 4, 4]
    assert all(0 <= position % 16 // 4 == index % 4 for index, position in enumerate(first.tolist()))
    recorder.remove()


def test_thinned_rows_are_rows_of_the_whole():
    model = tiny.litgpt()
    calls = {}
    for share in (1.0, 0.5):
        recorder = Recorder(model, find_stacks(model), token_fraction=share)
        recorder.start(seed=3)
        model(tiny.ids())
        (calls[share],) = recorder.collect()
        recorder.remove()
    for key, whole in calls[1.0].rows.items():
        assert torch.equal(calls[0.5].rows[key], whole[calls[0.5].places[key]])


def test_a_dropped_network_is_absent_and_the_others_are_there():
    model = tiny.litgpt()
    recorder = Recorder(model, find_stacks(model))
    model.transformer.h[0].mlp.forward = lambda x: x
    recorder.start()
    model(tiny.ids())
    (call,) = recorder.collect()
    assert list(call.rows) == ["transformer.h.1.mlp.proj.post"]
    recorder.remove()


def test_a_slice_of_the_features_is_noted_and_left_out():
    model = tiny.litgpt()
    for block in model.transformer.h:
        block.mlp.proj.in_features = 128  # what a hand-cut layer of two ranks would declare
        block.mlp.fc.out_features = 128
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    model(tiny.ids())
    (call,) = recorder.collect()
    assert not call.rows
    assert "64 of its 128 features" in recorder.notes["slice"]
    recorder.remove()


def test_a_failed_forward_is_left_out_and_nothing_is_left_after_removal():
    model = tiny.litgpt()
    recorder = Recorder(model, find_stacks(model))
    recorder.start()

    def fail(module, args):
        raise RuntimeError("out of memory")

    handle = model.transformer.h[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            model(tiny.ids())
    finally:
        handle.remove()
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        model(tiny.ids(seed=1))  # a retry inside the handler
    (call,) = recorder.collect()
    assert torch.equal(call.ids, tiny.ids(seed=1))
    assert "ended in an exception" in recorder.notes["failed"]
    recorder.remove()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_rows_are_freed_with_their_calls_and_not_by_the_garbage_collector():
    """A cycle of references kept every micro-batch of a window alive: 160 MB each on a GPU."""
    model = tiny.litgpt()
    recorder = Recorder(model, find_stacks(model))
    held: list[weakref.ref] = []
    gc.collect()
    gc.disable()
    try:
        recorder.start(training=False)
        model(tiny.ids(2, 8))
        calls = recorder.collect()
        held += [weakref.ref(rows) for call in calls for rows in call.rows.values()]
        assert held
        del calls
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
        recorder.remove()
