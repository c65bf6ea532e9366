"""Which forward calls of an evaluation are over its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.batch_calls import of_batch


def call(ids: Tensor | None, stack: str = "layers") -> ForwardCall:
    shape = (2, 3) if ids is None else tuple(ids.shape)
    return ForwardCall(stack, shape, ids, torch.zeros(1, dtype=torch.int64), 1, {}, {})


def counted(calls: list[ForwardCall], batch: Any) -> list[int]:
    kept, _ = of_batch(calls, batch)
    return [next(place for place, one in enumerate(calls) if one is mine) for mine in kept]


BATCH = torch.arange(20).view(2, 10) * 7 % 11


def grown(num_columns: list[int]) -> list[ForwardCall]:
    return [call(BATCH[:, :columns]) for columns in num_columns]


def test_the_batch_with_and_without_its_last_column() -> None:
    assert counted([call(BATCH[:, :-1])], BATCH) == [0]
    assert counted([call(BATCH)], {"input_ids": BATCH}) == [0]


def test_text_that_is_generated_is_left_out_but_for_its_prompt() -> None:
    prompt = BATCH[:, :4]
    steps = [call(prompt), call(torch.ones(2, 1, dtype=torch.int64)), call(torch.zeros(2, 1, dtype=torch.int64))]
    kept, notes = of_batch(steps, {"input_ids": prompt})
    assert kept == steps[:1]
    assert list(notes) == ["generated"]
    assert counted(grown([4, 5, 6]), BATCH) == []  # from the beginnings of the batch's texts: none is the batch
    assert counted([call(BATCH[:, :-1]), *grown([4, 5, 6])], BATCH) == [0]


def test_a_fixed_prompt_and_a_second_pass_are_left_out() -> None:
    fixed = call(torch.full((3, 5), 2))
    calls = [call(BATCH[:, :-1]), fixed, call(BATCH[:, :-1].clone())]
    kept, notes = of_batch(calls, BATCH)
    assert kept == calls[:1]
    assert list(notes) == ["other_ids"]


def test_what_is_not_known_to_be_of_the_batch_counts_where_nothing_is() -> None:
    made = [call(BATCH * 2), call(None)]  # tokenised in the step; without ids
    assert counted(made, {"text": ["a", "b"]}) == [0, 1]
    assert counted([call(None), call(BATCH)], BATCH) == [1]


def test_each_stack_by_itself() -> None:
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.int64), BATCH[:, :-1]], 1)
    calls = [call(BATCH, "encoder"), call(shifted, "decoder")]
    assert counted(calls, {"input_ids": BATCH, "labels": BATCH}) == [0, 1]
