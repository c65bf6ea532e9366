"""Run folders and points whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.records import (
    LOSSES_FILE,
    SPECTRAL_FILE,
    LossRecord,
    RunInfo,
    SpectralRecord,
    append_records,
    write_run,
)

BUCKETS = ("pooled", "head", "mid", "tail")
ORDERS = ("0.5", "1", "2", "3", "5")


def power_law_points(
    beta: float,
    a: float = 3.0,
    widths: Sequence[float] = (128, 256, 384, 512, 768, 1024),
    seeds: int = 1,
    noise: float = 0.0,
    layers: int = 4,
    series: tuple[str, ...] = (),
    rng: np.random.Generator | None = None,
) -> list[Point]:
    rng = rng or np.random.default_rng(0)
    points = []
    for width in widths:
        for seed in range(seeds):
            per_layer = a * width**beta * np.exp(noise * rng.standard_normal(layers))
            points.append(
                Point(
                    series,
                    float(width),
                    float(np.median(per_layer)),
                    f"{'_'.join(series)}_{width}_{seed}",
                    str(seed),
                    float(np.std(per_layer, ddof=1)) or 1e-3,
                    layers=tuple(map(float, per_layer)),
                )
            )
    return points


def table(points: Sequence[Point], by: tuple[str, ...] = ()) -> PointTable:
    return PointTable(by, tuple(points))


def write_study(
    root: Path,
    slopes: dict[str, float],
    widths: Sequence[int] = (128, 256, 512, 1024),
    seeds: Sequence[int] = (0,),
    steps: Sequence[int] = (0, 20, 40, 60, 80, 100),
    layers: int = 3,
    sites: Sequence[str] = ("post",),
    noise: float = 0.02,
    labels: dict[str, str] | None = None,
    num_tokens: int = 200_000,
    recipes: bool = False,
) -> list[Path]:
    """A study in which hard rank = 2 * D ** (slope of the optimizer), soft rank 1.5 times as large in ln."""
    return [
        write_one(
            root,
            name,
            slope,
            width,
            seed,
            steps,
            layers,
            sites,
            noise,
            labels or {},
            num_tokens,
            recipe(kind=name) if recipes else None,
        )
        for name, slope in slopes.items()
        for width in widths
        for seed in seeds
    ]


def write_spectra(folder: Path, width: int, steps: Sequence[int] = (20, 60, 100), layer: int = 1) -> None:
    """Eigenvalue files as `eigenvalues: true` leaves them."""
    (folder / "eigenvalues").mkdir()
    for step in steps:
        spectrum = np.arange(1, width + 1, dtype=np.float32) ** -(0.5 + step / 100)
        tensors = {f"layer_{layer:02d}.post.{bucket}": spectrum for bucket in BUCKETS}
        save_file(tensors, folder / "eigenvalues" / f"train_{step:08d}.safetensors")


def recipe(lr: float = 3e-3, steps: int = 100, data_seed: int | None = 0, kind: str = "adamw") -> dict[str, Any]:
    """What a run of `pretrain` records, as far as the analysis reads it."""
    return {
        "train": {"max_steps": steps, "lr_warmup_steps": 2, "max_tokens": None, "epochs": None},
        "lr_schedule": {"kind": "constant_linear_decay", "decay_fraction": 0.2},
        "optimizer": {"class_path": kind, "init_args": {"lr": lr, "weight_decay": 0.01}},
        "data": {"class_path": "StateOfTheUnion", "init_args": {"seed": data_seed}},
        "architecture": {"ffn_multiplier": 4, "activation": "relu2"},
    }


def write_one(
    root: Path,
    optimizer: str,
    slope: float,
    width: int,
    seed: int = 0,
    steps: Sequence[int] = (0, 20, 40, 60, 80, 100),
    layers: int = 3,
    sites: Sequence[str] = ("post",),
    noise: float = 0.02,
    labels: dict[str, str] | None = None,
    num_tokens: int = 200_000,
    hparams: dict[str, Any] | None = None,
) -> Path:
    extra = labels or {}
    run_id = "_".join([optimizer, str(width), str(seed), *extra.values()])
    folder = root / run_id
    # the untrained network of one seed and width is the same whatever the optimizer
    null = np.random.default_rng([seed, width])
    rng = np.random.default_rng([seed, width, sum(map(ord, optimizer + "".join(extra.values())))])
    write_run(
        folder,
        RunInfo(
            run_id,
            "2026-01-01T00:00:00",
            optimizer,
            seed,
            versions={"torch": "2.13.0"},
            labels={"optimizer": optimizer, **extra},
            hparams=hparams or {},
        ),
    )
    records, losses = [], []
    for step in steps:
        draw = null if step == 0 else rng
        done = step / max(steps[-1], 1)
        beta = 0.7 + (slope - 0.7) * done
        for site in sites:
            for layer in range(layers):
                for k, bucket in enumerate(BUCKETS):
                    hard = (2.0 + 0.2 * layer + 0.1 * k) * width**beta * float(np.exp(noise * draw.standard_normal()))
                    soft = hard * 1.5 * width**0.05
                    renyi = {order: soft * (hard / soft) ** (float(order) - 1) for order in ORDERS}
                    records.append(
                        SpectralRecord(
                            run_id=run_id,
                            stage="train",
                            step=step,
                            tokens_seen=step * 1024,
                            layer=layer,
                            module=f"transformer.h.{layer}.mlp.proj",
                            site=site,
                            bucket=bucket,
                            num_tokens=num_tokens,
                            width=width,
                            tokens_per_dim=num_tokens / width,
                            status="ok",
                            soft_rank=soft,
                            hard_rank=hard,
                            hard_rank_debiased=hard,
                            spectral_entropy=float(np.log(soft)),
                            early_enrichment=0.5,
                            top_share=0.1,
                            trace=1.0,
                            renyi=renyi,
                            reinjection=dict.fromkeys(ORDERS, 1.1) if site == "post" else {},
                            conventions={"row_attribution": "input"},
                        )
                    )
        for k, bucket in enumerate(BUCKETS):
            value = 7.6 - 3.5 * (1 - np.exp(-4 * done)) - 0.02 * np.log2(width / 128) - 0.1 * slope * done + 0.1 * k
            losses.append(LossRecord(run_id, "validation", step, step * 1024, bucket, 5000, float(value), 0.2))
    append_records(folder / SPECTRAL_FILE, records)
    append_records(folder / LOSSES_FILE, losses)
    return folder


def let_diverge(folder: Path, step: int) -> None:
    """Make every number of a run from ``step`` on none, as training that has diverged leaves them."""
    file = folder / "spectral.jsonl"
    lines = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if record["step"] >= step:
            pooled = record["bucket"] == "pooled"
            record |= {"status": "nonfinite" if pooled else "not_matched", "soft_rank": None, "hard_rank": None}
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines) + "\n")
