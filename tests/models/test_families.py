from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral.models.families import Hint
from lightning_spectral.models.linears import widths_of
from lightning_spectral.models.names import WRAPPERS, clean_name, unwrapped
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny

LITGPT = {"GptNeoxMLP": 64, "LLaMAMLP": 48, "GemmaMLP": 48}
HUGGING_FACE = {"gpt2": 64, "llama": 48, "mistral": 48, "qwen2": 48, "qwen3": 48, "pythia": 48, "phi": 48, "opt": 48}


def call_of(model: nn.Module, sites=("post", "pre")):
    recorder = Recorder(model, find_stacks(model, sites=sites))
    recorder.start(training=False)
    ids = tiny.ids()
    with torch.no_grad():
        model(ids)
    (call,) = recorder.collect()
    recorder.remove()
    assert torch.equal(call.ids, ids)
    assert call.layout == "(B, T)"
    assert not call.unmatched
    return call


@pytest.mark.parametrize("mlp", LITGPT)
def test_dense_litgpt(mlp):
    call = call_of(tiny.litgpt(mlp))
    assert [tuple(rows.shape) for rows in call.rows.values()] == [(24, LITGPT[mlp])] * 4


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name):
    call = call_of(tiny.hugging_face(name).eval())
    assert [tuple(rows.shape) for rows in call.rows.values()] == [(24, HUGGING_FACE[name])] * 4


def test_post_is_what_the_down_projection_gets_and_pre_what_the_up_projection_gives():
    model = tiny.litgpt("GptNeoxMLP")
    call = call_of(model)
    pre = call.rows["transformer.h.1.mlp.fc.pre"]
    post = torch.nn.functional.gelu(pre, approximate=model.config.gelu_approximate)
    assert torch.equal(call.rows["transformer.h.1.mlp.proj.post"], post)
    assert model.transformer.h[1].mlp.fc.out_features == pre.shape[1]


def test_experts_get_the_rows_of_their_own_tokens():
    call = call_of(tiny.litgpt("LLaMAMoE"))
    for layer in (0, 1):
        keys = [key for key in call.rows if f".h.{layer}." in key and key.endswith("post")]
        tokens = torch.cat([call.places[key] for key in keys])
        assert all(len(call.places[key]) == len(call.rows[key]) for key in keys)
        assert len(tokens) == 48  # each of the 24 tokens goes to two experts


def test_expert_rows_are_matched_with_the_right_tokens():
    """Equal tokens at layer 0 give equal rows, so the row of a token tells which token it is."""
    model = tiny.litgpt("LLaMAMoE", n_layer=1, rotary_percentage=0.0)
    seen = {}
    hook = model.transformer.h[0].mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    call = call_of(model, sites=("post",))
    hook.remove()
    for key, rows in call.rows.items():
        expert = model.transformer.h[0].mlp.experts[int(key.split(".")[5])]
        x = seen["x"][call.places[key]]
        torch.testing.assert_close(rows, (torch.nn.functional.silu(expert.fc_1(x)) * expert.fc_2(x)).detach())


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(tiny.VOCAB, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 40), "down": nn.Linear(40, 16)}) for _ in range(2)
        )

    def forward(self, ids):
        x = self.tok(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return x


@pytest.mark.parametrize("arguments", [{}, {"modules": ["blocks.*.down"]}, {"hints": [Hint("mine", "blocks.*.down")]}])
def test_structure_a_glob_and_a_hint_find_the_same(arguments):
    found = find_stacks(Custom(), sites=("post", "pre"), **arguments)
    assert [(site.name, site.layer, site.site, site.width) for site in found.sites] == [
        (f"blocks.{layer}.{name}", layer, site, 40)
        for layer in (0, 1)
        for name, site in (("down", "post"), ("up", "pre"))
    ]
    assert [(stack.name, stack.num_blocks) for stack in found.stacks] == [("blocks", 2)]
    assert isinstance(found.embedding, nn.Embedding)


class Opaque(nn.Module):
    """Projections of which no shape says that they belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Opaque, {}, "No feed-forward network.*`Opaque`.*modules=.*'first', 'second'"),
        (nn.Flatten, {}, "It has no linear module"),
        (Custom, {"modules": ["nope.*"]}, "No module matches `nope.*`.*blocks.0.up"),
        (Custom, {"modules": ["blocks.?"]}, "`blocks.0` is a ModuleDict, not a projection"),
        (Custom, {"embedding": "nope"}, "embedding `nope`.*'tok'"),
        (Custom, {"sites": ["middle"]}, "`post`, `pre` or both"),
        (Opaque, {"modules": ["second"], "sites": ["pre"]}, "No up projection was found for `second`"),
    ],
)
def test_what_cannot_be_found_is_named_with_the_remedy(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_stacks(model(), **arguments)


def test_names_lose_their_wrappers():
    assert clean_name("_forward_module.module._orig_mod.transformer.h.0") == "transformer.h.0"
    assert clean_name("module.transformer.h.0") == "transformer.h.0"
    assert clean_name("gpt._fsdp_wrapped_module.h.0._checkpoint_wrapped_module.mlp") == "gpt.h.0.mlp"
    assert clean_name("_orig_mod") == ""


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_taken_off_names_and_modules_alike(wrapper: str) -> None:
    """One list serves names, widths of linears and the comparison of blocks."""
    holder = nn.Module()
    holder.add_module(wrapper, nn.Linear(3, 7))
    twice = nn.Module()
    twice.add_module("_orig_mod", holder)
    assert clean_name(f"blocks.0.{wrapper}.fc") == "blocks.0.fc"
    assert unwrapped(twice) is holder._modules[wrapper]
    assert widths_of(twice) == (3, 7)


def test_compiled_models_have_the_same_names():
    plain, compiled = tiny.litgpt(), torch.compile(tiny.litgpt(), backend="eager")
    names = [site.key for site in find_stacks(plain).sites]
    assert [site.key for site in find_stacks(compiled).sites] == names
