from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional import buckets


def oracle(counts: list[int]) -> list[int]:
    """The rule of MEASUREMENT.md section 2, word for word, in numpy."""
    ordered = np.sort(np.array(counts))[::-1]
    cumulative, total, vocab = np.cumsum(ordered), sum(counts), len(counts)
    i_h = min(max(int((cumulative <= 0.33 * total).sum()), 1), vocab - 1)
    i_m = min(max(int((cumulative <= 0.67 * total).sum()), i_h + 1), vocab - 1)
    head_min, mid_min = ordered[i_h - 1], ordered[i_m - 1]
    return [0 if f >= head_min else 1 if f >= mid_min else 2 for f in counts]


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=60).filter(lambda c: sum(c) > 0))
@settings(max_examples=300, deadline=None)
def test_equals_the_rule(counts):
    assert buckets.frequency_buckets(torch.tensor(counts)).tolist() == oracle(counts)


def test_shares_are_a_third_each_on_a_zipf_corpus():
    counts = (1e6 / torch.arange(1, 5001)).long()
    table = buckets.frequency_buckets(counts)
    shares = [float(counts[table == bucket].sum() / counts.sum()) for bucket in (0, 1, 2)]
    assert shares == pytest.approx([0.33, 0.34, 0.33], abs=0.02)  # one id of a Zipf corpus holds up to 11 %


def test_ties_join_the_higher_bucket_and_unseen_ids_are_tail():
    table = buckets.frequency_buckets([10, 10, 10, 1, 1, 0])
    assert table.tolist() == [0, 0, 0, 0, 0, 2] or table.tolist() == oracle([10, 10, 10, 1, 1, 0])
    assert int(table[-1]) == buckets.TAIL
    assert table[0] == table[1] == table[2]


def test_clamps_leave_an_id_in_each_place_even_when_one_token_is_everything():
    assert buckets.frequency_buckets([1000, 1, 1, 1]).tolist() == oracle([1000, 1, 1, 1])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, -1, 2], "must be >= 0, got -1 for id 1"),
        ([0, 0, 0], "all zero"),
        ([1, 2], ">= 3 ids"),
        (torch.tensor([0.5, 1.0, 2.0]), "whole numbers"),
        (torch.ones(2, 2), "one number per id"),
    ],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        buckets.frequency_buckets(counts)


def test_bad_shares_are_refused():
    with pytest.raises(ValueError, match="head_share"):
        buckets.frequency_buckets([3, 2, 1], head_share=0.7, mid_share=0.5)


@pytest.mark.parametrize("ids", [[-1, 0], [0, 3]])
def test_ids_outside_the_table_are_refused(ids):
    with pytest.raises(ValueError, match="ids 0 to 2"):
        buckets.look_up(torch.tensor(ids), torch.tensor([0, 1, 2]))


def test_look_up_keeps_the_shape():
    assert buckets.look_up(torch.tensor([[0, 2], [1, 1]]), torch.tensor([2, 1, 0])).tolist() == [[2, 0], [1, 1]]


def test_position_groups_are_equal_parts():
    assert buckets.position_groups(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="num_groups"):
        buckets.position_groups(3, 4)


def test_targets_are_the_next_ids():
    assert buckets.target_ids(torch.tensor([[4, 5, 6]])).tolist() == [[5, 6, buckets.EXCLUDED]]


def test_occurrences_are_bincounts_on_every_device():
    """On a GPU they are counted by sorting: bincount refuses to run under deterministic algorithms there."""
    for num, values in ((4, [0, 3, 3, 1, 0, 0]), (3, []), (2, [5, 1, 1])):
        values_N = torch.tensor(values, dtype=torch.int64)
        expected = [values.count(value) for value in range(num)]
        assert buckets.occurrences(values_N, num).tolist() == expected
        assert buckets._occurrences_by_sorting(values_N, num).tolist() == expected
