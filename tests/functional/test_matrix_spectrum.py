import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional.matrix_spectrum import (
    MATRIX_MEASURES,
    matrix_spectrum,
    spectrum_measures,
    top_energy,
)

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def oracle(sigma):
    square = np.sort(np.asarray(sigma, dtype=np.float64) ** 2)[::-1]
    q = square / square.sum()
    entropy = -(q * np.log(q)).sum()
    return {
        "normalized_entropy": entropy / math.log(len(q)) if len(q) > 1 else 0.0,
        "effective_rank": math.exp(entropy),
        "top1_energy": q[0],
        "top10_energy": q[:10].sum(),
        "quartile_ratio": np.quantile(square, 0.75) / np.quantile(square, 0.25),
        "stable_rank": square.sum() / square[0],
        "condition_number": math.sqrt(square[0] / square[-1]),
    }


@settings(deadline=None)
@given(spectra)
def test_measures_equal_numpy(sigma):
    made = spectrum_measures(torch.tensor(sigma, dtype=torch.float64)).as_dict()
    for name, value in oracle(sigma).items():
        assert made[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@settings(deadline=None)
@given(spectra, st.floats(1e-6, 1e6))
def test_scale_free_and_in_range(sigma, scale):
    values = torch.tensor(sigma, dtype=torch.float64)
    measures, scaled = spectrum_measures(values), spectrum_measures(values * scale)
    for name in MATRIX_MEASURES:
        assert getattr(scaled, name) == pytest.approx(getattr(measures, name), rel=1e-9, abs=1e-12)
    slack = 1 + 1e-9
    assert -1e-12 <= measures.normalized_entropy <= slack
    assert measures.stable_rank * slack >= 1
    assert measures.stable_rank <= measures.effective_rank * slack <= len(sigma) * slack**2
    assert measures.quartile_ratio >= 1 / slack
    assert measures.condition_number >= 1 / slack


def test_orthogonal_and_rank_one_matrices():
    flat = matrix_spectrum(torch.eye(16))
    assert flat.normalized_entropy == pytest.approx(1)
    assert flat.effective_rank == pytest.approx(16)
    assert flat.top1_energy == pytest.approx(1 / 16)
    one = matrix_spectrum(torch.outer(torch.arange(1.0, 5), torch.ones(3)))
    assert (one.num_nonzero, one.normalized_entropy, one.stable_rank) == (1, 0.0, 1.0)


def test_zero_matrix_is_said_not_guessed():
    zero = matrix_spectrum(torch.zeros(3, 4))
    assert zero.effective_rank is None
    assert (zero.num_nonzero, zero.largest) == (0, 0.0)


def test_convolutions_are_flattened_and_transposes_are_equal():
    kernel = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert matrix_spectrum(kernel) == matrix_spectrum(kernel.flatten(1))
    assert matrix_spectrum(kernel.flatten(1).mT).effective_rank == pytest.approx(matrix_spectrum(kernel).effective_rank)


def test_refusals():
    with pytest.raises(ValueError, match="two axes"):
        matrix_spectrum(torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        matrix_spectrum(torch.full((2, 2), float("inf")))
    with pytest.raises(ValueError, match="`k`"):
        top_energy(torch.ones(3), 0)
    with pytest.raises(ValueError, match="all zero"):
        top_energy(torch.zeros(3))
    with pytest.raises(ValueError, match="`singular_values`"):
        spectrum_measures(torch.tensor([1.0, -1.0]))


def test_one_entry_is_a_matrix_and_none_is_not():
    assert matrix_spectrum(torch.tensor([[3.0]])).largest == 3.0
    with pytest.raises(ValueError, match="must have two axes and entries"):
        matrix_spectrum(torch.zeros(0, 3))
