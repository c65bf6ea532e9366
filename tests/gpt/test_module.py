"""The LightningModule: litgpt's loss, one optimizer, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from litgpt.config import Config
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader

from lightning_spectral.gpt import export
from lightning_spectral.gpt.architecture import Architecture
from lightning_spectral.gpt.export import load_final
from lightning_spectral.gpt.learning_rate import LRPlan
from lightning_spectral.gpt.module import LitGPT, build_optimizer, load_weights, optimizer_class
from lightning_spectral.models.checkpoint_file import CheckpointError
from tests.tiny import LIGHTNING_WARNINGS, tiny_tree

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),  # these fits only train
]

VOCAB = 50


def _module(folder: Path, **settings: Any) -> LitGPT:
    config = Config(**tiny_tree(folder)["model_config"], vocab_size=VOCAB, padded_vocab_size=VOCAB)
    return LitGPT(config, **{"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, **settings})


def _batches(num: int, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (size, 17), generator=generator) for _ in range(num)]


def _fit(module: LitGPT, batches: list[torch.Tensor], folder: Path, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def test_the_loss_is_litgpts(tmp_path: Path) -> None:
    module = _module(tmp_path)
    module.configure_model()
    batch = _batches(1)[0]
    expected = chunked_cross_entropy(module(batch[:, :-1]), batch[:, 1:])
    torch.testing.assert_close(module._loss(batch), expected, rtol=1e-6, atol=0)  # fp32, sums in another order


def test_a_fit_follows_plain_sgd_with_accumulation(tmp_path: Path) -> None:
    module, oracle = _module(tmp_path), _module(tmp_path)
    batches = _batches(4)
    trainer = _fit(module, batches, tmp_path, accumulate_grad_batches=2)
    oracle.configure_model()
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for first, second in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        ((oracle._loss(first) + oracle._loss(second)) / 2).backward()
        optimizer.step()
    assert trainer.global_step == 2
    for one, other in zip(module.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # fp32, halves summed in another order


def test_the_logged_loss_is_the_steps_and_the_rate_is_the_plans(tmp_path: Path) -> None:
    plan = LRPlan(num_steps=3, warmup_iters=0, min_lr=0.01)
    module = _module(tmp_path, lr_plan=plan)
    batches = _batches(3)
    oracle = _module(tmp_path)
    oracle.configure_model()
    first_loss = float(oracle._loss(batches[0]).detach())
    seen: list[tuple[float, float]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append((float(metrics["loss"]), float(metrics["learning_rate"])))

    _fit(module, batches, tmp_path, callbacks=[Watch()])
    assert seen[0][0] == pytest.approx(first_loss, rel=1e-6)  # the same fp32 computation
    assert [rate for _, rate in seen] == pytest.approx([0.1 * plan.factor(step, 0.1) for step in range(3)])


def test_tied_embeddings_are_one_matrix(tmp_path: Path) -> None:
    module = _module(tmp_path, tie_embeddings=True)
    module.configure_model()
    assert module.model is not None
    assert module.model.lm_head.weight is module.model.transformer.wte.weight


def test_building_twice_keeps_the_model(tmp_path: Path) -> None:
    module = _module(tmp_path)
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_come_from_litgpts_file_in_both_forms(tmp_path: Path, wrapped: bool) -> None:
    source = _module(tmp_path, seed=1)
    source.configure_model()
    assert source.model is not None
    weights = source.model.state_dict()
    torch.save({"model": weights} if wrapped else weights, tmp_path / "lit_model.pth")
    target = _module(tmp_path, seed=2, initial_checkpoint=tmp_path / "lit_model.pth")
    target.configure_model()
    assert target.model is not None
    assert all(torch.equal(value, weights[name]) for name, value in target.model.state_dict().items())


def test_weights_that_do_not_fit_name_the_parameter(tmp_path: Path) -> None:
    source = _module(tmp_path, architecture=Architecture(ffn_multiplier=2))
    source.configure_model()
    assert source.model is not None
    torch.save(source.model.state_dict(), tmp_path / "lit_model.pth")
    target = _module(tmp_path)
    target.configure_model()
    assert target.model is not None
    with pytest.raises(ValueError, match=r"lit_model.pth` does not fit the model: .*size mismatch for .*mlp"):
        load_weights(target.model, tmp_path / "lit_model.pth")


def test_a_dict_batch_is_refused(tmp_path: Path) -> None:
    module = _module(tmp_path)
    module.configure_model()
    with pytest.raises(
        ValueError, match=r"needs batches of token ids, shape \(B, T \+ 1\); the data module gives dict"
    ):
        module._loss({"input_ids": torch.zeros(1, 2)})  # type: ignore[arg-type]


def test_a_sequence_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`train.max_seq_length` is 64, but the model attends to 32"):
        _module(tmp_path, max_seq_length=64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Adamw", r"no optimizer `Adamw` .*: give a name in torch.optim"),
        ("no_such_package.Muon", r"no optimizer `no_such_package.Muon`"),
        ("torch.nn.Linear", r"`torch.nn.Linear` is not a torch optimizer"),
        ({"init_args": {}}, r"`optimizer` must be a name or have a `class_path`"),
        (
            {"class_path": "torch.optim.SGD", "init_args": {"betas": 1}},
            r"has `betas`, which SGD does not know; it knows: lr",
        ),
    ],
)
def test_a_wrong_optimizer_is_named(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class(spec)


def test_our_optimizers_get_names_and_others_litgpts_bare_list(tmp_path: Path) -> None:
    module = _module(tmp_path)
    module.configure_model()
    assert module.model is not None
    plain = build_optimizer("AdamW", module.model)
    assert "param_names" not in plain.param_groups[0]
    ours = build_optimizer({"class_path": "lightning_spectral.optim.Muon", "init_args": {"lr": 0.02}}, module.model)
    assert sum(len(group["params"]) for group in ours.param_groups) == len(list(module.model.parameters()))


def test_load_final_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_config.yaml"):
        load_final(tmp_path)


def test_a_torn_file_is_said_before_its_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_config.yaml").write_text("name: x\n")  # litgpt's defaults: a model of 3 billion parameters
    (tmp_path / "lit_model.pth").write_bytes(b"torn")
    monkeypatch.setattr(export, "build_gpt", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=r"lit_model\.pth` cannot be read"):
        load_final(tmp_path)
