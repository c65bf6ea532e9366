"""Every reader on damaged files: it gives what is whole, or one of the errors that it documents; never a traceback.

A file is cut, bytes are changed, zeroed, inserted, lines repeated: as disks, editors and transfers do.
"""

from __future__ import annotations

import json
import random
import re
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

from lightning_spectral.analysis.foreign import loss_records, manifest_rows, read_foreign, spectral_records
from lightning_spectral.analysis.published import read_curves
from lightning_spectral.analysis.reading import _progress, read_run_folder
from lightning_spectral.analysis.scan import scan_spectral
from lightning_spectral.analysis.spectra import read_spectrum
from lightning_spectral.analysis.tidy import read_points_csv
from lightning_spectral.callbacks.probe_file import load_callbacks
from lightning_spectral.callbacks.update_audience import read_audience
from lightning_spectral.cli import main
from lightning_spectral.cli.model_source import model_of
from lightning_spectral.data.litdata_folder import open_chunks
from lightning_spectral.memory.advise import read_counts
from lightning_spectral.memory.fit import read_results
from lightning_spectral.models.checkpoint_file import CheckpointError, read_checkpoint
from lightning_spectral.probe.audience import AudienceRecord
from lightning_spectral.probe.grouping import load_counts
from lightning_spectral.probe.run_lock import RunLock
from lightning_spectral.records import (
    AlarmRecord,
    LossRecord,
    RunInfo,
    WeightRecord,
    append_records,
    read_alarms,
    read_losses,
    read_run,
    read_spectral,
    read_weights,
    to_json,
    write_run,
)
from lightning_spectral.report.figures_audience import _of_audience
from lightning_spectral.sweep.plan import read_json
from lightning_spectral.tensorboard.reader import RunReader
from lightning_spectral.text import CommandError
from lightning_spectral.training.checkpoint_names import progress_of
from lightning_spectral.training.document import RecipeError, read_tree
from tests.analysis.synthetic import write_study
from tests.data.test_litdata import write_folder
from tests.records_factory import spectral

DAMAGES = 60


@dataclass
class Reader:
    """How a whole file is made, how it is read, and what the reader may raise."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = ()


def jsonl(name: str, records: list[Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        append_records(folder / name, records)
        return folder / name

    return make


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def run_json(folder: Path) -> Path:
    write_run(folder, RunInfo("run", "2026-01-01T00:00:00+00:00", "AdamW", hparams={"a": {"b": [1, 2.5, None]}}))
    return folder / "run.json"


def run_folder(damaged: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        run_json(folder)
        append_records(folder / "spectral.jsonl", SPECTRAL)
        append_records(folder / "losses.jsonl", LOSSES)
        return folder / damaged

    return make


def array(folder: Path) -> Path:
    np.save(folder / "counts.npy", np.arange(40, dtype=np.int64))
    return folder / "counts.npy"


def checkpoint(folder: Path) -> Path:
    torch.save({"weight": torch.arange(6.0), "step": 3}, folder / "a.ckpt")
    return folder / "a.ckpt"


def weights(folder: Path) -> Path:
    save_file({"h.0.up.weight": torch.zeros(8, 4), "h.0.down.weight": torch.zeros(4, 8)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def spectra(folder: Path) -> Path:
    save_file({"layer_00.post.pooled": torch.arange(6.0)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def litdata(damaged: str) -> Callable[[Path], Path]:
    return lambda folder: write_folder(folder / "tokens", [[1, 2, 3], [4, 5], [6]]) / damaged


def log(name: str, *lines: str) -> Callable[[Path], Path]:
    return text(name, "".join(f"{line}\n" for line in lines))


def imported(path: Path) -> Any:
    """What `import` makes of a log."""
    return [(spectral_records(run, 64), loss_records(run)) for run in read_foreign(path, None)]


SPECTRAL = [spectral(step=step, bucket=bucket) for step in range(3) for bucket in ("head", "tail")]
LOSSES = [LossRecord("run", "train", step, 10 * step, "tail", 64, 2.0, 0.5) for step in range(4)]
WEIGHTS = [WeightRecord("run", step, "h.0.weight", 0, "weight", 8, 4, "ok") for step in range(4)]
ALARM = AlarmRecord(
    run_id="run", stage="train", step=1, metric="hard_rank", site="post", bucket="tail", value=1.0, reference=2.0,
    relative_to="width", threshold=0.5, message="hard_rank is low",
)  # fmt: skip
AUDIENCE = [AudienceRecord("run", step, "mlp", "muon", "tail", 0.5, 2.0, 64, 2, False) for step in range(3)]
POINTS = "".join(f"AdamW,{w},0,{w**0.5}\nMuon,{w},0,{w**0.6}\n" for w in (64, 128, 256))
PROBE = {"callbacks": [{"class_path": "SpectralRankCallback", "init_args": {}}]}
GARBAGE = [b"\xff", b"\0", b"\n", b"{", b"[" * 5000, b'"', b"null", b"1e999", b"-"]

READERS = {
    "spectral.jsonl": Reader(jsonl("spectral.jsonl", SPECTRAL), lambda path: read_spectral(path).records),
    "losses.jsonl": Reader(jsonl("losses.jsonl", LOSSES), lambda path: read_losses(path).records),
    "weights.jsonl": Reader(jsonl("weights.jsonl", WEIGHTS), lambda path: read_weights(path).records),
    "alarms.jsonl": Reader(jsonl("alarms.jsonl", [ALARM, replace(ALARM, step=2)]), lambda p: read_alarms(p).records),
    "spectral.jsonl as columns": Reader(jsonl("spectral.jsonl", SPECTRAL), scan_spectral),
    "run.json": Reader(run_json, read_run, (ValueError,)),
    "a run's records": Reader(run_folder("spectral.jsonl"), lambda path: read_run_folder(path.parent)),
    "a run's losses": Reader(run_folder("losses.jsonl"), lambda path: read_run_folder(path.parent)),
    "a run's description": Reader(run_folder("run.json"), lambda path: read_run_folder(path.parent)),
    "the tab's records": Reader(run_folder("spectral.jsonl"), lambda path: RunReader(path.parent).refresh()),
    "the tab's description": Reader(run_folder("run.json"), lambda path: RunReader(path.parent).refresh()),
    "points.csv": Reader(text("points.csv", "optimizer,width,seed,value\n" + POINTS), read_points_csv, (ValueError,)),
    "results.jsonl": Reader(text("results.jsonl", '{"kind": "batch", "d": 8}\n' * 3), read_results),
    "audience.jsonl": Reader(
        text("audience.jsonl", "".join(json.dumps(one.as_dict()) + "\n" for one in AUDIENCE)), read_audience
    ),
    "a sweep's state": Reader(text("state.json", json.dumps({"name": "done", "steps": [1]}, indent=1)), read_json),
    "counts.npy": Reader(array, load_counts, (ValueError,)),
    "counts of memory": Reader(array, lambda path: read_counts(str(path)), (CommandError,)),
    "a checkpoint": Reader(checkpoint, read_checkpoint, (CheckpointError,)),
    "weights to look at": Reader(weights, lambda path: model_of(str(path), {}), (CommandError,)),
    "eigenvalues": Reader(spectra, lambda path: read_spectrum(path, "layer_00", "post", "pooled")),
    "trainer_state.json": Reader(
        text("trainer_state.json", '{"global_step": 7, "num_input_tokens_seen": 90}'), lambda p: progress_of(p.parent)
    ),
    "run.lock": Reader(
        text("run.lock", json.dumps({"host": socket.gethostname(), "pid": 1, "started": "1"})),
        lambda path: RunLock(path.parent).acquire(),
    ),
    "a sweep's progress": Reader(
        text("sweep_progress.json", '{"data": {"train": "a"}, "seconds": 4.5}'), lambda path: _progress(path.parent)
    ),
    "losses of a figure": Reader(
        text("audience.jsonl", "".join(json.dumps(one.as_dict()) + "\n" for one in AUDIENCE)), _of_audience
    ),
    "a log of lines of JSON": Reader(
        log("a.jsonl", *(f'{{"_step": {n}, "spectral/hard_rank.tail": 3.5, "train_loss": 2.5}}' for n in range(4))),
        imported, (ValueError,),
    ),
    "a log of columns": Reader(
        log("a.csv", "Step,spectral/hard_rank.tail", *(f"{n},3.5" for n in range(5))), imported, (ValueError,)
    ),
    "a log of the paper's": Reader(
        log("layer_1.txt", *(f"Step {n}: SE_post=5.4, PR_post=30.1" for n in range(5))), imported, (ValueError,)
    ),
    "an index of litdata": Reader(litdata("index.json"), lambda path: open_chunks(path.parent), (ValueError,)),
    "a chunk of litdata": Reader(litdata("chunk-0-0.bin"), lambda path: open_chunks(path.parent), (ValueError,)),
    "a manifest": Reader(log("m.csv", "run_id,width", "a,64", "b,128"), manifest_rows, (ValueError,)),
    "a recipe": Reader(text("a.yaml", yaml.safe_dump({"train": {"max_steps": 3}})), read_tree, (RecipeError,)),
    "probe.yaml": Reader(text("a.yaml", yaml.safe_dump(PROBE)), load_callbacks, (MisconfigurationException,)),
}  # fmt: skip


VALUES = [b"1e999", b"-1", b"9" * 400, b"NaN", b"null", b"[]", b"{}", b"true", b'"x"', b"[" * 100_000, b'"\\ud800"']


def another_value(content: bytes, rng: random.Random) -> bytes:
    """Syntax right, value wrong: one number or text is another, as of a file that anybody may have written."""
    found = list(re.finditer(rb'-?\d+(?:\.\d+)?|"[^"]*"', content))
    if not found:
        return damaged(content, rng)
    match = rng.choice(found)
    return content[: match.start()] + rng.choice(VALUES) + content[match.end() :]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three damages."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, len(content)))
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + bytes(len(content) - at)
        elif kind == 3:
            content = content[:at] + rng.choice(GARBAGE) + content[at:]
        elif kind == 4:
            lines = content.splitlines(keepends=True) or [b""]
            content = b"".join([*lines, rng.choice(lines)])
        else:
            end = rng.randrange(at, len(content) + 1)
            content = content[:at] + content[end:]
    return content


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_as_far_as_it_is_whole_or_refused(name: str, tmp_path: Path) -> None:
    reader, rng = READERS[name], random.Random(name)
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.read(path)
        told = []
        for number in range(2 * DAMAGES):
            path.write_bytes((another_value if number % 2 else damaged)(whole, rng))
            try:
                reader.read(path)
            except reader.errors as error:
                told.append(str(error))
        assert all(told), "an error without a word"


LINES = {
    "spectral.jsonl": (SPECTRAL, read_spectral),
    "losses.jsonl": (LOSSES, read_losses),
    "weights.jsonl": (WEIGHTS, read_weights),
}


@pytest.mark.parametrize("name", LINES)
def test_whole_lines_between_damaged_ones_are_all_read(name: str, tmp_path: Path) -> None:
    """Whatever stands between them, in order, the first of each key; each line that is left out is counted."""
    records, read = LINES[name]
    rng = random.Random(name)
    for _ in range(DAMAGES):
        lines: list[bytes] = []
        for record in records:
            line = to_json(record).encode()
            lines += [damaged(line, rng).replace(b"\n", b"") for _ in range(rng.randrange(2))]
            lines.append(line)
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = read(tmp_path)  # type: ignore[operator]
        whole = [line for line in lines if line.strip()]
        assert len(report.records) + len(report.skipped) == len(whole)
        found = {record.key: record for record in report.records}
        for record in records:
            # a damaged line before it may be a record of the same key with another number
            assert record.key in found


def test_both_readers_of_spectra_leave_out_the_same_lines(tmp_path: Path) -> None:
    rng, path = random.Random(5), tmp_path / "spectral.jsonl"
    whole = "".join(to_json(record) + "\n" for record in SPECTRAL).encode()
    for _ in range(3 * DAMAGES):
        path.write_bytes(damaged(whole, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = read_spectral(path)
        columns = scan_spectral(path)
        assert [number for number, _ in columns.skipped] == [number for number, _ in report.skipped]
        assert columns.ints["step"].tolist() == [-1 if r.step is None else r.step for r in report.records]


@pytest.mark.parametrize("read", [manifest_rows, lambda path: read_foreign(path, None), read_curves, read_points_csv])
def test_a_table_with_a_quotation_mark_left_open_is_named(read: Any, tmp_path: Path) -> None:
    """All that follows is one cell, longer than the csv module reads: its error is no ValueError."""
    (tmp_path / "a.csv").write_text('run_id,step,width,soft_rank\n"' + "x,1,64,2.0\n" * 20_000)
    with pytest.raises(ValueError, match=r"a.csv` is no whole table"):
        read(tmp_path / "a.csv")


def test_whole_numbers_of_any_size_and_labels_of_any_kind_are_read(tmp_path: Path) -> None:
    """Written by another program: JSON has no limit of a number, and a label may be one."""
    runs = write_study(tmp_path, {"muon": 0.9, "adamw": 0.3}, widths=(64, 128, 256), steps=(100,), layers=1)
    for number, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "spectral.jsonl").read_text().splitlines()]
        lines[0] |= {"hard_rank_across_sequences": 2**70, "mine": 10**400, "other": None}
        (run / "spectral.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = json.loads((run / "run.json").read_text())
        about["labels"] = {"optimizer": number // 3 + 0.5, "warm": True, "note": None}
        (run / "run.json").write_text(json.dumps(about))
    columns = scan_spectral(runs[0] / "spectral.jsonl")
    assert np.nanmax(columns.floats["hard_rank_across_sequences"]) == 2.0**70
    assert np.isinf(columns.floats["mine"]).sum() == 1
    found = read_run_folder(runs[3])[0]
    assert found is not None
    assert (found.optimizer, found.info.labels) == ("1.5", {"optimizer": "1.5", "warm": "True"})
    assert main(["compare", str(tmp_path), "--last", "1"]) == 0
    assert main(["report", str(tmp_path), "--last", "1", "--out", str(tmp_path / "page")]) == 0
