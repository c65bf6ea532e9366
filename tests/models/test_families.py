from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral.models.families import clean_name, resolve
from lightning_spectral.models.taps import Taps
from tests.models import tiny

LITGPT = {"GptNeoxMLP": 64, "LLaMAMLP": 48, "GemmaMLP": 48}
HUGGING_FACE = {"gpt2": 64, "llama": 48, "mistral": 48, "qwen2": 48, "qwen3": 48, "pythia": 48, "phi": 48, "opt": 48}


def rows_of(model: nn.Module, sites=("post", "pre")):
    taps = Taps(resolve(model, sites=sites))
    taps.start()
    ids = tiny.ids()
    with torch.no_grad():
        model(ids)
    forward = taps.collect()
    taps.remove()
    assert len(forward) == 1
    assert torch.equal(forward[0].ids_BT, ids)
    return forward[0]


@pytest.mark.parametrize("mlp", LITGPT)
def test_dense_litgpt(mlp):
    forward = rows_of(tiny.litgpt(mlp))
    assert [tuple(rows.shape) for rows in forward.rows.values()] == [(24, LITGPT[mlp])] * 4


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name):
    forward = rows_of(tiny.hugging_face(name).eval())
    assert [tuple(rows.shape) for rows in forward.rows.values()] == [(24, HUGGING_FACE[name])] * 4


def test_post_is_what_the_down_projection_gets_and_pre_what_the_up_projection_gives():
    model = tiny.litgpt("GptNeoxMLP")
    forward = rows_of(model)
    mlp = model.transformer.h[1].mlp
    pre = forward.rows["transformer.h.1.mlp.fc.pre"]
    post = torch.nn.functional.gelu(pre, approximate=model.config.gelu_approximate)
    assert torch.equal(forward.rows["transformer.h.1.mlp.proj.post"], post)
    assert mlp.fc.out_features == pre.shape[1]


def test_experts_get_the_rows_of_their_own_tokens():
    model = tiny.litgpt("LLaMAMoE")
    forward = rows_of(model)
    for layer in (0, 1):
        keys = [key for key in forward.rows if f".h.{layer}." in key and key.endswith("post")]
        tokens = torch.cat([forward.tokens[key] for key in keys])
        assert all(len(forward.tokens[key]) == len(forward.rows[key]) for key in keys)
        # each of the 24 tokens goes to two experts
        assert torch.equal(torch.bincount(tokens, minlength=24), torch.full((24,), 2))


def test_expert_rows_are_matched_with_the_right_tokens():
    """Equal tokens at layer 0 give equal rows, so the row of a token tells which token it is."""
    model = tiny.litgpt("LLaMAMoE", n_layer=1, rotary_percentage=0.0)
    taps = Taps(resolve(model))
    taps.start()
    seen = {}
    hook = model.transformer.h[0].mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tiny.ids())
    hook.remove()
    forward = taps.collect()[0]
    for site in taps.tapped.sites:
        if site.key in forward.rows:
            expert = model.transformer.h[0].mlp.experts[site.expert]
            x = seen["x"][forward.tokens[site.key]]
            expected = torch.nn.functional.silu(expert.fc_1(x)) * expert.fc_2(x)
            torch.testing.assert_close(forward.rows[site.key], expected.detach())


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


def test_any_module_by_glob():
    tapped = resolve(Custom(), modules=["blocks.*.down"])
    assert [(site.name, site.layer) for site in tapped.sites] == [("blocks.0.down", 0), ("blocks.1.down", 1)]
    assert isinstance(tapped.embedding, nn.Embedding)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "No feed-forward site found in `Custom`.*modules="),
        ({"modules": ["nope.*"]}, "No module matches `nope.*`.*blocks.0.up"),
        ({"modules": ["blocks.*.down"], "embedding": "nope"}, "embedding `nope`"),
        ({"modules": ["blocks.*.down"], "sites": ["pre"]}, "names down projections"),
        ({"sites": ["middle"]}, "`post`, `pre` or both"),
    ],
)
def test_what_cannot_be_found_is_named_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(Custom(), **arguments)


def test_names_lose_their_wrappers():
    assert clean_name("_forward_module.module._orig_mod.transformer.h.0") == "transformer.h.0"
    assert clean_name("module.transformer.h.0") == "transformer.h.0"
    assert clean_name("gpt._fsdp_wrapped_module.h.0._checkpoint_wrapped_module.mlp") == "gpt.h.0.mlp"
    assert clean_name("_orig_mod") == ""


def test_compiled_models_are_tapped_from_outside():
    compiled = torch.compile(tiny.litgpt(), backend="eager")
    assert resolve(compiled).root is compiled
