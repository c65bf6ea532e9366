"""Delta and rho against the closed forms of orthonormal embeddings."""

import math

import numpy as np
import pytest
import torch

from lightning_spectral.theory import dynamics
from lightning_spectral.theory.embeddings import Embeddings
from lightning_spectral.theory.gradient import log_probabilities, negative_gradient_at_zero
from lightning_spectral.theory.imbalance import imbalance, rho
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import Gradient, RuleSettings, direction

K = 20
WEIGHTS = np.repeat([4.0, 1.0], K // 2) / (5 * K / 2)  # two levels of frequency


class Orthonormal(Embeddings):
    def _draw(self, side, start, stop):
        return torch.eye(K)[start:stop]


@pytest.fixture
def items():
    return Orthonormal(MemoryProblem(d=K, n_items=K, alpha=1.5, dtype="float64"))


def known(scale):
    """Correct probability where the own score exceeds all others by ``scale``."""
    return math.exp(scale) / (math.exp(scale) + K - 1)


def test_probabilities_of_a_known_map(items):
    assert torch.allclose(log_probabilities(items, torch.zeros(K, K)).exp(), torch.full((K,), 1 / K).double())
    scales = torch.linspace(0, 5, K, dtype=torch.float64)
    found = log_probabilities(items, torch.diag(scales), 7).exp()
    assert found.tolist() == pytest.approx([known(float(s)) for s in scales], rel=1e-12)
    both = imbalance(found.log())
    assert (both.best, both.worst) == pytest.approx((known(5.0), 1 / K))
    assert both.delta == pytest.approx(known(5.0) - 1 / K)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
def test_rho_of_sgd_and_muon_with_orthonormal_items(items, epsilon):
    gradient = Gradient(negative_gradient_at_zero(items, WEIGHTS), WEIGHTS, items)
    # SGD: W = t diag(p) (up to a common shift), so that the tail has a quarter of the head's score
    head = math.log((1 - epsilon) / epsilon * (K - 1))
    assert rho(items, direction("sgd", gradient), epsilon) == pytest.approx(known(head / 4), rel=1e-6)
    # Muon: every item alike, up to the mean output that the gradient at 0 takes out (the gradient has rank K - 1)
    made = direction("muon", gradient, RuleSettings(polar="svd"))
    assert rho(items, made, epsilon) > 0.9 * (1 - epsilon)
    assert rho(items, torch.eye(K).double(), epsilon) == pytest.approx(1 - epsilon, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 0.99, float("nan")])
def test_bad_epsilon_is_named(items, epsilon):
    with pytest.raises(ValueError, match="`epsilon`"):
        rho(items, torch.eye(K), epsilon)


def test_directions_that_know_nobody_are_refused(items):
    for useless in (torch.zeros(K, K), -torch.eye(K)):
        with pytest.raises(ValueError, match="`direction`"):
            rho(items, useless.double())


def test_the_exact_dynamics_report_it():
    first, last = (dynamics.run(MemoryProblem(d=24, n_items=500, alpha=1.5), "muon", 3)[i].outputs for i in (0, -1))
    assert 0 <= first["worst_probability"] < first["best_probability"] <= 1
    assert last["imbalance"] == pytest.approx(last["best_probability"] - last["worst_probability"])
