"""``memory recall``: widths, optimizers, learning rates and seeds of the recall task, each a Trainer run.

A row holds what one run had recalled at one step, and the TAIL rank of its hidden layer as ``TailTokenProbe`` measured
it. The best learning rate of an optimizer at a width is the one with most facts at the end, mean over seeds.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral.memory.fit import Row, by_size, fit_exponent, group
from lightning_spectral.text import CommandError

# learning rates tried unless they are given
OPTIMIZERS: dict[str, tuple[float, ...]] = {
    "muon": (0.1, 0.2, 0.4), "adamw": (0.01, 0.03, 0.1), "sgd": (3.0, 10.0, 30.0)
}  # fmt: skip


def make_optimizer(name: str, module: nn.Module, lr: float) -> Optimizer:
    """One of :data:`OPTIMIZERS` for the hidden matrices, without weight decay."""
    from lightning_spectral import optim

    if name == "muon":
        return optim.Muon(module, lr=lr, weight_decay=0.0, roles={".*": "matrix"})
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)


def run_rows(d: int, optimizer: str, lr: float, seed: int, options: Any) -> Iterator[Row]:
    """One run; a row at each step that is looked at."""
    import lightning.pytorch as pl

    from lightning_spectral.callbacks import TailTokenProbe
    from lightning_spectral.memory.recall import FactRecall, FactRecallDataModule

    begun = time.perf_counter()
    found: list[Row] = []
    relations = options.relations if options.network == "attention" else 0
    pl.seed_everything(seed, verbose=False)
    task = FactRecall(
        d, num_facts=options.num_facts, alpha=options.alpha, network=options.network, num_relations=max(relations, 1),
        seed=1000 + seed, num_steps=options.steps, optimizer=lambda module: make_optimizer(optimizer, module, lr),
        eval_every_n_steps=options.every,
    )  # fmt: skip
    data = FactRecallDataModule(
        options.num_facts, options.alpha, batch_size=options.batch_size, num_batches=options.steps, seed=seed,
        num_relations=relations,
    )  # fmt: skip

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
            step = trainer.global_step
            if step == 1 or step % options.every == 0 or step == options.steps:
                loss = float(outputs["loss"])
                found.append(
                    {"step": step, "loss": loss, **{k.split("/")[-1]: v for k, v in module.measures().items()}}
                )

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        probe = TailTokenProbe(every_n_steps=options.every, counts=data.token_counts, dirpath=folder, losses=False)
        trainer = pl.Trainer(
            max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[probe, Look()],
        )  # fmt: skip
        trainer.fit(task, data)
        ranks = tail_ranks(folder)
    for row in found:
        near = min(ranks, key=lambda step: abs(step - int(row["step"])), default=None)
        yield {
            "schema_version": 1, "kind": "recall", "d": d, "hidden": 4 * d, "n_items": options.num_facts,
            "alpha": options.alpha, "batch_size": options.batch_size, "network": options.network, "seed": seed,
            "optimizer": optimizer, "lr": lr, "steps": options.steps, "status": "ok", **row,
            **(ranks[near] if near is not None else {}), "rank_step": near,
            "seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip


def tail_ranks(folder: str | Path) -> dict[int, Row]:
    """TAIL soft and hard rank of the hidden layer by optimizer step, from the probe's own records."""
    from lightning_spectral.records import read_spectral

    return {
        record.step: {"tail_soft_rank": record.soft_rank, "tail_hard_rank": record.hard_rank}
        for record in read_spectral(folder).records
        if record.bucket == "tail" and record.site == "post" and record.step is not None
    }


def plan(options: Any) -> list[tuple[int, str, float, int]]:
    """(d, optimizer, learning rate, seed) of every run."""
    for name in options.optimizers:
        if name not in OPTIMIZERS:
            raise CommandError(f"`--optimizers` must be among {', '.join(OPTIMIZERS)}, got {name!r}.")
    for name, least in (
        ("steps", 1),
        ("every", 1),
        ("seeds", 1),
        ("batch_size", 1),
        ("num_facts", 2),
        ("relations", 1),
    ):
        if getattr(options, name) < least:
            raise CommandError(f"`--{name.replace('_', '-')}` must be >= {least}, got {getattr(options, name)}.")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return [
        (d, name, lr, seed)
        for d, name in itertools.product(options.d, options.optimizers)
        for lr in (options.lr or OPTIMIZERS[name])
        for seed in seeds
    ]


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """Rows at each optimizer's best learning rate per width: most facts at the last step, mean over seeds."""
    chosen: list[Row] = []
    for same in group(rows, "optimizer", "d", "network").values():
        ends: dict[Any, float] = {}
        for (lr,), tried in group(same, "lr").items():
            last = max(row["step"] for row in tried)
            ends[lr] = float(np.mean([row["count"] for row in tried if row["step"] == last]))
        chosen += [row for row in same if row["lr"] == max(ends, key=lambda lr: ends[lr])]
    return chosen


def study_lines(rows: Sequence[Row]) -> list[str]:
    """Markdown: facts and TAIL rank by step, width and optimizer, then their exponents in d; best rates only."""
    best = best_rates(rows)
    lines = ["| step | optimizer | d | lr | facts | TAIL recall | TAIL soft rank | TAIL hard rank | seeds |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (step, name, d), same in sorted(group(best, "step", "optimizer", "d").items()):
        cells = [
            _mean_sd([row.get(key) for row in same]) for key in ("count", "tail", "tail_soft_rank", "tail_hard_rank")
        ]
        lines.append(f"| {step} | {name} | {d} | {same[0]['lr']:g} | {' | '.join(cells)} | {len(same)} |")
    lines += ["", "| step | optimizer | exponent in d of | value | 95 % interval |", "|---|---|---|---|---|"]
    for (step, name), same in sorted(group(best, "step", "optimizer").items()):
        for key in ("count", "tail_soft_rank", "tail_hard_rank"):
            known = [row for row in same if row.get(key)]
            xs, values = by_size(known, "d", key)
            if len(xs) >= 2 and min(len(at) for at in values) >= 2:  # one seed knows no interval
                fitted = fit_exponent(xs, values)
                lines.append(
                    f"| {step} | {name} | {key} | {fitted.slope:.2f} | [{fitted.low:.2f}, {fitted.high:.2f}] |"
                )
    return lines


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" +- {np.std(known, ddof=1):.3g}" if len(known) > 1 else ""
    return f"{np.mean(known):.4g}{spread}"
