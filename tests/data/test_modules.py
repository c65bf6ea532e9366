"""The data modules as litgpt and Lightning use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from litgpt.data import DataModule

from lightning_spectral.data.modules import HubText, StateOfTheUnion, TextBlocks, TextFiles
from lightning_spectral.data.tokens import prepare_tokens
from tests.tiny import LIGHTNING_WARNINGS, write_text

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]


def _module(folder: Path, num_words: int = 6000) -> TextFiles:
    return TextFiles(str(write_text(folder, num_words)), vocab_size=300, cache_dir=folder / "cache")


def test_it_is_a_litgpt_data_module_that_serves_one_epoch(tmp_path: Path) -> None:
    data = _module(tmp_path)
    assert isinstance(data, DataModule)
    data.connect(tokenizer=None, batch_size=4, max_seq_length=16)  # as litgpt's pretrain calls it
    data.prepare_data()
    data.setup()
    batches = list(data.train_dataloader())
    assert {batch.shape for batch in batches} == {(4, 17)}
    assert batches[0].dtype == torch.int64
    assert len(batches) == data.num_train_blocks // 4
    assert all(batch.shape[1] == 17 for batch in data.val_dataloader())


def test_counts_vocabulary_and_tokenizer_agree(tmp_path: Path) -> None:
    data = _module(tmp_path)
    assert data.token_counts.dtype == np.int64
    assert data.token_counts.shape == (data.vocab_size,) == (300,)
    assert data.tokenizer.vocab_size == 300
    assert int(data.token_counts.sum()) == len(data.cache.train)


def test_a_three_kilobyte_text_is_enough(tmp_path: Path) -> None:
    data = _module(tmp_path, num_words=600)
    assert 2_000 < (tmp_path / "text.txt").stat().st_size < 4_000
    data.connect(batch_size=2, max_seq_length=64, global_batch_size=4, num_steps=50)
    assert len(list(data.train_dataloader())) == 100  # more steps than blocks: epochs follow each other
    assert len(list(data.val_dataloader())) >= 1


def test_a_text_shorter_than_one_block_says_how_short(tmp_path: Path) -> None:
    data = _module(tmp_path, num_words=20)
    data.connect(batch_size=2, max_seq_length=256)
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, too few for one block of 256 .*: give more text or a smaller"
    ):
        data.train_dataloader()


def test_a_batch_larger_than_the_text_warns(tmp_path: Path) -> None:
    data = _module(tmp_path, num_words=600)
    data.connect(batch_size=64, max_seq_length=64, num_steps=2)
    with pytest.warns(UserWarning, match=r"gives \d+ blocks of 64 tokens, fewer than the 64 of one optimizer step"):
        data.train_dataloader()


def test_a_loaded_tokenizer_without_its_folder_is_refused(tmp_path: Path) -> None:
    data = _module(tmp_path)
    with pytest.raises(ValueError, match=r"say where its files lie: `connect\(tokenizer_dir=...\)`"):
        data.connect(tokenizer=data.tokenizer)


def test_a_given_tokenizer_sets_the_vocabulary(tmp_path: Path) -> None:
    other = prepare_tokens(_module(tmp_path).corpus(), vocab_size=270, cache_dir=tmp_path / "cache")
    data = _module(tmp_path)
    data.connect(tokenizer_dir=other.folder)
    assert data.vocab_size == 270


def test_the_default_corpus_is_the_addresses() -> None:
    data = StateOfTheUnion()
    assert isinstance(data, TextBlocks)
    assert len(data.corpus().files) == 249


@pytest.mark.slow
def test_the_pocket_studys_split_of_the_addresses(tmp_path: Path) -> None:
    data = StateOfTheUnion(cache_dir=tmp_path)
    # 3.19 M and 188 k tokens in the study, whose documents were joined in another way
    assert len(data.cache.train) == pytest.approx(3.19e6, rel=0.01)
    assert len(data.cache.validation) == pytest.approx(188e3, rel=0.05)


@pytest.mark.parametrize("num_proc", [0, -2, 1.5, True, "2"])
@pytest.mark.parametrize("kind", ["StateOfTheUnion", "TextFiles", "HubText"])
def test_a_number_of_processes_that_is_none_is_refused_before_any_text_is_read(kind: str, num_proc: object) -> None:
    makers = {
        "StateOfTheUnion": StateOfTheUnion,
        "TextFiles": lambda **more: TextFiles("nowhere.txt", **more),
        "HubText": lambda **more: HubText("nowhere", **more),
    }
    with pytest.raises(ValueError, match=rf"`num_proc` must be an integer >= 1, got {num_proc!r}: 1 tokenises"):
        makers[kind](num_proc=num_proc)
    assert makers[kind](num_proc=2).num_proc == 2


def test_a_cache_is_not_begun_with_a_number_of_processes_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_proc`"):
        prepare_tokens(_module(tmp_path).corpus(), vocab_size=300, cache_dir=tmp_path / "cache", num_proc=0)
    assert not (tmp_path / "cache").exists()
