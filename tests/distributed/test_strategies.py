"""`strategy:` of a recipe: each gives the run of one process, records included, and a model that litgpt loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lightning_spectral import records
from lightning_spectral.gpt.export import load_final
from lightning_spectral.training import factories
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.pretrain import pretrain
from lightning_spectral.training.recipe import load
from tests.distributed.harness import run_ranks
from tests.distributed.test_optim_lightning import FSDPOnCPU
from tests.tiny import tiny_tree, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


def recipe(folder: Path, out: str, **more: Any) -> Path:
    tree = tiny_tree(folder)
    tree["train"].update(max_steps=6, save_interval=3, micro_batch_size=1, max_norm=None)
    # litgpt counts warm-up and decay in micro-batches, of which ranks have fewer; AdamW's own eps makes rounding count
    tree["train"].update(lr_warmup_steps=0, min_lr=1e-2)
    tree["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "eps": 1e-3}}
    tree["callbacks"] = [{"class_path": "TailTokenProbe", "init_args": {"every_n_steps": 3}}]
    tree |= {"out_dir": str(folder / out), **more}
    return write_recipe(folder, tree)


def train(rank: int, world_size: int, folder: str, out: str, strategy: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    factories.FSDPStrategy = FSDPOnCPU  # Lightning refuses FSDP1 on a CPU by exact type
    path = Path(folder) / f"{out}-{rank}"
    path.mkdir()
    content = load(
        recipe(path, "run"), {"strategy": strategy, "devices": world_size, "out_dir": str(Path(folder) / out)}
    )
    pretrain(content, progress_bar=False)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    return pretrain(load(recipe(folder, "run")), progress_bar=False).run_folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("tp:2", 2), ("hsdp:2", 4), ("tp:2", 4)]
)
def test_every_strategy_is_the_run_of_one_process(strategy: str, world_size: int, single: Path, tmp_path: Path) -> None:
    run_ranks(train, world_size, str(tmp_path), "run", strategy, init=False, timeout_s=240)
    theirs = {record.key: record for record in records.read_spectral(single).records}
    ours = {record.key: record for record in records.read_spectral(tmp_path / "run").records}
    assert ours.keys() == theirs.keys()
    for key, record in ours.items():
        assert record.num_tokens == theirs[key].num_tokens, key
        if record.step == 0:  # the same weights
            assert record.hard_rank == pytest.approx(theirs[key].hard_rank, rel=1e-4), key  # fp32 sums
    model, expected = load_final(tmp_path / "run" / "final"), load_final(single / "final")
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (value - other).abs().max() < 1e-4, name  # of six steps of 1e-2
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))) == 2


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_a_checkpoint_in_parts_needs_a_strategy_that_divides(strategy: str, tmp_path: Path) -> None:
    """It used to be `Is a directory`."""
    (tmp_path / "step-00000003.ckpt").mkdir()
    with pytest.raises(RecipeError, match=f"is a checkpoint in parts, which `strategy: {strategy}` cannot read: go on"):
        factories.refuse_parts(tmp_path / "step-00000003.ckpt", SingleDeviceStrategy(), strategy)
    for made in (factories.make_strategy("fsdp2", 2), factories.make_strategy("hsdp:2", 4)):
        assert isinstance(made, Strategy)
        factories.refuse_parts(tmp_path / "step-00000003.ckpt", made, "fsdp2")
    factories.refuse_parts(None, SingleDeviceStrategy(), strategy)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("hsdp", "needs a number of replicas, such as `hsdp:2`"),
        ("tp:x", "needs a number of slices, such as `tp:2`"),
        ("tp:3", "does not divide 4 process\\(es\\)"),
    ],
)
def test_what_cannot_be_spread_is_said(wanted: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        factories.make_strategy(wanted, 4)


def test_who_has_data_of_their_own() -> None:
    assert [factories.spread_of(name).data_parallel(4) for name in ("ddp", "fsdp1", "fsdp2", "hsdp:2", "tp:2")] == [
        4, 4, 4, 4, 2,
    ]  # fmt: skip
    assert factories.spread_of({"class_path": "x"}).data_parallel(4) == 4
    assert torch.distributed.is_available()
