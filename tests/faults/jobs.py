"""The commands that faults are put into: each runs in seconds, and goes on when it is started again.

A job says what it has recorded so far, wherever it lies, and what its result is: weights and records, without what
differs between equal runs (ids, times).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, cli
from lightning_spectral.data.modules import TextFiles
from lightning_spectral.records import read_losses, read_spectral, read_weights
from lightning_spectral.sweep import launchers
from lightning_spectral.text import whole_file
from lightning_spectral.training.checkpoints import is_whole
from tests.distributed.harness import run_ranks
from tests.scripts import toys
from tests.tiny import tiny_tree, write_text

Facts = dict[str, str]  # name of a thing -> its content, or a digest of it
_READERS = {"spectral.jsonl": read_spectral, "losses.jsonl": read_losses, "weights.jsonl": read_weights}
_OF_ONE_RUN = {"run_id", "window_s"}  # fields of a record that differ between equal runs


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: What it is called in a fault's description.
        start: Runs it in a folder; returns the exit code.
        result: What must be equal to the undisturbed run's.
        recorded: What is on disk by now, in the folder and in ``previous/`` or ``runs/`` below it.
    """

    name: str
    start: Callable[[Path], int]
    result: Callable[[Path], Facts]
    recorded: Callable[[Path], Facts]


def shared_inputs(folder: Path) -> Path:
    """Text, token cache and recipe that all jobs read; the cache is built here."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = tiny_tree(folder)
    tree["train"] |= {"max_steps": 6, "save_interval": 2}
    tree["eval"] = {"interval": 6, "max_iters": 1}
    kinds = ("SpectralRankCallback", "TailTokenProbe", "WeightSpectrumCallback")
    tree["callbacks"] = [
        {"class_path": f"lightning_spectral.{kind}", "init_args": {"every_n_steps": 2}} for kind in kinds
    ]
    tree["callbacks"][0]["init_args"]["eigenvalues"] = True
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    data = TextFiles(str(write_text(folder)), vocab_size=300, cache_dir=folder / "cache")
    data.connect(batch_size=4, max_seq_length=16, tokenizer_dir=None)
    data.prepare_data()
    return folder


def _shared(folder: Path) -> Path:
    return folder.parent / "shared"


def _pretrain(folder: Path, *more: str) -> int:
    recipe = str(_shared(folder) / "recipe.yaml")
    return cli.main(["pretrain", "--config", recipe, "--out_dir", str(folder / "out"), "--resume", "auto", *more])


def _pretrain_cache(folder: Path) -> int:
    """With a token cache of the folder's own."""
    return _pretrain(folder, "--data.init_args.cache_dir", str(folder / "cache"))


def _script(folder: Path) -> int:
    """A careful user's script: a checkpoint an epoch, and the newest one that is whole to go on from."""
    out = folder / "out"
    settings: dict[str, Any] = {"dirpath": str(out / "records")}
    torch.manual_seed(1)
    lit = toys.Lit()
    trainer = pl.Trainer(
        default_root_dir=out, max_epochs=5, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[
            SpectralRankCallback(2, **settings),
            TailTokenProbe(3, counts=toys.counts(), **settings),
            WeightSpectrumCallback(4, **settings),
            ModelCheckpoint(out / "checkpoints", every_n_epochs=1, save_top_k=-1, filename="{step:03d}"),
        ],
    )  # fmt: skip
    checkpoints = sorted((out / "checkpoints").glob("*.ckpt"), reverse=True)
    newest = next((path for path in checkpoints if is_whole(path)), None)
    trainer.fit(lit, toys.loader(16), ckpt_path=newest)
    with whole_file(out / "final.pth") as partial:
        torch.save(lit.state_dict(), partial)
    return 0


@contextlib.contextmanager
def _forked_from_here() -> Iterator[None]:
    """A sweep's workers are forked from this process, which has imported everything: 10 seconds less a sweep."""
    import multiprocessing

    start, launchers.LocalLauncher._start_context = (
        launchers.LocalLauncher._start_context,
        lambda _: multiprocessing.get_context("fork"),
    )
    try:
        yield
    finally:
        launchers.LocalLauncher._start_context = start


def _sweep(folder: Path) -> int:
    recipe, out = str(_shared(folder) / "recipe.yaml"), str(folder / "out")
    with _forked_from_here():
        return cli.main(
            ["sweep", recipe, "--axis", "seed=3,4", "--workers", "2", "--out", out, "--train.max_steps", "4"]
        )


def _measure(folder: Path) -> int:
    shared = _shared(folder)
    words = ["--data", str(shared / "text.txt"), "--tokens", "2048", "--shards", "2", "--out", str(folder / "out")]
    return cli.main(["measure", str(shared / "pretrained" / "out" / "final"), *words])


def _memory(folder: Path) -> int:
    size = ["--d", "8", "16", "--alpha", "1.5", "--n-items", "200", "--seeds", "3", "--rules", "sgd", "muon"]
    return cli.main(["memory", "one-step", *size, "--no-figures", "--resume", "--out", str(folder / "out")])


def _ranks(folder: Path) -> int:
    """The script on two gloo ranks; what is odd about one of them is in ``ODD``."""
    run_ranks(_one_rank, 2, folder, init=False, timeout_s=50)
    return 0


ODD: dict[str, Any] = {}  # how: dies, lags, raises or none; step


class _Odd(toys.Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if ODD and self.global_rank == 1 and self.global_step == ODD["step"]:
            if ODD["how"] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if ODD["how"] == "raises":
                raise ArithmeticError("on one rank")
            if ODD["how"] == "none":
                return None
            time.sleep(1.0)
        return self.loss(batch)


def _one_rank(rank: int, world_size: int, folder: Path) -> None:
    out = folder / "out"
    torch.manual_seed(1)
    trainer = pl.Trainer(
        default_root_dir=out, max_epochs=4, accelerator="cpu", devices=world_size, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[
            SpectralRankCallback(2, dirpath=str(out / "records")),
            ModelCheckpoint(out / "checkpoints", every_n_epochs=1, save_top_k=-1, filename="{step:03d}"),
        ],
    )  # fmt: skip
    checkpoints = sorted((out / "checkpoints").glob("*.ckpt"), reverse=True)
    newest = next((path for path in checkpoints if is_whole(path)), None)
    lit, data = _Odd(), DataLoader(toys.ids(16, seed=rank), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(lit, data, ckpt_path=newest)
    if rank == 0:
        with whole_file(out / "final.pth") as partial:
            torch.save(lit.state_dict(), partial)


def recorded(folder: Path) -> Facts:
    """Every whole record below a folder, wherever it was moved: file's kind, key and digest -> content.

    Of two runs in one place (one was begun again before its first checkpoint) both have a record of a key.
    """
    found: Facts = {}
    for name in (*_READERS, "eigenvalues"):
        for path in sorted(folder.rglob(name)):
            for key, value in _content(path).items():
                found[f"{_run_of(path, folder)}:{key}:{hashlib.sha256(value.encode()).hexdigest()[:12]}"] = value
    return found


def _content(path: Path) -> Facts:
    """The records of one file, or the spectra of one folder."""
    if path.name == "eigenvalues":
        files = sorted(path.glob("*.safetensors"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the incomplete last line of a killed run
        found = [asdict(record) for record in _READERS[path.name](path).records]
    keys = (
        "stage",
        "step",
        "layer",
        "stack",
        "module",
        "parameter",
        "what",
        "site",
        "bucket",
        "expert",
        "loader",
        "ordinal",
    )
    return {
        f"{path.name}:{[record.get(key) for key in keys]}": json.dumps(
            {key: _rounded(value) for key, value in record.items() if key not in _OF_ONE_RUN}, sort_keys=True
        )
        for record in found
    }


def _rounded(value: Any) -> Any:
    """To nine digits: which of two callbacks writes the pooled record that both measure is a matter of time, and one
    of them adds the rows bucket by bucket."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else value


def _run_of(path: Path, folder: Path) -> str:
    """The run that a file belongs to, wherever it was moved."""
    parts = path.relative_to(folder).parts
    return next((part for part in parts if part.startswith("seed-")), "")


def rows(folder: Path) -> Facts:
    """Rows of ``results.jsonl`` below a folder."""
    found: Facts = {}
    for path in folder.rglob("results.jsonl"):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                row = {key: value for key, value in row.items() if not key.endswith(("seconds", "_s"))}
                name = ":".join(str(row.get(key)) for key in ("kind", "d", "rule", "seed", "batch_size"))
                found[name] = json.dumps(row, sort_keys=True)
    return found


def _main_records(folder: Path, *below: str) -> Facts:
    """Records of the runs in these folders, and of no other runs below them."""
    files = [(path, folder / path / name) for path in below for name in (*_READERS, "eigenvalues")]
    return {f"{path}:{key}": value for path, file in files if file.exists() for key, value in _content(file).items()}


def digest(weights: Path) -> str:
    """Of the tensors in a file, not of the file."""
    total = hashlib.sha256()
    for name, tensor in sorted(torch.load(weights, weights_only=True).items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def _weights_of(folder: Path, *files: str) -> Facts:
    return {f"weights:{file}": digest(folder / file) for file in files if (folder / file).is_file()}


def _pretrain_result(folder: Path) -> Facts:
    return {**_main_records(folder, "out"), **_weights_of(folder, "out/final/lit_model.pth")}


def _script_result(folder: Path) -> Facts:
    return {**_main_records(folder, "out/records"), **_weights_of(folder, "out/final.pth")}


def _sweep_result(folder: Path) -> Facts:
    runs = sorted(path.name for path in (folder / "out").glob("seed-*") if path.is_dir())
    found = _main_records(folder, *(f"out/{run}" for run in runs))
    return {**found, **_weights_of(folder, *(f"out/{run}/final/lit_model.pth" for run in runs))}


def _measure_result(folder: Path) -> Facts:
    """Of the newest run: an interrupted one is measured again, and what it had is in ``previous/``."""
    runs = [path.parent.relative_to(folder) for path in (folder / "out").rglob("run.json")]
    return _main_records(folder, *(str(run) for run in runs if "previous" not in run.parts))


def _memory_result(folder: Path) -> Facts:
    with (folder / "out" / "results.csv").open(newline="") as file:
        table = sorted(
            json.dumps({k: v for k, v in row.items() if not k.endswith(("seconds", "_s"))})
            for row in csv.DictReader(file)
        )
    return {**rows(folder / "out"), "table": "\n".join(table)}


JOBS = {
    job.name: job
    for job in (
        Job("pretrain", _pretrain, _pretrain_result, recorded),
        Job("cache", _pretrain_cache, _pretrain_result, recorded),
        Job("script", _script, _script_result, recorded),
        Job("sweep", _sweep, _sweep_result, recorded),
        Job("measure", _measure, _measure_result, recorded),
        Job("ranks", _ranks, _script_result, recorded),
        Job("memory", _memory, _memory_result, rows),
    )
}


def prepare(work: Path) -> None:
    """What every fault shares: inputs, and a trained model to measure."""
    shared = shared_inputs(work / "shared")
    cwd = os.getcwd()
    recipe = str(shared / "recipe.yaml")
    code = cli.main(
        ["pretrain", "--config", recipe, "--out_dir", str(shared / "pretrained" / "out"), "--train.max_steps", "2"]
    )
    assert code == 0, "the undisturbed run fails"
    os.chdir(cwd)
