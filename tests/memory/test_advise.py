"""Advice from counts: the same numbers as the theory, and the theory behind a ReLU layer against a simulated step."""

import math

import numpy as np
import pytest
import torch

from lightning_spectral.cli import main
from lightning_spectral.functional.orthogonalize import polar_svd
from lightning_spectral.memory import advise
from lightning_spectral.memory.fit import read_results
from lightning_spectral.theory.capacity import predict_weights, relu_features
from lightning_spectral.theory.rules import RuleSettings


def zipf(tokens=2000, alpha=1.2):
    return 1e7 * np.arange(1.0, tokens + 1) ** -alpha


def test_the_command_gives_a_row_per_matrix_and_rule(tmp_path, capsys):
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).permutation(zipf(400).astype(int)))
    arguments = ["--counts", str(tmp_path / "counts.npy"), "--d", "12", "--ffn", "32", "--batch-tokens", "128"]
    assert main(["memory", "advise", *arguments, "--rules", "ns", "muon", "--out", str(tmp_path / "out")]) == 0
    rows = {(row["layer"], row["rule"]): row for row in read_results(tmp_path / "out")}
    assert {layer for layer, _ in rows} == {"square", "up", "down", "down, behind ReLU"}
    assert (rows["up", "muon"]["outputs"], rows["up", "muon"]["inputs"]) == (32, 12)
    for row in rows.values():
        assert row["binds"] == max(row["gains"], key=row["gains"].get)
        assert 0 <= row["tail_share"] <= 1
    assert rows["square", "ns"]["ns_steps_needed"] >= 3
    text = capsys.readouterr().out
    assert "What binds muon in" in text or "What binds ns in" in text


def test_stored_tokens_are_the_theory_s():
    counts = zipf()
    advisor = advise.Advisor(counts, 32, 128, 4096, RuleSettings())
    made = advisor.advise(advise.Layer("down", 32, 128), "muon")
    weights = counts / counts.sum()
    assert made.stored_population == pytest.approx(predict_weights(weights, (32, 128), "muon").count)
    drawn = np.random.default_rng([0, 4096]).multinomial(4096, weights) / 4096
    assert made.stored == pytest.approx(predict_weights(drawn, (32, 128), "muon").count)
    at = predict_weights(
        np.random.default_rng([0, round(made.critical_batch)]).multinomial(round(made.critical_batch), weights) + 0.0,
        (32, 128),
        "muon",
    )
    assert at.count == pytest.approx(0.9 * made.stored_population, rel=0.12)  # one draw of a batch
    assert made.gains["ffn"] > 1.05  # a wider hidden layer stores more in the down projection


def simulated(rule, d, hidden, tokens=2048, batch=2048, seeds=5):
    weights = np.arange(1, tokens + 1.0) ** -1.2
    weights /= weights.sum()
    measured, predicted = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(tokens, d, generator=generator) / math.sqrt(d)
        v = torch.randn(tokens, d, generator=generator)
        h = torch.relu(v @ torch.randn(hidden, d, generator=generator).T / math.sqrt(d))
        drawn = np.random.default_rng(seed).multinomial(batch, weights) / batch
        gradient = ((u - u.mean(0)) * torch.tensor(drawn).float()[:, None]).T @ h
        update = polar_svd(gradient) if rule == "muon" else gradient
        scores = (h @ update.T) @ u.T
        own = scores.diagonal().clone()
        scores.fill_diagonal_(-torch.inf)
        measured.append(int((own > scores.amax(1)).sum()))
        predicted.append(
            predict_weights(drawn, (d, hidden), rule, input_scales=relu_features(d, hidden), shared_mean=True).count
        )
    return np.mean(measured), np.std(measured, ddof=1) / math.sqrt(seeds), np.mean(predicted)


@pytest.mark.parametrize(("rule", "d"), [("muon", 48), ("muon", 80), ("sgd", 64)])
def test_one_step_behind_a_relu_layer_stores_what_is_predicted(rule, d):
    measured, error, predicted = simulated(rule, d, 4 * d)
    assert abs(predicted - measured) < 3 * error + 0.10 * measured
    independent = predict_weights(np.arange(1, 2049.0) ** -1.2, (d, 4 * d), rule).count
    assert independent > 1.5 * measured  # independent hidden features would store far more


def test_relu_features_have_the_moments_of_a_relu():
    scales = relu_features(16, 64)
    assert scales.mean() == pytest.approx(1.0)
    sample = torch.relu(torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double())
    assert scales[0] / 64 == pytest.approx(float(sample.mean() ** 2 / sample.square().mean()), rel=0.02)
    with pytest.raises(ValueError, match="`hidden`"):
        relu_features(16, 16)


@pytest.mark.parametrize(
    ("content", "arguments", "named"),
    [
        (None, [], "`--counts`"),
        ("a b\n", [], "`--counts`"),
        ("1\n-2\n", [], "`--counts`"),
        ("5\n", [], "`--counts`"),
        ("5\n3\n1\n", ["--d", "1"], "`--d`"),
        ("5\n3\n1\n", ["--batch-tokens", "0"], "`--batch-tokens`"),
        ("5\n3\n1\n", ["--rules", "adam"], "`--rules`"),
        ("5\n3\n1\n", ["--coefficients", "best"], "`--coefficients`"),
    ],
)
def test_bad_input_is_named(content, arguments, named, tmp_path, capsys):
    path = tmp_path / "counts.txt"
    if content is not None:
        path.write_text(content)
    code = main(["memory", "advise", "--counts", str(path), "--d", "8", *arguments, "--out", str(tmp_path / "out")])
    assert code == 2
    assert named in capsys.readouterr().err
