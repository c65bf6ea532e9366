import lightning.pytorch as pl
import pytest
import torch

from lightning_spectral.memory.module import AssociativeMemory, AssociativeMemoryDataModule
from lightning_spectral.optim import Muon
from lightning_spectral.theory.one_step import one_step
from lightning_spectral.theory.problem import MemoryProblem

MUON = {
    "lr": 1.0,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "nesterov": False,
    "lr_scale": "none",
    "roles": {".*": "matrix"},
}
OPTIMIZERS = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), 100.0),
    "sign": lambda module: torch.optim.Adam(module.parameters(), 0.1, eps=1e-30),
    "muon": lambda module: Muon(module, orthogonalize="svd", **MUON),
    "ns5": lambda module: Muon(module, orthogonalize="muon", steps=5, precision="fp32", **MUON),
}


def train(model, data, steps=1, callbacks=()):
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


@pytest.mark.filterwarnings("ignore:.*num_workers")
# not the exact polar of a small batch: its null directions are fp32 rounding noise, kept by no two routes alike
@pytest.mark.parametrize(
    ("rule", "batch_size"), [*((rule, None) for rule in OPTIMIZERS), ("sgd", 200), ("sign", 200), ("ns5", 200)]
)
def test_one_step_of_an_optimizer_stores_what_the_solver_stores(rule, batch_size):
    model = AssociativeMemory(48, 2000, 1.5, seed=4, optimizer=OPTIMIZERS[rule])
    trainer = train(model, AssociativeMemoryDataModule(2000, 1.5, seed=4, batch_size=batch_size))
    problem = MemoryProblem(d=48, n_items=2000, alpha=1.5, seed=4, batch_size=batch_size)
    expected = one_step(problem, rule).stats.count
    # the parameter and its gradient are fp32: an item on the edge may fall to the other side
    assert abs(model.recall().count - expected) <= 1
    assert trainer.callback_metrics["memory/count"] == model.recall().count
    assert trainer.callback_metrics["memory/loss"] == pytest.approx(torch.log(torch.tensor(2000.0)))
    assert "memory_spectrum/effective_rank.update" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_the_loss_falls_and_its_gradient_is_autograds():
    model = AssociativeMemory(16, 300, 1.5, optimizer=OPTIMIZERS["sgd"])
    batch = next(iter(AssociativeMemoryDataModule(300, 1.5, batch_size=64).train_dataloader()))
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.memory.weight.copy_(weight)
    model.log = lambda *_, **__: None
    loss = model.training_step(batch, 0)
    loss.backward()
    u, v = (model.embeddings.rows(side, 0, 300) for side in "uv")
    leaf = weight.clone().requires_grad_()
    log_probability = torch.log_softmax(v @ leaf.T @ u.T, 1).diagonal()[batch["items"]]
    expected = -(batch["weights"].float() * log_probability).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(model.memory.weight.grad, leaf.grad, atol=1e-6)
    trained = AssociativeMemory(16, 300, 1.5)
    trainer = train(trained, AssociativeMemoryDataModule(300, 1.5), steps=3)
    assert trainer.callback_metrics["memory/loss"] < 5.7  # ln 300


@pytest.mark.parametrize("arguments", [{"d": 1}, {"alpha": 1.0}, {"n_items": 1}, {"eval_every_n_steps": 0}])
def test_bad_arguments_are_named(arguments):
    (field,) = arguments
    with pytest.raises(ValueError, match=f"`{field}`"):
        AssociativeMemory(**{"d": 8, "n_items": 50, "alpha": 1.5, **arguments})
    with pytest.raises(ValueError, match="`num_batches`"):
        AssociativeMemoryDataModule(num_batches=0)
