"""``memory recall``: widths, optimizers, learning rates and seeds of the recall task, each a Trainer run.

The learning rate of an optimizer at a width is searched first, on seeds that the study does not use (``stage`` scan):
up and down a geometric grid until both neighbours of the best one store less. The study's own runs follow at that rate.
A row holds what one run had recalled at one step, and the TAIL rank of its hidden layer as ``TailTokenProbe`` measured
it.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral.memory.fit import Row
from lightning_spectral.text import CommandError

# learning rate at which the search begins; it goes on by this factor
OPTIMIZERS: dict[str, float] = {"muon": 0.2, "adamw": 0.03, "sgd": 10.0}
FACTOR = 2.0
_RATES_AT_MOST = 12
_RANGE = (0, -2, -4, 2)  # powers of the factor
_SCAN_SEED = 100_000  # first of the seeds that only the search sees
_LEAST = {"steps": 1, "every": 1, "seeds": 1, "scan_seeds": 1, "batch_size": 1, "num_facts": 2, "relations": 1,
          "first_seed": 0}  # fmt: skip


def make_optimizer(name: str, module: nn.Module, lr: float) -> Optimizer:
    """One of :data:`OPTIMIZERS` for the hidden matrices, without weight decay."""
    from lightning_spectral import optim

    if name == "muon":
        return optim.Muon(module, lr=lr, weight_decay=0.0, roles={".*": "matrix"})
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)


def check(options: Any) -> None:
    """Name the first option that is out of range.

    Raises:
        CommandError: With the option, its value and what it must be.
    """
    for name in options.optimizers:
        if name not in OPTIMIZERS:
            raise CommandError(f"`--optimizers` must be among {', '.join(OPTIMIZERS)}, got {name!r}.")
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise CommandError(f"`--{name.replace('_', '-')}` must be >= {least}, got {getattr(options, name)}.")
    for lr in options.lr or ():
        if not 0 < lr < math.inf:
            raise CommandError(f"`--lr` must be finite and > 0, got {lr}.")
    if min(options.d) < 2:
        raise CommandError(f"`--d` must be >= 2, got {min(options.d)}.")


def study_rows(options: Any, say: Callable[[str], None]) -> Iterator[Row]:
    """Rows of the search, then of the study; with ``--lr`` of those rates and no search.

    Args:
        options: Of the command.
        say: Told what is run next, and how long it has taken so far.
    """
    begun = time.perf_counter()

    def run(stage: str, d: int, name: str, lr: float, seed: int) -> list[Row]:
        say(f"{time.perf_counter() - begun:.0f} s: {stage}, d = {d}, {name}, lr = {lr:g}, seed {seed}")
        return [{**row, "stage": stage} for row in run_rows(d, name, lr, seed, options)]

    rates: dict[tuple[str, int], Sequence[float]] = {}
    for name in options.optimizers:
        for d in sorted(options.d):
            if options.lr:
                rates[name, d] = options.lr
                continue
            search = rate_search(OPTIMIZERS[name])
            try:
                lr = next(search)
                while True:
                    rows = [
                        row
                        for seed in range(_SCAN_SEED, _SCAN_SEED + options.scan_seeds)
                        for row in run("scan", d, name, lr, seed)
                    ]
                    yield from rows
                    lr = search.send(float(np.mean([row["count"] for row in rows if row["step"] == options.steps])))
            except StopIteration as done:
                rates[name, d] = (float(done.value),)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for (name, d), several in rates.items():
            for lr in several:
                yield from run("study", d, name, lr, seed)


def rate_search(start: float, factor: float = FACTOR, at_most: int = _RATES_AT_MOST) -> Generator[float, float, float]:
    """Search a geometric grid: yields a rate, is sent its score, returns the rate that beats both its neighbours.

    Every other rate of a wide range comes first, so that the climb begins on the right slope: too high a rate recalls
    a few facts at any rate around it.

    Args:
        start: In the range's upper half.
        factor: Between neighbours.
        at_most: Rates tried; then the best so far is returned, whatever its neighbours.
    """
    scores: dict[int, float] = {}
    for place in _RANGE[:at_most]:
        scores[place] = yield start * factor**place
    best = max(scores, key=lambda place: (scores[place], -abs(place)))
    while len(scores) < at_most:
        missing = [place for place in (best + 1, best - 1) if place not in scores]
        if not missing:
            break
        scores[missing[0]] = yield start * factor ** missing[0]
        best = max(scores, key=lambda place: (scores[place], -abs(place)))
    return start * factor**best


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

    with tempfile.TemporaryDirectory() as folder, _quiet():
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
    """TAIL soft and hard rank of the hidden layer by optimizer step, and the rows they are of: the probe's records."""
    from lightning_spectral.records import read_spectral

    return {
        record.step: {
            "tail_soft_rank": record.soft_rank,
            "tail_hard_rank": record.hard_rank,
            "tail_rows": record.num_tokens,
        }
        for record in read_spectral(folder).records
        if record.bucket == "tail" and record.site == "post" and record.step is not None
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """A hundred runs say nothing of their own."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_spectral")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
