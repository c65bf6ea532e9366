"""The recall task: counts against brute force, a first step that is the theory's, ranks by the common callback."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_spectral.callbacks import TailTokenProbe
from lightning_spectral.cli import main
from lightning_spectral.memory.fit import read_results
from lightning_spectral.memory.recall import FactRecall, FactRecallDataModule
from lightning_spectral.memory.recall_study import best_rates, study_lines, tail_ranks
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
        ({"num_facts": 1}, "n_items"),
        ({"alpha": 0.0}, "alpha"),
        ({"eval_every_n_steps": 0}, "eval_every_n_steps"),
        ({"num_relations": 0}, "num_relations"),
    ],
)
def test_bad_arguments_are_named(fields, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        FactRecall(8, **fields)


def test_the_study_keeps_the_best_learning_rate():
    rows = [
        {"optimizer": "sgd", "d": d, "network": "mlp", "lr": lr, "seed": seed, "step": 2, "count": count + seed,
         "tail": 0.1, "tail_soft_rank": 2.0 * d, "tail_hard_rank": 1.0 * d}
        for d in (8, 16) for lr, count in ((0.1, d), (1.0, 2 * d), (9.0, 1)) for seed in (0, 1)
    ]  # fmt: skip
    assert {row["lr"] for row in best_rates(rows)} == {1.0}
    assert any("| tail_hard_rank | 1.00 |" in line for line in study_lines(rows))


def test_the_command_runs_and_reports(tmp_path, capsys):
    arguments = ["--d", "8", "--num-facts", "60", "--batch-size", "64", "--steps", "2", "--every", "1", "--seeds", "1"]
    assert main(["memory", "recall", *arguments, "--optimizers", "sgd", "--lr", "1", "--out", str(tmp_path)]) == 0
    rows = read_results(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert {"00", "05", "count", "tail", "tail_soft_rank"} <= set(rows[0])
    assert main(["memory", "report", str(tmp_path)]) == 0
    assert "TAIL soft rank" in capsys.readouterr().out
    assert main(["memory", "recall", *arguments, "--optimizers", "lion", "--out", str(tmp_path)]) == 2
    assert "`--optimizers`" in capsys.readouterr().err
