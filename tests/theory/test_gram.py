"""SGD by its Gram matrices has the distribution of SGD with embeddings, and of the theory."""

import math

import numpy as np
import pytest

from lightning_spectral.theory.capacity import predict
from lightning_spectral.theory.gram import _triangle, sgd_recovered
from lightning_spectral.theory.one_step import OneStep
from lightning_spectral.theory.problem import MemoryProblem


@pytest.mark.parametrize("batch_size", [None, 16])
def test_counts_have_mean_and_spread_of_simulated_ones(batch_size):
    problem = MemoryProblem(d=96, n_items=800, alpha=1.5, batch_size=batch_size)
    seeds = 100
    gram = [sgd_recovered(problem.with_(seed=seed)).sum() for seed in range(seeds)]
    direct = [OneStep(problem.with_(seed=1000 + seed)).run("sgd").stats.count for seed in range(seeds)]
    error = math.hypot(np.std(gram), np.std(direct)) / math.sqrt(seeds)
    assert abs(np.mean(gram) - np.mean(direct)) < 3 * error
    assert np.std(gram) == pytest.approx(np.std(direct), rel=0.3)  # 100 seeds know a spread to 7 %


def test_counts_meet_the_theory_at_a_size_no_embedding_needs():
    problem = MemoryProblem(d=4096, n_items=20000, alpha=1.5)
    counts = [sgd_recovered(problem.with_(seed=seed), heads=256).sum() for seed in range(8)]
    predicted = predict(problem, "sgd")
    assert abs(np.mean(counts) - predicted.count) < 3 * predicted.spread / math.sqrt(8) + 0.02 * predicted.count


def test_the_gram_matrix_has_the_moments_of_a_wishart():
    import torch

    grams = torch.stack(
        [(t := _triangle(12, 40, torch.Generator().manual_seed(seed)).double()) @ t.mT for seed in range(4000)]
    )
    mean, spread = grams.mean(0), grams.std(0)
    assert torch.allclose(mean, torch.eye(12).double(), atol=4 * math.sqrt(2 / 40 / 4000))
    off = ~torch.eye(12, dtype=torch.bool)
    assert torch.allclose(spread[off], torch.full_like(spread[off], 40**-0.5), rtol=0.06)
    assert torch.allclose(spread.diagonal(), torch.full((12,), math.sqrt(2 / 40)).double(), rtol=0.06)


def test_few_items_and_unfit_problems():
    alone = sgd_recovered(MemoryProblem(d=16, n_items=50, alpha=1.5, batch_size=1))
    assert alone.sum() <= 1
    for fields in ({"anisotropy": 1.0}, {"d_out": 20}):
        with pytest.raises(ValueError, match="`anisotropy`"):
            sgd_recovered(MemoryProblem(d=16, n_items=50, alpha=1.5, **fields))
