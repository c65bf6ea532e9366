"""Padding and targets are found in batches of any kind, beside the ids that the model was given."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_spectral.probe.adapters import BatchAdapter, ids_in

IDS = torch.arange(1, 33).view(4, 8)
REAL = torch.arange(8) < torch.tensor([8, 5, 3, 1]).unsqueeze(1)
MASK = REAL.long()
LABELS = torch.where(REAL, IDS, -100)
Pair = namedtuple("Pair", ["input_ids", "attention_mask"])


@dataclass
class Batch:
    tokens: Tensor
    mask: Tensor


BATCHES: dict[str, Any] = {
    "dict": {"input_ids": IDS, "attention_mask": MASK},
    "dict, another order": {"attention_mask": MASK, "labels": IDS, "input_ids": IDS},
    "labels": {"input_ids": IDS, "labels": LABELS},
    "tuple with a mask": (IDS, MASK),
    "tuple with a bool mask": (IDS, REAL),
    "tuple of three": (IDS, MASK, LABELS),
    "tuple with labels": (IDS, LABELS),
    "named tuple": Pair(IDS, MASK),
    "dataclass": Batch(IDS, REAL),
    "nested": {"meta": {"n": torch.ones(4, 8)}, "text": {"input_ids": IDS, "attention_mask": MASK}},
    "list in a dict": {"x": [IDS, MASK]},
    "inverted": {"input_ids": IDS, "padding_mask": ~REAL},
    "mask with a column more": {
        "input_ids": torch.cat([IDS, IDS[:, :1]], 1),
        "mask": torch.cat([MASK, MASK[:, :1]], 1),
    },
}


@pytest.mark.parametrize("name", BATCHES)
def test_padding_is_found(name: str) -> None:
    mask = BatchAdapter().mask(BATCHES[name], IDS, IDS.shape)
    assert mask is not None
    assert torch.equal(mask, REAL)


@pytest.mark.parametrize(
    "batch",
    [IDS, (IDS,), {"input_ids": IDS}, (IDS, IDS), {"input_ids": IDS, "labels": IDS}, {"a": 3, "b": "text"}, None],
)
def test_a_batch_that_does_not_say(batch: Any) -> None:
    assert BatchAdapter().mask(batch, IDS, IDS.shape) is None


def test_each_of_two_sequences_has_its_own_mask() -> None:
    other, other_mask = IDS.flip(0), MASK.flip(0)
    batch = {"input_ids": IDS, "attention_mask": MASK, "input_ids_b": other, "attention_mask_b": other_mask}
    chosen = {"chosen_input_ids": IDS, "chosen_attention_mask": MASK}
    rejected = {"rejected_input_ids": other, "rejected_attention_mask": other_mask}
    adapter = BatchAdapter()
    for ids, mask in ((IDS, MASK), (other, other_mask)):
        assert torch.equal(adapter.mask(batch, ids, ids.shape), mask.bool())
        nested = {"a": {"ids": IDS, "mask": MASK}, "b": {"ids": other, "mask": other_mask}}
        assert torch.equal(adapter.mask(nested, ids, ids.shape), mask.bool())
    both = {**chosen, **rejected}
    assert torch.equal(adapter.mask(both, IDS, IDS.shape), REAL)
    assert torch.equal(adapter.mask(both, other, other.shape), REAL.flip(0))


def test_a_mask_fn_comes_first_and_must_fit() -> None:
    assert torch.equal(BatchAdapter(lambda batch: ~REAL).mask(BATCHES["dict"], IDS, IDS.shape), ~REAL)
    assert BatchAdapter(lambda batch: None).mask(BATCHES["dict"], IDS, IDS.shape) is None
    longer = torch.cat([IDS, IDS[:, :1]], 1)
    assert torch.equal(BatchAdapter(lambda batch: batch != 5).mask(longer, IDS, IDS.shape), IDS != 5)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) but the model was given ids of shape \(4, 8\)"):
        BatchAdapter(lambda batch: torch.ones(2, 2)).mask(IDS, IDS, IDS.shape)


def test_targets() -> None:
    adapter, longer = BatchAdapter(), torch.cat([IDS, IDS[:, :1]], 1)
    assert torch.equal(adapter.targets(longer, IDS, IDS.shape), longer[:, 1:])
    assert torch.equal(adapter.targets((IDS, IDS + 1), IDS, IDS.shape), IDS + 1)
    assert adapter.targets((IDS, MASK), IDS, IDS.shape) is None
    assert adapter.targets(IDS, IDS, IDS.shape) is None
    assert adapter.targets(longer + 1, IDS, IDS.shape) is None  # other ids


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IDS, 1),
        ((IDS, IDS), 1),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": MASK, "position_ids": IDS}, 1),
        ({"chosen_input_ids": IDS, "rejected_input_ids": IDS}, 2),
        ({"web": IDS, "code": IDS}, 2),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 8])}, 1),
        ((torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), 0),
        ({"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.zeros(4, 8, dtype=torch.long)}, 0),
    ],
)
def test_ids_of_a_batch(batch: Any, expected: int) -> None:
    assert len(ids_in(batch)) == expected
