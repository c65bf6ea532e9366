"""Token shards: the format, one sequence over files, splits, counts, and what is wrong with a file."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.data import TokenFiles
from lightning_spectral.data.shards import MAGIC, TokenSequence, find_shards, open_shard


def write_bin(file: Path, ids: np.ndarray, *, magic: int = MAGIC, claimed: int | None = None) -> Path:
    header = np.zeros(256, np.int32)
    header[:3] = (magic, 1, len(ids) if claimed is None else claimed)
    file.write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())
    return file


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(-5, 60), st.integers(-5, 60), st.integers(0, 30))
def test_a_sequence_over_parts_is_their_concatenation(sizes: list[int], first: int, last: int, at: int) -> None:
    everything = np.arange(sum(sizes))
    parts = np.split(everything, np.cumsum(sizes)[:-1]) if sizes else []
    sequence = TokenSequence(parts)
    assert len(sequence) == len(everything)
    assert sequence[first:last].tolist() == everything[first:last].tolist()
    at = min(at, len(everything))
    left, right = sequence.split(at)
    assert (left[:].tolist(), right[:].tolist()) == (everything[:at].tolist(), everything[at:].tolist())
    assert right[first:last].tolist() == everything[at:][first:last].tolist()


def test_shards_are_trained_on_and_held_out_by_name(tmp_path: Path) -> None:
    ids = np.arange(600) % 97
    write_bin(tmp_path / "fineweb_train_000001.bin", ids[:250])
    write_bin(tmp_path / "fineweb_train_000002.bin", ids[250:])
    write_bin(tmp_path / "fineweb_val_000000.bin", ids[::-1])
    data = TokenFiles(str(tmp_path), vocab_size=97, cache_dir=tmp_path / "cache")
    data.connect(batch_size=2, max_seq_length=16, seed=0)
    assert data.cache.train[:].tolist() == ids.tolist()
    assert data.cache.validation[:].tolist() == ids[::-1].tolist()
    assert data.token_counts.tolist() == np.bincount(ids, minlength=97).tolist()
    blocks = [tuple(block.tolist()) for batch in data.train_dataloader() for block in batch]
    assert set(blocks) <= {tuple(ids[start : start + 17]) for start in range(0, 592, 16)}
    assert len(blocks) == len(set(blocks)) == data.num_train_blocks // 2 * 2
    assert data.tokenizer_folder is None


def test_without_a_validation_shard_the_last_18th_is_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(180, dtype=np.int32))
    data = TokenFiles(str(tmp_path / "tokens.npy"), vocab_size=180, cache_dir=tmp_path / "cache")
    assert data.cache.train[:].tolist() == list(range(170))
    assert data.cache.validation[:].tolist() == list(range(170, 180))


def test_counts_are_taken_once_and_again_when_a_shard_changes(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "a.bin", np.zeros(100))

    def counts() -> list[int]:
        return TokenFiles(str(file), vocab_size=2, cache_dir=tmp_path / "cache").token_counts.tolist()

    assert counts() == [95, 0]
    (kept,) = (tmp_path / "cache" / "counts").iterdir()
    np.save(kept, np.array([90, 5]))
    assert counts() == [90, 5]  # read, not taken again
    write_bin(file, np.ones(100))
    assert counts() == [0, 95]


@pytest.mark.parametrize("harm", ["zeros", "cut", "empty", "shape", "dtype", "negative"])
def test_damaged_counts_are_taken_again_with_a_word(tmp_path: Path, harm: str) -> None:
    file = write_bin(tmp_path / "a.bin", np.arange(180) % 3)

    def counts() -> list[int]:
        return TokenFiles(str(file), vocab_size=3, cache_dir=tmp_path / "cache").token_counts.tolist()

    expected = np.bincount(np.arange(170) % 3).tolist()
    assert counts() == expected
    (kept,) = (tmp_path / "cache" / "counts").iterdir()
    content = kept.read_bytes()
    if harm in ("zeros", "cut", "empty"):  # what is left of a file after a failure of the power
        end = {"zeros": 128, "cut": 140, "empty": 0}[harm]
        kept.write_bytes(content[:end] + bytes(len(content) - end) * (harm == "zeros"))
    else:
        wrong = {"shape": [170], "dtype": [60.0, 55.0, 55.0], "negative": [-10, 90, 90]}
        np.save(kept, np.array(wrong[harm]))
    with pytest.warns(UserWarning, match=rf"`{kept}` are damaged and are taken again"):
        assert counts() == expected
    assert kept.read_bytes() == content


def test_counts_that_cannot_be_kept_are_counted_all_the_same(tmp_path: Path) -> None:
    file = write_bin(tmp_path / "a.bin", np.arange(180) % 3)
    (tmp_path / "counts").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"the counts cannot be kept in `.*counts`"):
        assert TokenFiles(str(file), vocab_size=3, cache_dir=tmp_path).token_counts.tolist() == [57, 57, 56]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", r"it has 5 bytes, its header alone takes 1024"),
        (bytes(2000), r"its magic number and version are 0 and 0, known are 20240520 and 1"),
    ],
)
def test_a_foreign_or_cut_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"`.*a.bin` is not a token shard: {message}"):
        open_shard(tmp_path / "a.bin")


def test_a_cut_shard_a_wrong_vocabulary_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    write_bin(tmp_path / "cut.bin", np.zeros(100), claimed=1000)
    with pytest.raises(
        ValueError, match=r"its header says 1,000 tokens, its size is that of 100. Was the download cut"
    ):
        open_shard(tmp_path / "cut.bin")
    write_bin(tmp_path / "big.bin", np.full(100, 300))
    with pytest.raises(ValueError, match=r"the shards hold the id 300, `vocab_size` is 257"):
        _ = TokenFiles(str(tmp_path / "big.bin"), vocab_size=257, cache_dir=tmp_path).token_counts
    np.save(tmp_path / "two.npy", np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError, match=r"holds int32 of shape \(2, 2\), not a 1-D array"):
        open_shard(tmp_path / "two.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no text at `.*empty`: give a .bin, .npy file"):
        find_shards(tmp_path / "empty")


def write_wide(file: Path, ids: Sequence[int]) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, len(ids)
    file.write_bytes(header.tobytes() + np.array(ids, dtype=np.uint32).tobytes())


def test_shards_with_ids_beyond_16_bits(tmp_path: Path) -> None:
    """llm.c's format for Llama 3."""
    ids = [70_000, 5, 128_000, *range(40)]
    write_wide(tmp_path / "a_train_0.bin", ids)
    assert open_shard(tmp_path / "a_train_0.bin").tolist() == ids
    cut = (tmp_path / "a_train_0.bin").read_bytes()[:-2]
    (tmp_path / "a_train_0.bin").write_bytes(cut)
    with pytest.raises(ValueError, match="its header says 43 tokens, its size is that of 42"):
        open_shard(tmp_path / "a_train_0.bin")


@pytest.mark.parametrize("place", ["train", "val"])
@pytest.mark.parametrize(("bad", "message"), [(600, "the id 600, `vocab_size` is 512"), (-1, "the id -1: ids of")])
def test_a_foreign_id_is_refused_in_training_and_held_out_shards(
    place: str, bad: int, message: str, tmp_path: Path
) -> None:
    for name in ("train", "val"):
        np.save(tmp_path / f"{name}.npy", np.array([*range(99), bad if name == place else 0]))
    module = TokenFiles(str(tmp_path), vocab_size=512, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        module.token_counts  # noqa: B018


def test_arrays_of_every_integer_type_are_one_sequence(tmp_path: Path) -> None:
    kinds = ["<u8", ">u8", "<i8", "<u4", ">i4", "<u2", "|u1"]
    for number, kind in enumerate(kinds):
        np.save(tmp_path / f"{number}.npy", np.arange(100).astype(kind))
    module = TokenFiles(str(tmp_path), vocab_size=100, cache_dir=tmp_path / "cache")
    tokens = [*module.cache.train[:].tolist(), *module.cache.validation[:].tolist()]
    assert tokens == [*range(100)] * len(kinds)
    assert module.token_counts.sum() == len(module.cache.train)


def test_a_compressed_shard_says_so(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.bin.gz", "wb") as out:
        out.write(b"1" * 2_000)
    with pytest.raises(ValueError, match=r"a\.bin\.gz` is not a token shard: it is compressed, .* unpack it"):
        TokenFiles(str(tmp_path), vocab_size=100, cache_dir=tmp_path / "cache").token_counts  # noqa: B018
