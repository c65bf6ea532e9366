"""Every example runs, does what it says, and is short."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_spectral.records import read_losses, read_run, read_spectral
from tests.tiny import write_text

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))

pytestmark = pytest.mark.filterwarnings("ignore")  # an example's user sees Lightning's advice; a test need not


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write to ``out/`` where they run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text()[:4000])


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def the_run(folder: Path) -> Path:
    """The one run folder below."""
    (file,) = folder.rglob("spectral.jsonl")
    return file.parent


def test_all_are_short_ascii_and_tested() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.is_file():
            text = path.read_text()
            assert len(text.splitlines()) < 80, path.name
            assert text.isascii(), path.name
            assert path.name in tests or path.suffix == ".yaml", path.name
            assert path.name in (ROOT / "docs" / "examples.md").read_text() or path.suffix == ".yaml", path.name


@pytest.mark.parametrize(
    ("name", "folder", "steps"),
    [
        ("lightning_module.py", "lightning_module", [0, 10, 20, 29]),
        ("fabric_loop.py", "fabric_loop", [0, 10, 19]),
        ("torchtitan_model.py", "torchtitan", [0, 10, 19]),
        ("pytorch_loop.py", "pytorch_loop", [0, 10, 19]),
        ("huggingface_trainer.py", "huggingface", [0, 10, 19]),
    ],
)
def test_loops_of_all_kinds(name, folder, steps, tmp_path, monkeypatch) -> None:
    run(name, monkeypatch)
    found = the_run(tmp_path / "out" / "examples" / folder)
    records = read_spectral(found).records
    assert sorted({record.step for record in records}) == steps
    assert {record.layer for record in records} == {0, 1}
    assert {record.bucket for record in records} == {"pooled", "head", "mid", "tail"}
    assert {r.num_tokens for r in records if r.bucket == "pooled" and r.step == 0} == {16 * 64}
    assert {r.status for r in records if r.bucket == "pooled" and r.step == 0} == {"ok"}
    assert {record.bucket for record in read_losses(found).records} == {"pooled", "head", "mid", "tail"}


def test_two_rules_over_four_widths(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        run("my_widths.py", monkeypatch)
    assert not end.value.code
    runs = [read_run(file.parent) for file in (tmp_path / "out" / "examples" / "my_widths").rglob("run.json")]
    assert sorted(run.labels["optimizer"] for run in runs) == ["adamw"] * 4 + ["muon"] * 4
    said = capsys.readouterr().out
    assert said.count("64-192") == 16  # an exponent with its interval for each rule, bucket and metric
    assert "slope_difference  post tail hard_rank    adamw - muon" in said
    (row,) = [line.split() for line in said.splitlines() if line.startswith("post tail hard_rank") and "+-" in line]
    assert row[3:5] == ["adamw", "muon"]
    assert (row[7], row[9]) == ("1", "4")  # seeds and widths that there are


def test_pipeline_stages_of_one_rank_each(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "examples/pipeline_stages.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = read_spectral(tmp_path / "out" / "examples" / "pipeline_stages").records
    found = {(r.step, r.layer, r.bucket) for r in records}
    assert found == {(s, k, b) for s in (0, 10, 19) for k in range(4) for b in ("pooled", "head", "mid", "tail")}
    assert {(r.num_tokens, r.status) for r in records if r.bucket == "pooled"} == {(16 * 64, "ok")}


def test_accelerate(tmp_path, monkeypatch) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # another Trainer of this process has left its own
    GradientState._reset_state()
    run("accelerate_loop.py", monkeypatch)
    records = read_spectral(tmp_path / "out" / "examples" / "accelerate").records
    assert sorted({record.step for record in records}) == [0, 5, 9]
    assert {r.num_tokens for r in records if r.step == 0} == {2 * 8 * 64}  # both micro-batches of the step


def test_lightning_cli(tmp_path, monkeypatch) -> None:
    run("lightning_cli.py", monkeypatch, "fit", "--config", str(EXAMPLES / "lightning_cli.yaml"))
    found = the_run(tmp_path / "out" / "examples" / "lightning_cli")
    assert read_run(found).optimizer == "Muon"
    assert {record.step for record in read_spectral(found).records} == {0, 10, 19}


def test_wandb(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("wandb_offline.py", monkeypatch)
    assert read_spectral(tmp_path / "out" / "examples" / "wandb" / "records").records
    (log,) = (tmp_path / "out" / "examples" / "wandb").rglob("*.wandb")
    assert b"spectral_pictures/rank_by_bucket" in log.read_bytes()


def test_public_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    """On checkpoints of a model of that family made here: a test has no network."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    text = write_text(tmp_path)
    encoder = ByteLevelBPETokenizer()
    encoder.train([str(text)], vocab_size=300, show_progress=False)
    size = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, max_position_embeddings=64, **size))
    for step in (1000, 2000):
        model.save_pretrained(tmp_path / f"step-{step}")
        PreTrainedTokenizerFast(tokenizer_object=encoder._tokenizer).save_pretrained(tmp_path / f"step-{step}")
    run("public_checkpoint.py", monkeypatch, str(text), "step-1000", "step-2000")
    lines = [line for line in capsys.readouterr().out.splitlines() if "hard rank" in line and line.startswith("step-")]
    assert [line.split(":")[0] for line in lines] == ["step-1000", "step-2000"]
    assert all("D = 64, hard rank" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # builds the tokenizer of a text, then trains six runs
def test_my_optimizer_in_a_sweep(tmp_path) -> None:
    """As a user starts it: the sweep's workers are processes of their own."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/my_optimizer.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [read_run(file.parent) for file in (tmp_path / "out" / "examples" / "my_optimizer").rglob("run.json")]
    assert sorted(run.labels["optimizer"] for run in runs) == ["AdamW"] * 3 + ["SignDescent"] * 3


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_litgpt_pretrain_script(tmp_path) -> None:
    """litgpt_pretrain.sh; what it records is tested with the entry point (tests/callbacks/test_factory)."""
    import yaml

    recipe = {
        "model_name": "tiny",
        "model_config": {
            "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 40, "padded_vocab_size": 40,
        },
        "out_dir": str(tmp_path / "out"),
        "precision": "32-true",
        "data": {"class_path": "tests.training.foreign_data.RandomTokens", "init_args": {"num_sequences": 8}},
        "train": {
            "global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 64, "max_seq_length": 8, "lr_warmup_steps": 1,
        },
        "eval": {"interval": 100, "max_iters": 1, "final_validation": False},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "devices": 1,
        "logger_name": "csv",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # compiled, it is tested in tests/callbacks/test_factory: minutes
    environment["LIGHTNING_SPECTRAL"] = str(ROOT / "recipes" / "probe.yaml")
    command = ["bash", str(EXAMPLES / "litgpt_pretrain.sh"), "--config", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_spectral(the_run(tmp_path / "out")).records


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_series_of_checkpoints_that_it_trains_itself(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    text = str(write_text(Path.cwd()))
    run("checkpoint_series.py", monkeypatch, text)
    printed = capsys.readouterr().out
    for width in (64, 128, 256):
        records = read_spectral(Path("out/checkpoint_series/measured") / f"width_{width}").records
        assert {(r.step, r.width, r.stage) for r in records} == {(8, width, "measure"), (16, width, "measure")}
    assert "beta" in printed
