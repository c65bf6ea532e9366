"""Which files, which documents, which blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.data.corpus import (
    BLOCK_CHARS,
    HOLD_OUT_EVERY,
    Corpus,
    documents,
    find_files,
    split_blocks,
    state_of_the_union_files,
)


def test_files_by_path_glob_and_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "notes.py"):
        (tmp_path / name).write_text("{}")
    assert find_files(tmp_path / "a.txt") == (tmp_path / "a.txt",)
    assert find_files(f"{tmp_path}/*.txt") == (tmp_path / "a.txt", tmp_path / "b.txt")
    assert find_files(tmp_path) == (tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "deep" / "c.jsonl")


def test_a_missing_path_and_a_foreign_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text at `.*nowhere.txt`: give a .txt"):
        find_files(tmp_path / "nowhere.txt")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(ValueError, match=r"ends in `.pdf`; the readers know .txt"):
        find_files(tmp_path / "a.pdf")


def test_state_of_the_union_is_whole() -> None:
    assert len(state_of_the_union_files()) == 249


def test_the_same_text_in_three_formats(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one document\nof two lines", "another, with \u00fc"]
    (tmp_path / "1.txt").write_text(texts[0])
    (tmp_path / "2.txt").write_text(texts[1])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts))
    pq.write_table(pa.table({"body": texts, "n": [1, 2]}), tmp_path / "rows.parquet")
    assert list(documents(Corpus(find_files(f"{tmp_path}/*.txt")))) == texts
    assert list(documents(Corpus((tmp_path / "rows.jsonl",), "body"))) == texts
    assert list(documents(Corpus((tmp_path / "rows.parquet",), "body"))) == texts


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"no column `text`, only `body`: set `text_column`"):
        list(documents(Corpus((tmp_path / "rows.jsonl",))))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # pyarrow's reader, on the torn file
def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cannot read `.*torn.parquet`"):
        list(documents(Corpus((tmp_path / "torn.parquet",))))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read `.*latin.txt`"):
        list(documents(Corpus((tmp_path / "latin.txt",))))


@given(st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=20))
def test_a_split_loses_no_character(texts: list[str]) -> None:
    split = split_blocks(texts, "\n\n")
    assert sum(map(len, split.train)) + sum(map(len, split.validation)) == len("\n\n".join(texts)) == split.num_chars


def test_every_18th_block_of_20_000_characters_is_held_out() -> None:
    words = " ".join(f"w{number}" for number in range(150_000))
    split = split_blocks([words], "\n\n")
    blocks = len(split.train) + len(split.validation)
    assert len(split.validation) == blocks // HOLD_OUT_EVERY > 1
    assert all(BLOCK_CHARS <= len(block) <= BLOCK_CHARS * 1.05 for block in split.validation)
    assert all(block.split()[0] in words.split() for block in split.validation)  # never inside a word


@given(st.integers(min_value=40, max_value=3000))
def test_a_short_text_has_a_held_out_part(num_chars: int) -> None:
    split = split_blocks([("word " * num_chars)[:num_chars]], "\n\n")
    assert split.validation
    assert split.train


def test_the_fingerprint_follows_content_not_path(tmp_path: Path) -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
    prints = {name: Corpus((tmp_path / name,)).fingerprint() for name in ("a.txt", "b.txt", "c.txt")}
    assert prints["a.txt"] == prints["b.txt"] != prints["c.txt"]
