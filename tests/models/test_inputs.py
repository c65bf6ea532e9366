"""Which row is which token, on inputs of many shapes: the expected rows stand beside each way of arranging them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral.models.layout import Ids, prove
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models import tiny
from tests.models.test_calls import Block

B, T, D = 6, 12, 16
NONE = -1  # a row that is no token


def real() -> Tensor:
    """Which positions hold tokens: sequences of 12, 7, 9, 12, 4 and 10."""
    return torch.arange(T) < torch.tensor([12, 7, 9, 12, 4, 10])[:, None]


def ids() -> Tensor:
    return tiny.ids(B, T).clamp(min=1)


def padded() -> Tensor:
    return torch.where(real(), ids(), 0)


class Model(nn.Module):
    """Two blocks behind whatever arrangement."""

    def __init__(self, arrange: Callable) -> None:
        super().__init__()
        self.embed, self.prefix = nn.Embedding(tiny.VOCAB, D), nn.Parameter(torch.randn(3, D))
        self.virtual = nn.Embedding(6, D)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.arrange = arrange

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seqlens=None):
        arguments = (input_ids, attention_mask, position_ids, cu_seqlens)
        return self.run(self.arrange(self, *(value for value in arguments if value is not None)))


@dataclass(frozen=True)
class Case:
    """How rows are arranged, what the model is called with, the id of each row, and of which sequences they are."""

    arrange: Callable
    inputs: dict[str, Tensor]
    rows: Tensor
    num_sequences: int = B
    layout: str | None = None


def before(x: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([rows.expand(len(x), *rows.shape), x], 1)


def with_none(tokens: Tensor, num_before: int, num_behind: int = 0) -> Tensor:
    left, right = tokens.new_full((B, num_before), NONE), tokens.new_full((B, num_behind), NONE)
    return torch.cat([left, tokens, right], 1)


def image_in_place(model: Model, tokens: Tensor) -> Tensor:
    """What a placeholder (id 5) stands for is put in its place."""
    x = model.embed(tokens)
    return torch.where((tokens == 5)[..., None], torch.randn_like(x), x)


def with_images() -> Tensor:
    tokens = torch.where(ids() == 5, 6, ids())
    tokens[:, 2:6] = 5
    return tokens


STARTS = torch.tensor([0, 12, 30, 41, 72])
PLACES = torch.cat([torch.arange(length) for length in STARTS.diff().tolist()])

CASES = {
    "one after the other, packed, with positions": Case(
        lambda m, tokens, positions: m.embed(tokens),
        {"input_ids": ids().flatten(), "position_ids": PLACES},
        ids().flatten(),
        num_sequences=4,
    ),
    "packed in one row, with bounds": Case(
        lambda m, tokens, bounds: m.embed(tokens),
        {"input_ids": ids().reshape(1, -1), "cu_seqlens": STARTS},
        ids().flatten(),
        num_sequences=4,
    ),
    "padding is taken out behind the embedding": Case(
        lambda m, tokens, mask: m.embed(tokens)[mask.bool()],
        {"input_ids": padded(), "attention_mask": real().long()},
        padded()[real()],
        layout="unpadded",
    ),
    "padding is taken out, nobody says where": Case(
        lambda m, tokens: m.embed(tokens)[tokens != 0], {"input_ids": padded()}, padded()[real()], layout="unpadded"
    ),
    "padding is taken out before the embedding": Case(
        lambda m, tokens, mask: m.embed(tokens[mask.bool()]),
        {"input_ids": padded(), "attention_mask": real().long()},
        padded()[real()],
        num_sequences=1,  # rows without bounds or positions are one packed sequence
    ),
    "padding stays, on the left": Case(
        lambda m, tokens, mask: m.embed(tokens),
        {"input_ids": padded().flip(1), "attention_mask": real().flip(1).long()},
        torch.where(real(), padded(), NONE).flip(1).flatten(),
    ),
    "three registers": Case(
        lambda m, tokens: before(m.embed(tokens), m.prefix), {"input_ids": ids()}, with_none(ids(), 3).flatten()
    ),
    "registers behind, and padding": Case(
        lambda m, tokens, mask: torch.cat([m.embed(tokens), m.prefix.expand(B, 3, D)], 1),
        {"input_ids": padded(), "attention_mask": real()},
        with_none(torch.where(real(), padded(), NONE), 0, 3).flatten(),
    ),
    "virtual tokens of a table of their own": Case(
        lambda m, tokens: torch.cat([m.virtual(torch.arange(6).expand(B, 6)), m.embed(tokens)], 1),
        {"input_ids": ids()},
        with_none(ids(), 6).flatten(),
    ),
    "virtual tokens that were looked up last": Case(
        lambda m, tokens: before(m.embed(tokens), m.virtual(torch.tensor([3, 1, 4, 2]))),
        {"input_ids": ids()},
        with_none(ids(), 4).flatten(),
    ),
    "image features in place of one id": Case(
        image_in_place, {"input_ids": with_images()}, torch.where(with_images() == 5, NONE, with_images()).flatten()
    ),
    "sequences last, all the way": Case(
        lambda m, tokens: m.embed(tokens),
        {"input_ids": ids().T.contiguous()},
        ids().T.flatten(),
        num_sequences=T,  # nothing says that they were turned: rows and tokens agree all the same
    ),
    "sequences last, turned by a view": Case(
        lambda m, tokens: m.embed(tokens), {"input_ids": ids().T}, ids().T.flatten(), layout="(T, B)"
    ),
    "turned behind the embedding": Case(
        lambda m, tokens: m.embed(tokens).transpose(0, 1), {"input_ids": ids()}, ids().T.flatten(), layout="(T, B)"
    ),
    "turned and flattened": Case(
        lambda m, tokens: m.embed(tokens).transpose(0, 1).reshape(-1, D),
        {"input_ids": ids()},
        ids().T.flatten(),
        layout="(T, B)",
    ),
    "choices": Case(
        lambda m, tokens: m.embed(tokens.flatten(0, 1)),
        {"input_ids": ids().reshape(B // 2, 2, T)},
        ids().flatten(),
    ),
    "choices, embedded as they are": Case(
        lambda m, tokens: m.embed(tokens).flatten(0, 1), {"input_ids": ids().reshape(B // 2, 2, T)}, ids().flatten()
    ),
    "the last token is cut off": Case(
        lambda m, tokens: m.embed(tokens)[:, :-1],
        {"input_ids": ids()},
        ids()[:, :-1].flatten(),
        layout="first 11 (B, T)",
    ),
    "scaled, with positions added": Case(
        lambda m, tokens: 4 * m.embed(tokens) + torch.randn(T, D), {"input_ids": ids()}, ids().flatten()
    ),
}

REFUSED = {
    "every token twice": lambda m, tokens: m.embed(tokens).repeat_interleave(2, 1),
    "sequences in another order": lambda m, tokens: m.embed(tokens)[torch.randperm(B)],
    "neighbours mixed": lambda m, tokens: (m.embed(tokens) + m.embed(tokens).roll(1, 1)) / 2,
    "looked up without a module": lambda m, tokens: nn.functional.embedding(tokens, m.embed.weight),
    "one-hot": lambda m, tokens: nn.functional.one_hot(tokens, tiny.VOCAB).float() @ m.embed.weight,
}


def call_of(arrange: Callable, inputs: dict[str, Tensor]):
    torch.manual_seed(0)
    model = Model(arrange)
    recorder = Recorder(model, find_stacks(model))
    recorder.start()
    model(**inputs)
    (call,) = recorder.collect()
    recorder.remove()
    assert len(call.rows) == 2
    return call


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_token_that_it_is_of(name):
    case = CASES[name]
    call = call_of(case.arrange, case.inputs)
    assert not call.unmatched
    for key in call.rows:
        places = call.places[key]
        tokens = torch.where(places >= 0, call.ids.flatten()[places.clamp(min=0)], NONE)
        if call.mask is not None:
            tokens = torch.where((places >= 0) & ~call.mask.flatten()[places.clamp(min=0)], NONE, tokens)
        assert torch.equal(tokens, case.rows)
    assert call.num_sequences == case.num_sequences
    assert case.layout is None or call.layout == case.layout
    assert call.agreement > 0.9


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proven_is_pooled_and_says_why(name):
    call = call_of(REFUSED[name], {"input_ids": ids()})
    assert call.ids is None
    assert call.layout == ""
    assert call.reason


def test_packed_sequences_begin_where_positions_begin_again():
    for name in ("one after the other, packed, with positions", "packed in one row, with bounds"):
        call = call_of(CASES[name].arrange, CASES[name].inputs)
        expected = torch.repeat_interleave(torch.arange(4), STARTS.diff())
        assert torch.equal(call.sequences_P, expected)


@pytest.mark.parametrize(("faint", "dropout"), [(0.0, 0.1), (0.15, 0.3)])
def test_an_id_that_is_embedded_as_next_to_nothing_is_a_token_all_the_same(faint, dropout):
    """As `padding_idx` makes it, under dropout and positions: its rows cannot agree, and yet hold nothing else."""
    proven = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        zipf = 1 / torch.arange(1.0, tiny.VOCAB + 1)
        tokens = torch.multinomial(zipf, 8 * 16, replacement=True, generator=g).view(8, 16)
        table = torch.randn(tiny.VOCAB, D, generator=g)
        table[0] *= faint
        rows = table[tokens] + torch.randn(16, D, generator=g)
        kept = torch.rand(rows.shape, generator=g) > dropout
        layout = prove(Ids(tokens, table[tokens]), rows * kept / (1 - dropout))
        if layout is not None:
            assert layout.tokens_N.tolist() == list(range(8 * 16)), seed
            proven += 1
    assert proven >= 19
