"""The data modules as litgpt and Lightning use them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litgpt.data import DataModule

from lightning_spectral.data.modules import HubText, StateOfTheUnion, TextFiles, TokenFiles
from lightning_spectral.data.text_blocks import TextBlocks
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


def _documents(folder: Path, lengths: list[int]) -> TextFiles:
    rows = [{"text": " ".join(f"w{(7 * row + k) % 90}" for k in range(length))} for row, length in enumerate(lengths)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextFiles(str(folder / "rows.jsonl"), vocab_size=300, cache_dir=folder / "cache", documents="apart")


def test_documents_apart_are_in_no_sequence_together(tmp_path: Path) -> None:
    data = _documents(tmp_path, [200, 5, 333, 90, 41, 260] * 20)
    data.connect(batch_size=2, max_seq_length=32)
    end = data.tokenizer.eos_id
    blocks = [block for batch in (*data.train_dataloader(), *data.val_dataloader()) for block in batch]
    assert len(blocks) > 100
    assert not any((block[:-1] == end).any() for block in blocks)
    packed = TextFiles(data.path, vocab_size=300, cache_dir=tmp_path / "cache")
    packed.connect(batch_size=2, max_seq_length=32)
    assert data.num_train_blocks < packed.num_train_blocks
    assert any((block[:-1] == end).any() for batch in packed.train_dataloader() for block in batch)


def _named_documents(folder: Path, num: int) -> Path:
    """Every document is one word of its own, again and again."""
    rows = [{"text": f"<{row}> " * (20 + 37 * row % 200)} for row in range(num)]
    (folder / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "named.jsonl"


def _words(data: TextFiles, block: torch.Tensor) -> set[str]:
    return set(re.findall(r"<(\d+)>", data.tokenizer.processor.decode(block.tolist())))


def test_documents_apart_are_apart_also_where_held_out_text_lay_between(tmp_path: Path) -> None:
    path = _named_documents(tmp_path, 150)
    data = TextFiles(str(path), vocab_size=300, cache_dir=tmp_path / "cache", documents="apart")
    data.connect(batch_size=1, max_seq_length=24)
    train, held_out = list(data.train_dataloader()), list(data.val_dataloader())
    assert len(train) > 1000
    assert len(held_out) > 20
    assert max(len(_words(data, batch[0])) for batch in (*train, *held_out)) == 1


def test_a_cache_that_does_not_know_its_seams_is_packed_only(tmp_path: Path) -> None:
    path = _named_documents(tmp_path, 40)
    data = TextFiles(str(path), vocab_size=300, cache_dir=tmp_path / "cache", documents="apart")
    folder = data.cache.folder
    about = json.loads((folder / "about.json").read_text())
    for name in ("train_seams.npy", "validation_seams.npy"):
        (folder / name).unlink()
        del about["files_written"][name]
    (folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="does not say where held-out text was taken out, which `documents: apart`"):
        TextFiles(str(path), vocab_size=300, cache_dir=tmp_path / "cache", documents="apart").train_dataloader()
    assert TextFiles(str(path), vocab_size=300, cache_dir=tmp_path / "cache").num_train_blocks > 0


def test_held_out_documents_that_are_too_short_are_said(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one two three " * 500)
    (tmp_path / "validation.txt").write_text("one two three ")
    data = TextFiles(str(tmp_path), vocab_size=300, cache_dir=tmp_path / "cache", documents="apart")
    data.connect(batch_size=1, max_seq_length=64)
    with pytest.warns(UserWarning, match="no document of the held-out text has more than 64 tokens: nothing is val"):
        assert len(data.val_dataloader()) == 0


def _shards(folder: Path, *parts: list[int]) -> Path:
    (folder / "shards").mkdir()
    for number, ids in enumerate(parts):
        np.save(folder / "shards" / f"train_{number}.npy", np.array(ids, dtype=np.uint16))
    np.save(folder / "shards" / "val_0.npy", np.array(parts[0], dtype=np.uint16))
    return folder / "shards"


def test_token_files_apart_need_an_end_that_occurs_and_are_cut_where_a_file_begins(tmp_path: Path) -> None:
    tokenizer = TextFiles(str(_named_documents(tmp_path, 40)), vocab_size=300, cache_dir=tmp_path / "cache").cache
    path = _shards(tmp_path, [5] * 50)
    settings: Any = {"vocab_size": 300, "cache_dir": tmp_path / "cache", "documents": "apart"}
    data = TokenFiles(str(path), tokenizer_dir=tokenizer.folder, **settings)
    data.connect(batch_size=1, max_seq_length=16)
    with pytest.raises(ValueError, match=r"the 50 training tokens hold no token 0, with which the tokenizer in"):
        data.train_dataloader()
    np.save(path / "train_1.npy", np.array([6] * 50, dtype=np.uint16))
    data = TokenFiles(str(path), tokenizer_dir=tokenizer.folder, **settings)
    data.connect(batch_size=1, max_seq_length=16)
    found = [set(batch[0].tolist()) for batch in data.train_dataloader()]
    assert sorted(map(sorted, found)) == [[5], [5], [5], [6], [6], [6]]


def test_documents_apart_that_are_too_short_are_said(tmp_path: Path) -> None:
    data = _documents(tmp_path, [40, 20, 20, 20] * 30)
    data.connect(batch_size=2, max_seq_length=4096)
    with pytest.raises(ValueError, match="no document of the training text has more than 4096 tokens"):
        data.train_dataloader()
    data.connect(batch_size=2, max_seq_length=70)
    with pytest.warns(UserWarning, match=r"whole sequences of 70 tokens hold [\d,]+ of [\d,]+ training tokens"):
        data.train_dataloader()


def test_documents_apart_need_a_token_that_ends_them(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(500, dtype=np.uint16) % 50)
    data = TokenFiles(str(tmp_path / "a.npy"), vocab_size=50, cache_dir=tmp_path / "cache", documents="apart")
    data.connect(batch_size=2, max_seq_length=16)
    with pytest.raises(ValueError, match="needs the token that ends a document, and there is no tokenizer: set"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"`documents` must be one of \['packed', 'apart'\], got 'alone'"):
        TextFiles("x", documents="alone")  # type: ignore[arg-type]
