"""``LIGHTNING_SPECTRAL=probe.yaml`` measures scripts that know nothing of us, through the installed entry points."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.callbacks import factory
from lightning_spectral.callbacks.fabric import FabricSpectralProbe
from lightning_spectral.callbacks.injected import Injected, StoodDown, injected
from lightning_spectral.callbacks.probe_file import load_callbacks
from lightning_spectral.records import read_losses, read_run, read_weights
from tests.callbacks import tiny
from tests.callbacks.test_fabric import ROWS, model, train

ROOT = Path(__file__).parents[2]
GROUPS = ("lightning.fabric", "lightning.pytorch", "pytorch_lightning")

installed = pytest.mark.skipif(
    not entry_points(group="lightning.pytorch.callbacks_factory", name="lightning-spectral"),
    reason="entry points need the package to be installed: pip install -e .",
)


def probe_file(folder: Path, *callbacks: object) -> str:
    path = folder / "probe.yaml"
    path.write_text(yaml.safe_dump({"callbacks": list(callbacks)}))
    return str(path)


def rank(folder: Path, every: int = 1, **init_args) -> dict:
    init_args = {"every_n_steps": every, "dirpath": str(folder / "records"), **init_args}
    return {"class_path": "SpectralRankCallback", "init_args": init_args}


def tail(folder: Path, every: int = 1, **init_args) -> dict:
    init_args = {
        "every_n_steps": every,
        "counts": tiny.counts().tolist(),
        "dirpath": str(folder / "records"),
        **init_args,
    }
    return {"class_path": "lightning_spectral.callbacks.TailTokenProbe", "init_args": init_args}


@installed
@pytest.mark.parametrize("group", GROUPS)
def test_the_entry_points_are_declared(group):
    (found,) = entry_points(group=f"{group}.callbacks_factory", name="lightning-spectral")
    assert found.load()() == []


def test_without_the_variable_nothing_is_imported():
    code = (
        "import sys, lightning_spectral.callbacks.factory as f\n"
        "assert f.trainer_callbacks() == f.fabric_callbacks() == f.pytorch_lightning_callbacks() == []\n"
        "print(sorted({'torch', 'lightning', 'yaml', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(factory.VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@installed
def test_a_trainer_is_measured_without_an_edit(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path), "WeightSpectrumCallback"))
    tiny.trainer(tmp_path / "run", []).fit(tiny.Module(), tiny.loader())
    records = read_spectral(tmp_path / "records").records
    assert [(r.step, r.num_tokens) for r in records if r.layer == 0] == [(step, ROWS) for step in range(4)]
    assert read_weights(tmp_path / "run").records


def test_on_is_a_word_in_a_probe_file(tmp_path, monkeypatch):
    (tmp_path / "probe.yaml").write_text(
        "callbacks: [{class_path: SpectralRankCallback, init_args: {on: [train, validation], every_n_steps: 1e1}}]"
    )
    monkeypatch.setenv(factory.VARIABLE, str(tmp_path / "probe.yaml"))
    (callback,) = factory.trainer_callbacks()
    assert list(callback.measurement.settings.on) == ["train", "validation"]
    assert callback.measurement.settings.every_n_steps == 10


@installed
def test_it_stands_down_beside_the_scripts_own(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path), tail(tmp_path, 1)))
    own = [
        SpectralRankCallback(2, dirpath=str(tmp_path / "own")),
        TailTokenProbe(3, counts=tiny.counts(), dirpath=str(tmp_path / "own")),
    ]
    trainer = tiny.trainer(tmp_path / "run", own)
    assert len({callback.state_key for callback in trainer.callbacks}) == len(trainer.callbacks)
    trainer.fit(tiny.Module(), tiny.loader())
    assert not (tmp_path / "records").exists()
    assert [type(c) for c in trainer.callbacks if type(c) is StoodDown] == [StoodDown, StoodDown]
    assert {r.bucket for r in read_spectral(tmp_path / "own").records} == {"pooled", "head", "mid", "tail"}


@installed
def test_only_the_class_that_the_script_has_stands_down(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, tail(tmp_path, 1)))
    own = SpectralRankCallback(2, dirpath=str(tmp_path / "records"))
    tiny.trainer(tmp_path / "run", [own]).fit(tiny.Module(), tiny.loader())
    records = read_spectral(tmp_path / "records").records
    assert len({r.run_id for r in records}) == 1
    assert [r.step for r in records if r.bucket == "tail" and r.layer == 0] == [0, 1, 2, 3]
    # the probe reports its merge too; where both measure, the folder keeps one record
    assert [r.step for r in records if r.bucket == "pooled" and r.layer == 0] == [0, 1, 2, 3]


@installed
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_and_validate_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path, 2, on=["train", "validation"])))
    first = tiny.trainer(tmp_path / "run", [], max_steps=3)
    first.fit(tiny.Module(), tiny.loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    tiny.trainer(tmp_path / "run", [], max_steps=6).fit(tiny.Module(), tiny.loader(), ckpt_path=tmp_path / "a.ckpt")
    records = read_spectral(tmp_path / "records").records
    assert [(r.step, r.tokens_seen) for r in records if r.layer == 0] == [(s, s * ROWS) for s in (0, 2, 4, 5)]
    with pytest.warns(UserWarning, match="records go to .*that folder is of the run"):
        tiny.trainer(tmp_path / "run", []).validate(tiny.Module(), tiny.loader(16), verbose=False)
    assert {r.stage for r in read_spectral(tmp_path / "records").records} == {"train"}
    (other,) = (tmp_path / "records" / "runs").iterdir()
    assert {(r.stage, r.step) for r in read_spectral(other).records} == {("validation", None)}


@installed
def test_pytorch_lightning_imports_work(tmp_path, monkeypatch):
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.gpt = model()

        def training_step(self, batch, batch_idx):
            return self.gpt(batch[:, :-1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path)))
    trainer = pytorch_lightning.Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), tiny.loader())
    records = read_spectral(tmp_path / "records").records
    assert [(r.step, r.num_tokens) for r in records if r.layer == 1] == [(0, ROWS), (1, ROWS)]


def test_an_old_pytorch_lightning_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path)))
    monkeypatch.setattr(factory, "version", lambda name: "2.5.5")
    with pytest.warns(UserWarning, match=r"pytorch_lightning 2\.5\.5 cannot run callbacks of `lightning`: upgrade"):
        assert factory.pytorch_lightning_callbacks() == []


@installed
def test_a_fabric_loop_is_measured_without_an_edit(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path), tail(tmp_path)))
    fabric = Fabric(accelerator="cpu", devices=1)
    (probe,) = (callback for callback in fabric._callbacks if isinstance(callback, FabricSpectralProbe))
    assert isinstance(probe.callback, TailTokenProbe)  # its merge of buckets is the pooled number
    module = model()
    wrapped, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    train(fabric, wrapped, optimizer, steps=2, accumulate=2, validate=True)
    records = read_spectral(tmp_path / "records").records
    assert [(r.step, r.num_tokens) for r in records if r.layer == 0 and r.bucket == "pooled"] == [(0, ROWS), (1, ROWS)]
    assert len(records) == 2 * 2 * 4
    assert len(read_losses(tmp_path / "records").records) == 2 * 4


def test_two_schedules_share_a_folder_in_fabric(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, rank(tmp_path, 1), tail(tmp_path, 2)))
    probes = factory.fabric_callbacks()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._callbacks = probes
    module = model()
    wrapped, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    train(fabric, wrapped, optimizer, steps=3)
    records = read_spectral(tmp_path / "records").records
    assert [r.step for r in records if r.bucket == "pooled" and r.layer == 0] == [0, 1, 2]
    assert [r.step for r in records if r.bucket == "tail" and r.layer == 0] == [0, 2]
    assert len({r.run_id for r in records}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read that file .*give the path of a YAML file"),
        ("callbacks: [", "not YAML: while parsing"),
        ("[1]", "must hold one key `callbacks` .* got list"),
        ("{callbacks: [], more: 1}", r"got the keys \['callbacks', 'more'\]"),
        ("callbacks: [{init_args: {}}]", r"callbacks\[0\]: must be a class name or have `class_path`"),
        ("callbacks: [{class_path: TailTokenProbe, init_args: 3}]", r"callbacks\[0\]: must be a class name or have"),
        ("callbacks: [{class_path: TailProbe}]", r"callbacks\[0\]: no class `TailProbe` .* or one of .*TailTokenProbe"),
        ("callbacks: [{class_path: no.such.Thing}]", "no class `no.such.Thing` \\(No module named 'no'\\)"),
        ("callbacks: [{class_path: torch.nn.Linear}]", "`torch.nn.Linear` is no Lightning callback"),
        (
            "callbacks: [{class_path: TailTokenProbe, init_args: {count: 1}}]",
            "does not know `count`; did you mean `counts`",
        ),
        (
            "callbacks: [{class_path: SpectralRankCallback, init_args: {token_fraction: 2e+0}}]",
            r"must be in \(0, 1\], got 2\.",
        ),
        ("callbacks: [{class_path: TailTokenProbe, init_args: {counts: none.npy}}]", "no file `none.npy`"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, monkeypatch, content, message):
    path = tmp_path / "probe.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(factory.VARIABLE, str(path))
    with pytest.raises(MisconfigurationException, match=message) as caught:
        load_callbacks(str(path))
    assert str(caught.value).startswith(f"{factory.VARIABLE}={path}")
    assert "\n" not in str(caught.value)
    for make in (factory.trainer_callbacks, factory.fabric_callbacks):
        with pytest.warns(UserWarning, match=message):  # a script that never asked for us runs on
            assert make() == []


def test_what_needs_a_trainer_is_left_out_in_fabric(tmp_path, monkeypatch):
    monkeypatch.setenv(factory.VARIABLE, probe_file(tmp_path, "WeightSpectrumCallback"))
    with pytest.warns(UserWarning, match="WeightSpectrumCallback needs a Trainer; it is left out"):
        assert factory.fabric_callbacks() == []


def test_injected_callbacks_survive_a_spawn(tmp_path):
    callback = injected(SpectralRankCallback(3, dirpath=str(tmp_path)))
    copy = pickle.loads(pickle.dumps(callback))
    assert isinstance(copy, Injected)
    assert isinstance(copy, SpectralRankCallback)
    assert copy.measurement == callback.measurement
    assert copy.state_key == callback.state_key != SpectralRankCallback(3).state_key


def test_the_shipped_file_loads():
    (callback,) = load_callbacks(ROOT / "recipes" / "probe.yaml")
    assert isinstance(callback, SpectralRankCallback)
    assert callback.measurement.options.sites == ("pre", "post")


@installed
@pytest.mark.slow
@pytest.mark.timeout(420)  # litgpt always compiles: inductor takes minutes on one busy core
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.nightly)])
def test_litgpt_pretrain_itself_compiled_and_unmodified(tmp_path, precision):
    config = {
        "model_name": "tiny",
        "model_config": {
            "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 40, "padded_vocab_size": 40,
        },
        "out_dir": str(tmp_path / "out"),
        "precision": precision,
        "data": {"class_path": "tests.training.foreign_data.RandomTokens", "init_args": {"num_sequences": 24}},
        "train": {
            "global_batch_size": 4, "micro_batch_size": 2, "max_tokens": 5 * 4 * 8, "max_seq_length": 8,
            "lr_warmup_steps": 1, "save_interval": 2, "log_interval": 1,
        },
        "eval": {"interval": 2, "max_iters": 2, "initial_validation": True},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "devices": 1,
        "logger_name": "csv",
    }  # fmt: skip
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config))
    counts = torch.arange(40, 0, -1).tolist()
    probe = probe_file(tmp_path, {"class_path": "TailTokenProbe", "init_args": {"every_n_steps": 2, "counts": counts}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), factory.VARIABLE: probe, "CUDA_VISIBLE_DEVICES": ""}
    litgpt = Path(sys.executable).with_name("litgpt")
    done = subprocess.run(
        [str(litgpt), "pretrain", "--config", str(tmp_path / "pretrain.yaml")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "out" / "logs" / "csv" / "version_0"
    records = read_spectral(folder).records
    pooled = [r for r in records if r.bucket == "pooled" and r.layer == 0]
    # 4 sequences of 8 tokens a step; validation before, between and after is not in them
    assert [(r.step, r.num_tokens, r.num_sequences, r.tokens_seen) for r in pooled] == [
        (0, 32, 4, 0), (2, 32, 4, 64), (4, 32, 4, 128),
    ]  # fmt: skip
    assert len(records) == 3 * 2 * 4
    for step in (0, 2, 4):
        assert sum(r.num_tokens for r in records if r.step == step and r.layer == 1 and r.bucket != "pooled") == 32
    assert {r.dtype for r in records} == {"bfloat16" if precision == "bf16-mixed" else "float32"}
    assert read_run(folder).hparams["model_config"]["n_embd"] == 16
    assert "spectral/hard_rank.tail" in (folder / "metrics.csv").read_text()
