"""Token counts that are not those of the training are spoken of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_spectral as ls
from lightning_spectral.functional.buckets import frequency_buckets
from lightning_spectral.probe.row_shares import unlike_counts

COUNTS = torch.tensor([300, 200, 200, 100, 100, 100, 0, 0])  # TAIL: ids 3 to 7, three tenths of the tokens
TABLE = frequency_buckets(COUNTS)


def test_shares_of_rows_against_those_of_the_counts() -> None:
    assert TABLE.tolist() == [0, 1, 1, 2, 2, 2, 2, 2]
    ids = torch.tensor([[0, 1, 7, 7, 7, 7, 3, 2]])
    rows = {"head": 250, "mid": 125, "tail": 625}
    said = unlike_counts(rows, TABLE, COUNTS, ids)
    assert said.startswith("62% of the rows are of rare tokens (TAIL) where `counts` say 30%: token id 7 alone is 50%")
    assert "has the count 0. If it masks or fills, give it one (`counts[7] = counts.max()`)" in said
    assert "counts of other text, or of another tokenizer." in unlike_counts(rows, TABLE, COUNTS, None)
    assert unlike_counts({"head": 500, "mid": 100, "tail": 400}, TABLE, COUNTS, ids) == ""
    assert unlike_counts({"head": 100, "mid": 50, "tail": 250}, TABLE, COUNTS, ids) == ""  # few rows
    assert unlike_counts({"pooled": 5000}, TABLE, COUNTS, ids) == ""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)) for _ in range(2)])
        self.head = nn.Linear(6, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize(("masked", "expected"), [(0.5, 1), (0.0, 0)])
def test_a_mask_token_that_the_counts_do_not_know(tmp_path: Path, masked: float, expected: int) -> None:
    torch.manual_seed(0)
    model, draw = Net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ls.observe(model, 1, out=tmp_path, optimizer=optimizer, counts=COUNTS):
            for _ in range(2):
                ids = torch.multinomial(COUNTS.float(), 800, replacement=True, generator=draw).view(20, 40)
                seen = torch.where(torch.rand(ids.shape, generator=draw) < masked, 7, ids)
                F.cross_entropy(model(seen).flatten(0, 1), ids.flatten()).backward()
                optimizer.step()
    said = [str(one.message) for one in caught if "rare tokens" in str(one.message)]
    assert len(said) == expected
    assert all("token id 7 alone is" in message for message in said)
