"""Long runs: what a process holds and what a window costs do not grow with what was measured before."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, read_spectral
from lightning_spectral.records import to_json
from tests.records_factory import spectral
from tests.scripts import toys

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MIB = 2**20


@dataclass
class Held:
    """What this process holds."""

    rss_mib: float
    descriptors: int
    threads: int
    hooks: int


def held(module: nn.Module) -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE") / MIB, len(os.listdir("/proc/self/fd")), threading.active_count(), hooks
    )


class Watch(pl.Callback):
    """Takes stock now and then, and the CPU time of every step."""

    def __init__(self, every: int) -> None:
        self.every, self.held, self.seconds, self._began = every, [], [], 0.0  # type: ignore[var-annotated]

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.thread_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seconds.append(time.thread_time() - self._began)
        if trainer.global_step % self.every == 0:
            self.held.append(held(pl_module))


QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


@pytest.mark.timeout(900)
def test_five_thousand_windows_cost_what_the_first_ones_did(tmp_path: Path) -> None:
    windows, folder = 5_000, str(tmp_path / "records")
    callbacks = [
        SpectralRankCallback(1, dirpath=folder, background=False),
        TailTokenProbe(10, counts=toys.counts(), dirpath=folder, background=False),
    ]
    watch = Watch(1_000)
    data = DataLoader(toys.ids(8).repeat(windows // 4, 1), batch_size=2)  # type: ignore[arg-type]
    trainer = pl.Trainer(default_root_dir=tmp_path, max_steps=windows, callbacks=[*callbacks, watch], **QUIET)
    lit = toys.Lit()
    trainer.fit(lit, data)
    first, last = watch.held[0], watch.held[-1]
    assert (last.descriptors, last.threads, last.hooks) == (first.descriptors, first.threads, first.hooks)
    found = read_spectral(folder).records
    assert {r.step for r in found if r.bucket == "pooled"} == set(range(windows))
    records = len(found)
    # what has been written is remembered by its key, once: at most 0.5 KiB a record
    assert last.rss_mib - first.rss_mib < 0.5 * records / 1024 + 4
    early, late = median(watch.seconds[500:1_000]), median(watch.seconds[-500:])
    assert late < 1.25 * early, f"a window took {1e3 * early:.2f} ms and takes {1e3 * late:.2f} ms"
    assert held(lit).hooks == 0


@pytest.mark.timeout(900)
def test_three_hundred_fits_leave_nothing(tmp_path: Path) -> None:
    stock = []
    for number in range(300):
        settings: dict[str, Any] = {"dirpath": str(tmp_path / str(number % 7))}
        lit = toys.Lit()
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_steps=2,
            callbacks=[
                SpectralRankCallback(1, **settings),
                TailTokenProbe(1, counts=toys.counts(), background=True, **settings),
                WeightSpectrumCallback(1, **settings),
            ],
            **QUIET,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # earlier runs are moved aside
            trainer.fit(lit, toys.loader(16))
        if number % 50 == 49:
            stock.append(held(lit))
            assert stock[-1].hooks == 0
    first, last = stock[1], stock[-1]
    assert (last.descriptors, last.threads) == (first.descriptors, first.threads)
    assert last.rss_mib - first.rss_mib < 8


def test_a_hundred_thousand_records_are_read_in_seconds(tmp_path: Path) -> None:
    """In a process of its own, CPU seconds and peak memory above what importing takes."""
    path = tmp_path / "spectral.jsonl"
    line = to_json(
        spectral(
            step=123456789,
            layer=7,
            hard_rank=12345.5,
            soft_rank=54321.5,
            reinjection={"gini": 0.5},
            conventions={"a": "{b}"},
        )
    )
    with path.open("w") as file:
        for number in range(100_000):
            one = line.replace("123456789", str(number // 8)).replace('"layer": 7', f'"layer": {number % 8}')
            file.write(one.replace("12345.5", str(number / 7)).replace("54321.5", str(number / 3)) + "\n")
    code = """
import json, resource, sys, time
from lightning_spectral.analysis.scan import scan_spectral
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
columns = scan_spectral(sys.argv[1])
took = time.process_time() - began
print(json.dumps([len(columns), took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    records, seconds, mib = json.loads(done.stdout)
    assert records == 100_000
    assert seconds < 3
    assert mib < 300
