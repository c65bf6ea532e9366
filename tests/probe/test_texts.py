"""Copies of a text are one sequence: of one shard, counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_spectral as ls
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.ranks_of import HARD_RANK_ACROSS
from lightning_spectral.probe.texts import Texts
from lightning_spectral.records import SpectralRecord, read_spectral

VOCAB, DIM, LENGTH = 50, 6, 20


def call_of(ids: Tensor | None, num_sequences: int = 0) -> ForwardCall:
    count = len(ids) if ids is not None else num_sequences
    shape = tuple(ids.shape) if ids is not None else (count, 4)
    return ForwardCall("", shape, ids, torch.arange(count).repeat_interleave(shape[-1]), count, {}, {})


def numbered(texts: Texts, call: ForwardCall) -> list[list[int]]:
    return [part.int().tolist() for part in texts.of(call)]


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_texts_are_numbered_as_they_come_and_known_again() -> None:
    texts, ids = Texts(), drawn(4)
    assert numbered(texts, call_of(ids[[0, 1, 0]])) == [[0, 1, 0], [1, 1, 0]]
    assert numbered(texts, call_of(None, 2)) == [[2, 3], [1, 1]]  # hidden states: no text is known
    assert numbered(texts, call_of(ids[[2, 1, 2, 3]])) == [[4, 1, 4, 5], [1, 0, 0, 1]]
    assert numbered(Texts(), call_of(ids)) == [[0, 1, 2, 3], [1, 1, 1, 1]]


def test_one_question_with_several_answers_is_one_text() -> None:
    ids = drawn(2)
    answers = torch.cat([ids[:1].expand(3, -1)[:, : LENGTH // 2], drawn(3, 1)[:, : LENGTH // 2]], 1)
    assert numbered(Texts(), call_of(torch.cat([answers, ids]))) == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 1]]
    swapped = ids[:1].clone()
    swapped[0, [0, 1, 2, 3]] = swapped[0, [1, 0, 3, 2]]
    short = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 9, 9]])
    for pair in (torch.cat([ids[:1], swapped]), short):
        assert numbered(Texts(), call_of(pair)) == [[0, 1], [1, 1]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.mix = nn.GRU(DIM, DIM, batch_first=True)  # rows of a sequence have something in common
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM)) for _ in range(2)]
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + 0.1 * self.mix(self.embed(ids))[0]
        for block in self.blocks:
            x = x + block(x)
        return x


def record_of(path: Path, batches: list[Tensor], **more: Any) -> SpectralRecord:
    net = Net()
    with ls.observe(net, 1, out=path, background=False, **more) as probe:
        for ids in batches:
            net(ids).sum().backward()
        probe.step()
    return read_spectral(path).records[-1]


@pytest.mark.parametrize("copies", ["beside", "behind", "in a second pass"])
def test_ranks_of_a_batch_and_of_its_copies(tmp_path: Path, copies: str) -> None:
    ids = drawn(15)
    batches = {
        "beside": [ids.repeat_interleave(2, 0)], "behind": [ids.repeat(2, 1)], "in a second pass": [ids, ids]
    }[copies]  # fmt: skip
    once, twice = record_of(tmp_path / "once", [ids]), record_of(tmp_path / "twice", batches)
    assert (once.num_sequences, twice.num_sequences) == (15, 15)
    assert twice.num_tokens == 2 * once.num_tokens
    assert twice.extra[HARD_RANK_ACROSS] == pytest.approx(once.extra[HARD_RANK_ACROSS], rel=1e-5)
    assert twice.hard_rank == pytest.approx(once.hard_rank, rel=1e-5)
