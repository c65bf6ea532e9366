from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional.sample import sample

cov = import_module("lightning_spectral.functional.covariance")  # the module, not the function of that name
GROUPS, WIDTH = 3, 13


def rows_and_sizes(seed: int, num_tokens: int, *, mean_over_spread: float = 1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1, 3, WIDTH, dtype=torch.float64)
    rows = (torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64) + mean_over_spread) * scale
    cuts = torch.randint(0, num_tokens + 1, (GROUPS - 1,), generator=generator).sort().values.tolist()
    sizes = np.diff([0, *cuts, num_tokens]).tolist()
    return rows.to(dtype), sizes


def state_of(rows, sizes, dtype=torch.float64) -> cov.Moments:
    state = cov.empty_moments(GROUPS, rows.shape[1], dtype=dtype)
    cov.update_(state, rows, sizes)
    return state


def numpy_covariance(rows) -> np.ndarray:
    return np.cov(rows.double().numpy(), rowvar=False)


def relative_error(ours, oracle) -> float:
    oracle = np.asarray(oracle, dtype=np.float64)
    return float(np.abs(np.asarray(ours, dtype=np.float64) - oracle).max() / np.abs(oracle).max())


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 64, 100])
def test_packing_keeps_every_entry(width):
    matrix = torch.randn(width, width, dtype=torch.float64)
    matrix = matrix + matrix.mT
    packed = torch.zeros(cov.packed_size(width), dtype=torch.float64)
    for (start, stop), strip in zip(cov.strip_bounds(width), cov.strip_views(packed, width), strict=True):
        strip.copy_(matrix[start:stop, start:])
    assert torch.equal(cov.unpack(packed, width), matrix)
    assert float(cov.packed_trace(packed, width)) == pytest.approx(float(matrix.trace()), rel=1e-14)


def test_state_is_nine_sixteenths_of_a_full_matrix():
    assert cov.packed_size(2048) == 9 * 2048**2 // 16


@given(seed=st.integers(0, 10**6), chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_streaming_equals_batch_for_any_chunking(seed, chunks):
    rows = torch.cat([rows_and_sizes(seed + k, n)[0] for k, n in enumerate(chunks)])
    state = cov.empty_moments(1, WIDTH, dtype=torch.float64)
    for chunk in rows.split(chunks):
        cov.update_(state, chunk, [len(chunk)])
    if len(rows) > 1:
        # fp64 sums of at most 240 rows: 1e-10 leaves five digits for cancellation in the shift
        assert relative_error(cov.covariance(state), numpy_covariance(rows)) < 1e-10
    assert relative_error(cov.mean(state)[0], rows.mean(0)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_in_the_order_of_their_groups_need_not_lie_so(dtype):
    rows, sizes = rows_and_sizes(3, 50, dtype=dtype)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[: sum(sizes[:2])]
    kept = [*sizes[:2], 0]
    by_index, sorted_first = (cov.empty_moments(GROUPS, WIDTH, dtype=torch.float32) for _ in range(2))
    cov.update_(by_index, rows, kept, order)
    cov.update_(sorted_first, rows[order], kept)
    for name in ("shift_D", "count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G"):
        assert torch.equal(getattr(by_index, name), getattr(sorted_first, name)), name


@pytest.mark.parametrize(("entries", "rows_at_once"), [(130, 10), (13, 4)])
def test_no_more_rows_than_a_chunk_are_copied_at_once(entries, rows_at_once, monkeypatch):
    """The chunk's entries over the width, and no fewer than the least."""
    rows, sizes = rows_and_sizes(5, 60)
    whole, in_parts = (cov.empty_moments(GROUPS, WIDTH, dtype=torch.float64) for _ in range(2))
    cov.update_(whole, rows, sizes)
    monkeypatch.setattr(cov, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(cov, "_CHUNK_ENTRIES", entries)
    asked, make = [], cov.row_buffer
    monkeypatch.setattr(cov, "row_buffer", lambda like, num, width: asked.append(num) or make(like, num, width))
    cov.update_(in_parts, rows, sizes)
    assert asked == [rows_at_once]
    assert max(sizes) > rows_at_once
    for name in ("count_G", "sum_GD", "scatter_GP", "cubic_GD", "quartic_G"):
        torch.testing.assert_close(getattr(in_parts, name), getattr(whole, name), rtol=1e-12, atol=1e-9)


def test_the_shift_of_a_merge_is_the_mean_of_all_its_rows():
    """About any other the merge would be as exact in theory, and lose digits where means are far from it."""
    rows, _ = rows_and_sizes(4, 60)
    parts = [cov.empty_moments(GROUPS, WIDTH, dtype=torch.float64) for _ in range(2)]
    for state, part in zip(parts, rows.split(30), strict=True):
        cov.update_(state, part, [30, 0, 0])
    torch.testing.assert_close(cov.merge(*parts).shift_D, rows.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean_over_spread", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_fp32_survives_a_mean_far_above_the_spread(mean_over_spread, chunk):
    rows, _ = rows_and_sizes(1, 4096, mean_over_spread=mean_over_spread, dtype=torch.float32)
    state = cov.empty_moments(1, WIDTH)
    for part in rows.split(chunk):
        cov.update_(state, part, [len(part)])
    # raw fp32 second moments are off by 1e-5 to 1 here; sums about a fixed shift keep fp32's seven digits less sqrt(N)
    assert relative_error(cov.covariance(state), numpy_covariance(rows)) < 1e-5


@given(seed=st.integers(0, 10**6), sizes=st.tuples(*[st.integers(0, 30)] * 3), far=st.sampled_from([0.0, 3.0, 50.0]))
@settings(max_examples=200, deadline=None)
def test_merge_is_commutative_associative_and_has_an_identity(seed, sizes, far):
    parts = [state_of(*rows_and_sizes(seed + k, n, mean_over_spread=far * k)) for k, n in enumerate(sizes)]
    a, b, c = parts

    def numbers(state):
        group_covariances = [cov.covariance(state, group).flatten() for group in range(GROUPS)]
        return torch.cat([state.count_G, cov.mean(state)[state.count_G > 0].flatten(), *group_covariances])

    def check(left, right):
        scale = max(float(numbers(left).abs().max()), 1.0)
        torch.testing.assert_close(numbers(left), numbers(right), rtol=1e-9, atol=1e-9 * scale)  # fp64 re-basing

    check(cov.merge(a, b), cov.merge(b, a))
    check(cov.merge(cov.merge(a, b), c), cov.merge(a, cov.merge(b, c)))
    check(cov.merge(a, cov.empty_moments(GROUPS, WIDTH, dtype=torch.float64)), a)


def test_pooled_is_the_merge_of_the_buckets():
    rows, sizes = rows_and_sizes(5, 300)
    state = state_of(rows, sizes)
    assert relative_error(cov.covariance(cov.pool(state)), numpy_covariance(rows)) < 1e-12
    start = 0
    for group, size in enumerate(sizes):
        own = rows[start : start + size]
        assert int(state.count_G[group]) == size
        if size > 1:
            assert relative_error(cov.covariance(state, group), numpy_covariance(own)) < 1e-12
        start += size


def test_rebasing_moves_all_five_sums_exactly():
    rows, sizes = rows_and_sizes(7, 200)
    state = state_of(rows, sizes)
    target = torch.randn(WIDTH, dtype=torch.float64)
    cov.rebase_(state, target)
    y = rows[: sizes[0]] - target
    torch.testing.assert_close(state.sum_GD[0], y.sum(0), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(cov.unpack(state.scatter_GP[0], WIDTH), y.mT @ y, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(state.cubic_GD[0], (y.square().sum(1) @ y), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(state.quartic_G[0], y.square().sum(1).square().sum(), rtol=1e-10, atol=1e-8)


def test_scalars_equal_the_full_matrix():
    rows, sizes = rows_and_sizes(9, 400, mean_over_spread=20.0)
    state = cov.pool(state_of(rows, sizes))
    numbers = sample(state)
    oracle = numpy_covariance(rows)
    centred = rows - rows.mean(0)
    assert numbers.num_tokens == 400
    assert numbers.trace == pytest.approx(np.trace(oracle), rel=1e-10)
    assert numbers.frobenius_sq == pytest.approx((oracle**2).sum(), rel=1e-10)
    assert numbers.quartic == pytest.approx(float(centred.square().sum(1).square().sum()), rel=1e-9)


def test_a_bad_row_spoils_only_its_own_group():
    rows, _ = rows_and_sizes(3, 60)
    rows[5, 2] = torch.nan
    state = state_of(rows, [20, 20, 20])
    assert not np.isfinite(sample(state).trace)
    assert relative_error(cov.covariance(state, 1), numpy_covariance(rows[20:40])) < 1e-12


def test_products_keep_fp32_inside_autocast_and_leave_the_precision_alone():
    rows, _ = rows_and_sizes(11, 512, dtype=torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = cov.empty_moments(1, WIDTH)
            cov.update_(state, rows, [512])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    # bf16 products would be off by 4e-3
    assert relative_error(cov.covariance(state), numpy_covariance(rows)) < 1e-6


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens_are_numbers_not_crashes(num_tokens):
    state = cov.empty_moments(1, WIDTH)
    cov.update_(state, torch.randn(num_tokens, WIDTH), [num_tokens])
    numbers = sample(state)
    assert numbers.num_tokens == num_tokens
    assert np.isfinite(numbers.trace)


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (torch.zeros(4, WIDTH + 1), [4, 0, 0], "width 13"),
        (torch.zeros(4, WIDTH), [1, 1, 1], "sum to 4 rows"),
        (torch.zeros(4, WIDTH), [4], "3 entries"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, sizes, message):
    with pytest.raises(ValueError, match=message):
        cov.update_(cov.empty_moments(GROUPS, WIDTH), rows, sizes)


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Cannot merge"):
        cov.merge(cov.empty_moments(1, 3), cov.empty_moments(1, 4))
    with pytest.raises(ValueError, match="width"):
        cov.empty_moments(1, 0)
