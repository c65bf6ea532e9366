"""A Gram matrix says of few rows what their covariance says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional.across import across_groups
from lightning_spectral.functional.covariance import empty_moments, take_groups, update_
from lightning_spectral.functional.sample import gram, sample
from lightning_spectral.probe.ranks_of import measure

WIDTH = 40


def rows_of(num_tokens: int, *, far: float = 3.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDTH + 1) ** -0.5
    return ((torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64) + far) * scale).to(dtype)


def both(rows, sizes, order=None):
    moments = empty_moments(len(sizes), rows.shape[1], dtype=rows.dtype)
    update_(moments, rows, sizes, order)
    return gram(rows, sizes, order), moments


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", [[0], [1], [2], [0, 1, 2]])
def test_every_number_is_that_of_the_covariance(dtype, rel, groups):
    rows = rows_of(35, dtype=dtype)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(1))[:30]
    few, many = (measure(state, groups) for state in both(rows, [7, 3, 20], order))
    assert (few.num_tokens, few.width, few.status) == (many.num_tokens, many.width, many.status)
    for name in (
        "soft_rank",
        "hard_rank",
        "hard_rank_debiased",
        "spectral_entropy",
        "early_enrichment",
        "top_share",
        "trace",
    ):
        ours, theirs = (m.values.get(name, getattr(m, name, None)) for m in (few, many))
        # the correction of the hard rank needs four rows
        assert ours is theirs is None or ours == pytest.approx(theirs, rel=rel), name
    # orders below 1 weigh the null modes, which are zeros here and rounding there
    above = [order for order in few.renyi if float(order) >= 1]
    assert [few.renyi[order] for order in above] == pytest.approx([many.renyi[order] for order in above], rel=rel)
    largest = float(many.eigenvalues[0])
    torch.testing.assert_close(few.eigenvalues, many.eigenvalues, rtol=rel, atol=rel * largest)
    for name in ("soft_rank_ci", "hard_rank_ci", "soft_rank_debiased"):
        ours, theirs = (m.values.get(name, getattr(m, name, None)) for m in (few, many))
        # an interval reaches from differences of the ranks: a digit less
        assert ours is theirs is None or ours == pytest.approx(theirs, rel=10 * rel), name


@given(seed=st.integers(0, 10**6), sizes=st.tuples(*[st.integers(0, 9)] * 3), far=st.sampled_from([0.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_merged_groups_are_their_rows_together(seed, sizes, far):
    few, many = both(rows_of(sum(sizes), far=far, seed=seed), list(sizes))
    merges = [[0, 2], [1]]
    few, many = few.take_groups(merges), take_groups(many, merges)
    for group in range(2):
        ours, theirs = sample(few, [group]), sample(many, [group])
        assert ours.num_tokens == theirs.num_tokens
        for name in ("trace", "frobenius_sq", "quartic"):
            # fp64 with a mean 30 times the spread: 1e-16 * 30^4 is lost in the fourth moment about the shift
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-8, abs=1e-8), name


@pytest.mark.parametrize("index", [[0, 4, 1, 3], [1, 2, 3], [4, 3, 2], [2], [], [0, 1, 4]])
def test_products_of_some_rows_are_theirs_in_their_order(index):
    rows = rows_of(5)
    state = gram(rows, [1] * 5)
    some = torch.tensor(index, dtype=torch.int64)
    found = state.among(index)
    assert torch.equal(found, state.inner_NN[some][:, some])
    together = len(index) > 0 and index == list(range(index[0], index[0] + len(index)))
    assert (found.untyped_storage().data_ptr() == state.inner_NN.untyped_storage().data_ptr()) == together  # no copy


def test_a_bad_row_spoils_only_its_own_group():
    rows = rows_of(30)
    rows[4, 2] = math.inf
    state, clean = gram(rows, [10, 20]), gram(rows[10:], [20])
    assert measure(state, [0]).status == "nonfinite"
    assert measure(state, [1]).soft_rank == pytest.approx(measure(clean).soft_rank, rel=1e-10)


@pytest.mark.parametrize(
    ("rows", "status"),
    [(torch.zeros(0, 4), "empty"), (torch.randn(1, 4), "degenerate"), (torch.full((3, 4), 1e3), "degenerate")],
)
def test_bad_data_is_a_status(rows, status):
    assert measure(gram(rows, [len(rows)])).status == status


def test_products_keep_fp32_inside_autocast():
    rows = rows_of(30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = gram(rows, [30])
    exact = gram(rows.double(), [30])
    assert sample(state).frobenius_sq == pytest.approx(sample(exact).frobenius_sq, rel=1e-6)  # bf16 errs by 1e-3


def across_by_rows(rows, sizes):
    """The same sums from covariance matrices: pairs of groups, and what their means take out."""
    if sum(size > 0 for size in sizes) > 3:
        return across_by_four_rows(rows, sizes)
    parts = [part for part in rows.split(sizes) if len(part)]
    counts, means = [len(part) for part in parts], [part.mean(0) for part in parts]
    covariances = [(part - mean).T @ (part - mean) / len(part) for part, mean in zip(parts, means, strict=True)]
    square = trace = 0.0
    pairs = list(itertools.combinations(range(len(parts)), 2))
    for a, b in pairs:
        d, n_a, n_b = means[a] - means[b], counts[a], counts[b]
        # shares of E d d^T that are missing from C_a and from C_b
        v_a, v_b = (torch.outer(d, d) * n / (n_a + n_b) for n in (n_b, n_a))
        c_a, c_b = covariances[a], covariances[b]
        square += n_a * n_b * float((c_a * c_b).sum() + (v_a * c_b).sum() + (v_b * c_a).sum())
        trace += n_a * n_b * float(c_a.trace() * c_b.trace() + v_a.trace() * c_b.trace() + v_b.trace() * c_a.trace())
    return trace / square


def across_by_four_rows(rows, sizes):
    """The same from four rows of four groups, for all of them: differences of two and two."""
    parts = [part for part in rows.split(sizes) if len(part)]
    square = trace = 0.0
    for (a, b), (c, d) in itertools.combinations(itertools.combinations(parts, 2), 2):
        if {id(a), id(b)} & {id(c), id(d)}:
            continue
        one, two = ((x[:, None] - y).flatten(0, 1) for x, y in ((a, b), (c, d)))
        weight = len(one) / (len(a) + len(b)) * len(two) / (len(c) + len(d))
        square += weight * float((one @ two.T).square().mean())
        trace += weight * float(one.square().sum(1).mean() * two.square().sum(1).mean())
    return trace / square


@pytest.mark.parametrize("sizes", [[7, 3, 20], [15, 15], [8, 9, 6, 7], [10, 0, 20], [5, 6, 4, 8, 7], [1, 9, 12, 8]])
def test_the_rank_across_groups_is_that_of_the_products_of_different_groups(sizes):
    rows = rows_of(30)
    few, many = both(rows, sizes)
    expected, groups = across_by_rows(rows, sizes), range(len(sizes))
    assert across_groups(few, groups).hard_rank == pytest.approx(expected, rel=1e-9)
    assert across_groups(many, groups).hard_rank == pytest.approx(expected, rel=1e-9)
    assert measure(many, groups).values["hard_rank_across_sequences"] == pytest.approx(expected, rel=1e-9)
    assert math.isnan(across_groups(many, [0]).hard_rank)
    assert "hard_rank_across_sequences" not in measure(many, [0]).values


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("top", [False, True])
def test_the_rank_across_sequences_has_no_bias_from_what_a_sequence_shares(num_groups, top):
    """1,408 rows in 11 sequences that share a fifth of their variance, in all directions or in the largest ones."""
    generator, length, width = torch.Generator().manual_seed(3), 128, 256
    spectrum = torch.exp(-torch.arange(1, width + 1, dtype=torch.float64) / (0.12 * width))
    true = float(spectrum.sum() ** 2 / spectrum.square().sum())
    largest = (spectrum.cumsum(0) / spectrum.sum()) < 0.4  # half of their variance is a fifth of all
    share = torch.where(largest, 0.5, 0.0) if top else torch.full_like(spectrum, 0.2)
    plain, across = [], []
    for _ in range(8):
        noise = torch.randn(11 * length, width, generator=generator, dtype=torch.float64) * (1 - share).sqrt()
        shared = torch.randn(11, width, generator=generator, dtype=torch.float64).repeat_interleave(length, 0)
        rows = (noise + shared * share.sqrt()) * spectrum.sqrt()
        parts = [torch.arange(11 * length).view(11, -1)[k::num_groups].flatten() for k in range(num_groups)]
        moments = empty_moments(num_groups, width, dtype=torch.float64)
        update_(moments, rows, [len(part) for part in parts], torch.cat(parts))
        found = measure(moments, range(num_groups))
        plain.append(found.hard_rank / true)
        across.append(found.values["hard_rank_across_sequences"] / true)
    error = torch.tensor(across).std().item() / len(across) ** 0.5
    assert sum(across) / len(across) == pytest.approx(1.0, abs=0.01 + 2 * error)
    assert error < 0.02
    assert sum(plain) / len(plain) < 0.85


@pytest.mark.parametrize("num_groups", [4, 8, 11])
def test_the_rank_across_sequences_has_no_bias_where_their_means_and_their_scatter_go_together(num_groups):
    """relu^2 of what has a common part: a sequence whose rows are long has more variance in the same directions."""
    generator, width = torch.Generator().manual_seed(0), 64
    mixing = torch.randn(16, width, generator=generator, dtype=torch.float64) / 4

    def sequences(num, length):
        common = 0.7 * torch.randn(num, 1, 16, generator=generator, dtype=torch.float64)
        own = torch.randn(num, length, 16, generator=generator, dtype=torch.float64)
        return ((own + common) @ mixing * 2).relu() ** 2

    many = sequences(20_000, 8).flatten(0, 1)
    covariance_DD = torch.cov(many.T)
    true = float(covariance_DD.trace() ** 2 / covariance_DD.square().sum())
    found = []
    for _ in range(200):
        rows = sequences(11, 60)
        order = torch.arange(11 * 60).view(11, -1)
        parts = [order[group::num_groups].flatten() for group in range(num_groups)]
        moments = empty_moments(num_groups, width, dtype=torch.float64)
        update_(moments, rows.flatten(0, 1), [len(part) for part in parts], torch.cat(parts))
        found.append(1 / across_groups(moments, range(num_groups)).hard_rank)
    inverse = torch.tensor(found)  # of a ratio, whose noise is in what it is divided by
    error = float(inverse.std()) / len(found) ** 0.5 * true
    assert float(inverse.mean()) * true == pytest.approx(1.0, abs=0.03 + 2 * error)
    assert error < 0.02


@pytest.mark.parametrize("sizes", [[7, 23], [8, 9, 6, 7]])
def test_the_lean_is_the_eigenvalue_along_differences_of_means_over_that_along_rows(sizes):
    rows = rows_of(30)
    parts = rows.split(sizes)
    scatters = [(part - part.mean(0)).T @ (part - part.mean(0)) for part in parts]
    along = squared = 0.0
    for a, b in itertools.combinations(range(len(sizes)), 2):
        d, weight = parts[a].mean(0) - parts[b].mean(0), sizes[a] * sizes[b] / (sizes[a] + sizes[b])
        along += weight * float(d @ (scatters[a] + scatters[b]) @ d) / (sizes[a] + sizes[b])
        squared += weight * float(d @ d)
    along_rows = float(sum(scatters).trace()) / 30 / across_by_rows(rows, sizes)
    for state in both(rows, sizes):
        assert across_groups(state, range(len(sizes))).lean == pytest.approx(along / squared / along_rows, rel=1e-9)


def test_groups_without_variance_cost_no_window():
    """One row a group, one of them alive, as behind a relu that hardly ever lets anything through: one direction."""
    rows = torch.zeros(6, 8, dtype=torch.float64)
    rows[1, 3] = 0.02
    for state in both(rows, [1] * 6):
        measured = measure(state, range(6), num_sequences=6)
        assert measured.hard_rank == pytest.approx(1.0)
        # rounding may leave what is the same direction
        assert measured.values.get("hard_rank_across_sequences", 1.0) == pytest.approx(1.0)
    assert math.isnan(across_groups(gram(rows, [1] * 6), range(6)).hard_rank)


def test_no_lean_without_two_groups_or_a_difference():
    rows = rows_of(30)
    assert math.isnan(across_groups(gram(rows, [30]), [0]).lean)
    assert math.isnan(across_groups(gram(torch.cat([rows[:9], rows[:9]]), [9, 9]), [0, 1]).lean)
