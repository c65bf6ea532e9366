"""The layout of a model of any size, found without its blocks; and models from weights alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral.models.meta import without_memory
from lightning_spectral.models.rehearsal import rehearse
from lightning_spectral.models.skeleton import skeleton
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny


def layouts(build) -> dict[str, str]:
    with without_memory():
        model = build()
    assert all(p.is_meta for p in model.parameters() if p.numel() > 100)  # what is small may be real
    return {name: row.layout for name, row in rehearse(model, find_stacks(model)).items()}


class TimeFirst(nn.Module):
    """torch's own convention: (T, B, D) inside."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(tiny.VOCAB, 16), nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.encoder(x.transpose(0, 1))


class Registers(TimeFirst):
    """Five learned rows before the tokens, sequences first."""

    def __init__(self) -> None:
        super().__init__(batch_first=True)
        self.registers = nn.Parameter(torch.empty(5, 16))

    def forward(self, ids):
        x = torch.cat([self.registers.expand(len(ids), 5, 16), self.tok(ids)], 1)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Opaque(Registers):
    def forward(self, ids):
        x = self.tok(ids).cumsum(1)  # every row holds all tokens before it
        for layer in self.encoder.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny.litgpt, {"transformer.h": "(B, T)"}),
        (lambda: tiny.hugging_face("llama"), {"model.layers": "(B, T)"}),
        (TimeFirst, {"encoder.layers": "(T, B)"}),
        (Registers, {"encoder.layers": "5 before (B, T)"}),
        (Opaque, {"encoder.layers": ""}),
    ],
    ids=["litgpt", "llama", "time first", "registers", "mixed"],
)
def test_the_layout_of_a_model_without_memory(build, expected):
    assert layouts(build) == expected


def test_both_stacks_of_an_encoder_decoder():
    import transformers

    from tests.models.architectures import T5

    def build():
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))

    assert layouts(build) == {"encoder.block": "(B, T)", "decoder.block": "(B, T)"}


def test_a_model_that_needs_more_than_ids_says_so():
    class Needs(TimeFirst):
        def forward(self, ids, *, scale):
            return super().forward(ids) * scale

    with without_memory():
        model = Needs()
    (row,) = rehearse(model, find_stacks(model)).values()
    assert row.layout == ""
    assert "TypeError" in row.reason
    assert "scale" in row.reason


def test_nothing_of_the_caller_is_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with without_memory():
        model = tiny.litgpt()
    rehearse(model, find_stacks(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def sites_of(model: nn.Module) -> list[tuple]:
    return [(site.name, site.site, site.layer, site.width) for site in find_stacks(model, sites=("pre", "post")).sites]


@pytest.mark.parametrize("name", ["gpt2", "llama", "pythia", "phi", "opt"])
def test_weights_alone_say_the_same_as_the_code(name):
    """GPT-2 keeps its matrices transposed: their biases say so."""
    model = tiny.hugging_face(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sites_of(skeleton(shapes)) == sites_of(model)
    in_no_order = skeleton({key: shapes[key] for key in sorted(shapes)})
    assert {site[:1] + site[2:] for site in sites_of(in_no_order)} == {site[:1] + site[2:] for site in sites_of(model)}


def test_weights_of_experts_and_of_litgpt_say_the_same_as_the_code():
    for model in (tiny.litgpt("LLaMAMoE"), tiny.litgpt("GptNeoxMLP")):
        from_weights = skeleton({key: tuple(value.shape) for key, value in model.state_dict().items()})
        assert sites_of(from_weights) == sites_of(model)
