from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_spectral.functional import rank

SPECTRA = {
    "flat": np.ones(64),
    "power": np.arange(1, 65.0) ** -1.2,
    "steep": np.arange(1, 65.0) ** -4.0,
    "exponential": np.exp(-np.arange(64) / 5),
    "low_rank": np.r_[np.linspace(1, 2, 10), np.zeros(54)],
    "one": np.r_[3.0, np.zeros(63)],
}
spectra = arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e3, allow_subnormal=False)).filter(
    lambda eigs: eigs.max() > 1e-6
)


def oracle(eigs: np.ndarray) -> dict[str, float]:
    p = eigs / eigs.sum()
    positive = p[p > 0]
    entropy = -(positive * np.log(positive)).sum()
    ordered = np.sort(p)[::-1]
    width = len(p)
    area = (np.cumsum(ordered) - np.arange(1, width + 1) / width).sum() / (width / 2)
    return {
        "soft_rank": math.exp(entropy),
        "hard_rank": eigs.sum() ** 2 / (eigs**2).sum(),
        "spectral_entropy": entropy,
        "early_enrichment": min(max(area, 0), 1),
        "top_share": p.max(),
    }


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("metric", rank.RANK_METRICS)
def test_every_metric_equals_numpy(name, metric):
    ours = float(rank.RANK_METRICS[metric].function(torch.from_numpy(SPECTRA[name])))
    assert ours == pytest.approx(oracle(SPECTRA[name])[metric], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("order", [0.5, 1.5, 2.0, 3.0, 5.0])
def test_renyi_equals_numpy(name, order):
    p = SPECTRA[name] / SPECTRA[name].sum()
    expected = (p[p > 0] ** order).sum() ** (1 / (1 - order))
    assert float(rank.renyi_rank(torch.from_numpy(SPECTRA[name]), order)) == pytest.approx(expected, rel=1e-8)


@given(eigs=spectra, scale=st.floats(-6, 6))
@settings(max_examples=200, deadline=None)
def test_bounds_and_invariances(eigs, scale):
    eigs = torch.from_numpy(eigs)
    soft, hard = float(rank.soft_rank(eigs)), float(rank.hard_rank(eigs))
    slack = 1 + 1e-9
    assert hard * slack >= 1
    assert hard <= soft * slack
    assert soft <= len(eigs) * slack
    scaled = (eigs * 10.0**scale).flip(0)  # twelve orders of magnitude, and any order of the modes
    for metric in (rank.soft_rank, rank.hard_rank, rank.eigenvalue_early_enrichment, rank.top_share):
        assert float(metric(scaled)) == pytest.approx(float(metric(eigs)), rel=1e-9, abs=1e-12)


@given(eigs=spectra)
@settings(max_examples=100, deadline=None)
def test_renyi_does_not_increase_with_the_order(eigs):
    ranks = [float(rank.renyi_rank(torch.from_numpy(eigs), order)) for order in (0.5, 1, 1.5, 2, 3, 5, math.inf)]
    assert all(low <= high * (1 + 1e-9) for high, low in itertools.pairwise(ranks))


def test_extremes():
    flat, one = torch.full((32,), 7.0, dtype=torch.float64), torch.eye(32, dtype=torch.float64)[0]
    for metric in (rank.soft_rank, rank.hard_rank):
        assert float(metric(flat)) == pytest.approx(32, rel=1e-12)
        assert float(metric(one)) == pytest.approx(1, rel=1e-12)
    assert float(rank.eigenvalue_early_enrichment(flat)) == pytest.approx(0, abs=1e-12)


def test_batches_of_spectra():
    eigs = torch.rand(3, 5, 16, dtype=torch.float64)
    assert rank.soft_rank(eigs).shape == (3, 5)
    assert float(rank.soft_rank(eigs)[1, 2]) == pytest.approx(float(rank.soft_rank(eigs[1, 2])), rel=1e-12)


def test_the_papers_epsilon_breaks_scale_invariance_and_is_opt_in():
    eigs = torch.ones(241, dtype=torch.float64) * 1e-8  # activations of std 1e-4
    assert float(rank.hard_rank(eigs)) == pytest.approx(241)
    assert float(rank.hard_rank(eigs, absolute_epsilon=1e-12)) < 10


def test_spectrum_of_data_equals_numpy():
    rows = np.random.default_rng(0).normal(size=(500, 20)) * np.linspace(1, 4, 20)
    covariance = np.cov(rows, rowvar=False)
    ours = rank.spectrum(torch.from_numpy(covariance)).numpy()
    np.testing.assert_allclose(ours, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-10)


def test_js_divergence_is_zero_for_equal_shapes_and_ln2_for_disjoint_ones():
    eigs = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    assert float(rank.js_divergence(eigs, 10 * eigs.flip(0))) == pytest.approx(0, abs=1e-12)
    wide, narrow = torch.ones(10_000, dtype=torch.float64), torch.eye(10_000, 1, dtype=torch.float64).flatten()
    assert math.log(2) * 0.99 < float(rank.js_divergence(wide, narrow)) <= math.log(2)


@pytest.mark.parametrize(
    "eigs", [torch.tensor([1.0, -0.5]), torch.tensor([1.0, math.nan]), torch.zeros(4), torch.tensor([math.inf, 1.0])]
)
@pytest.mark.parametrize("metric", rank.RANK_METRICS)
def test_no_spectrum_is_refused(eigs, metric):
    with pytest.raises(ValueError, match="finite eigenvalues|not of a covariance"):
        rank.RANK_METRICS[metric].function(eigs)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="order must be > 0"):
        rank.renyi_rank(torch.ones(3), 0)
    with pytest.raises(ValueError, match="cannot be compared"):
        rank.js_divergence(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="must be square"):
        rank.spectrum(torch.ones(2, 3))
    with pytest.raises(ValueError, match="non-finite"):
        rank.spectrum(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="not of a covariance"):
        rank.spectrum(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def row_wise_oracle(rows: np.ndarray) -> float:
    """U-statistics over distinct rows: unbiased by construction, O(N^4)."""
    n = len(rows)
    gram = rows @ rows.T
    square_trace = trace_square = 0.0
    for i in range(n):
        for j in range(n):
            for k in range(n):
                for m in range(n):
                    if len({i, j, k, m}) == 4:
                        cross = gram[i, k] - gram[i, m] - gram[j, k] + gram[j, m]
                        square_trace += cross**2 / 4
                        own = gram[i, i] - 2 * gram[i, j] + gram[j, j]
                        other = gram[k, k] - 2 * gram[k, m] + gram[m, m]
                        trace_square += own * other / 4
    return trace_square / square_trace


def corrected(rows: np.ndarray) -> float:
    covariance = np.cov(rows, rowvar=False)
    quartic = ((rows - rows.mean(0)) ** 2).sum(1) ** 2
    return rank.debiased_hard_rank(len(rows), np.trace(covariance), (covariance**2).sum(), quartic.sum())


@pytest.mark.parametrize("seed", range(3))
def test_unbiased_hard_rank_equals_the_row_wise_estimator(seed):
    rows = np.random.default_rng(seed).exponential(size=(9, 5)) * np.linspace(1, 3, 5)
    assert corrected(rows) == pytest.approx(row_wise_oracle(rows), rel=1e-9)


@pytest.mark.parametrize("tokens_per_dim", [1, 2, 4])
def test_unbiased_hard_rank_is_near_the_truth_where_the_plain_one_is_far(tokens_per_dim):
    rng = np.random.default_rng(0)
    width = 256
    scale = np.arange(1, width + 1.0) ** -0.25  # eigenvalues k^-0.5
    truth = (scale**2).sum() ** 2 / (scale**4).sum()
    draws = [rng.normal(size=(tokens_per_dim * width, width)) * scale for _ in range(6)]
    plain = np.mean(
        [float(rank.hard_rank(torch.from_numpy(np.linalg.eigvalsh(np.cov(d, rowvar=False))))) for d in draws]
    )
    assert np.mean([corrected(d) for d in draws]) == pytest.approx(truth, rel=0.03)  # the goal of PERFORMANCE.md, F1
    assert plain < 0.93 * truth


def test_unbiased_hard_rank_needs_four_rows():
    assert math.isnan(rank.debiased_hard_rank(3, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("num_tokens", "width", "trace", "status"),
    [
        (0, 8, 0.0, "empty"),
        (1, 8, 1.0, "degenerate"),
        (5000, 8, 0.0, "degenerate"),
        (5000, 8, math.nan, "nonfinite"),
        (999, 8, 1.0, "few_tokens"),
        (2000, 4096, 1.0, "undersampled"),
        (5000, 8, 1.0, "ok"),
    ],
)
def test_sampling_status(num_tokens, width, trace, status):
    assert rank.sampling_status(num_tokens, width, trace) == status


def test_the_renyi_orders_are_those_that_the_paper_draws():
    assert rank.DEFAULT_RENYI_ORDERS == (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("metric", [rank.soft_rank, rank.hard_rank])
def test_no_size_of_the_eigenvalues_leaves_the_range_of_fp64(metric, scale):
    eigs = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(metric(eigs * scale), metric(eigs))


def test_the_unbiased_hard_rank_of_no_estimated_variance_is_unknown():
    """(n-1)(n-2) * 1 + 1 - 4/3 * 5.25 = 0 for n = 4."""
    assert math.isnan(rank.debiased_hard_rank(4, 1.0, 1.0, 5.25))
    assert rank.debiased_hard_rank(4, 1.0, 1.0, 5.25 - 0.75) == pytest.approx((2 + 5 - 6) / 1)
