"""Inside Lightning's Trainer every strategy equals one process; resume, manual optimization, LightningCLI, litgpt."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.strategies.fsdp
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from litgpt.model import Block
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)

from lightning_spectral.optim import Muon
from tests.distributed.harness import run_ranks
from tests.distributed.optim_runs import KINDS, Weights, distance, fresh_model

warnings.filterwarnings("ignore", category=FutureWarning)
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on loaders, workers and loggers
]


def loss_of(model: nn.Module, batch_idx: int) -> torch.Tensor:
    """The same batch on every rank, so that only the optimizer can differ."""
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(batch_idx))
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class LM(pl.LightningModule):
    def __init__(self, kind: str = "muon") -> None:
        super().__init__()
        self.kind = kind
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = fresh_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.transformer.h:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self.model, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return KINDS[self.kind](self.parameters())


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses FSDP1 on a CPU by exact type, and torch needs the device named."""

    @contextmanager
    def model_sharded_context(self) -> Any:
        yield

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        wrapped = FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        self.model = wrapped
        return wrapped


def make_strategy(name: str) -> Any:
    return {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp1": lambda: FSDPOnCPU(auto_wrap_policy={Block}, state_dict_type="sharded"),
        "fsdp1 full": lambda: FSDPOnCPU(auto_wrap_policy={Block}, state_dict_type="full"),
        "fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1
        ),
    }[name]()


def trainer_for(name: str, devices: int, steps: int, folder: str | None, **more: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=make_strategy(name),
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **more,
    )


def full_weights(lm: LM, name: str) -> Weights:
    if name.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(lm.trainer.strategy.model):
            named = [
                (n.replace("_fsdp_wrapped_module.", ""), p.detach().clone()) for n, p in lm.model.named_parameters()
            ]
        return dict(named)
    return {n: (p.full_tensor() if name == "fsdp2" else p).detach().clone() for n, p in lm.model.named_parameters()}


def fit(rank: int, world_size: int, name: str, kind: str, steps: int, more: dict[str, Any]) -> Weights:
    lm = LM(kind)
    trainer = trainer_for(name, world_size, steps, None, **more)
    trainer.fit(lm, torch.utils.data.DataLoader(range(64)))
    assert trainer.global_step == steps
    return full_weights(lm, name)


def start() -> Weights:
    return {name: p.detach().clone() for name, p in fresh_model().named_parameters()}


@pytest.mark.parametrize("kind", ["normuon"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_trainer_with_two_ranks_equals_one_process(strategy, kind):
    expected = fit(0, 1, "single", kind, 20, {})
    for weights in run_ranks(fit, 2, strategy, kind, 20, {}, init=False):
        assert distance(weights, expected, start()) < 1e-5  # fp32, another order of summation


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "normuon", "dion", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_trainer_with_four_ranks_equals_one_process(strategy, kind):
    expected = fit(0, 1, "single", kind, 20, {})
    for weights in run_ranks(fit, 4, strategy, kind, 20, {}, init=False):
        assert distance(weights, expected, start()) < 1e-5


class Manual(LM):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_equals_automatic():
    lm = Manual()
    trainer_for("single", 1, 3, None).fit(lm, torch.utils.data.DataLoader(range(64)))
    expected = fit(0, 1, "single", "muon", 3, {})
    assert all(torch.equal(value, expected[name]) for name, value in full_weights(lm, "single").items())


def resumed_fit(rank: int, world_size: int, name: str, kind: str, folder: str) -> tuple[Weights, Weights]:
    """Six steps at once, and three, a checkpoint, three more in a new trainer."""
    if name == "fsdp1 full":  # offloading to the CPU on a CPU ends the process, with torch.optim.AdamW too
        lightning.pytorch.strategies.fsdp._get_full_state_dict_context = full_state_without_offload
    loader = torch.utils.data.DataLoader(range(64))
    straight = LM(kind)
    trainer_for(name, world_size, 6, folder).fit(straight, loader)
    first = LM(kind)
    trainer = trainer_for(name, world_size, 3, folder)
    trainer.fit(first, loader)
    path = f"{folder}/three.ckpt"
    trainer.save_checkpoint(path)
    second = LM(kind)
    trainer_for(name, world_size, 6, folder).fit(
        second, loader, ckpt_path=path, weights_only=True
    )  # as `pretrain` does
    return full_weights(straight, name), full_weights(second, name)


def full_state_without_offload(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    kept = {"offload_to_cpu": False, "rank0_only": rank0_only}
    return FullyShardedDataParallel.state_dict_type(
        module, StateDictType.FULL_STATE_DICT, FullStateDictConfig(**kept), FullOptimStateDictConfig(**kept)
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", pytest.param("fsdp1 full", marks=pytest.mark.slow), "fsdp2"])
def test_trainer_resume_is_bit_equal(strategy, tmp_path):
    for straight, resumed in run_ranks(resumed_fit, 2, strategy, "normuon", str(tmp_path), init=False):
        assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_lightning_cli(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    class Toy(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(8, 6))

    flags = ["--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    flags += [
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    wish = ["--optimizer=lightning_spectral.optim.Muon", "--optimizer.lr=0.01", "--optimizer.betas=[0.8, 0.9]"]
    monkeypatch.setattr(sys, "argv", ["test"])
    cli = LightningCLI(Toy, args=["fit", *flags, *wish], save_config_callback=None)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, Muon)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert {group["role"] for group in optimizer.param_groups} == {"matrix", "vector"}


@pytest.mark.slow
def test_litgpt_pretrain(tmp_path):
    """litgpt's own program, unchanged, in a process of its own; its loop writes one `lr` into every group."""
    import subprocess

    (tmp_path / "toy_data.py").write_text(
        "import torch\nfrom litgpt.data import DataModule\n"
        "class Toy(DataModule):\n"
        "    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):\n"
        "        self.batch_size, self.length = batch_size, max_seq_length + 1\n"
        "    def train_dataloader(self):\n"
        "        rows = torch.randint(0, 8, (64, self.length))\n"
        "        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)\n"
        "    val_dataloader = train_dataloader\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name: pythia-14m\n"
        "model_config: {n_layer: 1, n_embd: 16, n_head: 2, vocab_size: 8, padded_vocab_size: 8, block_size: 16}\n"
        f"out_dir: {tmp_path / 'out'}\n"
        "precision: 32-true\n"
        "data: {class_path: toy_data.Toy}\n"
        "train: {max_tokens: 1024, micro_batch_size: 4, global_batch_size: 4, max_seq_length: 16, log_interval: 1,\n"
        "        lr_warmup_steps: 2, tie_embeddings: false, save_interval: 1000}\n"
        "eval: {interval: 100, max_iters: 2, initial_validation: false, final_validation: true}\n"
        "optimizer: {class_path: lightning_spectral.optim.Muon, init_args: {lr: 0.01, fallback_lr: 0.02}}\n"
        "logger_name: csv\ndevices: 1\ntokenizer_dir: null\n"
    )
    root = Path(__file__).parents[2]
    settings = {"PYTHONPATH": f"{root}:{tmp_path}", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "litgpt", "pretrain", "--config", str(config)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=70, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "muon, lr 0.01 x match_rms_adamw" in done.stdout + done.stderr
    assert "adamw, lr 0.02" in done.stdout + done.stderr
    assert (tmp_path / "out" / "final" / "lit_model.pth").exists()
