"""Token embeddings that are no `nn.Embedding`: a class of the script's around one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_spectral import observe, read_spectral
from lightning_spectral.models.stacks import find_stacks, is_own_table, num_ids

V, D, B, T = 50, 16, 8, 16


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(V, D))

    def forward(self, tokens):
        return self.W_E[tokens]


class PosEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.randn(T, D) / 10)

    def forward(self, tokens):
        return self.W_pos[: tokens.shape[-1]]


class Unembed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.randn(D, V) / D)

    def forward(self, x):
        return x @ self.W_U


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.embed, self.pos_embed, self.unembed = table, PosEmbed(), Unembed()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens) + self.pos_embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


class Hidden(nn.Module):
    """Of a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D))

    def forward(self, tokens):
        return self.table[tokens]


def records_of(model, path, **arguments):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    with observe(model, 1, out=path, optimizer=optimizer, background=False, **arguments):
        for _ in range(3):
            seen.append(torch.randint(0, V, (B, T)))
            model(seen[-1]).square().mean().backward()
            optimizer.step()
    return read_spectral(path).records, seen


def test_buckets_of_a_matrix_that_looks_ids_up(tmp_path):
    records, seen = records_of(Model(Embed()), tmp_path, counts=torch.arange(V, 0, -1))
    for step, tokens in enumerate(seen):
        head = {r.num_tokens for r in records if (r.step, r.bucket) == (step, "head")}
        assert head == {int((tokens <= 8).sum())}  # the ids that hold a third of the counts


def test_its_length_is_the_vocabulary(tmp_path):
    found = find_stacks(Model(Embed()))
    assert num_ids(found.embedding) == V
    assert set(found.embeddings) == {"embed"}
    with pytest.raises(ValueError, match="embeds 50 token ids but the token counts have 40"):
        observe(Model(Embed()), 1, out=tmp_path, counts=torch.arange(40, 0, -1))
    records, _ = records_of(Model(Embed()), tmp_path, counts="stream")
    assert {r.status for r in records if r.bucket == "head" and r.step == 0} == {"not_matched"}


@pytest.mark.parametrize("other", [PosEmbed(), Unembed(), Hidden(), nn.Linear(4, 4), nn.Embedding(4, 4)])
def test_what_is_none(other):
    assert not is_own_table(other)


def test_a_table_of_another_name_is_asked_for(tmp_path):
    counts = torch.arange(V, 0, -1)
    with pytest.warns(UserWarning, match=r"no table was found: name it \(`embedding='\*.wte'`\)"):
        records, _ = records_of(Model(Hidden()), tmp_path / "a", counts=counts)
    assert {r.status for r in records if r.bucket == "head"} == {"not_matched"}
    records, seen = records_of(Model(Hidden()), tmp_path / "b", counts=counts, embedding="embed")
    head = {r.num_tokens for r in records if (r.step, r.bucket) == (0, "head")}
    assert head == {int((seen[0] <= 8).sum())}
