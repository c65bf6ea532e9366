"""The cache: right counts, reused when it should be, never half there."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.data import tokens
from lightning_spectral.data.corpus import Corpus, split_blocks
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
    split = split_blocks([tiny_text()], "")
    tokenizer = Tokenizer(cache.folder)
    assert tokenizer.processor.decode(cache.train.tolist()) == "".join(split.train)
    assert tokenizer.processor.decode(cache.validation.tolist()) == "".join(split.validation)
    assert tokenizer.eos_id == 0


def test_documents_end_in_the_end_of_text_token(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(tiny_text(500, seed=number))
    corpus = Corpus(tuple(sorted(tmp_path.glob("*.txt"))))
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert int((cache.train == 0).sum() + (cache.validation == 0).sum()) == 4


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


def test_a_failed_build_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "bincount", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache").seconds is not None


def test_the_slower_of_two_builders_takes_the_other_ones_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = _corpus(tmp_path)
    build = tokens._build

    def overtaken(folder: Path, *rest: object) -> None:
        build(folder, *rest)  # type: ignore[arg-type]
        shutil.copytree(folder, folder.with_name(folder.name.partition(".")[0]))

    monkeypatch.setattr(tokens, "_build", overtaken)
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    assert len(cache.train) > 0
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [cache.folder.name]


def test_bad_input_is_named(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with pytest.raises(ValueError, match=r"`vocab_size` must be >= 257 .*, got 100"):
        prepare_tokens(corpus, vocab_size=100, cache_dir=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in `.*none`: it needs `tokenizer.json`"):
        prepare_tokens(corpus, vocab_size=300, tokenizer_dir=tmp_path / "none", cache_dir=tmp_path)
    (tmp_path / "empty.txt").write_text("  \n ")
    with pytest.raises(ValueError, match=r"hold no text"):
        prepare_tokens(Corpus((tmp_path / "empty.txt",)), vocab_size=300, cache_dir=tmp_path)


def test_unigram_entropy_of_equal_frequencies() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4), rel=1e-12)  # fp64
