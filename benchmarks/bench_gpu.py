"""Does measuring hold on a GPU what it promises: same training, no wait outside windows, bounded memory, right numbers?

Every line is a claim with what was measured; `benchmarks/gpu.md` says which of them must hold. Needs CUDA.

    python benchmarks/bench_gpu.py --out gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from torch import Tensor

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_spectral.functional.approximate import approximate_entropy
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.functional.products import calibrate, cuda_bf16, strips
from lightning_spectral.functional.row_ranks import rank_rows
from lightning_spectral.probe.grouping import by_frequency
from lightning_spectral.probe.memory_plan import plan_of
from lightning_spectral.probe.observe import observe
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.ranks_of import RankMeasurement, measure

VOCAB, LENGTH, BATCH = 4_096, 1_024, 8
DEVICE = torch.device("cuda")


def model_of(width: int = 1_024, layers: int = 8, ffn: int = 4_096) -> GPT:
    """A GPT on the GPU, fp32 weights."""
    torch.manual_seed(0)
    config = Config(
        n_layer=layers, n_head=8, n_embd=width, intermediate_size=ffn, block_size=LENGTH, vocab_size=VOCAB,
        padded_vocab_size=VOCAB, mlp_class_name="GptNeoxMLP", norm_class_name="RMSNorm", bias=False,
    )  # fmt: skip
    return GPT(config).to(DEVICE)


def batches(num: int, seed: int = 0) -> Tensor:
    """Token ids of a few frequent and many rare tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num, BATCH, LENGTH + 1, generator=generator).pow(3) * VOCAB
    return drawn.long().to(DEVICE)


def train(
    steps: int, around: Callable[[int], Any] | None = None, *, out: str = "", every: int = 0, **more: Any
) -> dict[str, Any]:
    """Train under bf16 autocast; returns the weights' checksum, milliseconds of each step and waits for the device."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    counts = torch.bincount(batches(4).flatten().cpu(), minlength=VOCAB)
    watch = (
        observe(model, every, out=out, counts=counts, optimizer=optimizer, num_steps=steps, **more) if every else None
    )
    data, milliseconds, waits = batches(steps), [], []
    for step in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model(data[step][:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[step][:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - began))
        waits.append(sum("synchronizing" in str(one.message) for one in seen))
    if watch is not None:
        watch.close()
    checksum = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {"checksum": checksum, "ms": milliseconds, "waits": waits}


def training_is_unchanged(folder: str) -> dict[str, Any]:
    """Bit-identical weights, time of an unarmed step, waits for the device in unarmed steps and in windows."""
    bare, again = train(24), train(24)
    watched = train(24, out=f"{folder}/run", every=8)
    approx = train(24, out=f"{folder}/approx", every=8, soft="approx")
    windows = [step for step in range(24) if step % 8 == 0 or step == 23]
    unarmed = [step for step in range(4, 24) if step not in windows]

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    return {
        "same weights": bare["checksum"] == watched["checksum"],
        "same weights of two bare runs": bare["checksum"] == again["checksum"],
        "window ms, approx": [round(approx["ms"][step], 1) for step in windows],
        "bare step ms": median([bare["ms"][step] for step in unarmed]),
        "unarmed step ms": median([watched["ms"][step] for step in unarmed]),
        "window ms": [round(watched["ms"][step], 1) for step in windows],
        "waits, bare step": max(bare["waits"][step] for step in unarmed),
        "waits, unarmed step": max(watched["waits"][step] for step in unarmed),
        "waits, window": [watched["waits"][step] for step in windows],
    }


def products_are_right() -> dict[str, Any]:
    """What the calibration offers and chooses for fp32 and bf16 rows."""
    chosen: dict[str, Any] = {}
    for width in (1_024, 4_096, 14_336):
        for rows in (torch.float32, torch.bfloat16):
            calibration = calibrate(width, device=DEVICE, activations=rows)
            chosen[f"{width} {str(rows)[6:]}"] = {
                "chosen": calibration.name, "seconds": calibration.seconds, "errors": calibration.errors,
            }  # fmt: skip
    return chosen


def ranks_of_one_layer() -> dict[str, Any]:
    """Ranks on the GPU against the CPU's, and the time of a layer as wide as LLaMA-3.1-8B's, all rows and a sample."""
    torch.manual_seed(0)
    rows_ND = (torch.randn(4_096, 1_024) * torch.arange(1, 1_025).float().rsqrt()).relu() ** 2
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        moments = empty_moments(1, 1_024, device=device)
        update_(moments, rows_ND.to(device), [len(rows_ND)])
        values = measure(moments).values
        found[device] = {"soft": values["soft_rank"], "hard": values["hard_rank"]}
    for name in ("soft", "hard"):
        found[f"{name}, relative difference"] = abs(found["cuda"][name] / found["cpu"][name] - 1)
    wide_ND = torch.randn(8_192, 14_336, device=DEVICE, dtype=torch.bfloat16)
    for product in (strips, cuda_bf16):
        moments = empty_moments(1, 14_336, device=DEVICE)
        update_(moments, wide_ND, [8_192], product=product)
        found[f"8,192 rows of 14,336 by {product.__name__}, ms"] = timed(
            partial(update_, moments, wide_ND, [8_192], product=product)
        )
        torch.manual_seed(1)
        bf16_ND = (
            (torch.randn(8_192, 4_096, device=DEVICE) / torch.arange(1, 4_097, device=DEVICE).sqrt()).relu() ** 2
        ).bfloat16()
        moments = empty_moments(1, 4_096, device=DEVICE)
        update_(moments, bf16_ND, [8_192], product=product)
        values = measure(moments).values
        found[f"ranks by {product.__name__}"] = {"soft": values["soft_rank"], "hard": values["hard_rank"]}
    del moments
    for dtype in (torch.float32, torch.float64):
        matrix_DD = torch.randn(4_096, 4_096, device=DEVICE, dtype=dtype)
        matrix_DD = matrix_DD @ matrix_DD.mT
        found[f"eigenvalues of 4,096, {dtype}, ms"] = timed(partial(torch.linalg.eigvalsh, matrix_DD), 2)
    found["approximate entropy of 4,096, ms"] = timed(lambda: approximate_entropy(matrix_DD.float()), 2)
    found["ranks of 4,096 of them by a sample, ms"] = timed(
        lambda: rank_rows(wide_ND[:4_096], torch.arange(4_096, device=DEVICE) // 64, 8_192), repeats=2
    )
    return found


def timed(run: Callable[[], Any], repeats: int = 5) -> float:
    """Milliseconds of the best of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, 1e3 * (time.perf_counter() - began))
    return best


def a_sample_fits_its_plan() -> dict[str, Any]:
    """Peak memory of a window in a limit, beyond what the same steps take without it; against the dense numbers."""
    model = model_of(layers=4)
    counts = torch.bincount(batches(4).flatten().cpu(), minlength=VOCAB)
    grouping = by_frequency(counts, head_share=0.33, mid_share=0.67, attribute_to="input")
    found: dict[str, Any] = {}
    data = batches(8, seed=1)
    for limit_mib in (0.0, 1e9, 200.0):
        probe = SpectralProbe(model, grouping, ProbeOptions()) if limit_mib else None
        plan = None if probe is None else plan_of(probe, limit_mib, 1)
        if probe is not None and plan is not None:
            probe.hold(plan)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            for ids in data:
                if probe is not None:
                    probe.start(seed=0, training=False)
                model(ids[:, :-1])
                if probe is not None:
                    probe.collect()
        torch.cuda.synchronize()
        taking = (torch.cuda.max_memory_allocated() - before) / 2**20
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = None if probe is None else probe.end()
        torch.cuda.synchronize()
        name = "without" if probe is None else "all rows" if plan is None or plan.num_rows is None else "sample"
        ending = (torch.cuda.max_memory_allocated() - before) / 2**20
        found[name] = {"peak MiB, taking rows": taking, "peak MiB, at the end": ending}
        if result is not None and probe is not None:
            found[name] |= {
                "plan": str(plan), "end ms": 1e3 * (time.perf_counter() - began),
                "layer 2": {site.bucket: numbers_of(site.measurement) for site in result.sites if site.layer == 2},
            }  # fmt: skip
            probe.remove()
    return found


def numbers_of(measurement: RankMeasurement) -> dict[str, float]:
    """Ranks, and what a sample says about them."""
    return {name: value for name, value in measurement.values.items() if "rank" in name or "rows" in name}


def main() -> None:
    """Run every check and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu.json", help="where the findings go (default: gpu.json)")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    torch.use_deterministic_algorithms(True)  # else two runs differ, measured or not
    checks: dict[str, Callable[[], Any]] = {
        "products": products_are_right,
        "one layer": ranks_of_one_layer,
        "training": lambda: training_is_unchanged(str(Path(options.out).absolute().parent / "gpu_run")),
        "sample": a_sample_fits_its_plan,
    }
    for name, check in checks.items():
        began = time.perf_counter()
        try:
            found[name] = check()
        except Exception as error:  # the other checks are worth having
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        found[name]["wall_s"] = time.perf_counter() - began
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
