"""Ranks from a few rows: equal to those of all rows, within the error that is stated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_spectral.functional.few_rows import Population, RowWeights, entropy_of_rows, population
from lightning_spectral.functional.row_ranks import _eigenvalues, _pairs, _parts, rank_rows

D = 256
INDEX = torch.arange(1.0, D + 1, dtype=torch.float64)


def gaussian(spectrum: Tensor) -> Callable[[int], Tensor]:
    return lambda num: torch.randn(num, D, dtype=torch.float64) * spectrum.sqrt()


def relu_squared(num: int) -> Tensor:
    """What a feed-forward network holds: some rows are ten times as long as others."""
    mixing = torch.randn(64, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (torch.randn(num, 64, dtype=torch.float64) / INDEX[:64].sqrt() @ mixing).relu() ** 2


def correlated(num: int) -> Tensor:
    """Tokens of a sequence of 64 share a third of their variance."""
    return gaussian(1 / INDEX)(num // 64).repeat_interleave(64, 0) * 0.3**0.5 + gaussian(INDEX**-0.7)(num) * 0.7**0.5


SOURCES: dict[str, Callable[[int], Tensor]] = {
    "i^-0.7": gaussian(INDEX**-0.7),
    "i^-1.5": gaussian(INDEX**-1.5),
    "exp": gaussian((-INDEX / (0.2 * D / math.e)).exp()),
    "flat": gaussian(torch.ones(D, dtype=torch.float64)),
    "correlated": correlated,
    "relu^2": relu_squared,
}


def all_rows(rows_ND: Tensor) -> tuple[float, float]:
    """Soft and hard rank of the sample covariance of all rows, by definition."""
    eigs = torch.linalg.eigvalsh(torch.cov(rows_ND.T)).clamp(min=1e-300)
    shares = eigs / eigs.sum()
    return math.exp(-float((shares * shares.log()).sum())), 1 / float(shares.square().sum())


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("share", [1 / 32, 1 / 16])
def test_all_rows_are_within_the_stated_error(name: str, share: float) -> None:
    """64 to 128 rows of 256 features for 2,048: the plain ranks of so few are 20 to 75 % too low."""
    torch.manual_seed(0)
    rows_ND = SOURCES[name](8 * D)
    soft, hard = all_rows(rows_ND)
    sequences_N = torch.arange(len(rows_ND)) // 64
    misses: dict[str, list[float]] = {"soft": [], "hard": []}
    for _ in range(4):
        kept = torch.randperm(len(rows_ND))[: round(share * len(rows_ND) * 2)]
        ranks = rank_rows(rows_ND[kept], sequences_N[kept], len(rows_ND))
        misses["soft"].append(math.log(ranks.soft_rank / soft) / ranks.soft_rank_error)
        misses["hard"].append(math.log(ranks.hard_rank / hard) / ranks.hard_rank_error)
    for misses_of_one in misses.values():
        # errors estimated from two or four parts: a t of 1 or 3 degrees of freedom, not a normal
        assert sum(abs(miss) < 3 for miss in misses_of_one) >= 3, (name, misses)


@pytest.mark.parametrize("name", ["i^-0.7", "flat", "relu^2"])
def test_the_hard_rank_is_unbiased(name: str) -> None:
    """Of 40 samples the mean of 1 / hard rank is that of all rows, to the error of the mean."""
    torch.manual_seed(1)
    rows_ND = SOURCES[name](2 * D)
    _, hard = all_rows(rows_ND)
    found = []
    for _ in range(40):
        kept = torch.randperm(len(rows_ND))[:64]
        found.append(1 / rank_rows(rows_ND[kept], torch.arange(64), len(rows_ND)).hard_rank)
    values = torch.tensor(found)
    standard_error = float(values.std()) / math.sqrt(len(values))
    # a ratio of two unbiased estimates: off by 1 / N of itself at most
    assert float(values.mean()) == pytest.approx(1 / hard, abs=3 * standard_error + 1 / hard / 64)


def test_pairs_of_different_sequences_do_not_feel_what_a_sequence_shares() -> None:
    """64 sequences of 8 rows that share four fifths of their variance: plain estimates are a third too low."""
    torch.manual_seed(2)
    draw, spectrum = gaussian(INDEX**-0.7), INDEX**-0.7
    behind = float(spectrum.sum() ** 2 / spectrum.square().sum())
    across, plain = [], []
    for _ in range(6):
        rows_ND = draw(64).repeat_interleave(8, 0) * 0.8**0.5 + draw(512) * 0.2**0.5
        ranks = rank_rows(rows_ND, torch.arange(512) // 8, 512)
        across.append(ranks.hard_rank_across)
        plain.append(ranks.hard_rank_debiased)
    # the common mean ties sequences together by a 64th of what each shares: 2 % of tr C^2 here
    assert sum(across) / 6 == pytest.approx(behind, rel=0.07)
    assert sum(plain) / 6 < 0.75 * behind


def test_more_rows_of_a_known_spectrum() -> None:
    """The forward equation against simulation, from fewer rows than features to 16 times as many."""
    torch.manual_seed(3)
    spectrum = INDEX**-1.0
    masses_J = torch.full((D,), 1 / D, dtype=torch.float64)
    one = torch.ones(1).double()
    behind = Population(spectrum / spectrum.mean(), masses_J, RowWeights.of(one, one), D)
    for num in (64, 256, 1024, 4096):
        shown = torch.tensor([all_rows(gaussian(spectrum)(num))[0] for _ in range(8)]).log()
        error = float(shown.std()) / 8**0.5
        assert entropy_of_rows(behind, num) == pytest.approx(float(shown.mean()), abs=3 * error + 0.005), num
    assert entropy_of_rows(behind, 10**8) == pytest.approx(behind.entropy, abs=1e-4)


def test_sums_over_pairs_are_those_of_every_pair_by_itself() -> None:
    """U-statistics over all different rows: of pairs, triples and quadruples, written as such."""
    rows_ND = torch.randn(9, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 1
    sequences_N = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
    centred_ND = rows_ND - rows_ND.mean(0)
    square = trace_sq = 0.0
    count = 0
    for i, j, k, m in itertools.permutations(range(9), 4):
        # E of either: <C, C> and (tr C)^2, from differences of rows, in which the mean is not
        one, two = rows_ND[i] - rows_ND[j], rows_ND[k] - rows_ND[m]
        square += float(one @ two) ** 2 / 4
        trace_sq += float(one @ one) * float(two @ two) / 4
        count += 1
    found = _pairs(centred_ND, centred_ND.square().sum(1), sequences_N)
    assert found.frobenius_sq == pytest.approx(square / count, rel=1e-10)
    assert found.trace_sq == pytest.approx(trace_sq / count, rel=1e-10)
    apart = [(i, j) for i in range(9) for j in range(9) if sequences_N[i] != sequences_N[j]]
    own = sum(float(centred_ND[i] @ centred_ND[j]) ** 2 for i, j in apart) / len(apart)
    assert found.across == pytest.approx(own, rel=1e-10)
    assert found.quartic == pytest.approx(float(centred_ND.square().sum(1).square().mean()), rel=1e-12)


@pytest.mark.parametrize(("num", "width"), [(6, 9), (9, 6), (7, 7)])
def test_few_rows_are_solved_in_fp64(num: int, width: int) -> None:
    rows_ND = torch.randn(num, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, width)
    found = _eigenvalues(rows_ND)
    assert (found.dtype, len(found)) == (torch.float64, min(num, width))
    # of the product as it was rounded in fp32: what a solve in fp32 would add is 1e-7 of the largest
    product = rows_ND @ rows_ND.T if num <= width else rows_ND.T @ rows_ND
    expected = torch.linalg.eigvalsh(product.double()).clamp(min=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_part_holds_whole_sequences_where_there_are_twice_as_many_as_parts() -> None:
    eight, seven = torch.tensor([5, 5, 1, 2, 9, 7, 0, 3, 4, 4]), torch.tensor([5, 5, 1, 2, 9, 7, 0, 3, 3, 3])
    assert _parts(eight, 4).tolist() == [1, 1, 1, 2, 3, 2, 0, 3, 0, 0]
    assert _parts(seven, 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # rows in turn


def test_two_rows_show_one_direction() -> None:
    one = torch.ones(1).double()
    behind = Population(one, one, RowWeights.of(one, one), D)
    assert entropy_of_rows(behind, 2) == pytest.approx(0.0, abs=0.03)
    assert entropy_of_rows(behind, 3) == pytest.approx(math.log(2), abs=0.03)


def test_a_half_of_equal_rows_says_nothing_of_the_error() -> None:
    rows = torch.ones(40, 16)
    rows[::2] = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    found = rank_rows(rows, torch.arange(40), 400)
    assert found.soft_rank > 1
    assert math.isnan(found.soft_rank_error)


def test_no_rank_is_beyond_the_width() -> None:
    """Rows of a direction each: unbiased estimates are 1.03 times the width, or 1 / 0."""
    for num in (11, 32):
        found = rank_rows(torch.eye(16)[torch.arange(num) % 16], torch.arange(num), 100 * num)
        for value in (found.hard_rank, found.hard_rank_debiased, found.hard_rank_across, found.soft_rank_debiased):
            assert not value > 16 * (1 + 1e-9)


def test_what_cannot_be_told() -> None:
    assert math.isnan(rank_rows(torch.randn(5, 8), torch.arange(5), 50).soft_rank)
    assert math.isnan(rank_rows(torch.ones(64, 8), torch.arange(64), 64).hard_rank)  # no variance
    assert not math.isfinite(rank_rows(torch.full((64, 8), torch.nan), torch.arange(64), 64).trace)
    assert rank_rows(torch.zeros(0, 8), torch.arange(0), 0).num_rows == 0
    with pytest.raises(ValueError, match="at least 4 rows that differ, got 2"):
        population(torch.ones(2), 2, 8, RowWeights.from_norms(torch.ones(2), 2.0))


@pytest.mark.parametrize(("variance", "own"), [(0.1, 0.0), (0.2, 0.0), (0.4, 0.5), (0.8, 0.75)])
def test_weights_of_rows_are_what_chance_does_not_explain_of_their_norms(variance: float, own: float) -> None:
    """Norms of rows of hard rank 10 vary by 2 / 10 without any weights."""
    norms_N = torch.ones(41, dtype=torch.float64)
    norms_N[::2] += 0.5
    norms_N = 1 + (norms_N / norms_N.mean() - 1) * math.sqrt(variance / float((norms_N / norms_N.mean()).var()))
    weights_N = RowWeights.from_norms(norms_N, 10.0).weights_W
    expected_N = norms_N ** math.sqrt(own)
    torch.testing.assert_close(weights_N, expected_N / expected_N.mean())


def test_the_population_behind_a_sample_has_a_mean_eigenvalue_of_one() -> None:
    rows_ND = torch.randn(60, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows_ND = rows_ND * torch.linspace(0.2, 3.0, 20, dtype=torch.float64)
    centred_ND = rows_ND - rows_ND.mean(0)
    eigs_M = torch.linalg.eigvalsh(centred_ND.mT @ centred_ND)
    behind = population(eigs_M, 60, 20, RowWeights.from_norms(centred_ND.square().sum(1), 10.0))
    assert float(behind.values_J @ behind.masses_J) == pytest.approx(1.0, rel=1e-12)
    assert float(behind.masses_J.sum()) == pytest.approx(1.0, rel=1e-12)
