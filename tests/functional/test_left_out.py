"""What is said by leaving shards out, against closed forms and simulations."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_spectral.functional.left_out import endless, interval


def on_a_law(rank: float, hidden: float, power: float, rows: float) -> float:
    """The rank that so many rows show: ``S_N ** -power = S ** -power + hidden / N``, or ``ln S_N = ln S - ...``."""
    if power == 0:
        return rank * math.exp(-hidden / rows)
    return (rank**-power + hidden / rows) ** (-1 / power)


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shards", [[50, 50], [10, 20, 30], [1, 99], [300, 5, 5, 40], [7] * 8])
def test_what_follows_the_law_is_found_whatever_the_sizes_of_the_shards(shards: list[int], power: float) -> None:
    rows, hidden = sum(shards), 0.4
    parts = [(on_a_law(20.0, hidden, power, rows - size), rows - size) for size in shards]
    found = endless(on_a_law(20.0, hidden, power, rows), rows, parts, 64, power)
    assert found == pytest.approx(20.0, rel=1e-9)


def test_two_halves_are_twice_all_minus_the_halves() -> None:
    assert math.log(endless(10.0, 200, [(8.0, 100), (9.0, 100)], 64, 0.0)) == pytest.approx(
        2 * math.log(10) - (math.log(8) + math.log(9)) / 2
    )


def test_shards_of_one_size_are_the_jackknife() -> None:
    logs = torch.tensor([2.0, 2.2, 1.9, 2.1], dtype=torch.float64)
    low, high = interval(math.exp(2.05), 100, [(math.exp(log), 75) for log in logs.tolist()])
    error = math.sqrt(3 / 4 * float((logs - logs.mean()).square().sum()))
    assert math.log(high) - 2.05 == pytest.approx(3.182446 * error, rel=1e-6)  # t of 3 degrees of freedom
    assert 2.05 - math.log(low) == pytest.approx(3.182446 * error, rel=1e-6)


def test_an_interval_from_unlike_shards_covers_the_mean() -> None:
    """The logarithm of a mean of independent rows, of which shards hold very unlike numbers."""
    generator, sizes = torch.Generator().manual_seed(0), [40, 3, 25, 10, 60, 5, 30, 12]
    rows, covered = sum(sizes), 0
    for _ in range(1_000):
        values = 5 + torch.randn(rows, generator=generator, dtype=torch.float64)
        parts = [(values.sum() - own.sum()) / (rows - len(own)) for own in values.split(sizes)]
        low, high = interval(
            float(values.mean()), rows, [(float(p), rows - n) for p, n in zip(parts, sizes, strict=True)]
        )
        covered += low <= 5 <= high
    assert covered / 1_000 == pytest.approx(0.95, abs=0.03)  # exact only for shards of one size


def test_what_cannot_be_told() -> None:
    assert endless(3.0, 10, [], 8, 0.0) is None
    assert interval(3.0, 10, [(2.0, 5)]) is None
    assert endless(3.0, 10, [(0.0, 5), (2.0, 5)], 8, 0.0) is None
    assert interval(math.nan, 10, [(2.0, 5), (2.0, 5)]) is None
    assert endless(7.9, 10, [(1.0, 5), (1.0, 5)], 8, 1.0) == 8.0
    low, high = interval(3.0, 100, [(1.0, 1), (3.0, 99)])
    assert 0 <= low < 3 < high < math.inf
