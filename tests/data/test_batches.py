"""The order of the data: a pure function of seed and position, the same for every world size."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.data import batches
from lightning_spectral.data.batches import ResumableLoader, StepBatches, TokenBlocks
from lightning_spectral.data.shards import TokenSequence

SETTINGS = {"seed": 3, "global_batch": 8, "num_steps": 5}


def _steps(num_blocks: int, micro_batch: int, world_size: int) -> list[list[int]]:
    """Blocks of each optimizer step, sorted, over all ranks."""
    steps: list[list[int]] = [[] for _ in range(SETTINGS["num_steps"])]
    for rank in range(world_size):
        batches = StepBatches(num_blocks, **SETTINGS, micro_batch=micro_batch, rank=rank, world_size=world_size)
        assert len(list(batches)) == len(batches)
        for position, batch in enumerate(batches):
            assert len(batch) == micro_batch
            steps[position // batches.accumulation] += batch
    return [sorted(step) for step in steps]


@given(num_blocks=st.integers(1, 40), micro_and_world=st.sampled_from([(8, 1), (1, 1), (2, 2), (1, 4), (4, 2)]))
def test_a_step_sees_the_same_blocks_for_any_world_size(num_blocks: int, micro_and_world: tuple[int, int]) -> None:
    assert _steps(num_blocks, *micro_and_world) == _steps(num_blocks, 8, 1)


def test_an_epoch_sees_every_block_once_and_drops_none() -> None:
    flat = [block for batch in StepBatches(10, **SETTINGS, micro_batch=4) for block in batch]
    assert len(flat) == 40
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_the_order_depends_on_the_seed_only() -> None:
    first = list(StepBatches(30, **SETTINGS, micro_batch=8))
    torch.manual_seed(99)
    assert list(StepBatches(30, **SETTINGS, micro_batch=8)) == first
    assert list(StepBatches(30, **{**SETTINGS, "seed": 4}, micro_batch=8)) != first


def test_a_loader_goes_on_where_its_state_says() -> None:
    blocks = TokenBlocks(np.arange(200, dtype=np.uint16), 10)

    def loader() -> ResumableLoader:
        return ResumableLoader(blocks, StepBatches(len(blocks), **SETTINGS, micro_batch=4))

    whole = [batch.tolist() for batch in loader()]
    first, half = loader(), []
    for batch in first:
        half.append(batch.tolist())
        if len(half) == 3:
            break
    state = first.state_dict()
    assert state == {"position": 3, "accumulation": 2}
    second = loader()
    second.load_state_dict(state)
    assert len(second) == len(whole)  # Lightning counts from the run's beginning
    assert half + [batch.tolist() for batch in second] == whole


def test_a_changed_accumulation_is_refused() -> None:
    blocks = TokenBlocks(np.arange(200, dtype=np.uint16), 10)
    loader = ResumableLoader(blocks, StepBatches(len(blocks), **SETTINGS, micro_batch=4))
    with pytest.raises(ValueError, match=r"made with 4 micro-batches per step on each rank, this run has 2"):
        loader.load_state_dict({"position": 3, "accumulation": 4})


def test_blocks_overlap_by_their_target_only() -> None:
    blocks = TokenBlocks(np.arange(35, dtype=np.uint16), 10)
    assert [blocks[i].tolist() for i in range(len(blocks))] == [list(range(s, s + 11)) for s in (0, 10, 20)]
    with pytest.raises(IndexError, match=r"block 3 of 3"):
        blocks[3]
    assert blocks[0].dtype == torch.int64


@pytest.mark.parametrize(("num_tokens", "lengths"), [(0, []), (1, []), (2, [2]), (7, [7]), (11, [11]), (12, [11])])
def test_a_short_split_is_one_shorter_block(num_tokens: int, lengths: list[int]) -> None:
    blocks = TokenBlocks(np.arange(num_tokens, dtype=np.uint16), 10)
    assert [len(blocks[i]) for i in range(len(blocks))] == lengths


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"multiple of world_size \* micro_batch = 2 \* 3, got 8"):
        StepBatches(10, **SETTINGS, micro_batch=3, world_size=2)
    with pytest.raises(ValueError, match=r"`num_blocks` must be >= 1, got 0"):
        StepBatches(0, **SETTINGS, micro_batch=8)


@pytest.mark.parametrize(("before", "after"), [((4, 1), (2, 2)), ((2, 2), (1, 4)), ((1, 4), (4, 1)), ((2, 1), (1, 2))])
def test_a_run_goes_on_in_mid_epoch_with_another_number_of_ranks(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(Blocks per micro-batch, ranks); as many micro-batches per step, which is what Lightning counts."""
    blocks = TokenBlocks(np.arange(200, dtype=np.uint16), 10)

    def loaders(micro_batch: int, world_size: int) -> list[ResumableLoader]:
        ranks = range(world_size)
        settings = {**SETTINGS, "micro_batch": micro_batch, "world_size": world_size}
        return [ResumableLoader(blocks, StepBatches(len(blocks), **settings, rank=rank)) for rank in ranks]

    def starts(found: list[ResumableLoader], first: int, last: int | None) -> list[list[int]]:
        """First token of each block, by step."""
        parts = [[batch[:, 0].tolist() for batch in list(loader)[first:last]] for loader in found]
        by_micro_batch = [sorted(itertools.chain(*group)) for group in zip(*parts, strict=True)]
        steps = found[0].state_dict()["accumulation"]
        return [sorted(itertools.chain(*by_micro_batch[k : k + steps])) for k in range(0, len(by_micro_batch), steps)]

    whole = starts(loaders(*before), 0, None)
    accumulation = loaders(*before)[0].state_dict()["accumulation"]
    position = 3 * accumulation
    resumed = loaders(*after)
    for loader in resumed:
        loader.load_state_dict({"position": position, "accumulation": accumulation})
    assert whole[3:] == starts(resumed, 0, None)


def naive_sequences(tokens: list[int], seq_length: int, end: int) -> list[list[int]]:
    """Documents one by one."""
    found, document = [], []
    for token in tokens:
        document.append(token)
        if token == end:
            found.append(document)
            document = []
    found.append(document)
    return [
        one[first : first + seq_length + 1] for one in found for first in range(0, len(one) - seq_length, seq_length)
    ]


@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), max_size=120),
    st.integers(1, 9),
    st.integers(1, 50),
)
def test_apart_no_sequence_reaches_from_one_document_into_the_next(tokens, seq_length, at_once) -> None:
    with mock.patch.object(batches, "_SCANNED_AT_ONCE", at_once):
        blocks = TokenBlocks(np.array(tokens, dtype=np.uint16), seq_length, end_of_text=0)
    assert [blocks[i].tolist() for i in range(len(blocks))] == naive_sequences(tokens, seq_length, 0)
    assert all(0 not in block[:-1] for block in blocks)


def test_documents_of_shards_are_found_across_their_borders() -> None:
    shards = TokenSequence([np.array([5, 6, 0, 7], dtype=np.uint16), np.array([8, 9, 0, 1, 2], dtype=np.uint16)])
    blocks = TokenBlocks(shards, 2, end_of_text=0)
    assert [block.tolist() for block in blocks] == [[5, 6, 0], [7, 8, 9]]
