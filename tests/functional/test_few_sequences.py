"""What few sequences say about endlessly many, by samples whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_spectral.functional.across import across_groups
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.functional.few_sequences import Likeness, entropy_of_endless
from lightning_spectral.functional.rank import soft_rank
from lightning_spectral.probe.ranks_of import measure

WIDTH, LENGTH, SEQUENCES = 128, 64, 12
SPECTRUM = torch.exp(-torch.arange(WIDTH, dtype=torch.float64) / 20)
TRUE = float(soft_rank(SPECTRUM))
EVERYWHERE = torch.full((WIDTH,), 0.3, dtype=torch.float64)
AMONG_THE_LARGEST = torch.where(SPECTRUM.cumsum(0) < 0.5 * SPECTRUM.sum(), 0.6, 0.0).double()


def moments_of(share: torch.Tensor, seed: int, sigma: float = 0.0):
    """Two shards of sequences whose rows share so much of each direction's variance; log-normal lengths of rows."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    common = torch.randn(SEQUENCES, 1, WIDTH, generator=generator, dtype=torch.float64)
    rows = ((own * (1 - share).sqrt() + common * share.sqrt()) * SPECTRUM.sqrt()).flatten(0, 1)
    if sigma:
        rows = rows * (torch.randn(len(rows), 1, generator=generator, dtype=torch.float64) * sigma).exp()
    moments = empty_moments(2, WIDTH, dtype=torch.float64)
    update_(moments, rows, [len(rows) // 2] * 2)
    return moments


def mean_error(share: torch.Tensor, num_sequences: int, draws: int = 12) -> float:
    """Of the logarithm of the corrected soft rank."""
    found = [measure(moments_of(share, seed), [0, 1], num_sequences=num_sequences) for seed in range(draws)]
    return sum(math.log(one.soft_rank_debiased / TRUE) for one in found) / draws


@pytest.mark.parametrize(
    ("share", "raw"), [(EVERYWHERE, -0.196), (AMONG_THE_LARGEST, -0.109)], ids=["everywhere", "among the largest"]
)
def test_the_soft_rank_of_sequences_that_share_three_tenths_of_their_variance(share, raw):
    """Raw, and what is left of it."""
    shown = [measure(moments_of(share, seed), [0, 1]).soft_rank for seed in range(12)]
    assert sum(math.log(value / TRUE) for value in shown) / 12 == pytest.approx(raw, abs=0.02)
    assert abs(mean_error(share, SEQUENCES)) < 0.02


def test_without_the_number_of_sequences_the_extrapolation_stands():
    """A third of the bias is left."""
    assert -0.07 < mean_error(EVERYWHERE, 0) < -0.03


def test_rows_of_unlike_length_are_no_sequences_that_differ():
    """Long rows make means differ along their own directions: that says nothing about sequences."""
    nothing = torch.zeros(WIDTH, dtype=torch.float64)
    errors = []
    for known in (0, SEQUENCES):
        found = [measure(moments_of(nothing, seed, 0.8), [0, 1], num_sequences=known) for seed in range(12)]
        errors.append(sum(math.log(one.soft_rank_debiased / TRUE) for one in found) / 12)
    without, with_them = errors
    assert abs(with_them) < 0.012 < abs(without)


def test_independent_rows_are_no_sequences():
    """Neither way has anything to correct beyond N rows, and they agree."""
    state = moments_of(torch.zeros(WIDTH, dtype=torch.float64), 0)
    known, unknown = (measure(state, [0, 1], num_sequences=n).soft_rank_debiased for n in (SEQUENCES, 0))
    assert known == pytest.approx(unknown, rel=0.005)
    assert known == pytest.approx(TRUE, rel=0.01)


def test_a_lean_tells_where_sequences_differ():
    def mean_lean(share: torch.Tensor) -> float:
        return sum(across_groups(moments_of(share, seed), [0, 1]).lean for seed in range(20)) / 20

    assert 0.9 < mean_lean(EVERYWHERE) < 1.1
    assert mean_lean(AMONG_THE_LARGEST) > 1.25  # were there endlessly many sequences: 1.4


def test_weights_have_the_second_moments_that_the_ranks_say():
    """1 / 8 = 1 / 10 + 2.5 / 100, and so on; 100 rows of 5 sequences."""
    likeness = Likeness.of(100, 8.0, 10.0, 20.0)
    assert (likeness.of_rows, likeness.of_sequences) == (pytest.approx(2.5), pytest.approx(5.0))
    rows = Likeness(1.0, 19 * 0.2**2).weights(100, 5)  # a fifth in common
    assert float(rows.weights_W @ rows.shares_W) == pytest.approx(1.0)
    assert float(rows.weights_W[0] / rows.weights_W[1]) == pytest.approx((0.8 + 0.2 * 20) / 0.8)
    assert rows.shares_W[0] == pytest.approx(4 / 100)  # about the mean of all rows one direction is gone
    assert likeness.share_of_sequences == pytest.approx(5 / (5 + 1.5))
    uneven = Likeness(2.5, 0.0).weights(100, 5)
    assert float(uneven.weights_W.square() @ uneven.shares_W) == pytest.approx(0.04 * 1 + 0.96 * 2.5, rel=1e-3)
    assert Likeness.of(100, 8.0, 7.0, 6.0) == Likeness(1.0, 0.0)  # ranks of noise


def test_parts_that_are_the_whole_say_nothing():
    eigs = SPECTRUM.clone()
    assert math.isnan(entropy_of_endless(eigs, math.log(TRUE), WIDTH, 768, 12, [(1.0, 768)], Likeness(1.0, 1.0)))


def test_a_fit_that_does_not_settle_leaves_the_extrapolation(monkeypatch):
    def never(*args, **options):
        raise RuntimeError("Maximum number of iterations reached.")

    state = moments_of(EVERYWHERE, 0)
    without = measure(state, [0, 1]).soft_rank_debiased
    monkeypatch.setattr("scipy.optimize.nnls", never)
    assert measure(state, [0, 1], num_sequences=SEQUENCES).soft_rank_debiased == without
