"""Which files, which documents, which blocks."""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.data.corpus import (
    BLOCK_CHARS,
    HOLD_OUT_EVERY,
    Block,
    Corpus,
    blocks,
    document_pieces,
    documents,
    joined,
    state_of_the_union_files,
)
from lightning_spectral.data.files import digest_of, find_files


def naive_blocks(text: str) -> list[Block]:
    """The rule, from the whole text at once."""
    size = min(BLOCK_CHARS, max(1, len(text) // HOLD_OUT_EVERY))
    cut, start = [], 0
    while start < len(text):
        end = start + size
        spaces = [place for place in range(end, min(end + max(64, size // 20), len(text))) if text[place].isspace()]
        end = spaces[0] + 1 if spaces else end
        cut.append(text[start:end])
        start = end
    made = [Block(piece, number % HOLD_OUT_EVERY == 0) for number, piece in enumerate(cut, start=1)]
    if len(made) > 1 and not any(block.held_out for block in made):
        made[-1] = Block(made[-1].text, True)
    return made


def test_files_by_path_glob_and_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "notes.py"):
        (tmp_path / name).write_text("{}")
    assert find_files(tmp_path / "a.txt").train == (tmp_path / "a.txt",)
    assert find_files(f"{tmp_path}/*.txt").train == (tmp_path / "a.txt", tmp_path / "b.txt")
    found = find_files(tmp_path)
    assert found.train == found.all == (tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "deep" / "c.jsonl")
    assert found.left_out == ((tmp_path / "notes.py", "no reader for `.py`"),)


def test_split_names_are_honoured_and_test_text_is_never_trained_on(tmp_path: Path) -> None:
    for name in ("train.txt", "validation.txt", "test.txt", "notes.txt"):
        (tmp_path / name).write_text(name)
    found = find_files(tmp_path)
    assert [file.name for file in found.train] == ["train.txt"]
    assert [file.name for file in found.held_out] == ["validation.txt"]
    assert {file.name: why for file, why in found.left_out} == {
        "notes.txt": "no split in its name, beside files of a train split",
        "test.txt": "test split",
    }
    assert str(found) == (
        "1 file(s) of training text; held out: validation.txt; left out: notes.txt (no split in its name, beside files "
        "of a train split), test.txt (test split)"
    )


@pytest.mark.parametrize("names", [("book.txt", "book_test.txt"), ("a/train/0.txt", "a/test/0.txt")])
def test_without_a_validation_split_the_test_split_is_held_out(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files(tmp_path)
    assert (found.train, found.held_out) == ((tmp_path / names[0],), (tmp_path / names[1],))


def test_a_word_that_only_contains_a_split_is_none(tmp_path: Path) -> None:
    for name in ("latest.txt", "trains.txt", "evaluate.txt"):
        (tmp_path / name).write_text(name)
    assert len(find_files(tmp_path).train) == 3


def test_what_describes_the_data_is_not_data(tmp_path: Path) -> None:
    """Licences, tokenizers and the notes of download tools, in a folder whose names say no split."""
    about = ("LICENSE.txt", "README.txt", "requirements.txt", "dataset_infos.json", "state.json", "tokenizer.json")
    for name in (*about, "licensed_books.txt", "state_of_things.json"):
        (tmp_path / name).write_text('{"text": "a"}')
    found = find_files(tmp_path)
    assert [file.name for file in found.train] == ["licensed_books.txt", "state_of_things.json"]
    assert dict(found.left_out) == {tmp_path / name: "describes the data" for name in about}
    assert find_files(tmp_path / "README.txt").train  # asked for by name


def test_a_data_set_that_was_saved_to_disk_is_read_by_split(tmp_path: Path) -> None:
    import datasets

    def rows(tag: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{tag} {k}" for k in range(3)]})

    datasets.disable_progress_bars()
    rows("plain").save_to_disk(str(tmp_path / "one"))
    assert list(documents(Corpus.of(find_files(tmp_path / "one")))) == ["plain 0", "plain 1", "plain 2"]
    datasets.DatasetDict({name: rows(name) for name in ("train", "testing")}).save_to_disk(str(tmp_path / "splits"))
    corpus = Corpus.of(find_files(tmp_path / "splits"))
    assert list(documents(corpus)) == ["train 0", "train 1", "train 2"]
    assert [file.parent.name for file in corpus.held_out] == ["testing"]


def test_a_snapshot_of_a_data_set_is_not_trained_on_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# card")
    (tmp_path / ".gitattributes").write_text("x")
    (tmp_path / "part.txt").write_text("text")
    found = find_files(tmp_path)
    assert found.train == (tmp_path / "part.txt",)
    assert [file.name for file, _ in found.left_out] == ["README.md"]
    assert find_files(f"{tmp_path}/*.md").train == (tmp_path / "README.md",)  # asked for


@pytest.mark.parametrize("folder", [".cache/huggingface/download", ".git", "part/.ipynb_checkpoints"])
def test_what_lies_in_hidden_folders_is_not_data(folder: str, tmp_path: Path) -> None:
    """A notebook's copies, a download's notes, a repository's: each text would be trained on once more."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "copy.txt").write_text("text")
    (tmp_path / "part.txt").write_text("text")
    for path in (tmp_path, f"{tmp_path}/**/*.txt", f"{tmp_path}/**"):
        assert find_files(path).train == (tmp_path / "part.txt",)
    hidden = (tmp_path / folder).rename(tmp_path / ".mine")
    assert find_files(hidden).train == (hidden / "copy.txt",)  # asked for


def test_a_file_and_its_compressed_copy_are_one_text(tmp_path: Path) -> None:
    import gzip

    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"text": "a row"}\n')
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write('{"text": "a row"}\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("alone")
    found = find_files(tmp_path)
    assert [file.name for file in found.train] == ["a.jsonl", "b.txt", "c.txt.gz"]
    assert [(file.name, why) for file, why in found.left_out] == [
        ("a.jsonl.gz", "`a.jsonl` is beside it"),
        ("b.txt.gz", "`b.txt` is beside it"),
    ]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    for suffix, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        with module.open(tmp_path / f"t.txt{suffix}", "wt", encoding="utf-8") as file:
            file.write(f"text in {suffix} \u00fc")
    with gzip.open(tmp_path / "z.json.gz", "wt") as file:
        file.write(json.dumps({"text": "a row"}) + "\n")
    found = find_files(tmp_path)
    assert (len(found.train), found.left_out) == (4, ())
    texts = [f"text in {suffix} \u00fc" for suffix in (".bz2", ".gz", ".xz")]
    assert list(documents(Corpus.of(found))) == [*texts, "a row"]


def test_a_cut_compressed_file_is_named(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cannot read `.*t.txt.gz` as text"):
        list(documents(Corpus((tmp_path / "t.txt.gz",))))


def test_a_long_document_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 2_500_000)
    sizes = [len(piece) for _, piece in document_pieces([tmp_path / "t.txt"])]
    assert sum(sizes) == 2_500_000
    assert max(sizes) <= 1 << 20


def test_the_digest_of_a_large_file_sees_a_cut_and_zeros(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    content = bytes(range(1, 256)) * 300_000  # 76 MB
    file.write_bytes(content)
    whole = digest_of(file)
    file.write_bytes(content[:-1_000_000] + bytes(1_000_000))
    assert digest_of(file) != whole
    file.write_bytes(content[:-1])
    assert digest_of(file) != whole


def test_a_missing_path_and_a_foreign_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text at `.*nowhere.txt`: give a .txt"):
        find_files(tmp_path / "nowhere.txt")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(FileNotFoundError, match=r"hub is `{class_path: HubText, init_args: {dataset: owner/name}}`"):
        find_files("owner/name")
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
    assert list(documents(Corpus.of(find_files(f"{tmp_path}/*.txt")))) == texts
    assert list(documents(Corpus((tmp_path / "rows.jsonl",), "body"))) == texts
    assert list(documents(Corpus((tmp_path / "rows.parquet",), "body"))) == texts


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"no column `text`, only `body`: name one of them by `text_column`"):
        list(documents(Corpus((tmp_path / "rows.jsonl",))))


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cannot read `.*torn.parquet`"):
        list(documents(Corpus((tmp_path / "torn.parquet",))))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read `.*latin.txt`"):
        list(documents(Corpus((tmp_path / "latin.txt",))))


@given(st.lists(st.text(max_size=400), min_size=1, max_size=20))
def test_short_texts_are_cut_as_the_whole_would_be(texts: list[str]) -> None:
    text = "\n\n".join(text for text in texts if text)
    assert list(blocks(joined(enumerate(texts), "\n\n"))) == naive_blocks(text)


@pytest.mark.parametrize("piece_chars", [999, 20_000, 70_001, 2_000_000])
def test_a_stream_is_cut_as_the_whole_text_whatever_its_pieces(piece_chars: int) -> None:
    text = " ".join(f"w{number}" for number in range(120_000)) + "x" * 50_000 + " end"
    pieces = [text[first : first + piece_chars] for first in range(0, len(text), piece_chars)]
    made = list(blocks(pieces))
    assert made == naive_blocks(text)
    assert sum(block.held_out for block in made) == len(made) // HOLD_OUT_EVERY > 1


def test_nothing_is_held_out_where_held_out_text_comes_from_elsewhere() -> None:
    assert not any(block.held_out for block in blocks(["word " * 200_000], hold_out=False))


@given(st.lists(st.integers(0, 60), min_size=30, max_size=120), st.sampled_from(["<|endoftext|>", "\n\n", "é€𝄞"]))
def test_a_separator_is_never_cut_in_two(lengths: list[int], separator: str) -> None:
    """Text without white space, as in Chinese: documents of any length, so that separators lie at every border."""
    texts = ["語" * length for length in lengths]
    made = [block.text for block in blocks(joined(enumerate(texts), separator), separator=separator)]
    whole = separator.join(text for text in texts if text)
    assert "".join(made) == whole
    assert sum(text.count(separator) for text in made) == whole.count(separator)


def test_a_separator_at_the_border_of_a_block_of_a_long_text_stays_whole() -> None:
    separator = "<|endoftext|>"
    for before in range(BLOCK_CHARS - len(separator), BLOCK_CHARS + 1):
        text = "x" * before + separator + "x" * (18 * BLOCK_CHARS)
        made = [block.text for block in blocks([text], separator=separator)]
        assert sum(separator in block for block in made) == 1
        assert "".join(made) == text


def test_empty_documents_leave_no_separator() -> None:
    assert "".join(joined([(0, "a"), (0, "b"), (1, ""), (2, "c")], "|")) == "ab|c"


def test_the_fingerprint_follows_content_not_path(tmp_path: Path) -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(text)
    prints = {name: Corpus((tmp_path / name,)).fingerprint() for name in ("a.txt", "b.txt", "c.txt")}
    assert prints["a.txt"] == prints["b.txt"] != prints["c.txt"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst"])
def test_a_zstandard_file_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    missing = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda word: None if word == "zstandard" else missing(word))
    with pytest.raises(ValueError, match=rf"`.*{name}` needs the package `zstandard`: `pip install zstandard`"):
        list(documents(Corpus.of(find_files(tmp_path), "text")))


def test_a_folder_with_held_out_text_alone_says_that_it_was_seen(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match=r"Left out there: test.txt \(held out by its name\)"):
        find_files(tmp_path)


JSON_FILES: dict[str, tuple[str, list[str]]] = {
    "lines": ('{"text": "a"}\n\n{"text": "b\\u2028c"}', ["a", "b\u2028c"]),
    "a list": ('[{"text": "a"},\n {"text": "b"}]\n', ["a", "b"]),
    "one object over lines": ('{\n "text": "a"\n}\n', ["a"]),
    "a mark of the byte order": ('\ufeff{"text": "a"}\n', ["a"]),
    "columns that come later": ('{"n": 1}\n{"text": "a"}\n{"n": 2}\n', ["a"]),
    "texts like dates": ('{"text": "2026-01-01"}\n{"text": "2026-01-02"}\n', ["2026-01-01", "2026-01-02"]),
    "lines of Windows": ('{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
    "nothing": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("kind", JSON_FILES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_rows_of_json(kind: str, suffix: str, tmp_path: Path) -> None:
    content, texts = JSON_FILES[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    assert list(documents(Corpus((path,)))) == texts


@pytest.mark.parametrize(
    "line",
    ['{"text": ' + "[" * 200_000 + "]" * 200_000 + "}", "[1]", "3", '{"text": "a', '{"text": "\\ud800"}', "\xff"],
)
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    """pyarrow's reader ended the process where a line was nested without end."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"read `.*a.jsonl` as json: (line 2 is no JSON|a row is|'utf-8' codec)"):
        list(documents(Corpus((tmp_path / "a.jsonl",))))


def test_a_file_without_the_column_beside_one_that_has_it_is_named(tmp_path: Path) -> None:
    """It used to be left out without a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "y"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl` has no column `text`, only `body`"):
        list(documents(Corpus((tmp_path / "a.jsonl", tmp_path / "b.jsonl"))))


@pytest.fixture
def zlib_as_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package need not be installed: zlib's objects have the same methods."""
    module = types.ModuleType("zstandard")
    module.__spec__ = importlib.machinery.ModuleSpec("zstandard", None)
    module.ZstdDecompressor = lambda: types.SimpleNamespace(decompressobj=zlib.decompressobj)
    module.ZstdError = zlib.error
    monkeypatch.setitem(sys.modules, "zstandard", module)


@pytest.mark.usefixtures("zlib_as_zstandard")
@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_a_zstandard_file_is_read_whole_or_named(name: str, tmp_path: Path) -> None:
    """Its own reader ends where the file does: half of a download used to be all that was trained on."""
    lines = [json.dumps({"text": f"{number} \u00fc"}) + "\n" for number in range(20_000)]
    frames = [zlib.compress("".join(part).encode()) for part in (lines[:15_000], lines[15_000:])]
    path, whole = tmp_path / name, b"".join(frames)
    path.write_bytes(whole)
    expected = "".join(lines) if ".txt" in name else "".join(json.loads(line)["text"] for line in lines)
    assert "".join(documents(Corpus((path,)))) == expected
    for cut in (1, 5_000, len(frames[0]) - 1, len(frames[0]) + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"cannot read `.*{name}` as \w+: it ends inside a compressed frame"):
            list(documents(Corpus((path,))))
    path.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(ValueError, match=rf"cannot read `.*{name}`"):
        list(documents(Corpus((path,))))


def parquet(file: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), file)


def test_a_parquet_file_without_rows_and_one_with_other_columns_beside(tmp_path: Path) -> None:
    """An empty part is what parallel writers leave; only the text's column need be the same."""
    parquet(tmp_path / "a.parquet", text=pa.array([], type=pa.string()))
    parquet(tmp_path / "b.parquet", text=["one"], id=[1])
    parquet(tmp_path / "c.parquet", id=["x"], text=pa.array(["two"], type=pa.large_string()), extra=[0.5])
    assert list(documents(Corpus.of(find_files(tmp_path)))) == ["one", "two"]


def test_of_several_tables_the_torn_one_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=["one"])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot read `[^`]*b\.parquet` as parquet: .*Is it whole\?"):
        list(documents(Corpus.of(find_files(tmp_path))))


@pytest.mark.parametrize("kind", ["new_stream", "new_file"])
def test_both_formats_of_arrow_files(kind: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two", None], "id": [1, 2, 3]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, getattr(pa.ipc, kind)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert list(documents(Corpus.of(find_files(tmp_path)))) == ["one", "two"]


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (data / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (data / "more").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "itself").symlink_to(data)
    (data / "newest.txt").symlink_to(data / "a.txt")
    for path in (data, data / "**/*.txt"):
        assert sorted(documents(Corpus.of(find_files(path)))) == ["a", "b"]
    assert find_files(data / "newest.txt").train == (data / "newest.txt",)


@pytest.mark.parametrize("path", ["", "*.txt", "b.txt"])
def test_a_link_to_nothing_is_named(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"b\.txt` is a link to `.*gone\.txt`, which does not exist"):
        find_files(tmp_path / path)


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "/annex/objects/S-1"]
)
def test_a_file_that_was_not_downloaded_is_no_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text(content)
    for path in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(
            FileNotFoundError, match=r"b\.txt` stands for a file that was not downloaded: `git lfs pull`"
        ):
            find_files(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.txt")
    assert find_files(tmp_path).train == (tmp_path / "a.txt",)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find_files(tmp_path)


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as out:
        out.write(b'\xef\xbb\xbf{"text": "three"}')
    assert list(documents(Corpus.of(find_files(tmp_path)))) == ["one\ntwo", "three"]
