"""The verbs ``pretrain`` and ``count-tokens`` through the front door."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from litgpt.pretrain import setup as litgpt_setup

from lightning_spectral import cli
from lightning_spectral.cli.pretrain import summary
from lightning_spectral.records import SpectralRecord, append_records
from lightning_spectral.text.tables import render
from lightning_spectral.training.help_keys import keys_with
from lightning_spectral.training.schema import our_keys
from tests.tiny import LIGHTNING_WARNINGS, tiny_tree, write_recipe, write_text

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

PROBES = "[{class_path: SpectralRankCallback, init_args: {every_n_steps: 6}}, {class_path: TailTokenProbe}]"


def test_a_run_ends_in_the_table_and_the_way_to_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    words = ["--callbacks", PROBES, "--callbacks.TailTokenProbe.init_args.every_n_steps", "6"]
    assert cli.main(["pretrain", "--config", str(recipe), *words, "--logger_name", "tensorboard"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in ("pooled", "head", "mid", "tail")}
    assert list(rows) == ["pooled", "head", "mid", "tail"]
    for soft, hard, tokens_per_dim, loss, status in rows.values():
        assert 1 <= float(hard) <= float(soft) <= 64
        assert float(tokens_per_dim) <= 1.0  # 64 rows, D = 64
        assert 0 < float(loss) < 10
        assert status == "few_tokens"
    assert "validation   loss" in printed
    assert "token frequencies alone" in printed
    assert f"tensorboard --logdir {tmp_path / 'run'}  (tab SPECTRAL)" in printed
    assert list((tmp_path / "run" / "logs" / "tensorboard" / "version_0").glob("events.*"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_any_text_by_path(tmp_path: Path, suffix: str) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    text = write_text(tmp_path).read_text()
    path = tmp_path / f"mine{suffix}"
    if suffix == ".txt":
        path.write_text(text)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.splitlines()))
    else:
        pq.write_table(pa.table({"text": text.splitlines()}), path)
    words = ["--data", str(path), "--data.init_args.cache_dir", str(tmp_path / "cache"), "--train.max_steps", "2"]
    words += ["--data.init_args.vocab_size", "300"]
    assert cli.main(["pretrain", "--config", str(write_recipe(tmp_path)), *words]) == 0


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    for words in (
        ["--config", "nowhere.yaml"],
        ["--config", recipe, "--train.max_step", "3"],
        ["--config", recipe, "--data", "nowhere.txt"],
        ["--config", recipe, "50"],
        ["--config", recipe, "--callbacks", "[{class_path: TailTokenProbe, init_args: {every_n_steps: 0}}]"],
        ["--config"],
        ["--train.max_steps", "3"],
    ):
        assert cli.main(["pretrain", *words]) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("lightning-spectral pretrain: "), words
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_the_records_of_the_one_before(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    assert cli.main(["pretrain", "--config", recipe, "--callbacks", PROBES, "--train.max_steps", "3"]) == 0
    before = (tmp_path / "run" / "spectral.jsonl").read_bytes()
    assert cli.main(["pretrain", "--config", recipe, "--model_config.padded_vocab_size", "100"]) == 2
    kept = [*(tmp_path / "run").rglob("spectral.jsonl")]
    assert [path.read_bytes() for path in kept] == [before]


def test_the_recipe_can_be_shown_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--config", str(write_recipe(tmp_path)), "--print_recipe", "--seed", "9"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["pretrain", "--config", str(tmp_path / "shown.yaml"), "--print_recipe"]) == 0
    assert "seed: 9" in capsys.readouterr().out


def test_help_is_quick_and_lists_the_recipes() -> None:
    started = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "lightning_spectral", "pretrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 5  # 0.2 s on a quiet machine; importing lightning takes about 8 s
    assert "quickstart" in done.stdout
    assert "torch" not in done.stderr
    assert "lightning.pytorch" not in done.stderr


def test_every_key_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help_keys"]) == 0
    printed = capsys.readouterr().out
    for key in ("--train.max_steps", "--architecture.activation", "--lr_schedule.kind", "--callbacks", "--strategy"):
        assert key in printed


def test_the_help_of_keys_is_what_the_schema_has_and_can_be_asked_for_by_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = {key.name: key for key in keys_with()}
    known = {name: parameter for function in (litgpt_setup, our_keys) for name, parameter in _parameters(function)}
    assert {name for name in every if "." not in name} == set(known)
    assert every["train.max_steps"].kind == "int or null"
    assert every["train.global_batch_size"].default == str(known["train"].default.global_batch_size)
    assert every["seed"].default == str(known["seed"].default)
    assert "steps" in every["train.max_steps"].meaning
    assert cli.main(["pretrain", "--config", "debug", "--help_keys", "max_steps"]) == 0
    assert re.findall(r"^--(\S+)", capsys.readouterr().out, re.M) == ["train.max_steps"]


def _parameters(function: object) -> list[tuple[str, inspect.Parameter]]:
    return list(inspect.signature(function).parameters.items())  # type: ignore[arg-type]


def test_the_table_takes_medians_over_layers_of_the_last_window(tmp_path: Path) -> None:
    def record(step: int, layer: int, soft: float) -> SpectralRecord:
        return SpectralRecord(
            "id", "train", step, 0, layer, "m", "post", "tail", 100, 10, 10.0, "ok", soft, soft / 2, None, None, None,
            None, None,
        )  # fmt: skip

    layers = [record(5, 0, 1.0), record(5, 1, 3.0), record(5, 2, 8.0)]
    append_records(tmp_path / "spectral.jsonl", [record(0, 0, 9.0), *layers])
    lines = render(summary(tmp_path)).splitlines()
    assert "step 5, FFN width D = 10" in lines[0]
    assert lines[2].split() == ["tail", "3.00", "1.50", "10.0", "-", "ok"]


def test_the_table_has_every_bucket_of_the_records(tmp_path: Path) -> None:
    made = [
        SpectralRecord(
            "id", "train", 0, 0, 0, "m", "post", bucket, 100, 10, 10.0, "ok", 2.0, 1.0, None, None, None, None, None
        )
        for bucket in ("position_0", "position_1", "pooled")
    ]
    append_records(tmp_path / "spectral.jsonl", made)
    table = summary(tmp_path)
    assert table is not None
    assert [row[0] for row in table.rows] == ["pooled", "position_0", "position_1"]


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ([("validation", 5, "post")], "last window of validation: step 5, FFN width D = 10, after"),
        ([("train", 4, "post"), ("validation", 5, "post")], "last window: step 4, FFN width D = 10, after"),
        ([("train", 4, "pre"), ("train", 4, "post")], "last window: step 4, FFN width D = 10, after"),
        ([("train", 4, "pre")], "last window: step 4, FFN width D = 10, before"),
        ([("mine", 4, "post")], "last window of mine: step 4, FFN width D = 10, after"),
    ],
)
def test_the_table_is_of_what_was_measured(tmp_path: Path, measured: list[tuple[str, int, str]], shown: str) -> None:
    made = [
        SpectralRecord(
            "id", stage, step, 0, 0, "m", site, "tail", 100, 10, 10.0, "ok", 2.0, 1.0, None, None, None, None, None
        )
        for stage, step, site in measured
    ]
    append_records(tmp_path / "spectral.jsonl", made)
    table = summary(tmp_path)
    assert table is not None
    assert table.title.startswith(shown)
    assert len(table.rows) == 1


def test_without_records_the_table_says_so(tmp_path: Path) -> None:
    assert summary(tmp_path) is None


def test_count_tokens_counts_what_pretrain_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    words = ["--data", str(text), "--vocab_size", "300", "--cache_dir", str(tmp_path / "cache")]
    assert cli.main(["count-tokens", *words, "--out", str(tmp_path / "deep" / "counts.npy")]) == 0
    counts = np.load(tmp_path / "deep" / "counts.npy")
    assert counts.dtype == np.int64
    assert counts.shape == (300,)
    assert f"300 ids, {(counts > 0).sum()} seen, {counts.sum():,} tokens" in capsys.readouterr().out
    from lightning_spectral.data.modules import TextFiles

    data = TextFiles(str(text), vocab_size=300, cache_dir=tmp_path / "cache")
    assert np.array_equal(data.token_counts, counts)


def test_count_tokens_names_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count-tokens", "--data", "nowhere.txt", "--out", str(tmp_path / "c.npy")]) == 2
    assert "no text at `nowhere.txt`" in capsys.readouterr().err
    assert cli.main(["count-tokens", "--data", str(write_text(tmp_path)), "--out", "c.txt"]) == 2
    assert "`--out` must end in .npy, got `c.txt`" in capsys.readouterr().err


def test_the_probe_reads_the_counted_file(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    init_args = tree["data"]["init_args"]
    words = ["--data", init_args["path"], "--vocab_size", "300", "--cache_dir", init_args["cache_dir"]]
    assert cli.main(["count-tokens", *words, "--out", str(tmp_path / "counts.npy")]) == 0
    probe = {"every_n_steps": 6, "counts": str(tmp_path / "counts.npy")}
    tree["callbacks"] = [{"class_path": "TailTokenProbe", "init_args": probe}]
    assert cli.main(["pretrain", "--config", str(write_recipe(tmp_path, tree))]) == 0
    assert (tmp_path / "run" / "losses.jsonl").is_file()


@pytest.mark.parametrize("recipe", ["debug", "quickstart", "optimizers/muon", "paper/160m"])
def test_print_config_is_print_recipe_without_the_arguments_of_classes(recipe, capsys):
    """The one reads sources, the other imports litgpt and checks every value."""
    assert cli.main(["pretrain", "--config", recipe, "--print_config", "--train.max_norm", "2.0"]) == 0
    quick = yaml.safe_load(capsys.readouterr().out)
    assert cli.main(["pretrain", "--config", recipe, "--print_recipe", "--train.max_norm", "2.0"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    classes = ("data", "callbacks", "optimizer")
    assert {k: v for k, v in quick.items() if k not in classes} == {k: v for k, v in whole.items() if k not in classes}
    assert [one["class_path"] for one in quick["callbacks"]] == [one["class_path"] for one in whole["callbacks"]]
    assert quick["train"]["max_norm"] == 2.0


def test_a_library_s_warning_is_one_line_without_its_file(tmp_path) -> None:
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-m", "lightning_spectral", "pretrain", "--config", str(recipe)]
    command += ["--train.lr_warmup_steps", "50", "--train.global_batch_size", "6"]  # the second is refused, late
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    (warning,) = [line for line in said if "lr_warmup_steps" in line]
    assert warning.startswith("WARNING `--train.lr_warmup_steps` should be less")
    assert not [line for line in said if "warnings.warn" in line or ".py:" in line]
