"""Runs a script without us and with us, and compares: how it ended, weights, losses, and every record with an oracle.

The oracle is a hook of the harness's own on one down projection: the rows of forwards that train, by optimizer step. A
record either has the oracle's number of rows and rank, or a status that says why it has no number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.models.names import clean_name
from lightning_spectral.records import SpectralRecord, read_losses
from tests.scripts import toys

LOST = {"no_forward", "not_matched", "solve_failed"}
WAYS = ("without", "rank", "tail", "variable")


@dataclass
class Script:
    """One training script.

    Attributes:
        module: Makes its LightningModule.
        data: Makes what ``fit`` gets.
        options: Of the Trainer.
        callbacks: Makes callbacks of the script's own.
        on: Stages that are measured.
        exact: Windows must have numbers; else a status will do.
        losses: The records' pooled loss must be the mean of what the script computed.
        refuses: The model cannot be measured: an explicit callback says so before step 1, the variable warns.
        evaluated_rows: Rows that a validation must have.
        unscored: The losses must have the status ``not_matched``, with a reason.
        prepare: Called with the folder before ``fit``; returns further arguments of ``fit``.
        settings: Further arguments of our callbacks.
        run: What the script does with its Trainer, module, data and further arguments.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], tuple[Any, ...]] = lambda: (toys.loader(),)
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    on: tuple[str, ...] = ("train",)
    exact: bool = True
    losses: bool = True
    refuses: bool = False
    evaluated_rows: int | None = None
    unscored: bool = False
    prepare: Callable[[Path], dict[str, Any]] = lambda path: {}
    settings: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = lambda trainer, module, *data, **options: trainer.fit(module, *data, **options)


@dataclass
class Outcome:
    """How a script ended."""

    ended: str
    step: int
    weights: list[Tensor]
    losses: list[Tensor]
    rng: Tensor
    rows: dict[int, list[Tensor]]
    warnings: list[str]
    watched: str = ""
    row_ids: dict[int, list[Tensor]] = field(default_factory=dict)


class Notes(pl.Callback):
    """The script's own notes: rows that train, by optimizer step, and the losses that it returned."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Tensor]] = {}
        self.losses: list[Tensor] = []
        self.row_ids: dict[int, list[Tensor]] = {}
        self.watched = ""
        self._trains = False
        self._handle: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = pl_module.watched() if isinstance(pl_module, toys.Lit) else None
        if module is not None:
            self.watched = clean_name(next(name for name, found in pl_module.named_modules() if found is module))

            def keep(called: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                rows = args[0] if args else kwargs["input"]
                backward = torch._C._current_graph_task_id() != -1
                functorch = torch._C._functorch.peek_interpreter_stack() is not None
                of_a_copy = called is not module
                if self._trains and not of_a_copy and torch.is_grad_enabled() and not backward and not functorch:
                    kept = pl_module.counted(rows.detach())
                    self.rows.setdefault(trainer.global_step, []).append(kept.reshape(-1, kept.shape[-1]).clone())
                    if pl_module.row_ids is not None:
                        self.row_ids.setdefault(trainer.global_step, []).append(pl_module.row_ids.flatten().clone())

            self._handle = module.register_forward_pre_hook(keep, with_kwargs=True)

    def on_train_batch_start(self, *_: Any) -> None:
        self._trains = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trains = False
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(outputs["loss"].detach().clone())

    def on_validation_start(self, *_: Any) -> None:
        self._trains = False

    def forget(self, step: int) -> None:
        """What was seen in this step did not train."""
        self.rows.pop(step, None)

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._handle is not None:
            self._handle.remove()


def run(script: Script, way: str, path: Path) -> Outcome:
    """Run a script in one of the :data:`WAYS`; records go to ``path / "records"``."""
    torch.manual_seed(1)
    notes = Notes()
    settings: dict[str, Any] = {"on": list(script.on), "dirpath": str(path / "records"), "background": False}
    settings |= script.settings
    ours: dict[str, Callable[[], list[Any]]] = {
        "rank": lambda: [SpectralRankCallback(2, **settings)],
        "tail": lambda: [TailTokenProbe(2, counts=toys.counts(), **settings)],
    }
    defaults = {
        "max_steps": 6, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    module = script.module()
    ended, step = "ok", -1
    with _variable(path, settings if way == "variable" else None), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            default_root_dir=str(path),
            callbacks=[*script.callbacks(), *ours.get(way, list)(), notes],
            **{**defaults, **script.options},
        )
        try:
            script.run(trainer, module, *script.data(), **script.prepare(path))
        except BaseException as error:
            if isinstance(error, (pytest.fail.Exception, MemoryError)):
                raise
            ended = f"{type(error).__name__}: {error}"
        step = trainer.global_step
    weights = [tensor.detach().clone() for tensor in module.state_dict().values()]
    told = [str(warning.message) for warning in caught]
    found = Outcome(ended, step, weights, notes.losses, torch.get_rng_state(), notes.rows, told)
    found.watched, found.row_ids = notes.watched, notes.row_ids
    return found


def compare(script: Script, ways: tuple[str, ...], path: Path) -> None:
    """Run a script in all ways and assert what must hold."""
    plain = run(script, "without", path / "without")
    for way in ways:
        ours = run(script, way, path / way)
        if script.refuses and way != "variable":
            assert ours.ended.startswith("MisconfigurationException"), ours.ended
            assert ours.step == 0
            continue
        assert (ours.ended, ours.step) == (plain.ended, plain.step), way
        _same(plain.weights, ours.weights, f"{way}: weights")
        _same(plain.losses, ours.losses, f"{way}: losses")
        assert torch.equal(plain.rng, ours.rng), f"{way}: random state"
        check_records(script, ours, path / way / "records", with_losses=way == "tail" and script.losses)
        repeated = [text for text in ours.warnings if text.startswith(("SpectralRank", "TailToken", "Injected"))]
        assert len(repeated) == len(set(repeated)), f"told twice: {repeated}"


def check_records(script: Script, outcome: Outcome, folder: Path, *, with_losses: bool) -> None:
    """Every record of training has the oracle's rows and rank, or says why not."""
    records = read_spectral(folder).records if (folder / "spectral.jsonl").exists() else []
    pooled = [r for r in records if r.stage == "train" and r.bucket == "pooled"]
    pooled = [r for r in pooled if (r.module == outcome.watched if outcome.watched else r.layer == 0)]
    if script.exact and not script.refuses and outcome.step > 0:
        assert pooled, f"no record; told: {outcome.warnings}"
    for record in records:
        if record.status in LOST:
            assert record.reason, record
            assert record.hard_rank is None
    for record in pooled:
        if record.status in LOST:
            assert not script.exact or not outcome.rows.get(record.step or 0), f"{record.status}: {record.reason}"
        elif outcome.rows:
            _check_rows(record, torch.cat(outcome.rows.get(record.step or 0, [torch.zeros(0, toys.WIDTH)])))
    if outcome.row_ids:
        _check_buckets(outcome, records)
    _check_evaluation(script, records)
    _check_losses(script, outcome, folder, with_losses=with_losses)


def _check_evaluation(script: Script, records: list[SpectralRecord]) -> None:
    evaluated = [r for r in records if r.stage == "validation" and r.bucket == "pooled" and r.layer == 0]
    if script.evaluated_rows is not None:
        assert {r.num_tokens for r in evaluated} == {script.evaluated_rows}


def _check_losses(script: Script, outcome: Outcome, folder: Path, *, with_losses: bool) -> None:
    if script.unscored and (folder / "losses.jsonl").exists():
        scored = [r for r in read_losses(folder).records if r.stage == "train"]
        assert scored
        assert all(r.status == "not_matched" and r.reason for r in scored), scored
    if with_losses and script.exact and outcome.losses:
        losses = {r.step: r for r in read_losses(folder).records if r.bucket == "pooled" and r.stage == "train"}
        assert losses[0].loss == pytest.approx(float(outcome.losses[0]), rel=1e-5)


def _check_buckets(outcome: Outcome, records: list[SpectralRecord]) -> None:
    """Rows and rank of each bucket, by the rule of the paper, written once more."""
    counts = toys.counts()
    ordered = counts.sort(descending=True).values
    share = ordered.cumsum(0) / counts.sum()
    last_head, last_mid = int((share <= 0.33).sum()) - 1, int((share <= 0.67).sum()) - 1
    bucket = torch.full_like(counts, 2).masked_fill(counts >= ordered[last_mid], 1)
    bucket = bucket.masked_fill(counts >= ordered[last_head], 0)
    for record in records:
        step = record.step or 0
        fits = record.stage == "train" and record.module == outcome.watched and record.bucket in toys.BUCKETS
        if fits and record.status not in LOST and step in outcome.row_ids:
            mine = bucket[torch.cat(outcome.row_ids[step])] == toys.BUCKETS.index(record.bucket)
            _check_rows(record, torch.cat(outcome.rows[step])[mine])


def _check_rows(record: SpectralRecord, rows: Tensor) -> None:
    assert record.num_tokens == len(rows), f"step {record.step}: {record.num_tokens} rows of {len(rows)}"
    if record.hard_rank is not None:
        eigs = torch.linalg.eigvalsh(torch.cov(rows.double().T))
        expected = float(eigs.sum() ** 2 / eigs.square().sum())
        tolerance = 0.02 if record.dtype == "bfloat16" else 1e-4  # fp32 products; 8 bits of mantissa
        assert record.hard_rank == pytest.approx(expected, rel=tolerance)


def _same(expected: list[Tensor], found: list[Tensor], what: str) -> None:
    assert len(expected) == len(found), what
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype, what
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True), what


@contextmanager
def _variable(path: Path, settings: dict[str, Any] | None) -> Iterator[None]:
    if settings is None:
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    spec = {"class_path": "SpectralRankCallback", "init_args": {"every_n_steps": 2, **settings}}
    (path / "probe.yaml").write_text(yaml.safe_dump({"callbacks": [spec]}))
    os.environ["LIGHTNING_SPECTRAL"] = str(path / "probe.yaml")
    try:
        yield
    finally:
        del os.environ["LIGHTNING_SPECTRAL"]
