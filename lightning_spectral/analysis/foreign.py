"""Logs that others wrote -> run folders: the paper's raw logs, TensorBoard event files, exports of W&B.

Every format becomes the same thing first, numbers with a step and a place (:class:`Number`); then records. What a log
does not say (the width, the optimizer, the seed) comes from a manifest or from the caller.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lightning_spectral.analysis.cells import finite, number_of, read_sheet, text_of
from lightning_spectral.analysis.foreign_rows import logged
from lightning_spectral.analysis.tables import ours
from lightning_spectral.records import POOLED, LossRecord, SpectralRecord
from lightning_spectral.text import parse_json

_STEP: Final = re.compile(r"^\s*step\s+(\d{1,15})\s*:(.*)$", re.IGNORECASE)
_BUCKET: Final = re.compile(r"^\s*([A-Za-z][\w ]*?)\s*\(n=(\d{1,15})\)\s*:(.*)$")
_PAIR: Final = re.compile(r"(\w+)=([-+.\deEnNaAiIfF]+)")
# of the paper's logs -> field of a record
_PAPER: Final = {"SE": "spectral_entropy", "PR": "hard_rank", "EEE": "early_enrichment", "JS": "js_divergence"}
_LAYER: Final = re.compile(r"layer[_-]?(\d+)", re.IGNORECASE)
# our own tags (`probe.scalars`), details of a layer and medians over layers, and losses; a browser saves
# a file with `_` where a tag has `/`
TAGS: Final = (
    re.compile(r"spectral(?:_(?P<stage>[a-z]+))?\.(?P<metric>\w+)\.(?P<site>pre|post)\.(?P<bucket>[^/]+)[/_]layer_(?P<layer>\d+)"),
    re.compile(r"spectral(?:_(?P<stage>validation|test|predict))?[/_](?P<metric>\w+?_rank)(?:\.(?P<site>pre))?\.(?P<bucket>[^./]+)"),
    re.compile(r"spectral_loss(?:_(?P<stage>[a-z]+))?[/_](?P<metric>loss|accuracy)\.(?P<bucket>[^/]+)"),
    re.compile(r"(?:(?P<stage>train|val|validation|eval|test)[/_.])?(?P<metric>(?:lm_|ce_)?loss)", re.IGNORECASE),
    re.compile(r"(?P<metric>loss)[/_.](?P<stage>train|val|validation|eval|test)", re.IGNORECASE),
)  # fmt: skip
_STAGES: Final = {"val": "validation", "eval": "validation", "": "train"}
_FIELDS: Final = ("soft_rank", "hard_rank", "spectral_entropy", "early_enrichment", "top_share", "trace")
_LAST_STEP: Final = 2**53  # beyond it not every whole number is a float
_LARGEST: Final = 700.0  # of an entropy in nats whose exponential is a number
_NOT_FINITE: Final = "NaN, infinite or no number"
_NO_STEP: Final = "of a step that is no whole number from 0 on"


@dataclass(frozen=True)
class Number:
    """One logged number.

    Attributes:
        step: Optimizer step.
        metric: Field of a record, or a name of its own.
        value: The number.
        stage: ``train``, ``validation``, ...
        site: ``post`` or ``pre``.
        bucket: ``pooled``, ``head``, ...
        layer: Depth; ``None`` for what is no layer's.
        num_tokens: Rows behind it; 0 if the log does not say.
    """

    step: int
    metric: str
    value: float
    stage: str = "train"
    site: str = "post"
    bucket: str = POOLED
    layer: int | None = None
    num_tokens: int = 0


@dataclass
class ForeignRun:
    """Numbers of one run.

    Attributes:
        name: Its id.
        place: File or folder that they come from.
        source: ``paper_log``, ``tensorboard`` or ``wandb``.
        numbers: In file order.
        unread: Names that were no number of ours, each once.
        left_out: Why known numbers were left out -> how many.
    """

    name: str
    place: Path
    source: str
    numbers: list[Number] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def read_foreign(path: str | Path, tag: str | None = None) -> list[ForeignRun]:
    """Every run in a file, or at or below a folder.

    Args:
        path: A log of the paper (``Step N: SE_pre=...``), an event file, an export of W&B (CSV, JSON or JSON lines), a
            download of TensorBoard, ``trainer_state.json``, a long table (``tag`` and ``value``), or a folder of them;
            texts may be gzipped. Logs and events of one folder are one run; so are the columns of a table with one
            name, and its rows with one name in a column ``run_id``, ``run`` or ``name``.
        tag: Regular expression with the groups ``metric`` and, as far as they are there, ``stage``, ``site``,
            ``bucket`` and ``layer``, for tags that are not ours.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If a file is of no known kind, or the expression is wrong.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: `{root}`.")
    place_of = _places(tag)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if _reader_of(file) is not None)
    runs: dict[str, ForeignRun] = {}
    for file in files:
        read = _reader_of(file)
        if read is None:
            raise ValueError(
                f"`{file}` is no log that can be imported: give .txt, .log, .csv, .json, .jsonl or an event file."
            )
        read(file, root, runs, place_of)
    found = [run for run in runs.values() if run.numbers]
    if not found:
        names = list(dict.fromkeys(name for run in runs.values() for name in run.unread))[:6]
        seen = f"; it has {', '.join(f'`{name}`' for name in names)}: say what they are with --tag" if names else ""
        if not files:
            seen = ": it has no .txt, .log, .csv, .json, .jsonl or event file; give the folder that holds the logs"
        if not seen:
            seen = ": give the paper's raw logs (`Step N: SE_pre=...`), TensorBoard event files, or exports of W&B"
        raise ValueError(f"`{root}` holds no number that is known here{seen}.")
    return found


Place = Callable[[str], "Mapping[str, str] | None"]
Reader = Callable[[Path, Path, "dict[str, ForeignRun]", Place], None]


def _places(tag: str | None) -> Place:
    try:
        patterns = (*([re.compile(tag)] if tag else []), *TAGS)
    except re.error as error:
        raise ValueError(f"--tag `{tag}` is no regular expression: {error}.") from error
    if tag and "metric" not in patterns[0].groupindex:
        raise ValueError(f"--tag `{tag}` has no group `(?P<metric>...)`: nothing says what a number is.")

    def place_of(name: str) -> Mapping[str, str] | None:
        found = next((match for pattern in patterns if (match := pattern.fullmatch(name))), None)
        return None if found is None else {key: value or "" for key, value in found.groupdict().items()}

    return place_of


def _reader_of(file: Path) -> Reader | None:
    if "tfevents" in file.name:
        return _read_events
    readers: dict[str, Reader] = {".txt": _read_paper, ".log": _read_paper, ".csv": _read_csv, ".tsv": _read_csv}
    return (readers | {".json": _read_json, ".jsonl": _read_json}).get(Path(_plain(file)).suffix)


def _plain(file: Path) -> str:
    """Name of a file without the ending of gzip."""
    return file.name.removesuffix(".gz")


def _run_of(runs: dict[str, ForeignRun], name: str, place: Path, source: str) -> ForeignRun:
    return runs.setdefault(name, ForeignRun(name, place, source))


def _folder_name(file: Path, root: Path) -> str:
    """Id of the run of a folder: its path below the root, or the root's own name."""
    inside = file.parent.relative_to(root if root.is_dir() else file.parent)
    return "_".join(inside.parts) or file.parent.resolve().name


def _read_paper(file: Path, root: Path, runs: dict[str, ForeignRun], _: Place) -> None:
    name = _folder_name(file, root)
    found = _LAYER.search(_plain(file))
    layer = int(found[1]) if found else 0
    step = -1
    for line in text_of(file).splitlines():
        bucket, tokens = POOLED, 0
        if match := _STEP.match(line):
            step, rest = int(match[1]), match[2]
        elif match := _BUCKET.match(line):
            bucket, tokens, rest = ours(match[1].strip()), int(match[2]), match[3]
        else:
            continue  # what else a job prints belongs to no step, even if it has such pairs
        if step >= 0:
            run = _run_of(runs, name, file.parent, "paper_log")
            numbers = _paper_numbers(rest, run)
            run.numbers += [Number(step, m, v, "train", s, bucket, layer, tokens) for m, s, v in numbers]


def _paper_numbers(text: str, run: ForeignRun) -> Iterator[tuple[str, str, float]]:
    """``SE_pre=5.4, PR_post=30.1, JS=0.03`` -> (field, site, value); the divergence is the post site's."""
    for key, cell in _PAIR.findall(text):
        name, _, site = key.partition("_")
        value = finite(cell)
        if name in _PAPER and value is not None:
            yield _PAPER[name], site or "post", value
        elif name in _PAPER:
            run.left_out[_NOT_FINITE] += 1


def _read_events(file: Path, root: Path, runs: dict[str, ForeignRun], place_of: Place) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    run = _run_of(runs, _folder_name(file, root), file.parent, "tensorboard")
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            scalar = make_ndarray(value.tensor) if value.HasField("tensor") else None
            if scalar is not None and scalar.size == 1 and scalar.dtype.kind in "fiu":
                _add(run, value.tag, int(event.step), float(scalar.reshape(-1)[0]), place_of)


def _read_csv(file: Path, root: Path, runs: dict[str, ForeignRun], place_of: Place) -> None:
    """A table (``foreign_rows``)."""
    _read_rows(read_sheet(file).rows, file, root, runs, place_of)


def _read_json(file: Path, root: Path, runs: dict[str, ForeignRun], place_of: Place) -> None:
    """JSON lines, one list of objects, or one object with such a list (``log_history`` of a Trainer)."""
    text, rows = text_of(file), []
    for part in [text] if _is_whole_json(text) else text.splitlines():
        try:
            read = parse_json(part)
        except ValueError:
            continue  # the last line of a run that was cut off
        if isinstance(read, dict) and isinstance(read.get("log_history"), list):
            read = read["log_history"]
        rows += [row for row in (read if isinstance(read, list) else [read]) if isinstance(row, dict)]
    _read_rows(rows, file, root, runs, place_of)


def _is_whole_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _read_rows(
    rows: Sequence[Mapping[str, Any]], file: Path, root: Path, runs: dict[str, ForeignRun], place_of: Place
) -> None:
    for own in logged(rows, Path(_plain(file)).stem, _folder_name(file, root)):
        _add(_run_of(runs, own.run, file, "wandb"), own.tag, number_of(own.step), own.cell, place_of)


def _add(run: ForeignRun, tag: str, step: float | None, cell: Any, place_of: Place) -> None:
    place, value = place_of(tag), finite(cell)
    if place is None:
        run.unread[tag] = None
        return
    if step is None or not (0 <= step <= _LAST_STEP and float(step).is_integer()):
        run.left_out[_NO_STEP] += 1
        return
    if value is None:
        run.left_out[_NOT_FINITE] += 1
        return
    stage, layer, metric = place.get("stage", "").lower(), place.get("layer", ""), place["metric"]
    metric = "loss" if metric.lower().endswith("loss") else metric
    bucket = ours(place.get("bucket") or POOLED)
    where = (_STAGES.get(stage, stage), place.get("site") or "post", bucket)
    run.numbers.append(Number(int(step), metric, value, *where, int(layer) if layer else None))


def spectral_records(run: ForeignRun, width: int) -> list[SpectralRecord]:
    """Records of every step, layer, site and bucket; medians over layers only where no layer is there.

    Args:
        run: Numbers.
        width: FFN hidden size D; the logs do not say it.
    """
    spectral = [number for number in run.numbers if number.metric not in ("loss", "accuracy")]
    if any(number.layer is not None for number in spectral):
        spectral = [number for number in spectral if number.layer is not None]
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    tokens: dict[tuple[Any, ...], int] = {}
    for number in spectral:
        key = (number.step, number.layer or 0, number.site, number.bucket, number.stage)
        cells.setdefault(key, {})[number.metric] = number.value
        tokens[key] = max(tokens.get(key, 0), number.num_tokens)
    median = all(number.layer is None for number in spectral)
    return [_record(run, width, key, values, tokens[key], median) for key, values in sorted(cells.items())]


def _record(
    run: ForeignRun, width: int, key: tuple[Any, ...], values: dict[str, float], tokens: int, median: bool
) -> SpectralRecord:
    step, layer, site, bucket, stage = key
    if values.get("spectral_entropy", math.inf) < _LARGEST:
        values.setdefault("soft_rank", math.exp(values["spectral_entropy"]))
    known = {name: values.get(name) for name in _FIELDS}
    return SpectralRecord(
        **{"hard_rank_debiased": None, **known},  # type: ignore[arg-type]
        run_id=run.name,
        stage=stage,
        step=step,
        tokens_seen=None,
        layer=layer,
        module="median over layers" if median else f"layer {layer}",
        site=site,
        bucket=bucket,
        num_tokens=tokens,
        width=width,
        tokens_per_dim=tokens / width,
        status="ok",
        js_divergence=values.get("js_divergence") if site == "post" else None,
        conventions={"imported_from": run.source},
        extra={name: value for name, value in values.items() if name not in (*_FIELDS, "js_divergence")},
    )


def loss_records(run: ForeignRun) -> list[LossRecord]:
    """Losses, one a stage, step and bucket: the last that was logged."""
    cells: dict[tuple[str, int, str], dict[str, float]] = {}
    for number in run.numbers:
        if number.metric in ("loss", "accuracy"):
            cells.setdefault((number.stage, number.step, number.bucket), {})[number.metric] = number.value
    return [
        LossRecord(run.name, stage, step, None, bucket, 0, values.get("loss"), values.get("accuracy"))
        for (stage, step, bucket), values in sorted(cells.items())
        if "loss" in values
    ]


def manifest_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a manifest: what is known of each run, by column.

    Raises:
        ValueError: If it names no runs (``run_id``, ``name`` or ``log_dir``).
    """
    rows = list(read_sheet(path).rows)
    if not rows or not {"run_id", "name", "log_dir"} & set(rows[0]):
        raise ValueError(f"`{path}` is no manifest: it needs a column `run_id`, `name` or `log_dir`.")
    return rows


def row_of(run: ForeignRun, rows: Iterable[Mapping[str, str]]) -> Mapping[str, str] | None:
    """The manifest's row about a run: of its name, or whose ``log_dir`` ends as its folder does."""
    place = run.place.resolve().as_posix()
    for row in rows:
        if run.name in (row.get("run_id"), row.get("name")):
            return row
        tail = row.get("log_dir", "").partition("://")[2] or row.get("log_dir", "")
        parts = [part for part in tail.split("/") if part]
        if any(place.endswith("/" + "/".join(parts[k:])) for k in range(max(len(parts) - 1, 0))):
            return row
    return None
