"""What is promised on a GPU, on one: `pytest -m cuda`.

The default run leaves these out, for it needs no GPU; `benchmarks/gpu.md` says when they passed, and where.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_spectral import (
    SOAP,
    AdaMuon,
    AdamW,
    Dion,
    Dion2,
    Muon,
    MuonH,
    NorDion2,
    NorMuon,
    SpectralRankCallback,
    TailTokenProbe,
    WeightSpectrumCallback,
    read_spectral,
)
from tests.callbacks import tiny as callbacks_tiny
from tests.models import tiny

pytestmark = [
    pytest.mark.cuda,
    # advice of torch and Lightning that only a machine with a GPU hears
    pytest.mark.filterwarnings("ignore:.* defaults to a non-deterministic algorithm"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
ROOT = Path(__file__).parents[2]
OPTIMIZERS = (AdamW, Muon, NorMuon, AdaMuon, MuonH, Dion, Dion2, NorDion2, SOAP)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """fp32 products are fp32, and every kernel gives the same bits twice."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fit(path, callbacks, precision, **options):
    module = callbacks_tiny.Module()
    trainer = callbacks_tiny.trainer(path, callbacks, accelerator="gpu", precision=precision, **options)
    trainer.fit(module, callbacks_tiny.loader())
    return {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_bit_identical(tmp_path, precision):
    bare = fit(tmp_path / "bare", [], precision, max_steps=8)
    watched = fit(tmp_path / "watched", [SpectralRankCallback(2), WeightSpectrumCallback(3)], precision, max_steps=8)
    assert all(torch.equal(bare[name], watched[name]) for name in bare)


def test_ranks_are_those_of_the_cpu(tmp_path):
    def records(accelerator):
        module = callbacks_tiny.Module()
        probe = TailTokenProbe(2, counts=callbacks_tiny.counts(), sites=["pre", "post"])
        trainer = callbacks_tiny.trainer(tmp_path / accelerator, [probe], accelerator=accelerator, max_steps=1)
        trainer.fit(module, callbacks_tiny.loader())
        return {(r.step, r.layer, r.bucket, r.site): r for r in read_spectral(tmp_path / accelerator).records}

    on_cpu, on_gpu = records("cpu"), records("gpu")
    assert on_cpu
    assert on_cpu.keys() == on_gpu.keys()
    for key, record in on_cpu.items():
        assert on_gpu[key].status == record.status, key
        for name in ("soft_rank", "hard_rank"):
            seen, expected = getattr(on_gpu[key], name), getattr(record, name)
            assert seen == (None if expected is None else pytest.approx(expected, rel=2e-3)), (key, name)


@pytest.mark.parametrize("where", ["whole", "each block"])
def test_a_compiled_model_is_measured_as_it_is(tmp_path, where):
    def ranks(path, compiled):
        module = callbacks_tiny.Module()
        for part in ([module.gpt] if where == "whole" else module.gpt.transformer.h) if compiled else ():
            part.compile(dynamic=False)
        trainer = callbacks_tiny.trainer(path, [SpectralRankCallback(1)], accelerator="gpu", max_steps=1)
        trainer.fit(module, callbacks_tiny.loader())
        return {(r.step, r.layer): (r.status, r.num_tokens, r.hard_rank) for r in read_spectral(path).records}

    eager, compiled = ranks(tmp_path / "eager", False), ranks(tmp_path / "compiled", True)
    assert eager.keys() == compiled.keys()
    for key, (status, num_tokens, hard_rank) in eager.items():
        assert compiled[key] == (status, num_tokens, pytest.approx(hard_rank, rel=1e-3))


def given_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_an_optimizer_steps_as_on_the_cpu(optimizer):
    options = {} if optimizer in (AdamW, Dion, SOAP) else {"precision": "fp32"}
    models = [tiny.litgpt().to(device) for device in ("cpu", "cuda")]
    models[1].load_state_dict(models[0].state_dict())
    before = [p.detach().clone() for p in models[0].parameters()]
    optimizers = [optimizer(model, lr=1e-2, **options) for model in models]
    for step in range(5):
        for model, chosen in zip(models, optimizers, strict=True):
            given_gradients(model, step)
            chosen.step()
    for begun, cpu, cuda in zip(before, *(m.parameters() for m in models), strict=True):
        moved = (cpu - begun).norm()
        assert (cuda.cpu() - cpu).norm() <= 1e-4 * moved, (cuda.cpu() - cpu).norm() / moved


def waits(run):
    """How often the host waits for the device in ``run()``."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in seen if "synchronizing" in str(one.message)]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("optimizer", [AdamW, Muon, NorMuon, AdaMuon, MuonH, Dion2, NorDion2, Dion])
def test_a_step_waits_at_most_once(optimizer, safe):
    model = tiny.litgpt().to("cuda")
    chosen = optimizer(model, lr=1e-2, **({"max_grad_norm": 1.0, "nonfinite": "skip"} if safe else {}))
    for step in range(3):
        given_gradients(model, step)
        seen = waits(chosen.step)
    assert len(seen) <= 1, seen


def test_stochastic_rounding_keeps_the_movement_of_bf16_weights():
    weights = torch.nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    exact = weights.weight.detach().double()
    optimizer = AdamW(weights, lr=1e-4, weight_decay=0.0, bf16_weights="stochastic")
    for _ in range(50):
        weights.weight.grad = torch.ones_like(weights.weight)
        optimizer.step()
    moved = (weights.weight.detach().double() - exact).mean()
    assert moved.item() == pytest.approx(-50 * 1e-4, rel=0.02)


NCCL = """
import copy, os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from lightning_spectral import Dion, Muon, NorMuon
from tests.gpu.test_gpu import given_gradients
from tests.models import tiny
torch.backends.cuda.matmul.allow_tf32 = False
dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
for optimizer in (Muon, NorMuon, Dion):
    plain = tiny.litgpt().cuda()
    for kind in ("ddp", "fsdp2"):
        alone, wrapped = copy.deepcopy(plain), copy.deepcopy(plain)
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(wrapped, device_ids=[0])
        else:
            for block in wrapped.transformer.h:
                fully_shard(block)
            fully_shard(wrapped)
        options = {} if optimizer is Dion else {"precision": "fp32"}
        both = [(model, optimizer(model, lr=1e-2, **options)) for model in (alone, wrapped)]
        for step in range(5):
            for model, chosen in both:
                torch.manual_seed(step)
                for p in model.parameters():
                    full = torch.randn(p.shape, device="cuda")
                    p.grad = torch.empty_like(p) if p.grad is None else p.grad
                    local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                    local.copy_(full)
                chosen.step()
        for a, b in zip(alone.parameters(), wrapped.parameters(), strict=True):
            b = b.full_tensor() if hasattr(b, "full_tensor") else b
            assert torch.allclose(a, b, rtol=0, atol=1e-6), (optimizer, kind, (a - b).abs().max())
        print(optimizer.__name__, kind, "equal")
dist.destroy_process_group()
"""


def python(*arguments, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=170, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_exchange_runs_over_nccl(tmp_path):
    script = tmp_path / "nccl.py"
    script.write_text(NCCL)
    out = python(str(script), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert out.count("equal") == 6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_pretrain_on_a_gpu_measures_and_resumes(tmp_path, strategy):
    """A whole recipe: text, training under NCCL, validation, checkpoints, ranks; then the same to a later step."""
    command = ["-m", "lightning_spectral", "pretrain", "--config", "debug", "--out_dir", str(tmp_path / "out")]
    more = ["--strategy", strategy, "--accelerator", "gpu", "--devices", "1"]
    python(*command, *more)
    first = read_spectral(tmp_path / "out").records
    python(*command, *more, "--train.max_steps", "30", "--resume", "true", "--accept-changes")
    later = read_spectral(tmp_path / "out").records
    assert {record.step for record in first} == {0, 5, 10, 15, 19}
    assert {record.step for record in later} >= {0, 5, 10, 15, 20, 25, 29}
    assert {record.run_id for record in later} == {record.run_id for record in first}
    assert {record.status for record in later} <= {"ok", "few_tokens", "undersampled"}
