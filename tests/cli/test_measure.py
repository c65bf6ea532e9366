"""``measure``: the same ranks from every kind of checkpoint, equal to an oracle; bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spectral import cli, read_spectral
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.data.tokens import Encoder
from lightning_spectral.gpt.export import load_final
from lightning_spectral.records import read_losses, read_run
from lightning_spectral.training.checkpoints import checkpoint_path
from lightning_spectral.training.load_checkpoint import load_checkpoint
from lightning_spectral.training.measure import measure_checkpoint
from lightning_spectral.training.pretrain import run
from lightning_spectral.training.recipe import load
from tests.callbacks.test_measuring import oracle_ranks
from tests.tiny import LIGHTNING_WARNINGS, tiny_text, tiny_tree, write_recipe

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

LENGTH, NUM = 16, 40 * 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of a tiny recipe."""
    folder = tmp_path_factory.mktemp("trained")
    return run(
        load(write_recipe(folder, {**tiny_tree(folder), "architecture": {"activation": "relu2"}})), progress_bar=False
    )


@pytest.fixture(scope="module")
def hugging_face(trained, tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=48, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / "final" / name, folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(tiny_text(seed=5))
    return path


def words(text: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--out", str(out), "--tokens", str(NUM), "--seq_length", str(LENGTH), *more]


def first_ids(trained: Path, text: Path) -> torch.Tensor:
    tokens = Encoder(trained / "final")([text.read_text()])[: NUM + 1]
    return torch.from_numpy(tokens.astype(np.int64))


def test_equal_to_an_oracle(trained, text, tmp_path):
    assert cli.main(["measure", str(trained / "final"), *words(text, tmp_path / "out")]) == 0
    records = {(r.layer, r.bucket): r for r in read_spectral(tmp_path / "out").records}
    tokens = first_ids(trained, text)
    ids, targets = tokens[:-1].view(-1, LENGTH), tokens[1:].view(-1, LENGTH)
    model = load_final(trained / "final").eval()
    rows: list[torch.Tensor] = []
    model.transformer.h[1].mlp.proj.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        logits = model(ids)
    soft, hard = oracle_ranks(rows[0].flatten(0, 1).double())
    record = records[1, "pooled"]
    assert (record.num_tokens, record.num_sequences, record.width) == (NUM, NUM // LENGTH, 64)
    assert (record.soft_rank, record.hard_rank) == pytest.approx((soft, hard), rel=1e-5)  # fp32 products
    assert (record.stage, record.step, record.tokens_seen) == ("measure", None, None)
    assert record.conventions["counts"] == "measured text"
    assert record.conventions["step"] == "unknown"
    assert sum(records[1, bucket].num_tokens for bucket in ("head", "mid", "tail")) == NUM
    loss = {r.bucket: r for r in read_losses(tmp_path / "out").records}["pooled"]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert (loss.num_tokens, loss.loss) == (NUM, pytest.approx(float(expected), rel=1e-5))


def test_the_ckpt_is_the_final_model_and_two_stand_side_by_side(trained, text, tmp_path, capsys):
    ckpt = checkpoint_path(trained, 12)
    assert cli.main(["measure", str(trained / "final"), str(ckpt), *words(text, tmp_path / "out")]) == 0
    folders = [tmp_path / "out" / "1_final", tmp_path / "out" / f"2_{ckpt.stem}"]
    first, second = (read_spectral(folder).records for folder in folders)
    assert [(r.module, r.bucket, r.hard_rank) for r in first] == [(r.module, r.bucket, r.hard_rank) for r in second]
    assert {r.step for r in second} == {12}
    assert read_run(folders[1]).optimizer == "AdamW"
    printed = capsys.readouterr().out
    ratios = [line.split()[5] for line in printed.splitlines() if line.startswith("post")]
    assert ratios == ["1.000"] * 12  # 4 buckets, soft, hard, loss
    assert "HEAD, MID and TAIL are those of the 641 measured tokens themselves" in printed


def test_hugging_face_with_pre_sites_intervals_and_counts(trained, hugging_face, text, tmp_path, capsys):
    counts = tmp_path / "counts.npy"
    np.save(counts, np.bincount(first_ids(trained, text).numpy(), minlength=300))
    extra = ["--counts", str(counts), "--sites", "pre", "post", "--shards", "4"]
    assert cli.main(["measure", str(hugging_face), *words(text, tmp_path / "out", *extra)]) == 0
    records = read_spectral(tmp_path / "out").records
    assert {(r.site, r.width) for r in records} == {("pre", 48), ("post", 48)}
    pooled = [r for r in records if r.bucket == "pooled" and r.site == "post"]
    assert all(r.hard_rank_ci_low < r.hard_rank < r.hard_rank_ci_high for r in pooled)
    assert {r.conventions["counts"] for r in records} == {str(counts)}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if row and row[0] in ("post", "pre")] == ["pooled", "head", "mid", "tail"] * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_of_text_stop_when_there_is_enough(hugging_face, tmp_path, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = tiny_text(seed=5).splitlines()
    path = tmp_path / f"text{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    else:
        pq.write_table(pa.table({"body": lines}), path)
    measured = measure_checkpoint(
        hugging_face, Corpus((path,), "body"), tmp_path / "out", num_tokens=100, seq_length=LENGTH
    )
    assert {r.num_tokens for r in measured.spectral if r.bucket == "pooled"} == {96}


def test_litgpts_own_folder_of_a_step_says_its_step(trained, text, tmp_path):
    folder = tmp_path / "step-00000008"
    shutil.copytree(trained / "final", folder)
    assert load_checkpoint(folder).step == 8
    assert load_checkpoint(folder / "lit_model.pth").kind == "litgpt"


def final(trained: Path, folder: Path, change: Callable[[Path, Path], object]) -> list[str]:
    """A run's final folder, its weights or its configuration changed."""
    shutil.copytree(trained / "final", folder / "final")
    change(folder / "final" / "lit_model.pth", folder / "final" / "model_config.yaml")
    return [str(folder / "final")]


def checkpoint(trained: Path, folder: Path, keep: int | None) -> list[str]:
    """The first bytes of a Lightning checkpoint, without its run around it."""
    (folder / "a.ckpt").write_bytes(checkpoint_path(trained, 12).read_bytes()[:keep])
    return [str(folder / "a.ckpt")]


def foreign_checkpoint(folder: Path) -> list[str]:
    """A Lightning checkpoint of another program."""
    torch.save({"state_dict": {}, "epoch": 1}, folder / "a.ckpt")
    return [str(folder / "a.ckpt")]


def big_tokenizer(folder: Path) -> list[str]:
    """A tokenizer with more ids than the model."""
    from lightning_spectral.data.tokens import prepare_tokens

    (folder / "big.txt").write_text(tiny_text(20_000, seed=9))
    made = prepare_tokens(Corpus((folder / "big.txt",)), vocab_size=500, cache_dir=folder / "cache").folder
    return ["--tokenizer_dir", str(made)]


def counts_file(folder: Path, name: str) -> list[str]:
    """Counts of too few ids, and the name of a file."""
    np.save(folder / "counts.npy", np.ones(280, dtype=np.int64))
    return ["--counts", str(folder / name)]


def copied(hugging_face: Path, folder: Path, change: Callable[[Path], object]) -> list[str]:
    """A Hugging Face folder, changed."""
    shutil.copytree(hugging_face, folder / "hf")
    change(folder / "hf")
    return [str(folder / "hf")]


def cut(file: Path, keep: int) -> None:
    """Keep the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:keep])


def without_a_layer(folder: Path) -> None:
    """Leave one matrix out."""
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(weights).items() if "layers.1.mlp.down" not in key}
    save_file(kept, weights, metadata={"format": "pt"})


# what is broken -> arguments of one bad call, from (trained run, Hugging Face folder, empty folder)
BROKEN: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "nothing": lambda trained, hf, folder: [str(folder / "none")],
    "empty folder": lambda trained, hf, folder: [str(folder)],
    "torn pth": lambda trained, hf, folder: final(trained, folder, lambda weights, _: cut(weights, 1000)),
    "no config": lambda trained, hf, folder: final(trained, folder, lambda _, config: config.unlink()),
    "other config": lambda trained, hf, folder: final(
        trained, folder, lambda _, config: config.write_text(config.read_text().replace("n_layer: 2", "n_layer: 3"))
    ),
    "odd config": lambda trained, hf, folder: final(
        trained, folder, lambda _, config: config.write_text(config.read_text() + "\nno_such_key: 1\n")
    ),
    "torn ckpt": lambda trained, hf, folder: checkpoint(trained, folder, 5000),
    "foreign ckpt": lambda trained, hf, folder: foreign_checkpoint(folder),
    "ckpt without tokenizer": lambda trained, hf, folder: checkpoint(trained, folder, None),
    "small vocabulary": lambda trained, hf, folder: [str(hf), *big_tokenizer(folder)],
    "no counts": lambda trained, hf, folder: [str(hf), *counts_file(folder, "none.npy")],
    "other counts": lambda trained, hf, folder: [str(hf), *counts_file(folder, "counts.npy")],
    "hf torn": lambda trained, hf, folder: copied(hf, folder, lambda own: cut(own / "model.safetensors", 3000)),
    "hf without weights": lambda trained, hf, folder: copied(
        hf, folder, lambda own: (own / "model.safetensors").unlink()
    ),
    "hf lacks a layer": lambda trained, hf, folder: copied(hf, folder, without_a_layer),
    "hf tokenizer": lambda trained, hf, folder: copied(
        hf, folder, lambda own: (own / "tokenizer.json").write_text("{")
    ),
    "device": lambda trained, hf, folder: [str(hf), "--device", "cuda"],
    "a file as folder": lambda trained, hf, folder: [str(hf), "--out", str(hf / "config.json")],
    "long": lambda trained, hf, folder: [str(hf), "--seq_length", "64"],
}


@pytest.mark.filterwarnings("ignore")  # transformers has its own to say about broken folders
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no checkpoint at"),
        ("empty folder", "is no checkpoint that can be read: expected a litgpt folder"),
        ("torn pth", "lit_model.pth` "),
        ("no config", "no `model_config.yaml`"),
        ("other config", "does not fit the model: Error(s) in loading state_dict for GPT: Missing key(s)"),
        ("odd config", "model_config.yaml` is not litgpt's: "),
        ("torn ckpt", "a.ckpt` cannot be read, it is incomplete or corrupted"),
        ("foreign ckpt", "has no 'hyper_parameters'"),
        ("ckpt without tokenizer", "no `tokenizer.json` or `tokenizer.model` in"),
        ("small vocabulary", "embeds 300: use the tokenizer that it was trained with"),
        ("no counts", "or leave it out: then of this text"),
        ("a file as folder", "(it is a file); give another folder as `--out`"),
        ("other counts", "embeds 300 token ids but the token counts have 280"),
        ("hf torn", "cannot be read ("),
        ("hf without weights", "holds no `*.safetensors`"),
        ("hf lacks a layer", "lacks 1 weights of its model, the first is `model.layers.1.mlp.down_proj.weight`"),
        ("hf tokenizer", "the tokenizer in"),
        ("device", "this machine has no CUDA device"),
        ("long", "takes 32 tokens: lower it"),
    ],
)
def test_bad_input_is_one_sentence(name, message, trained, hugging_face, text, tmp_path, capsys):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "broken").mkdir()
    arguments = BROKEN[name](trained, hugging_face, tmp_path / "broken")
    assert cli.main(["measure", *words(text, tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lightning-spectral measure: ")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_or_too_short(hugging_face, tmp_path, capsys):
    assert cli.main(["measure", str(hugging_face), "--data", str(tmp_path / "none.txt")]) == 2
    assert "no text at" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("abc")
    assert (
        cli.main(["measure", str(hugging_face), "--data", str(tmp_path / "short.txt"), "--out", str(tmp_path / "o")])
        == 2
    )
    assert "one sequence needs 33: give more, or lower `--seq_length`" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_a_solver_that_fails_is_one_sentence_and_the_next_try_goes_on(
    error, trained, text, tmp_path, capsys, monkeypatch
):
    def failing(*_, **__):
        raise error

    given = ["measure", str(trained / "final"), *words(text, tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigvalsh", failing)
        assert cli.main(given) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "solve_failed" in said
    assert str(error) in said
    assert cli.main(given) == 0
    assert all(record.soft_rank for record in read_spectral(tmp_path / "out").records)
