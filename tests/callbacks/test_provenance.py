"""Step, tokens, dataloader and table of a record are those of what was measured; what is not known is null."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.functional.buckets import frequency_buckets
from tests.callbacks import tiny

ROWS = 8 * tiny.LENGTH
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
)


def seen(path: Path, *names: str) -> list[Any]:
    names = names or ("stage", "step", "tokens_seen")
    return [tuple(getattr(r, name) for name in names) for r in read_spectral(path).records if r.layer == 0]


def begun(path: Path, callbacks: list[Any], steps: int = 3, **changes: Any) -> str:
    trainer = tiny.trainer(path, callbacks, max_steps=steps)
    trainer.fit(tiny.Module(), tiny.loader())
    trainer.save_checkpoint(path / "a.ckpt")
    return str(path / "a.ckpt")


def test_a_test_is_of_the_checkpoints_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dirpath": str(tmp_path / "r"), "on": ["train", "test"]}
    saver = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = tiny.trainer(tmp_path, [SpectralRankCallback(4, **options), saver], enable_checkpointing=True)
    module = tiny.Module()
    trainer.fit(module, tiny.loader())
    trainer.test(module, tiny.loader(16), ckpt_path=str(tmp_path / "kept" / "step=2.ckpt"), verbose=False)
    trainer = tiny.trainer(tmp_path, [SpectralRankCallback(4, **options)])
    trainer.test(tiny.Module(), tiny.loader(16), ckpt_path=str(tmp_path / "kept" / "step=4.ckpt"), verbose=False)
    assert seen(tmp_path / "r") == [
        ("train", 0, 0), ("train", 3, 3 * ROWS), ("test", 2, 2 * ROWS), ("test", 4, 4 * ROWS),
    ]  # fmt: skip
    assert len({r.run_id for r in read_spectral(tmp_path / "r").records}) == 1


def test_validate_then_fit_then_test_are_one_run(tmp_path: Path) -> None:
    callback = SpectralRankCallback(2, on=["train", "validation", "test"], dirpath=str(tmp_path / "r"))
    trainer, module = tiny.trainer(tmp_path, [callback], max_steps=2), tiny.Module()
    trainer.validate(module, tiny.loader(16), verbose=False)
    trainer.fit(module, tiny.loader())
    trainer.test(module, tiny.loader(16), verbose=False)
    trainer.test(module, tiny.loader(16, seed=1), verbose=False)
    assert seen(tmp_path / "r", "stage", "step", "tokens_seen", "ordinal") == [
        ("validation", None, None, 0), ("train", 0, 0, 0), ("train", 1, ROWS, 0),
        ("test", 2, 2 * ROWS, 0), ("test", 2, 2 * ROWS, 1),
    ]  # fmt: skip
    assert {r.run_id for r in read_spectral(tmp_path / "r").records} == {callback.run_folder.run_id}
    assert not (tmp_path / "r" / "previous").exists()


def test_the_same_callback_in_another_trainer_is_another_run(tmp_path: Path) -> None:
    callback = SpectralRankCallback(2, dirpath=str(tmp_path / "r"))
    tiny.trainer(tmp_path, [callback], max_steps=1).fit(tiny.Module(), tiny.loader())
    first = callback.run_folder.run_id
    with pytest.warns(UserWarning, match=f"held the run `{first}`"):
        tiny.trainer(tmp_path, [callback], max_steps=1).fit(tiny.Module(), tiny.loader())
    assert callback.run_folder.run_id != first


@pytest.mark.parametrize(
    ("before", "after", "tokens"),
    [
        ({}, {}, 3 * ROWS),
        ({}, {"on": ["train", "validation"]}, 3 * ROWS),
        ({}, {"num_jackknife_groups": 4}, 3 * ROWS),
        (None, {}, None),  # added at resume
    ],
)
def test_tokens_at_resume(
    tmp_path: Path, before: dict[str, Any] | None, after: dict[str, Any], tokens: int | None
) -> None:
    callbacks = [] if before is None else [SpectralRankCallback(1, dirpath=str(tmp_path / "one"), **before)]
    checkpoint = begun(tmp_path, callbacks)
    callback = SpectralRankCallback(1, dirpath=str(tmp_path / "two"), **after)
    tiny.trainer(tmp_path, [callback], max_steps=4).fit(tiny.Module(), tiny.loader(), ckpt_path=checkpoint)
    assert seen(tmp_path / "two") == [("train", 3, tokens)]


def test_tokens_of_a_checkpoint_with_an_earlier_state_key(tmp_path: Path) -> None:
    checkpoint = begun(tmp_path, [SpectralRankCallback(1, dirpath=str(tmp_path / "one"))])
    content = torch.load(checkpoint, weights_only=False)
    del content["lightning_spectral"]
    (state,) = content["callbacks"].values()
    content["callbacks"] = {"SpectralRankCallback{'sites': ('post',), 'modules': None, 'on': ('train',)}": state}
    torch.save(content, checkpoint)
    callback = SpectralRankCallback(1, dirpath=str(tmp_path / "two"))
    trainer = tiny.trainer(tmp_path, [callback], max_steps=4)
    trainer.fit(tiny.Module(), tiny.loader(), ckpt_path=checkpoint)
    assert seen(tmp_path / "two") == [("train", 3, 3 * ROWS)]


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda path: TensorBoardLogger(path, name="n", version="v"), "n/v"),
        (lambda path: TensorBoardLogger(path, name="n"), "n/version_0"),
        (lambda path: CSVLogger(path, name=""), "version_0"),
        (lambda path: False, ""),
    ],
)
def test_records_lie_where_checkpoints_do(tmp_path: Path, logger: Any, folder: str) -> None:
    saver = ModelCheckpoint(every_n_train_steps=1)
    trainer = tiny.trainer(
        tmp_path, [SpectralRankCallback(1), saver], logger=logger(tmp_path), enable_checkpointing=True, max_steps=1
    )
    trainer.fit(tiny.Module(), tiny.loader())
    assert (tmp_path / folder / "spectral.jsonl").exists()
    assert (tmp_path / folder / "checkpoints").exists()


@pytest.mark.parametrize("tensorboard_first", [True, False])
def test_of_several_loggers_records_lie_beside_tensorboards_files(tmp_path: Path, tensorboard_first: bool) -> None:
    loggers: list[Any] = [TensorBoardLogger(tmp_path / "tb", name="n"), CSVLogger(tmp_path / "csv")]
    trainer = tiny.trainer(
        tmp_path, [SpectralRankCallback(1)], logger=loggers if tensorboard_first else loggers[::-1], max_steps=1
    )
    trainer.fit(tiny.Module(), tiny.loader())
    (file,) = tmp_path.rglob("spectral.jsonl")
    assert file.parent == tmp_path / "tb" / "n" / "version_0"
    assert list(file.parent.glob("events.out.tfevents.*"))


def resumed(path: Path, checkpoint: str, callback: SpectralRankCallback, **logger: Any) -> tuple[str, list[str]]:
    """Where it records, and what it said about that."""
    trainer = tiny.trainer(path, [callback], max_steps=4, logger=TensorBoardLogger(path, name="n", **logger))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(tiny.Module(), tiny.loader(), ckpt_path=checkpoint)
    said = [str(one.message) for one in caught]
    return callback.run_folder.path.name, [text for text in said if "the resumed run records" in text]


def test_a_run_that_is_resumed_into_another_folder_says_where_it_began(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [SpectralRankCallback(1)], max_steps=3, logger=TensorBoardLogger(tmp_path, "n"))
    trainer.fit(tiny.Module(), tiny.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = str(tmp_path / "a.ckpt")
    folder, (said,) = resumed(tmp_path, checkpoint, SpectralRankCallback(1))
    assert folder == "version_1"
    assert re.search("`.*/n/version_1`, its records up to step 3 are in `.*/n/version_0`: .* `dirpath=`", said)
    assert seen(tmp_path / "n" / "version_1") == [("train", 3, 3 * ROWS)]
    asked_for = SpectralRankCallback(1, dirpath=str(tmp_path / "mine"))
    assert resumed(tmp_path, checkpoint, asked_for) == ("mine", [])
    assert resumed(tmp_path, checkpoint, SpectralRankCallback(1), version=0) == ("version_0", [])
    assert seen(tmp_path / "n" / "version_0") == [("train", step, step * ROWS) for step in range(4)]


@pytest.mark.parametrize(("accumulate", "epochs", "expected"), [(1, 2, 7), (2, 2, 3), (3, 1, 1)])
def test_the_last_step_of_epochs(tmp_path: Path, accumulate: int, epochs: int, expected: int) -> None:
    trainer = tiny.trainer(
        tmp_path, [SpectralRankCallback(100)], max_steps=-1, max_epochs=epochs, accumulate_grad_batches=accumulate,
        limit_train_batches=4,
    )  # fmt: skip
    trainer.fit(tiny.Module(), tiny.loader())
    assert sorted({step for _, step, _ in seen(tmp_path)}) == [0, expected]
    assert trainer.global_step - 1 == expected


class Stream(IterableDataset[torch.Tensor]):
    """Neither a length nor an end."""

    def __iter__(self) -> Any:
        while True:
            yield from tiny.data()


def test_counts_of_a_stream_are_settled_while_training(tmp_path: Path) -> None:
    loader = DataLoader(Stream(), batch_size=8)
    tiny.trainer(tmp_path, [TailTokenProbe(1, counts="stream")], max_steps=8).fit(tiny.Module(), loader)
    records = [r for r in read_spectral(tmp_path).records if r.layer == 0]
    statuses = {(r.step, r.bucket): r.status for r in records}
    # 10 tokens per id of 64 are 640, and a batch has 8 sequences of 17
    settled = next(step for step in range(8) if statuses[step, "head"] != "not_matched")
    assert settled == 5
    counts = torch.bincount(tiny.data()[: 8 * 5].flatten(), minlength=64)
    codes = frequency_buckets(counts)[tiny.data()[40:48, :-1].flatten()]
    rows = {r.bucket: r.num_tokens for r in records if r.step == 5}
    assert rows == {name: int((codes == code).sum()) for code, name in enumerate(("head", "mid", "tail"))} | {
        "pooled": ROWS
    }
    early = [r for r in records if r.step < settled and r.bucket != "pooled"]
    assert {(r.hard_rank, r.num_tokens) for r in early} == {(None, 0)}
    assert all("too few tokens" in r.reason for r in early)
    assert all(r.hard_rank for r in records if r.bucket == "pooled")
    assert len({r.conventions["counts"] for r in records if r.step >= settled}) == 1
