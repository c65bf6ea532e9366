"""Predictions against closed forms and against simulation."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from lightning_spectral.theory import capacity_rules, dynamics, exponents
from lightning_spectral.theory.capacity import distrust, predict, predict_weights, win_probability
from lightning_spectral.theory.density import density_of
from lightning_spectral.theory.one_step import OneStep
from lightning_spectral.theory.problem import MemoryProblem, power_law, typical_draw
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
        GradientSpectrum(bins, nearly).smoothed(0.0).signal,
        GradientSpectrum(bins, flat).smoothed(0.0).signal,
        rtol=1e-3,
    )


def test_predicted_spectral_moments_match_a_sampled_gradient():
    problem = MemoryProblem(d=128, n_items=4000, alpha=1.5, anisotropy=0.8, dtype="float64")
    import torch

    sigma = torch.linalg.svdvals(OneStep(problem).gradient.matrix_MD).numpy()
    spectrum = GradientSpectrum(bin_weights(problem.frequencies()), problem.input_scales())
    for y in (1e-4, 1e-3):
        measured = np.mean(y**2 / (sigma**2 + y**2))
        occupied = np.interp(-y, -spectrum.y, spectrum.held / problem.d)
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
        signal = spectrum.smoothed(lam).signal[:-1]
        answers = spectrum.responses(spectrum.bins.value, lam)
        assert np.allclose(answers.mean(1), signal, rtol=1e-9)
        assert (np.diff(answers[0]) <= 1e-12).all()  # a head answers mostly along the directions that carry v


@pytest.mark.parametrize("alpha", [1.15, 1.5])
def test_sgd_prediction_has_converged(alpha, monkeypatch):
    problem = MemoryProblem(d=128, n_items=3000, alpha=alpha)
    count = predict(problem, "sgd").count
    monkeypatch.setattr(capacity_rules, "_SGD_SAMPLES", 4096)
    # means of counts are measured to a standard error of 1 % with some hundred seeds: sampling must stay below that
    assert count == pytest.approx(predict(problem, "sgd").count, rel=0.01)


def test_small_batches_are_stored_whole():
    problem = MemoryProblem(d=128, n_items=5000, alpha=1.5, batch_size=64)
    weights = problem.gradient_weights()
    probability = predict(problem, "muon").probability
    assert probability[weights > 0].mean() > 0.999
    assert probability[weights == 0].sum() < 0.4


@pytest.mark.parametrize("batch_size", [4, 16])
def test_items_without_weight_win_as_rarely_as_they_do(batch_size):
    # rivals that are stored answer sqrt(d / items) times as loud as silent ones: 1 / N each would make a whole item
    found, predicted = [], []
    for seed in range(60):
        problem = MemoryProblem(d=64, n_items=1000, alpha=1.5, batch_size=batch_size, seed=seed)
        silent = problem.gradient_weights() == 0
        found.append(OneStep(problem).run("muon").recovered[silent].sum())
        predicted.append(predict(problem, "muon").probability[silent].sum())
    assert abs(np.mean(found) - np.mean(predicted)) < 3 * np.std(found) / math.sqrt(60) + 0.05


SHAPES = [(128, 512), (512, 128), (96, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["muon", "ns5", "newton"])
def test_rectangular_memories_meet_simulation(shape, rule):
    problem = MemoryProblem(d=shape[1], d_out=shape[0], n_items=5000, alpha=1.5)
    counts = [OneStep(problem.with_(seed=40 + seed)).run(rule).stats.count for seed in range(3)]
    predicted = predict(problem, rule)
    # three standard errors plus the 3 % that d = 96 and a finite N leave
    assert abs(np.mean(counts) - predicted.count) < 3 * predicted.spread / math.sqrt(3) + 0.03 * np.mean(counts)


def test_rectangular_prediction_has_its_reference_values():
    weights = np.arange(1, 10001.0) ** -1.5
    weights /= weights.sum()
    expected = {(128, 256): 197.6, (128, 1024): 342.2, (256, 128): 203.2, (1024, 128): 243.8, (256, 1024): 695.8}
    made = {shape: predict_weights(weights, shape, "muon").count for shape in expected}
    assert made == pytest.approx(expected, rel=2e-3)  # an independent implementation


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
def test_the_density_gives_the_polar_factor_s_effect(shape):
    weights = MemoryProblem(d=2, n_items=2000, alpha=1.4).frequencies()
    bins = bin_weights(weights)
    exact = GradientSpectrum(bins, np.ones(shape[1]), shape[0]).smoothed(0.0)
    made = density_of(bins, shape).effect(np.ones_like)
    for name in ("signal", "image", "answer"):
        # heads are spikes narrower than the grid: 1 %
        assert getattr(made, name) == pytest.approx(getattr(exact, name), rel=1e-2, abs=1e-9), name


def test_the_density_smooths_like_lambda():
    problem = MemoryProblem(d=64, n_items=2000, alpha=1.5)
    bins, lam = bin_weights(problem.frequencies()), 2e-3
    exact = GradientSpectrum(bins, np.ones(64)).smoothed(lam)
    made = density_of(bins, (64, 64)).effect(lambda s: s / np.hypot(s, lam))
    assert made.signal == pytest.approx(exact.signal, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("rule", ["ns5", "power0.2"])
def test_other_spectral_maps_meet_simulation(rule):
    problem = MemoryProblem(d=128, n_items=4000, alpha=1.3)
    counts = [OneStep(problem.with_(seed=60 + seed)).run(rule).stats.count for seed in range(4)]
    predicted = predict(problem, rule)
    assert abs(np.mean(counts) - predicted.count) < 3 * predicted.spread / math.sqrt(4) + 0.03 * np.mean(counts)


@pytest.mark.parametrize("anisotropy", [0.0, 3.0, 9.0])
def test_newton_does_not_see_anisotropy(anisotropy):
    problem = MemoryProblem(d=64, n_items=1500, alpha=1.5, seed=1)
    plain = OneStep(problem).run("newton").recovered
    other = OneStep(problem.with_(anisotropy=anisotropy)).run("newton").recovered
    assert (plain != other).sum() <= 1  # one item may hang on a rounding


def test_trust_has_one_rule_and_gives_its_reason():
    def reason(rule, settings=None, **fields):
        problem = MemoryProblem(**{"d": 128, "n_items": 5000, "alpha": 1.5, **fields})
        settings = settings or RuleSettings()
        return distrust(problem, rule, settings, predict(problem, rule, settings))

    assert reason("muon") is None
    assert reason("newton") is None
    assert "d=64" in reason("muon", d=64)
    assert "d=100" in reason("muon", d_out=100)
    assert "censored" in reason("muon", n_items=300)
    assert "d / n_items" in reason("newton", n_items=630)
    assert "anisotropy" in reason("sgd", anisotropy=1.5)
    assert reason("newton", anisotropy=4.0) is None
    assert "lambda" in reason("muon", RuleSettings(lam_scale=3.0))
    assert "condition" in reason("muon", alpha=6.0, n_items=5000)
    assert "no formula" in reason("sign")
    assert "singular" in reason("newton", batch_size=16)


def test_steep_weights_are_predicted_or_refused_by_name():
    steep = predict(MemoryProblem(d=128, n_items=1000, alpha=50.0), "muon")
    assert 50 < steep.count < 128  # items beyond the d-th are out of reach
    with pytest.raises(ValueError, match="`alpha`"):
        predict(MemoryProblem(d=4096, n_items=30000, alpha=60.0), "muon")


def test_lambda_costs_capacity_and_becomes_sgd():
    problem = MemoryProblem(d=128, n_items=5000, alpha=1.5)
    counts = [predict(problem, "muon", RuleSettings(lam_scale=scale)).count for scale in (0.0, 1.0, 10.0, 1000.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 20


def test_rules_without_a_formula_have_no_prediction():
    assert predict(MemoryProblem(d=32, n_items=500, alpha=1.5, anisotropy=1.0), "ns5") is None
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


@pytest.mark.parametrize("batch_size", [8, 128, 4096])
def test_a_typical_draw_is_what_draws_are_on_average(batch_size):
    problem = MemoryProblem(d=2, n_items=5000, alpha=1.3, batch_size=batch_size)
    draws = [problem.with_(seed=seed).gradient_weights() * batch_size for seed in range(400)]
    typical = [typical_draw(problem.frequencies(), batch_size, shift) for shift in (0.0, 0.25, 0.5, 0.75)]
    for times in (1, 2):  # items drawn at least that often
        expected = np.mean([(draw >= times).sum() for draw in draws])
        found = np.mean([(draw / draw[draw > 0].min() > times - 0.5).sum() for draw in typical])  # once is the least
        assert found == pytest.approx(expected, rel=0.04, abs=0.7)  # a head or two
    assert sum(typical[0]) == pytest.approx(1)


@pytest.mark.parametrize(("alpha", "batch_size"), [(50.0, 2**40), (1.01, 2**40), (3.0, 1)])
def test_typical_draws_are_weights_whatever_the_batch(alpha, batch_size):
    drawn = typical_draw(power_law(3000, alpha), batch_size, 0.25)
    assert np.isfinite(drawn).all()
    assert (drawn >= 0).all()
    assert drawn.sum() in (0.0, pytest.approx(1.0))  # a single draw may typically be none


def test_critical_batch_lies_at_nine_tenths():
    problem = MemoryProblem(d=64, n_items=3000, alpha=1.5)
    critical = exponents.critical_batch(problem, "muon")
    whole = predict(problem, "muon").count
    near = [predict(problem.with_(batch_size=round(critical), seed=seed), "muon").count for seed in range(60)]
    # three standard errors of 60 draws, and half a step of the grid of powers of two
    assert np.mean(near) == pytest.approx(0.9 * whole, abs=3 * np.std(near) / 60**0.5 + 0.02 * whole)
    assert exponents.critical_batch(problem, "sign") is None


def test_deflation_prediction_grows_from_the_one_step_count():
    problem = MemoryProblem(d=64, n_items=5000, alpha=1.5)
    reached = exponents.predict_deflation(problem, "muon", 3)
    assert reached[0] == pytest.approx(predict(problem, "muon").count)
    assert reached[0] < reached[1] < reached[2]
    assert exponents.predict_deflation(problem, "sign", 2) is None


def test_deflation_of_sampled_steps_is_predicted_from_their_own_draws():
    problem = MemoryProblem(d=128, n_items=8000, alpha=1.5, batch_size=256)
    found = [
        [step.count for step in dynamics.run(problem.with_(seed=seed), "muon", 3, "deflation")] for seed in range(4)
    ]
    predicted = [exponents.predict_deflation(problem.with_(seed=seed), "muon", 3) for seed in range(4)]
    # the population's 135, 361, 637 are not within reach of 256 draws a step
    assert np.mean(found, 0) == pytest.approx(np.mean(predicted, 0), rel=0.05)
    assert np.mean(predicted, 0)[2] < 130


def test_deflation_never_predicts_more_items_than_there_are():
    reached = exponents.predict_deflation(MemoryProblem(d=64, n_items=100, alpha=1.5), "muon", 6)
    assert max(reached) <= 100


def test_distinct_items_of_a_flat_law_are_counted():
    assert exponents.expected_distinct(0.9, 100, 1) == pytest.approx(1.0)
    assert 7 < exponents.expected_distinct(0.5, 10**5, 8) <= 8


def test_information_limit():
    assert exponents.information_limit(64, 4096) == pytest.approx(4096 / (2 * math.log(4096)))


def test_a_law_so_steep_that_no_batch_holds_its_items_has_no_critical_batch():
    frequencies = np.arange(1, 101.0) ** -50
    assert (
        exponents.saturating_batch(lambda batch: 50.0 if batch is None else 1.0, frequencies / frequencies.sum())
        is None
    )
