"""The cache: right counts, reused when it should be, never half there."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.data import encode as encode_module
from lightning_spectral.data import tokens
from lightning_spectral.data.batches import TokenBlocks
from lightning_spectral.data.corpus import Corpus, blocks
from lightning_spectral.data.files import find_files
from lightning_spectral.data.tokens import prepare_tokens, unigram_entropy
from tests.tiny import tiny_text, write_text


def _corpus(folder: Path) -> Corpus:
    return Corpus((write_text(folder),))


def test_counts_are_those_of_the_training_tokens_alone(tmp_path: Path) -> None:
    cache = prepare_tokens(_corpus(tmp_path), vocab_size=300, cache_dir=tmp_path / "cache")
    expected = Counter(cache.train.tolist())
    assert cache.counts.dtype == np.int64
    assert cache.counts.shape == (cache.vocab_size,) == (300,)
    assert {i: int(n) for i, n in enumerate(cache.counts) if n} == dict(expected)
    assert len(cache.validation) > 0


def test_tokens_spell_the_split(tmp_path: Path) -> None:
    from litgpt.tokenizer import Tokenizer

    cache = prepare_tokens(_corpus(tmp_path), vocab_size=300, cache_dir=tmp_path / "cache")
    made = list(blocks([tiny_text()]))
    tokenizer = Tokenizer(cache.folder)
    assert tokenizer.processor.decode(cache.train.tolist()) == "".join(
        block.text for block in made if not block.held_out
    )
    assert tokenizer.processor.decode(cache.validation.tolist()) == "".join(
        block.text for block in made if block.held_out
    )
    assert tokenizer.eos_id == 0


def test_documents_end_in_the_end_of_text_token(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(tiny_text(500, seed=number))
    corpus = Corpus(tuple(sorted(tmp_path.glob("*.txt"))))
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert int((cache.train == 0).sum() + (cache.validation == 0).sum()) == 4


def test_documents_are_packed_and_sequences_cross_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{f"{letter} " * 300}"}}\n' for letter in "abcdefgh"))
    (tmp_path / "held.txt").write_text("z z")
    corpus = Corpus((tmp_path / "a.jsonl",), held_out=(tmp_path / "held.txt",))
    cache = prepare_tokens(corpus, vocab_size=257, cache_dir=tmp_path / "cache")
    # 256 bytes and the end of text: 8 documents of 600 bytes, 7 ends between them
    assert len(cache.train) == 8 * 600 + 7
    assert np.flatnonzero(cache.train == 0).tolist() == [600 + 601 * k for k in range(7)]
    blocks_of_500 = TokenBlocks(cache.train, 500)
    assert [len(blocks_of_500), len(blocks_of_500[0])] == [9, 501]  # no padding: 306 tokens are left
    second = blocks_of_500[1].tolist()
    assert second.index(0) == 100
    assert second[98] != second[101]  # the second document's bytes are targets in the first one's sequence


def test_a_second_run_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    first = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert first.seconds is not None
    assert "built in" in str(first)
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("built again"))
    second = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert second.seconds is None
    assert "reused" in str(second)
    assert second.folder == first.folder


@pytest.mark.parametrize("change", ["vocabulary", "text"])
def test_other_settings_and_other_text_get_their_own_cache(tmp_path: Path, change: str) -> None:
    corpus = _corpus(tmp_path)
    first = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    if change == "text":
        corpus.files[0].write_text(tiny_text(seed=1))
    second = prepare_tokens(corpus, vocab_size=310 if change == "vocabulary" else 300, cache_dir=tmp_path / "cache")
    assert second.folder != first.folder
    assert second.seconds is not None


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    own = prepare_tokens(corpus, vocab_size=280, cache_dir=tmp_path / "cache")
    given = prepare_tokens(corpus, vocab_size=2048, tokenizer_dir=own.folder, cache_dir=tmp_path / "cache")
    assert given.folder != own.folder
    assert given.vocab_size == 280
    assert np.array_equal(given.train, own.train)


def interrupt_a_build(corpus: Corpus, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop it in the fifth batch of texts; the list of batch sizes grows further with what is encoded later."""
    monkeypatch.setattr(encode_module, "UNIT_BLOCKS", 4)
    encoded: list[int] = []
    encode = tokens.Encoder.rows

    def interrupted(self: tokens.Encoder, texts: list[str]) -> list[np.ndarray]:
        encoded.append(len(texts))
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(tokens.Encoder, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(corpus, vocab_size=300, cache_dir=folder)
    return encoded


@pytest.mark.parametrize("unit_blocks", [1, 4, 5, 2_048])
def test_seams_are_where_the_other_split_lay_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_blocks: int
) -> None:
    monkeypatch.setattr(encode_module, "UNIT_BLOCKS", unit_blocks)
    cache = prepare_tokens(_corpus(tmp_path), vocab_size=300, cache_dir=tmp_path / "cache")
    made = list(blocks([tiny_text()]))
    lengths = [len(row) for row in tokens.Encoder(cache.folder).rows([block.text for block in made])]
    expected: dict[bool, list[int]] = {False: [], True: []}
    for number, block in enumerate(made):
        if number == 0 or made[number - 1].held_out != block.held_out:
            before = zip(made[:number], lengths, strict=False)
            expected[block.held_out].append(sum(n for one, n in before if one.held_out == block.held_out))
    assert cache.seams("train").tolist() == expected[False]
    assert cache.seams("validation").tolist() == expected[True]
    assert len(expected[True]) >= 1


def test_a_tokenizer_whose_end_of_text_cannot_be_spelled_has_no_separator_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    Fast(models.BPE(vocab={"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4, "\n": 5}, merges=[])).save(
        str(tmp_path / "tokenizer.json")
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    encoder = tokens.Encoder(tmp_path)
    assert (encoder.end_of_document, encoder.end_of_text, encoder.separator) == (4, None, "\n\n")
    Fast(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert tokens.Encoder(tmp_path).end_of_document == 7


def test_an_interrupted_build_goes_on_from_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    whole = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "other")
    encoded = interrupt_a_build(corpus, tmp_path / "cache", monkeypatch)
    assert not (tmp_path / "cache" / "tokens" / whole.folder.name).exists()
    done_before = len(encoded)
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    num_blocks = len(list(blocks([tiny_text()])))
    assert sum(encoded[done_before:]) == num_blocks - 8  # two units of four blocks were whole
    for name in ("train.npy", "validation.npy", "counts.npy", "tokenizer.json"):
        assert (cache.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert sorted(path.name for path in cache.folder.parent.iterdir()) == [
        cache.folder.name,
        f"{cache.folder.name}.lock",
    ]


@pytest.mark.parametrize("harm", ["zeros", "cut", "empty", "changed", "no arrays"])
def test_a_damaged_unit_of_an_interrupted_build_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    corpus = _corpus(tmp_path)
    whole = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "other")
    interrupt_a_build(corpus, tmp_path / "cache", monkeypatch)
    unit = next((tmp_path / "cache").rglob("unit-000000.npz"))
    content = unit.read_bytes()
    middle = len(content) // 2
    if harm == "no arrays":
        np.savez(unit, other=np.zeros(3))
    else:
        parts = {"zeros": content[:200] + bytes(len(content) - 200), "cut": content[:middle], "empty": b""}
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        unit.write_bytes(parts.get(harm, changed))
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert (cache.folder / "train.npy").read_bytes() == (whole.folder / "train.npy").read_bytes()


@pytest.mark.parametrize("about", ["[" * 100_000, "[]", "1", '{"files_written": []}', '{"files_written": {}}'])
def test_a_foreign_list_of_a_caches_files_is_not_believed(tmp_path: Path, about: str) -> None:
    corpus = _corpus(tmp_path)
    whole = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    (whole.folder / "about.json").write_text(about)
    with pytest.warns(UserWarning, match="is damaged"):
        assert prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache").seconds is not None


@pytest.mark.parametrize("harm", ["zeros", "cut", "empty", "about", "missing"])
def test_a_damaged_cache_is_built_again_with_a_word(tmp_path: Path, harm: str) -> None:
    corpus = _corpus(tmp_path)
    whole = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    before, file = whole.train.tolist(), whole.folder / "train.npy"
    content = file.read_bytes()
    if harm == "zeros":
        file.write_bytes(content[:200] + bytes(len(content) - 200))
    elif harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "missing":
        file.unlink()
    else:
        (whole.folder / "about.json").write_text("")
    with pytest.warns(UserWarning, match=rf"token cache `.*{whole.folder.name}` is damaged"):
        again = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert again.seconds is not None
    assert again.train.tolist() == before


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot write the token cache `.*tokens`: .*LIGHTNING_SPECTRAL_CACHE"):
        prepare_tokens(_corpus(tmp_path), vocab_size=300, cache_dir=tmp_path)


def test_two_builders_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    build, built, said, second = tokens._build, [], [], threading.Event()

    def until_the_other_waits(*arguments: object) -> None:
        built.append(1)
        assert second.wait(60)
        build(*arguments)  # type: ignore[arg-type]

    def report(line: str) -> None:
        said.append(line)
        second.set()

    monkeypatch.setattr(tokens, "_build", until_the_other_waits)
    with ThreadPoolExecutor(2) as pool:
        made = list(
            pool.map(
                lambda _: prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache", report=report),
                range(2),
            )
        )
    assert len(built) == 1
    assert len({cache.folder for cache in made}) == 1
    assert sorted(cache.seconds is None for cache in made) == [False, True]
    assert [line.partition(":")[2] for line in said] == [" waiting for it."]


def test_held_out_files_are_the_validation_tokens(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(tiny_text(500))
    (tmp_path / "valid.txt").write_text(tiny_text(200, seed=1))
    cache = prepare_tokens(Corpus.of(find_files(tmp_path)), vocab_size=300, cache_dir=tmp_path / "cache")
    encoder = tokens.Encoder(cache.folder)
    texts = [block.text for block in blocks([tiny_text(500)], hold_out=False)]
    held_out = [block.text for block in blocks([tiny_text(200, seed=1)], hold_out=False)]
    assert cache.train.tolist() == encoder(texts).tolist()
    assert cache.validation.tolist() == encoder(held_out).tolist()


def test_bad_input_is_named(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with pytest.raises(ValueError, match=r"`vocab_size` must be >= 257 .*, got 100"):
        prepare_tokens(corpus, vocab_size=100, cache_dir=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in `.*none`: it needs `tokenizer.json`"):
        prepare_tokens(corpus, vocab_size=300, tokenizer_dir=tmp_path / "none", cache_dir=tmp_path)
    (tmp_path / "empty.txt").write_text("  \n ")
    with pytest.raises(ValueError, match=r"there is no text in"):
        prepare_tokens(Corpus((tmp_path / "empty.txt",)), vocab_size=300, cache_dir=tmp_path)


def test_unigram_entropy_of_equal_frequencies() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4), rel=1e-12)  # fp64


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_any_number_of_processes_makes_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    monkeypatch.setattr(encode_module, "UNIT_BLOCKS", 4)
    made = [
        prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / str(num_proc), num_proc=num_proc).folder
        for num_proc in (1, 2)
    ]
    for name in ("train.npy", "validation.npy", "counts.npy", "tokenizer.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(120)
def test_a_tokenising_process_that_is_killed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where memory runs out; the next start goes on."""
    corpus = _corpus(tmp_path)
    whole = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(encode_module, "_encode_in_worker", _killed)
        with pytest.raises(ValueError, match="one of the 2 processes that tokenise was killed, .* smaller `num_proc`"):
            prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache", num_proc=2)
    again = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    for name in ("train.npy", "validation.npy", "counts.npy"):
        assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_a_data_set_is_read_as_a_stream_and_by_split(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lightning_spectral.data.hub import HubCorpus

    for split in ("train", "test"):
        table = pa.table({"body": [f"{split} {line}" for line in tiny_text(300).splitlines()]})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    corpus = HubCorpus(dataset=str(tmp_path / "set"), held_out_split="test", text_column="body")
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert cache.num_documents == 60
    from litgpt.tokenizer import Tokenizer

    spelled = Tokenizer(cache.folder).processor.decode(cache.validation.tolist())
    assert spelled.count("test ") == 30
    assert "train " not in spelled
    before = corpus.fingerprint()
    pq.write_table(pa.table({"body": ["other"]}), tmp_path / "set" / "train-00000-of-00001.parquet")
    assert corpus.fingerprint() != before
    with pytest.raises(ValueError, match="cannot read split `none` of the data set `.*set`"):
        list(HubCorpus(dataset=str(tmp_path / "set"), split="none", text_column="body").pieces())
    with pytest.raises(ValueError, match="no column `text`"):
        list(HubCorpus(dataset=str(tmp_path / "set")).pieces())


@pytest.mark.parametrize("kind", ["one", "of a split", "several"])
def test_what_save_to_disk_wrote_is_read(kind: str, tmp_path: Path) -> None:
    import datasets

    from lightning_spectral.data.hub import HubCorpus

    datasets.disable_progress_bars()
    rows = {"text": ["one", "two", None], "id": [1, 2, 3]}
    train = datasets.Dataset.from_dict(rows, split=None if kind == "one" else datasets.Split("train"))
    other = datasets.Dataset.from_dict({"text": ["three"]})
    saved = datasets.DatasetDict({"train": train, "for_later": other}) if kind == "several" else train
    saved.save_to_disk(str(tmp_path / "set"))
    corpus = HubCorpus(dataset=str(tmp_path / "set"), held_out_split="for_later" if kind == "several" else "")
    assert [text for _, text in corpus.pieces()] == ["one", "two"]
    if kind == "several":
        assert [text for _, text in corpus.pieces(held_out=True)] == ["three"]
    names = "train, for_later" if kind == "several" else "train"
    with pytest.raises(ValueError, match=rf"cannot read split `val` of .*: its splits are {names}\.$"):
        list(HubCorpus(dataset=str(tmp_path / "set"), split="val").pieces())


def test_a_folder_of_a_data_set_with_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    from lightning_spectral.data.hub import HubCorpus

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"b.jsonl` is a link to `.*gone.jsonl`, which does not exist"):
        HubCorpus(dataset=str(tmp_path)).fingerprint()
