"""What forward calls say, on models of many shapes: rows against hooks of the test's own."""

from __future__ import annotations

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_spectral.models.layout import Ids, prove
from lightning_spectral.models.modes import in_function_forward
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny
from tests.models.architectures import QUICK, D, release

V, T = 64, 16


def ids(batch: int = 8, length: int = T) -> torch.Tensor:
    return tiny.ids(batch, length)


def calls_of(model: nn.Module, step, **options):
    recorder = Recorder(model, find_stacks(model, **options))
    recorder.start()
    step(model)
    calls = recorder.collect()
    notes = dict(recorder.notes)
    recorder.remove()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    return calls, notes


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 48), nn.Linear(48, D)

    def forward(self, x):
        return self.down(input=torch.nn.functional.silu(self.up(x)))  # by keyword


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(D), nn.Linear(D, D), Network()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, tokens, order=(0, 1, 2)):
        x = self.embed(tokens)
        for index in order:
            x = self.layers[index](x)
        return x


def layers_of(call):
    return {key: tuple(rows.shape) for key, rows in call.rows.items()}


def test_a_dropped_layer_is_absent_even_the_first_one():
    (call,), _ = calls_of(Decoder(), lambda model: model(ids(), order=(1, 2)))
    assert layers_of(call) == {f"layers.{n}.mlp.down.post": (128, 48) for n in (1, 2)}
    assert torch.equal(call.ids, ids())


def test_a_looped_layer_is_a_site_at_each_depth():
    model = Decoder(1)
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    model(ids(), order=(0, 0, 0))
    (call,) = recorder.collect()
    assert [(site.key, site.layer) for site in recorder.sites] == [
        ("layers.0.mlp.down.post", 0),
        ("layers.0.mlp.down@1.post", 1),
        ("layers.0.mlp.down@2.post", 2),
    ]
    assert set(call.rows) == {site.key for site in recorder.sites}
    recorder.remove()


def test_a_loop_that_embeds_the_same_ids_again_is_one_call():
    def step(model):
        tokens = ids()

        def twice(tokens):
            x = model.embed(tokens)
            for _ in range(2):
                x = model.layers[0](x + model.embed(tokens))
            return x

        model.forward = twice
        model(tokens)

    (call,), _ = calls_of(Decoder(1), step)
    assert set(call.rows) == {"layers.0.mlp.down.post", "layers.0.mlp.down@1.post"}


def test_parts_of_a_batch_inside_one_forward_are_calls_of_their_own():
    def step(model):
        whole = model.forward
        model.forward = lambda tokens: torch.cat([whole(part) for part in tokens.chunk(2)])
        model(ids())

    calls, _ = calls_of(Decoder(), step)
    assert [torch.equal(call.ids, part) for call, part in zip(calls, ids().chunk(2), strict=True)] == [True, True]
    assert [layers_of(call) for call in calls] == [{f"layers.{n}.mlp.down.post": (64, 48) for n in (0, 1, 2)}] * 2


def test_two_forwards_are_two_calls_each_with_its_own_ids():
    first, second = ids(), ids().flip(0)

    def step(model):
        model(first)
        model(second)

    calls, _ = calls_of(Decoder(), step)
    assert [torch.equal(call.ids, own) for call, own in zip(calls, (first, second), strict=True)] == [True, True]


def test_blocks_called_one_by_one_without_the_root():
    def step(model):
        x = torch.cat([torch.randn(8, 4, D), model.embed(ids())], 1)  # a soft prompt in front
        for layer in model.layers:
            x = layer(x)

    (call,), _ = calls_of(Decoder(), step)
    assert call.layout == "4 before (B, T)"
    places = call.places["layers.0.mlp.down.post"].view(8, 20)
    assert bool((places[:, :4] == -1).all())
    assert torch.equal(places[:, 4:].flatten(), torch.arange(128))


def test_tokens_in_an_order_that_nobody_knows_are_one_sequence():
    """Unpadded by hand: of each text some tokens, one behind another. None of them is a text by itself."""

    def step(model):
        x = model.embed(ids()).flatten(0, 1)[torch.randperm(8 * T)[: 6 * T]]
        for layer in model.layers:
            x = layer(x)

    (call,), _ = calls_of(Decoder(), step)
    assert (call.ids, call.num_sequences, call.sequences_P.tolist()) == (None, 1, [0] * 6 * T)


def test_only_training_forwards_with_gradients_count_and_the_others_are_named():
    def step(model):
        with torch.no_grad():
            model(ids())
        model.eval()
        model(ids())
        model.train()

    calls, notes = calls_of(Decoder(), step)
    assert calls == []
    assert set(notes) == {"no_grad", "eval_mode"}


def test_a_whole_model_that_is_recomputed_is_counted_once():
    def step(model):
        checkpoint(model, ids(), use_reentrant=False).square().mean().backward()

    calls, _ = calls_of(Decoder(), step)
    assert len(calls) == 1


def test_vmap_is_named_and_not_recorded():
    def step(model):
        torch.vmap(lambda row: model(row[None]))(ids())

    calls, notes = calls_of(Decoder(), step)
    assert calls == []
    assert "vmap" in notes["transformed"]


def test_copies_and_files_made_in_the_middle_hold_nothing_of_ours():
    model = Decoder()
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    exported = torch.export.export(model, (ids(),), strict=False).module()
    torch.testing.assert_close(exported(ids()), model(ids()))
    for other in (twin, loaded, exported):
        other(ids())
    assert len(recorder.collect()) == 1  # the model's own
    recorder.remove()
    for other in (twin, loaded):
        hooks = [h for m in other.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        assert not [hook for hook in hooks if type(hook).__module__.startswith("lightning_spectral")]
        assert not hooks or other is loaded  # in a file an empty callable stands for each


@pytest.mark.skipif(release("torch") < (2, 10), reason="exports no module strictly that has a hook, whosever it is")
def test_a_strict_export_in_the_middle_holds_nothing_of_ours():
    model, plain = Decoder(), torch.export.export(Decoder(), (ids(),), strict=True)
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    exported = torch.export.export(model, (ids(),), strict=True)
    assert len(exported.graph.nodes) == len(plain.graph.nodes)
    exported.module()(ids())
    assert recorder.collect() == []
    recorder.remove()


@pytest.mark.skipif(release("transformers") < (5,), reason="experts of one tensor")
@pytest.mark.parametrize("grouped", [True, False])
def test_fused_experts_show_the_rows_that_meet_the_down_projection(monkeypatch, grouped):
    if not grouped:  # the product that transformers brings where torch's does not fit
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    torch.manual_seed(0)
    model = QUICK["Mixtral"][0]()
    seen = {}
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.setdefault("args", args))
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    model(ids())
    (call,) = recorder.collect()
    recorder.remove()
    hidden, index, _ = seen["args"]
    key = "model.layers.0.mlp.experts.down_proj.post"
    rows, places = call.rows[key], call.places[key]
    assert rows.shape == (256, 48)
    assert bool((places >= 0).all())
    of_experts = []
    for gate_up in experts.gate_up_proj:
        gate, up = (hidden[places] @ gate_up.T).chunk(2, -1)
        of_experts.append((torch.nn.functional.silu(gate) * up).detach())
    chosen = torch.stack([(of_expert - rows).abs().amax(-1) < 1e-5 for of_expert in of_experts], 1)
    assert bool((chosen.sum(1) == 1).all())  # fp32 products in another order; no two experts are alike
    assert bool((index[places] == chosen.long().argmax(1)[:, None]).any(1).all())


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Doubled(torch.autograd.Function):
    """The style that takes no context, behind a decorator."""

    @staticmethod
    @decorated
    def forward(x):
        Doubled.inside = not torch.is_grad_enabled(), in_function_forward()
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_the_forward_of_a_function_is_told_from_no_grad():
    Doubled.apply(torch.ones(1, requires_grad=True)).backward()
    assert Doubled.inside == (True, True)
    with torch.no_grad():
        assert not decorated(in_function_forward)()


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_without_tokens_has_rows_and_samples():
    (call,), _ = calls_of(Vision(), lambda model: model(torch.randn(5, 3, 16, 8)))
    assert (call.ids, call.shape, call.num_sequences) == (None, (5, 8), 5)
    assert call.reason
    assert torch.equal(call.sequences_P, torch.arange(40) // 8)
    assert layers_of(call)["blocks.1.mlp.down.post"] == (40, 48)


LAYOUTS = {
    "(B, T)": lambda x: x,
    "(T, B)": lambda x: x.transpose(0, 1),
    "1 before (B, T)": lambda x: torch.cat([torch.randn(len(x), 1, x.shape[2]), x], 1),
    "3 behind (B, T)": lambda x: torch.cat([x, torch.randn(len(x), 3, x.shape[2])], 1),
    "every 2 (B, T)": lambda x: x[:, ::2],
    "first 5 (B, T)": lambda x: x[:, :5],
}


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_proven_where_shapes_say_nothing(layout, strength):
    torch.manual_seed(0)
    tokens = tiny.ids(16, 16)  # as many sequences as positions
    embedded = torch.randn(V, 64)[tokens]
    x = LAYOUTS[layout](embedded * math.sqrt(64) + strength * math.sqrt(64) * torch.randn(16, 64))
    found = prove(Ids(tokens, embedded), torch.nn.functional.dropout(x, 0.1))
    assert found is not None
    assert found.name == layout
    assert found.agreement > 0.9


@pytest.mark.parametrize("mixed", ["shuffled", "pooled", "noise"])
def test_what_is_no_layout_is_not_proven(mixed):
    torch.manual_seed(0)
    tokens = tiny.ids(16, 16)
    embedded = torch.randn(V, 64)[tokens]
    x = {
        "shuffled": embedded[:, torch.randperm(16)],
        "pooled": (embedded[:, ::2] + embedded[:, 1::2]) / 2,
        "noise": torch.randn(16, 16, 64),
    }[mixed]
    assert prove(Ids(tokens, embedded), x) is None


def test_an_input_of_another_width_is_matched_by_equal_ids():
    torch.manual_seed(0)
    tokens = tiny.ids(16, 16)
    embedded = torch.randn(V, 8)[tokens]
    x = torch.tanh(embedded @ torch.randn(8, 64)) + 0.3 * torch.randn(16, 64)
    for layout, rows in {"(B, T)": x, "(T, B)": x.transpose(0, 1)}.items():
        found = prove(Ids(tokens, embedded), rows)
        assert found is not None
        assert found.name == layout


def test_two_networks_of_one_block_have_records_of_their_own():
    from dataclasses import replace

    from tests.records_factory import spectral

    first = spectral()
    assert (
        replace(first, module="mlp.experts.down_proj").key != replace(first, module="mlp.shared_expert.down_proj").key
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_of_torch_jit_is_named_and_the_rest_is_measured():
    model = Decoder()
    model.layers[1] = torch.jit.trace(model.layers[1], torch.randn(2, T, D))
    found = find_stacks(model)
    assert [site.name for site in found.sites] == ["layers.0.mlp.down", "layers.2.mlp.down"]
    (note,) = found.notes
    assert note.startswith("1 of 3 blocks of `layers` are not measured: it is a program of `torch.jit`")
    (call,), _ = calls_of(model, lambda model: model(ids()))
    assert layers_of(call) == {f"layers.{n}.mlp.down.post": (128, 48) for n in (0, 2)}
    model.layers[0].mlp = torch.jit.trace(Network(), torch.randn(2, T, D))
    assert any("`mlp` is a program of `torch.jit`" in note for note in find_stacks(model).notes)
    with pytest.raises(ValueError, match="It is a program of `torch.jit`"):
        find_stacks(torch.jit.trace(Decoder(), ids()))
