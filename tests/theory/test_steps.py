"""Gradients, rules, recovery and dynamics against brute force."""

import numpy as np
import pytest
import torch

from lightning_spectral.theory import dynamics
from lightning_spectral.theory.embeddings import Embeddings
from lightning_spectral.theory.gradient import (
    log_probabilities,
    negative_gradient,
    negative_gradient_at_zero,
    population_loss,
)
from lightning_spectral.theory.one_step import OneStep, one_step
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.recovery import recovered_mask, recovery_stats
from lightning_spectral.theory.rules import Gradient, RuleSettings, direction, steps_for_capacity

SMALL = MemoryProblem(d=24, n_items=1500, alpha=1.5, dtype="float64", seed=3)


def everything(problem):
    embeddings = Embeddings(problem)
    return embeddings, *(embeddings.rows(side, 0, problem.n_items).double() for side in "uv")


def autograd(problem, weights, weight_DD):
    _, u, v = everything(problem)
    w = weight_DD.clone().requires_grad_()
    loss = -(torch.from_numpy(weights) * torch.log_softmax(v @ w.T @ u.T, 1).diagonal()).sum()
    loss.backward()
    return -w.grad, float(loss.detach())


@pytest.mark.parametrize("batch_size", [None, 50])
def test_gradients_and_loss_equal_autograd(batch_size):
    problem = SMALL.with_(batch_size=batch_size)
    weights, embeddings = problem.gradient_weights(), Embeddings(problem)
    expected, _ = autograd(problem, weights, torch.zeros(24, 24, dtype=torch.float64))
    assert torch.allclose(negative_gradient_at_zero(embeddings, weights), expected, rtol=0, atol=1e-14)  # fp64 sums
    weight_DD = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    expected, loss = autograd(problem, weights, weight_DD)
    for chunk_size in (64, 1024):
        actual, actual_loss = negative_gradient(embeddings, weight_DD, weights, chunk_size)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-13)
        assert actual_loss == pytest.approx(loss, rel=1e-12)
    if batch_size is None:
        assert population_loss(embeddings, weight_DD, 100) == pytest.approx(loss, rel=1e-12)


def test_fp32_gradient_at_zero_is_the_fp64_one_for_every_singular_value():
    problem = MemoryProblem(d=64, n_items=9000, alpha=1.5, seed=5)  # nine blocks: more than two fp32 sums
    weights = problem.gradient_weights()
    single = negative_gradient_at_zero(Embeddings(problem), weights)
    double = negative_gradient_at_zero(Embeddings(problem.with_(dtype="float64")), weights)
    error, sigma = torch.linalg.matrix_norm(single - double, 2), torch.linalg.svdvals(double)
    # fp32 rounds products of tail items only: measured 8e-6; with a mean of u in fp32 it would be 2e-4
    assert error < 3e-5 * sigma[-1]
    assert torch.equal(negative_gradient_at_zero(Embeddings(problem, cache_bytes=0), weights), single)


def test_loss_at_zero_is_log_n():
    assert population_loss(Embeddings(SMALL), torch.zeros(24, 24)) == pytest.approx(np.log(1500), rel=1e-12)


def brute_force(problem, weight_DD):
    _, u, v = everything(problem)
    scores = v @ weight_DD.double().T @ u.T
    own = scores.diagonal().clone()
    scores.fill_diagonal_(-torch.inf)
    return (own > scores.amax(1)).numpy()


@pytest.mark.parametrize("rule", ["sgd", "sign", "muon", "ns5", "newton"])
@pytest.mark.parametrize("screen", ["bfloat16", "float32", "float64"])
def test_screened_recovery_equals_brute_force(rule, screen):
    problem = MemoryProblem(d=32, n_items=3000, alpha=1.3, seed=1)
    step = OneStep(problem)
    update = direction(rule, step.gradient)
    expected = brute_force(problem, update)
    assert expected.sum() > 2
    assert np.array_equal(recovered_mask(step.embeddings, update, screen=screen), expected)


@pytest.mark.parametrize("screen", ["bfloat16", "float32"])
def test_near_ties_are_decided_in_fp64(screen):
    problem = MemoryProblem(d=32, n_items=3000, alpha=1.3, seed=1)

    class NearTwins(Embeddings):
        def _draw(self, side, start, stop):
            rows = super()._draw(side, start, stop)
            if side == "u" and start == 0:  # outputs 1000..1999 repeat 0..999 but for the last bit of one entry
                rows[1000:2000] = rows[:1000]
                rows[1000:2000, 0] = torch.nextafter(rows[1000:2000, 0], torch.tensor(torch.inf))
            return rows

    embeddings = NearTwins(problem)
    weights = problem.gradient_weights()
    update = direction("muon", Gradient(negative_gradient_at_zero(embeddings, weights), weights, embeddings))
    u, v = (embeddings.rows(side, 0, problem.n_items).double() for side in "uv")
    scores = v @ update.T @ u.T
    own = scores.diagonal().clone()
    expected = (own > scores.fill_diagonal_(-torch.inf).amax(1)).numpy()
    assert 2 < expected[:1000].sum() < 1000
    assert np.array_equal(recovered_mask(embeddings, update, screen=screen), expected)


def test_recovery_does_not_depend_on_chunks_cache_or_scale():
    problem = MemoryProblem(d=48, n_items=6000, alpha=1.5, seed=2)
    update = OneStep(problem).run("muon").update_MD
    whole = recovered_mask(Embeddings(problem), update)
    for chunk_size, cache in ((1, 2**30), (700, 0), (10**6, 0)):
        if chunk_size == 1:
            continue  # one row at a time takes minutes
        assert np.array_equal(recovered_mask(Embeddings(problem, cache_bytes=cache), update, chunk_size), whole)
    assert np.array_equal(recovered_mask(Embeddings(problem), update * 1e30), whole)


@pytest.mark.parametrize(
    ("d", "n_items", "alpha", "seed"),
    [(33, 1500, 1.2, 0), (64, 4500, 1.35, 1), (96, 3000, 2.0, 2), (300, 2100, 1.5, 3)],
)
def test_muon_stores_exactly_what_the_naive_fp64_computation_stores(d, n_items, alpha, seed):
    # fp32 gradient, BLAS-3 polar factor with fp32 corrections, bf16 screening: none of it may show in a single item
    problem = MemoryProblem(d=d, n_items=n_items, alpha=alpha, seed=seed)
    _, u, v = everything(problem)
    weights = torch.from_numpy(problem.frequencies())
    gradient = ((u - u.mean(0)) * weights[:, None]).T @ v
    left, _, right = torch.linalg.svd(gradient)
    assert np.array_equal(OneStep(problem).run("muon").recovered, brute_force(problem, left @ right))


def test_zero_map_and_ties_recover_nothing():
    embeddings = Embeddings(SMALL)
    assert not recovered_mask(embeddings, torch.zeros(24, 24)).any()

    class Twins(Embeddings):
        def _draw(self, side, start, stop):
            rows = super()._draw(side, start, stop)
            return rows[:1].expand_as(rows).contiguous() if side == "u" else rows

    twins = Twins(MemoryProblem(d=4, n_items=200, alpha=1.5))
    assert not recovered_mask(twins, torch.eye(4)).any()


@pytest.mark.parametrize("bad", [torch.zeros(23, 24), torch.full((24, 24), float("nan"))])
def test_bad_maps_are_refused(bad):
    with pytest.raises(ValueError, match="`W`"):
        recovered_mask(Embeddings(SMALL), bad)


def test_stats_of_a_known_mask():
    mask = np.array([True, True, False, True, False, False])
    stats = recovery_stats(mask, np.full(6, 1 / 6))
    assert (stats.count, stats.prefix) == (3, 2)
    assert stats.mass == pytest.approx(0.5)
    assert stats.head_recall == pytest.approx(2 / 3)
    assert stats.tail_recall == pytest.approx(1 / 3)
    assert recovery_stats(np.ones(6, bool), np.full(6, 1 / 6)).prefix == 6
    with pytest.raises(ValueError, match="shape"):
        recovery_stats(mask, np.ones(5))


def test_rules_are_what_they_are_called():
    step = OneStep(SMALL)
    gradient = step.gradient.matrix_MD
    left, sigma, right = torch.linalg.svd(gradient)
    assert torch.equal(direction("sgd", step.gradient), gradient)
    assert torch.equal(direction("sign", step.gradient), gradient.sign())
    polar = left @ right
    assert torch.allclose(direction("muon", step.gradient), polar, rtol=0, atol=1e-10)  # 1e-16 x condition number
    assert torch.allclose(direction("muon", step.gradient, RuleSettings(polar="svd")), polar, rtol=0, atol=1e-10)
    lam = 0.3 * float(sigma[3])
    smooth = (left * (sigma / (sigma**2 + lam**2).sqrt())) @ right
    for polar_by in ("newton", "svd"):
        made = direction("muon", step.gradient, RuleSettings(lam=lam, polar=polar_by))
        assert torch.allclose(made, smooth, rtol=0, atol=1e-11)


def test_newton_solves_the_hessian_at_zero():
    problem = MemoryProblem(d=6, n_items=80, alpha=1.2, dtype="float64")
    embeddings, u, v = everything(problem)
    p = torch.from_numpy(problem.frequencies())

    def loss(flat):
        return -(p * torch.log_softmax(v @ flat.view(6, 6).T @ u.T, 1).diagonal()).sum()

    zero = torch.zeros(36, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, zero)
    expected = torch.linalg.solve(hessian, -torch.autograd.functional.jacobian(loss, zero)).view(6, 6)
    step = OneStep(problem)
    assert torch.allclose(direction("newton", step.gradient), expected, rtol=1e-8)  # condition number of the Hessian
    assert embeddings.cached


def test_pseudo_polar_of_a_small_batch_stores_every_sampled_item():
    problem = MemoryProblem(d=64, n_items=3000, alpha=1.5, batch_size=30)
    step = OneStep(problem)
    by_items = direction("muon", step.gradient)
    by_svd = direction("muon", step.gradient, RuleSettings(polar="svd"))
    assert torch.allclose(by_items, by_svd, rtol=0, atol=1e-8)  # the SVD sees the rank only down to rounding of G
    recovered = step.run("muon").recovered
    assert recovered[step.weights > 0].all()


def test_newton_on_a_small_batch_asks_for_a_ridge():
    step = OneStep(MemoryProblem(d=64, n_items=3000, alpha=1.5, batch_size=30))
    with pytest.raises(ValueError, match="`ridge`.*--ridge"):
        step.run("newton")
    assert step.run("newton", RuleSettings(ridge=1e-3)).stats.count > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("lam", -1.0), ("lam", float("nan")), ("ridge", -1.0), ("ns_steps", 0), ("ns_dtype", "int8"), ("polar", "qr")],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        RuleSettings(**{field: value})


def test_unknown_rules_zero_and_nonfinite_gradients_are_refused():
    step = OneStep(SMALL)
    with pytest.raises(ValueError, match="`rules`"):
        direction("adamw", step.gradient)
    for value, message in ((0.0, "zero"), (float("nan"), "finite")):
        step.gradient.matrix_MD.fill_(value)
        with pytest.raises(ValueError, match=message):
            direction("muon", step.gradient)


def test_few_items_warn_that_the_count_is_censored():
    with pytest.warns(UserWarning, match="censored"):
        one_step(MemoryProblem(d=64, n_items=60, alpha=1.5), "muon")


def test_steps_for_capacity_grow_with_d_and_alpha():
    assert steps_for_capacity(1024, 1.5) > steps_for_capacity(64, 1.5) > 5
    assert steps_for_capacity(256, 2.0) > steps_for_capacity(256, 1.2)


def test_exact_dynamics_first_step_is_the_one_step_result():
    problem = MemoryProblem(d=24, n_items=1500, alpha=1.5)
    first, second = dynamics.run(problem, "muon", 2, "exact", step_scale=1.0, schedule="constant")
    assert first.count == one_step(problem, "muon").stats.count
    assert second.outputs["loss"] < first.outputs["loss"] < np.log(1500)


def test_deflation_grows_and_first_step_is_the_one_step_result():
    problem = MemoryProblem(d=24, n_items=1500, alpha=1.5)
    counts = [result.count for result in dynamics.run(problem, "muon", 3, "deflation")]
    assert counts[0] == one_step(problem, "muon").stats.count
    assert counts == sorted(counts)
    assert dynamics.run(problem, "muon", 0) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": -1}, "steps"),
        ({"step_scale": 0.0}, "step_scale"),
        ({"mode": "fast"}, "mode"),
        ({"schedule": "cosine"}, "schedule"),
        ({"rule": "newton"}, "rule"),
    ],
)
def test_bad_runs_are_refused(change, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        dynamics.run(SMALL, **change)


@pytest.mark.parametrize("scale", [2.0, 100.0, 1e4, 1e6, 1e8])
def test_no_probability_exceeds_one_however_large_the_scores(scale):
    for step in dynamics.run(MemoryProblem(d=32, n_items=500, alpha=1.5), "muon", 2, step_scale=scale):
        assert 0 <= step.outputs["worst_probability"] <= step.outputs["best_probability"] <= 1
        assert step.outputs["loss"] >= 0


def test_large_scores_are_decided_in_fp64():
    problem = MemoryProblem(d=24, n_items=300, alpha=1.5)  # fp32 problem
    weight = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e6
    _, u, v = everything(problem)
    expected = torch.log_softmax(v @ weight.T @ u.T, 1).diagonal()
    assert torch.allclose(log_probabilities(Embeddings(problem), weight), expected, rtol=1e-9, atol=1e-6)


def test_scores_beyond_fp64_are_refused_by_name():
    with pytest.raises(ValueError, match="`step_scale`"):
        dynamics.run(MemoryProblem(d=32, n_items=500, alpha=1.5), "muon", 3, step_scale=1e30)


@pytest.mark.parametrize("rule", ["sgd", "sign", "muon", "ns5", "power0.5", "newton"])
def test_rectangular_steps_recover_what_brute_force_says(rule):
    problem = MemoryProblem(d=40, d_out=24, n_items=800, alpha=1.5, dtype="float64")
    result = OneStep(problem).run(rule)
    assert result.update_MD.shape == (24, 40)
    assert (result.recovered == brute_force(problem, result.update_MD)).all()


def test_rectangular_gradients_equal_autograd():
    problem = MemoryProblem(d=12, d_out=20, n_items=300, alpha=1.5, dtype="float64")
    weights = problem.gradient_weights()
    for weight in (
        torch.zeros(20, 12).double(),
        torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).double(),
    ):
        expected, loss = autograd(problem, weights, weight)
        actual, actual_loss = negative_gradient(Embeddings(problem), weight, weights)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-13)
        assert actual_loss == pytest.approx(loss, rel=1e-12)
    at_zero = negative_gradient_at_zero(Embeddings(problem), weights)
    expected, _ = autograd(problem, weights, torch.zeros(20, 12, dtype=torch.float64))
    assert torch.allclose(at_zero, expected, rtol=0, atol=1e-14)


def test_exact_rectangular_dynamics_keep_their_step_size():
    problem = MemoryProblem(d=16, d_out=36, n_items=200, alpha=1.5)
    first = dynamics.run(problem, "muon", 1, step_scale=1.0, schedule="constant")[0]
    assert first.count > 0
