"""The recall task: counts against brute force, a first step that is the theory's, ranks by the common callback."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.stats
import torch

from lightning_spectral.callbacks import TailTokenProbe
from lightning_spectral.cli import main
from lightning_spectral.memory.fit import read_results
from lightning_spectral.memory.recall import FactRecall, FactRecallDataModule
from lightning_spectral.memory.recall_study import rate_search, tail_ranks
from lightning_spectral.memory.recall_tables import best_rates, log_ratio, tables
from lightning_spectral.optim import Muon
from lightning_spectral.theory.capacity import predict_weights, relu_features

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*", "ignore:.*fewer than.*"
)
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
         "enable_model_summary": False}  # fmt: skip


def sgd(rate, momentum=0.0):
    return lambda module: torch.optim.SGD(module.parameters(), rate, momentum=momentum)


def fit(task, data, steps, *callbacks):
    trainer = pl.Trainer(max_steps=steps, callbacks=list(callbacks), **QUIET)
    trainer.fit(task, data)
    return trainer


@pytest.mark.parametrize("network", ["mlp", "attention"])
def test_recall_is_brute_force(network):
    task = FactRecall(12, num_facts=90, network=network, optimizer=sgd(1.0))
    with torch.no_grad():
        for parameter in task.h.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    logits = task(task.question(torch.arange(90)))
    assert (task.recall() == (logits.argmax(1) == torch.arange(90))).all()
    measures = task.measures()
    octaves = [measures[f"recall_octave/{k:02d}"] * (min(2 ** (k + 1), 91) - 2**k) for k in range(7)]
    assert sum(octaves) == pytest.approx(measures["recall/count"])


def test_questions_of_subjects_and_relations_are_told_apart():
    task = FactRecall(8, num_facts=10, network="attention", num_relations=4)
    questions = task.question(torch.arange(10))
    assert len(questions.unique(dim=0)) == 10
    assert questions[:, 0].max() < 3 <= questions[:, 1].min()


def test_the_first_step_of_muon_stores_what_theory_says():
    d, counts, predicted = 40, [], []
    for seed in range(4):
        task = FactRecall(d, num_facts=1500, seed=seed, eval_every_n_steps=1)
        data = FactRecallDataModule(1500, batch_size=2048, seed=seed)
        trainer = fit(task, data, 1)
        counts.append(float(trainer.callback_metrics["recall/count"]))
        batch = next(iter(data.train_dataloader()))
        weights = np.bincount(batch.numpy(), minlength=1500) / len(batch)
        features = relu_features(d, 4 * d)
        predicted.append(predict_weights(weights, (d, 4 * d), "muon", input_scales=features, shared_mean=True).count)
    # three standard errors, and the 10 % that Gaussian features are off a ReLU's
    error = 3 * np.std(counts, ddof=1) / 2
    assert abs(np.mean(counts) - np.mean(predicted)) < error + 0.1 * np.mean(counts)


def test_the_common_probe_measures_its_hidden_layer(tmp_path):
    task = FactRecall(8, num_facts=64, optimizer=sgd(0.5))
    data = FactRecallDataModule(64, batch_size=256, num_batches=4)
    fit(task, data, 4, TailTokenProbe(every_n_steps=2, counts=data.token_counts, dirpath=tmp_path, losses=False))
    ranks = tail_ranks(tmp_path)
    assert ranks
    assert all(1 <= rank["tail_hard_rank"] <= rank["tail_soft_rank"] <= 32 for rank in ranks.values())


def muon(module):
    return Muon(module, lr=0.2, weight_decay=0.0, roles={".*": "matrix"})


def test_attention_learns_facts_of_two_factors():
    task = FactRecall(24, num_facts=60, network="attention", alpha=1.0, optimizer=muon, num_steps=60)
    data = FactRecallDataModule(60, 1.0, batch_size=256, num_batches=60, num_relations=4)
    trainer = fit(task, data, 60)
    assert float(trainer.callback_metrics["recall/count"]) > 30  # of 60; subjects alone would give 15


def test_token_counts_are_those_of_the_questions():
    task = FactRecall(8, num_facts=30, network="attention", num_relations=4)
    data = FactRecallDataModule(30, num_relations=4)
    counts = data.token_counts.double()
    assert len(counts) == task.wte.num_embeddings
    drawn = torch.from_numpy(np.random.default_rng(0).choice(30, 20000, p=task.frequencies))
    seen = task.question(drawn).flatten().bincount(minlength=len(counts)).double()
    assert torch.allclose(seen / seen.sum(), counts / counts.sum(), atol=0.01)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"network": "rnn"}, "network"),
        ({"hidden": 1}, "hidden"),
        ({"num_facts": 1}, "num_facts"),
        ({"alpha": 0.0}, "alpha"),
        ({"eval_every_n_steps": 0}, "eval_every_n_steps"),
        ({"num_relations": 0}, "num_relations"),
    ],
)
def test_bad_arguments_are_named(fields, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        FactRecall(8, **fields)


def study(rate_of, noise=0.0):
    """Rows of two optimizers at several widths and rates, and of a search that must not count."""
    rng = np.random.default_rng(0)
    return [
        {"optimizer": name, "d": d, "network": "mlp", "lr": lr, "seed": seed, "step": step, "stage": stage,
         "count": factor * rate_of[lr] * d**1.5 * step * (1 + noise * rng.standard_normal()),
         "tail": 0.1, "tail_soft_rank": 2.0 * d, "tail_hard_rank": 1.0 * d}
        for name, factor in (("muon", 2.0), ("sgd", 1.0))
        for d in (8, 16, 32) for lr in rate_of for seed in range(6) for step in (1, 2) for stage in ("scan", "study")
    ]  # fmt: skip


def test_the_study_keeps_the_best_learning_rate_and_leaves_its_search_out():
    best = best_rates(study({0.1: 1.0, 1.0: 2.0, 9.0: 0.5}))
    assert {(row["lr"], row["stage"]) for row in best} == {(1.0, "study")}
    means, exponents, pairs = tables(study({0.1: 1.0, 1.0: 2.0, 9.0: 0.5}, noise=0.05))
    assert {row[-1] for row in means.rows} == {6}
    facts = [row for row in exponents.rows if row[2] == "facts"]
    assert all(low < 1.5 < high and value == pytest.approx(1.5, abs=0.08) for *_, value, low, high in facts)
    ratios = [row for row in pairs.rows if row[3] == "facts"]
    assert {row[0] for row in ratios} == {1, 2}
    assert all(row[2] == "Muon / SGD" and row[4] == pytest.approx(2, rel=0.1) for row in ratios)


def test_ratios_are_welch_s():
    first, second = [3.0, 4.0, 5.0, 4.5], [2.0, 2.5, 1.5]
    found = log_ratio(first, second)
    oracle = scipy.stats.ttest_ind(np.log(first), np.log(second), equal_var=False).confidence_interval()
    assert found.interval == pytest.approx((oracle.low, oracle.high))
    assert log_ratio(first, [2.0, None, 0.0]) is None


def drive(search, score):
    """Every rate tried, and the one chosen."""
    tried = [next(search)]
    while True:
        try:
            tried.append(search.send(score(tried[-1])))
        except StopIteration as done:
            return tried, done.value


@pytest.mark.parametrize("start", [0.001, 0.1, 0.8, 6.4])
def test_the_search_climbs_to_a_rate_that_beats_its_neighbours(start):
    tried, chosen = drive(rate_search(start, at_most=12), lambda rate: -abs(np.log(rate / 0.11)))
    assert 0.11 / 2**0.5 <= chosen <= 0.11 * 2**0.5
    assert len(tried) == len(set(tried)) <= 4 + abs(np.log2(start / 0.11)) + 4
    assert drive(rate_search(1.0, at_most=6), lambda rate: rate)[1] == 16.0  # better and better: ends all the same


def test_the_search_is_not_held_by_a_small_hill():
    """As SGD's was: 3 facts at a rate of 10, 1 and 0 around it, and dozens at a tenth of it."""
    facts = {10.0: 3.0, 5.0: 1.0, 20.0: 0.0, 2.5: 20.0, 1.25: 60.0, 0.625: 40.0, 40.0: 0.0}
    assert drive(rate_search(10.0), facts.__getitem__)[1] == 1.25


def test_the_command_searches_runs_and_reports(tmp_path, capsys):
    arguments = ["--d", "8", "12", "--num-facts", "60", "--batch-size", "64", "--steps", "2", "--every", "1"]
    options = [*arguments, "--seeds", "2", "--out", str(tmp_path)]
    assert main(["memory", "recall", *options, "--optimizers", "sgd", "--format", "json"]) == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)  # sentences go elsewhere
    assert "study, d = 12, sgd" in captured.err
    rows = read_results(tmp_path)
    studied = [row for row in rows if row["stage"] == "study"]
    assert {(row["d"], row["seed"], row["step"]) for row in studied} == {
        (d, seed, step) for d in (8, 12) for seed in (0, 1) for step in (1, 2)
    }
    assert {"00", "05", "count", "tail", "tail_soft_rank", "tail_rows"} <= set(rows[0])
    assert {row["seed"] for row in rows if row["stage"] == "scan"}.isdisjoint({0, 1})
    assert any("facts recalled" in title for title in made)
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert main(["memory", "report", str(tmp_path), "--no-figures"]) == 0
    assert "TAIL soft rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--optimizers", "lion"], "--optimizers"), (["--lr", "0"], "--lr"), (["--d", "1"], "--d"),
     (["--scan-seeds", "0"], "--scan-seeds"), (["--first-seed", "-1"], "--first-seed"), (["--every", "0"], "--every")],
)  # fmt: skip
def test_bad_options_of_the_study_are_named(arguments, named, tmp_path, capsys):
    assert main(["memory", "recall", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert f"`{named}`" in capsys.readouterr().err
