import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.theory.embeddings import BLOCK_ROWS, Embeddings
from lightning_spectral.theory.problem import MemoryProblem, check_weights, power_law

GOOD = {"d": 16, "n_items": 100, "alpha": 1.5}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d", 1),
        ("d", 2.5),
        ("d", True),
        ("n_items", 0),
        ("n_items", 1),
        ("alpha", 0),
        ("alpha", -1.0),
        ("alpha", 1.0),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("alpha", True),
        ("batch_size", 0),
        ("batch_size", 10.0),
        ("seed", -1),
        ("anisotropy", -0.5),
        ("anisotropy", float("nan")),
        ("dtype", "float16"),
        ("dtype", "int64"),
    ],
)
def test_bad_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"`{field}`") as caught:
        MemoryProblem(**{**GOOD, field: value})
    assert str(value) in str(caught.value)


def test_flat_alpha_needs_the_flag_and_huge_problems_are_refused():
    assert MemoryProblem(d=16, n_items=10, alpha=0.8, allow_flat=True).alpha == 0.8
    with pytest.raises(ValueError, match="`n_items` x `d`"):
        MemoryProblem(d=2**20, n_items=2**20, alpha=1.5)


def test_power_law_is_normalised_and_has_its_slope():
    p = power_law(1000, 1.5)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(np.diff(np.log(p)) / np.diff(np.log(np.arange(1, 1001))), -1.5, atol=1e-9)


def test_batch_weights_are_counts_of_the_seed():
    problem = MemoryProblem(**GOOD, batch_size=64)
    counts = problem.gradient_weights() * 64
    assert counts.sum() == pytest.approx(64)
    assert np.array_equal(counts, counts.round())
    assert np.array_equal(counts, problem.gradient_weights() * 64)
    assert not np.array_equal(counts, problem.gradient_weights(step=1) * 64)
    assert not np.array_equal(counts, problem.with_(seed=1).gradient_weights() * 64)


@pytest.mark.parametrize("weights", [np.ones(3), np.array([1, -1, 1, 1.0]), np.array([1, np.nan, 0, 0]), np.zeros(4)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="`weights`"):
        check_weights(weights, 4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2999), st.integers(1, 3000), st.booleans())
def test_any_range_of_rows_is_the_same_rows(start, length, cached):
    problem = MemoryProblem(d=3, n_items=3000, alpha=1.5, seed=4)
    stop = min(start + length, 3000)
    whole = Embeddings(problem).rows("v", 0, 3000)
    part = Embeddings(problem, cache_bytes=2**30 if cached else 0).rows("v", start, stop)
    assert torch.equal(part, whole[start:stop])


def test_embeddings_are_gaussian_of_unit_length_and_seeds_differ():
    problem = MemoryProblem(d=64, n_items=3 * BLOCK_ROWS, alpha=1.5)
    u, v = (Embeddings(problem).rows(side, 0, problem.n_items) for side in "uv")
    # |u|^2 has mean 1 and standard deviation sqrt(2 / d): over N = 3072 items the mean errs by 0.0032; 5 sd
    assert float(u.square().sum(1).mean()) == pytest.approx(1, abs=0.016)
    assert abs(float((u * v).sum(1).mean())) < 5 / (64 * problem.n_items) ** 0.5
    other = Embeddings(problem.with_(seed=1)).rows("u", 0, BLOCK_ROWS)
    assert not torch.equal(other, u[:BLOCK_ROWS])
    assert not torch.equal(u[:BLOCK_ROWS], u[BLOCK_ROWS : 2 * BLOCK_ROWS])


def test_anisotropy_scales_inputs_only_and_keeps_the_trace():
    problem = MemoryProblem(d=8, n_items=20000, alpha=1.5, anisotropy=1.0)
    rows = Embeddings(problem)
    assert torch.equal(rows.rows("u", 0, 100), Embeddings(problem.with_(anisotropy=0.0)).rows("u", 0, 100))
    variance = rows.rows("v", 0, 20000).var(0) * 8
    # a sample variance errs by sqrt(2 / N) = 1 %; 5 sd
    assert torch.allclose(variance.double(), torch.from_numpy(problem.input_scales()), rtol=0.05)
    assert problem.input_scales().mean() == pytest.approx(1)


def test_select_equals_indexing_streamed_or_not():
    problem = MemoryProblem(d=4, n_items=2500, alpha=1.5)
    indices = torch.tensor([0, 5, 1023, 1024, 2499])
    streamed = Embeddings(problem, cache_bytes=0)
    assert torch.equal(streamed.select("u", indices), Embeddings(problem).select("u", indices))
    with pytest.raises(ValueError, match="start < stop"):
        streamed.rows("u", 10, 10)
