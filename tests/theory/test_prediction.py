"""Predictions against closed forms and against simulation."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from lightning_spectral.theory import capacity, exponents
from lightning_spectral.theory.capacity import predict, win_probability
from lightning_spectral.theory.one_step import OneStep
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings
from lightning_spectral.theory.spectrum import GradientSpectrum, bin_weights


def test_grid_solves_the_isotropic_resolvent_equation():
    problem = MemoryProblem(d=100, n_items=5000, alpha=1.5)
    p = problem.frequencies()
    spectrum = GradientSpectrum(bin_weights(p), problem.input_scales())
    for y in (1e-4, 1e-3, 1e-2):
        g = brentq(lambda g, y=y: g * y + np.sum((g * p) ** 2 / (1 + (g * p) ** 2)) / 100 - 1, 1e-9, 1 / y)
        c = np.exp(np.interp(-np.log(y), -np.log(spectrum.y[:-1]), np.log(spectrum.c[:-1])))
        assert math.sqrt(c) == pytest.approx(g, rel=1e-3)  # bins of 0.4 %


def test_anisotropic_solution_reduces_to_the_isotropic_one():
    bins = bin_weights(MemoryProblem(d=64, n_items=4000, alpha=1.5).frequencies())
    flat = np.ones(64)
    nearly = flat.copy()
    nearly[0] += 1e-9
    assert np.allclose(
        GradientSpectrum(bins, nearly).smoothed(0.0)[0], GradientSpectrum(bins, flat).smoothed(0.0)[0], rtol=1e-3
    )


def test_predicted_spectral_moments_match_a_sampled_gradient():
    problem = MemoryProblem(d=128, n_items=4000, alpha=1.5, anisotropy=0.8, dtype="float64")
    import torch

    sigma = torch.linalg.svdvals(OneStep(problem).gradient.matrix_DD).numpy()
    spectrum = GradientSpectrum(bin_weights(problem.frequencies()), problem.input_scales())
    for y in (1e-4, 1e-3):
        measured = np.mean(y**2 / (sigma**2 + y**2))
        occupied = np.interp(-y, -spectrum.y, spectrum.T)
        assert 1 - occupied == pytest.approx(measured, rel=0.03)  # one sample: fluctuations of order 1 / d


@pytest.mark.parametrize(
    ("alpha", "d", "expected"), [(1.5, 128, 123.4), (1.5, 256, 330.8), (2.0, 256, 288.0), (1.2, 256, 375.3)]
)
def test_muon_reference_values_plus_the_one_item_that_chance_recovers(alpha, d, expected):
    # an independent implementation; its items beyond the law were not counted, which adds N x 1/N = 1 here
    count = predict(MemoryProblem(d=d, n_items=30000, alpha=alpha), "muon").count
    assert count == pytest.approx(expected + 1, rel=2e-3)


def test_large_d_tends_to_the_closed_form():
    problem = MemoryProblem(d=4096, n_items=10**6, alpha=1.5)
    slope = math.log(predict(problem.with_(d=8192), "muon").count / predict(problem, "muon").count) / math.log(2)
    assert slope == pytest.approx(exponents.one_step_exponent("muon", 1.5), abs=0.01)  # the design page: 1.335 there


@pytest.mark.parametrize("rule", ["muon", "newton", "sgd"])
def test_prediction_meets_simulation(rule):
    problem = MemoryProblem(d=128, n_items=5000, alpha=1.5)
    seeds = 4 if rule != "sgd" else 10
    counts = [OneStep(problem.with_(seed=10 + seed)).run(rule).stats.count for seed in range(seeds)]
    error = np.std(counts, ddof=1) / math.sqrt(seeds)
    # three standard errors of the measured mean, plus the 1 % that terms of order 1 / d leave
    assert abs(np.mean(counts) - predict(problem, rule).count) < 3 * error + 0.01 * np.mean(counts)


@pytest.mark.parametrize(("anisotropy", "alpha", "d"), [(1.0, 1.5, 128), (1.0, 1.2, 160), (0.75, 2.0, 128)])
def test_anisotropic_prediction_meets_simulation(anisotropy, alpha, d):
    problem = MemoryProblem(d=d, n_items=5000, alpha=alpha, anisotropy=anisotropy)
    mean = np.mean([OneStep(problem.with_(seed=20 + seed)).run("muon").stats.count for seed in range(4)])
    predicted = predict(problem, "muon")
    # three standard errors (four seeds do not know their own spread), plus the 2 % of terms that d leaves out
    assert abs(mean - predicted.count) < 3 * predicted.spread / math.sqrt(4) + 0.02 * mean


def test_answers_of_an_item_average_to_its_signal():
    problem = MemoryProblem(d=64, n_items=4000, alpha=1.5, anisotropy=1.0)
    spectrum = GradientSpectrum(bin_weights(problem.frequencies()), problem.input_scales())
    for lam in (0.0, 1e-3):
        signal, _, _ = spectrum.smoothed(lam)
        answers = spectrum.responses(spectrum.bins.value, lam)
        assert np.allclose(answers.mean(1), signal, rtol=1e-9)
        assert (np.diff(answers[0]) <= 1e-12).all()  # a head answers mostly along the directions that carry v


@pytest.mark.parametrize("alpha", [1.15, 1.5])
def test_sgd_prediction_has_converged(alpha, monkeypatch):
    problem = MemoryProblem(d=128, n_items=3000, alpha=alpha)
    count = predict(problem, "sgd").count
    monkeypatch.setattr(capacity, "_SGD_SAMPLES", 4096)
    # means of counts are measured to a standard error of 1 % with some hundred seeds: sampling must stay below that
    assert count == pytest.approx(predict(problem, "sgd").count, rel=0.01)


def test_small_batches_are_stored_whole():
    problem = MemoryProblem(d=128, n_items=5000, alpha=1.5, batch_size=64)
    distinct = (problem.gradient_weights() > 0).sum()
    assert predict(problem, "muon").count == pytest.approx(distinct + 1, abs=0.2)  # plus chance


def test_lambda_costs_capacity_and_becomes_sgd():
    problem = MemoryProblem(d=128, n_items=5000, alpha=1.5)
    counts = [predict(problem, "muon", RuleSettings(lam_scale=scale)).count for scale in (0.0, 1.0, 10.0, 1000.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 20


def test_rules_without_a_formula_have_no_prediction():
    assert predict(MemoryProblem(d=32, n_items=500, alpha=1.5), "ns5") is None
    assert predict(MemoryProblem(d=32, n_items=500, alpha=1.5), "sign") is None
    with pytest.raises(ValueError, match="`rules`"):
        predict(MemoryProblem(d=32, n_items=500, alpha=1.5), "adam")


def test_win_probability_of_equals_is_one_in_n():
    assert float(win_probability(np.array([0.0]), np.array([1.0]), 99)[0]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("alpha", "muon", "newton", "sgd"),
    [(1.2, 0.468, 0.374, 2.726), (1.5, 0.527, 0.521, 2.676), (2.0, 0.587, 0.637, 2.579)],
)
def test_constants(alpha, muon, newton, sgd):
    made = [exponents.capacity_constant(rule, alpha) for rule in ("muon", "newton", "sgd")]
    assert made == pytest.approx([muon, newton, sgd], abs=1.1e-3)


def test_exponents_of_many_steps():
    muon = [exponents.multi_step_exponent("muon", 1.5, step) for step in range(5)]
    assert muon == pytest.approx([1, 4 / 3, 14 / 9, 46 / 27, 146 / 81])
    sgd = [exponents.multi_step_exponent("sgd", 1.5, step) for step in range(6)]
    assert sgd == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 14 / 9])  # lags by 2 alpha = 3 steps, then Muon's own
    assert exponents.critical_batch_exponent("muon", 1.5) == 2.0
    assert exponents.critical_batch_exponent("sgd", 1.5) == 0.5
    assert exponents.one_step_exponent("ns5", 1.5) is None
    with pytest.raises(ValueError, match="`alpha`"):
        exponents.one_step_exponent("muon", 1.0)


def test_distinct_items_match_the_draws():
    problem = MemoryProblem(d=2, n_items=30000, alpha=1.5, batch_size=4096)
    drawn = np.mean([(problem.with_(seed=seed).gradient_weights() > 0).sum() for seed in range(20)])
    assert exponents.expected_distinct(1.5, 30000, 4096) == pytest.approx(drawn, rel=0.02)


def test_critical_batch_lies_at_nine_tenths():
    problem = MemoryProblem(d=64, n_items=3000, alpha=1.5)
    critical = exponents.critical_batch(problem, "muon")
    whole = predict(problem, "muon").count
    near = predict(problem.with_(batch_size=round(critical)), "muon").count
    assert near == pytest.approx(0.9 * whole, rel=0.15)  # one draw of a batch
    assert exponents.critical_batch(problem, "ns5") is None


def test_deflation_prediction_grows_from_the_one_step_count():
    problem = MemoryProblem(d=64, n_items=5000, alpha=1.5)
    reached = exponents.predict_deflation(problem, "muon", 3)
    assert reached[0] == pytest.approx(predict(problem, "muon").count)
    assert reached[0] < reached[1] < reached[2]
    assert exponents.predict_deflation(problem, "ns5", 2) is None
