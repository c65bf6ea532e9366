"""Ranks of odd rows: no number that a rank cannot be, and none that hangs on a rounding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.functional.rank import possible_rank
from lightning_spectral.functional.sample import gram
from lightning_spectral.probe.ranks_of import HARD_RANK_ACROSS, UNMEASURABLE, RankMeasurement, measure

WIDTH, GROUPS = 33, 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy(num: int) -> Tensor:
    """Pareto lengths without a variance: one row holds nearly everything."""
    return torch.randn(num, WIDTH, generator=generator(0)) * torch.rand(num, 1, generator=generator(1)) ** -2


def one_row_among_zeros(num: int) -> Tensor:
    return torch.cat([torch.randn(1, WIDTH, generator=generator(0)), torch.zeros(num - 1, WIDTH)])


def with_nan(num: int) -> Tensor:
    return torch.randn(num, WIDTH, generator=generator(0)).index_fill(0, torch.tensor([num - 1]), math.nan)


ROWS = {
    "gaussian": lambda num: torch.randn(num, WIDTH, generator=generator(0)),
    "one direction each": lambda num: torch.eye(WIDTH)[torch.arange(num) % WIDTH],
    "one direction": lambda num: torch.randn(num, 1, generator=generator(0)) * torch.ones(WIDTH),
    "heavy": heavy,
    "equal": lambda num: torch.full((num, WIDTH), 3.0),
    "zero": lambda num: torch.zeros(num, WIDTH),
    "two kinds": lambda num: torch.randn(2, WIDTH, generator=generator(0))[torch.arange(num) % 2],
    "one row among zeros": one_row_among_zeros,
    "far from 0": lambda num: torch.randn(num, WIDTH, generator=generator(0)) + 1e3,
    "large": lambda num: torch.randn(num, WIDTH, generator=generator(0)) * 1e10,
    "beyond squares": lambda num: torch.randn(num, WIDTH, generator=generator(0)) * 1e25,
    "tiny": lambda num: torch.randn(num, WIDTH, generator=generator(0)) * 1e-20,
    "with NaN": with_nan,
}


def measured(rows_ND: Tensor, *, as_moments: bool) -> RankMeasurement:
    """Of two groups, each of every other row."""
    order_N = torch.argsort(torch.arange(len(rows_ND)) % GROUPS, stable=True)
    sizes = [(len(rows_ND) + 1) // 2, len(rows_ND) // 2]
    if not as_moments:
        return measure(gram(rows_ND, sizes, order_N), range(GROUPS), num_sequences=len(rows_ND))
    moments = empty_moments(GROUPS, WIDTH)
    update_(moments, rows_ND, sizes, order_N)
    return measure(moments, range(GROUPS), num_sequences=len(rows_ND))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num", "as_moments"), [(1, True), (2, False), (3, True), (11, False), (11, True), (90, True)])
@pytest.mark.parametrize("kind", ROWS)
def test_every_rank_is_one_that_can_be(kind: str, num: int, as_moments: bool, dtype: torch.dtype) -> None:
    found = measured(ROWS[kind](num).to(dtype), as_moments=as_moments)
    if found.status in UNMEASURABLE:
        assert found.values == {}
        assert found.hard_rank_debiased is found.soft_rank_debiased is None
        return
    numbers = [found.soft_rank, found.hard_rank, found.hard_rank_debiased, found.soft_rank_debiased]
    for number in [*numbers, found.values.get(HARD_RANK_ACROSS), *found.renyi.values()]:
        assert number is None or 1 - 1e-4 <= number <= WIDTH * (1 + 1e-4)
    for low, high in filter(None, (found.hard_rank_ci, found.soft_rank_ci)):
        assert 0 < low <= high < math.inf


@pytest.mark.parametrize("kind", ["with NaN", "beyond squares"])
def test_what_has_no_finite_square_says_so(kind: str) -> None:
    assert measured(ROWS[kind](40), as_moments=True).status == "nonfinite"


@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_rows_without_variance_say_so(kind: str) -> None:
    assert measured(ROWS[kind](40), as_moments=True).status == "degenerate"


def test_rows_that_have_nothing_in_common_are_extrapolated_alike_however_they_are_summed() -> None:
    """Estimates of ``tr C^2`` are zero but for rounding: its sign must not decide."""
    found = [measured(ROWS["one direction each"](11) * scale, as_moments=False) for scale in (1.0, 0.1, 1e-4, 3e-7)]
    found.append(measured(ROWS["one direction each"](11), as_moments=True))
    for one, other in itertools.pairwise(found):
        assert one.soft_rank_debiased == pytest.approx(other.soft_rank_debiased, rel=1e-3)


def test_a_possible_rank() -> None:
    assert [possible_rank(value, 8) for value in (0.3, 1.0, 3.5, 8.0, 9.0, math.inf)] == [1.0, 1.0, 3.5, 8.0, 8.0, 8.0]
    assert all(math.isnan(possible_rank(value, 8)) for value in (0.0, -2.0, math.nan, -math.inf))
