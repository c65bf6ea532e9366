"""What a run leaves behind: one JSON object a line, readable without torch.

A run folder holds up to four files, each written by one place and read through this module:

* ``run.json``: what was run (a :class:`RunInfo`), written once at fit start;
* ``spectral.jsonl``: one :class:`SpectralRecord` per (window, layer, site, bucket);
* ``losses.jsonl``: one :class:`LossRecord` per (window, bucket);
* ``weights.jsonl``: one :class:`WeightRecord` per (window, parameter, what of it).

The JSONL files only ever grow. A line is whole or it is not a record: a file cut at any byte gives back every
whole line, and :func:`append_records` first closes a torn tail so that what follows stays readable.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

SCHEMA_VERSION = 1

RUN_FILE = "run.json"
SPECTRAL_FILE = "spectral.jsonl"
LOSSES_FILE = "losses.jsonl"
WEIGHTS_FILE = "weights.jsonl"
PROGRESS_FILE = "sweep_progress.json"  # what a sweep's monitor writes beside them

POOLED = "pooled"
BUCKETS = ("head", "mid", "tail")
SITES = ("pre", "post")

# status of a number, worst first; a reader decides which it accepts
STATUSES = ("empty", "nonfinite", "degenerate", "few_rows", "undersampled", "ok")


@dataclass(frozen=True)
class SpectralRecord:
    """Ranks of one covariance: one window, one layer, one site, one bucket.

    ``null`` stands for a number that could not be computed; ``status`` says why. Definitions:
    ``lightning_spectral.functional.rank``.

    Attributes:
        run_id: The run that measured it; equal to ``run.json``'s.
        stage: ``train``, ``validation``, ``test``, ``predict`` or ``measure``.
        step: Optimizer steps done when the rows flowed through the model (0: untrained).
        tokens_seen: Training tokens before ``step``, over all ranks; ``None`` if they were not counted.
        layer: Block index.
        module: Name of the tapped module, wrapper prefixes removed.
        expert: Expert index inside a mixture of experts, else ``None``.
        site: ``pre`` or ``post`` the nonlinearity.
        bucket: ``pooled``, ``head``, ``mid``, ``tail`` or a group of the user's own.
        num_rows: Rows N (tokens) in the covariance.
        num_sequences: Sequences that those rows come from, or ``None``.
        width: Features D.
        rows_per_dim: N / D.
        status: One of :data:`STATUSES`.
        soft_rank: ``exp(spectral_entropy)``.
        soft_method: ``exact`` or ``approx``.
        hard_rank: Participation ratio.
        hard_rank_unbiased: Participation ratio with the finite-sample bias removed (rows taken as independent).
        hard_rank_ci_low: Lower end of the 95 % sequence-level interval, or ``None``.
        hard_rank_ci_high: Upper end.
        soft_rank_unbiased: Half-split jackknife of the soft rank, or ``None``.
        soft_rank_ci_low: Lower end of the 95 % sequence-level interval, or ``None``.
        soft_rank_ci_high: Upper end.
        spectral_entropy: Shannon entropy of the normalised spectrum, nats.
        eee: Eigenvalue early enrichment, in [0, 1].
        top_share: Largest eigenvalue over the trace.
        trace: Total variance.
        renyi: Renyi rank by order, keys as in ``{"0.5": 12.3}``.
        reinjection: ``R_a(post) / R_a(pre)`` by order, on post records when both sites are measured.
        js_divergence: Jensen-Shannon divergence of the pre and post spectra, likewise.
        dtype: Type of the activations.
        world_size: Ranks that the rows were reduced over.
        window_s: Wall time of the whole window's measurement, in seconds.
        conventions: Named choices that change the number (row attribution, reduction, thinning, epsilon).
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    stage: str
    step: int
    tokens_seen: int | None
    layer: int
    module: str
    site: str
    bucket: str
    num_rows: int
    width: int
    rows_per_dim: float
    status: str
    soft_rank: float | None
    hard_rank: float | None
    hard_rank_unbiased: float | None
    spectral_entropy: float | None
    eee: float | None
    top_share: float | None
    trace: float | None
    renyi: dict[str, float] = field(default_factory=dict)
    reinjection: dict[str, float] = field(default_factory=dict)
    js_divergence: float | None = None
    soft_method: str = "exact"
    soft_rank_unbiased: float | None = None
    hard_rank_ci_low: float | None = None
    hard_rank_ci_high: float | None = None
    soft_rank_ci_low: float | None = None
    soft_rank_ci_high: float | None = None
    num_sequences: int | None = None
    expert: int | None = None
    dtype: str = ""
    world_size: int = 1
    window_s: float | None = None
    conventions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        return (self.stage, self.step, self.layer, self.expert, self.site, self.bucket)

    @property
    def asymmetry(self) -> float | None:
        """``ln(soft_rank / hard_rank)``, >= 0."""
        if not self.soft_rank or not self.hard_rank:
            return None
        return math.log(self.soft_rank / self.hard_rank)


@dataclass(frozen=True)
class LossRecord:
    """Cross-entropy and top-1 accuracy of the next token, for the rows of one bucket in one window.

    Attributes:
        run_id: The run that measured it.
        stage: ``train`` or ``validation``.
        step: Optimizer steps done.
        tokens_seen: Training tokens before ``step``.
        bucket: As in :class:`SpectralRecord`; ``pooled`` for all rows.
        num_rows: Target tokens that were scored.
        loss: Mean cross-entropy, nats.
        accuracy: Share of rows whose most likely token is the target.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    stage: str
    step: int
    tokens_seen: int | None
    bucket: str
    num_rows: int
    loss: float | None
    accuracy: float | None
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        return (self.stage, self.step, self.bucket)


@dataclass(frozen=True)
class WeightRecord:
    """Spectrum of one matrix of the training step: a weight, its gradient, its momentum or the update applied to it.

    Definitions: ``lightning_spectral.functional.matrix_spectrum`` (energies s^2) and ``functional.flattening``.

    Attributes:
        run_id: The run that measured it.
        step: Optimizer steps done before the step that was measured; weights are those after it.
        parameter: Name, wrapper prefixes removed.
        layer: First number in the name, or ``None``.
        what: ``weight``, ``gradient``, ``momentum`` or ``update``.
        rows: First axis.
        columns: All other axes.
        status: ``ok``, ``degenerate`` (all zero) or ``nonfinite``.
        normalized_entropy: In [0, 1].
        effective_rank: exp(entropy) of the energies.
        top1_energy: Share of the largest direction.
        top10_energy: Share of the ten largest.
        quartile_ratio: Q75/25 of the squared singular values.
        stable_rank: ``sum s^2 / s_1^2``.
        condition_number: ``s_1 / s_n`` over the non-zero ones.
        num_nonzero: Non-zero singular values n.
        largest: s_1.
        frobenius: ``sqrt(sum s^2)``.
        flattened_share: Share of the spectrum that the named iteration flattens, for gradient and momentum.
        steps_to_flatten: Steps of it that would flatten 99 %, or ``None``.
        coefficients: The iteration, as in ``muon x 5``.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    step: int
    parameter: str
    layer: int | None
    what: str
    rows: int
    columns: int
    status: str
    normalized_entropy: float | None = None
    effective_rank: float | None = None
    top1_energy: float | None = None
    top10_energy: float | None = None
    quartile_ratio: float | None = None
    stable_rank: float | None = None
    condition_number: float | None = None
    num_nonzero: int | None = None
    largest: float | None = None
    frobenius: float | None = None
    flattened_share: float | None = None
    steps_to_flatten: int | None = None
    coefficients: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        return (self.step, self.parameter, self.what)


@dataclass(frozen=True)
class RunInfo:
    """What was run; the labels that analysis groups by.

    Attributes:
        run_id: Stable id of the run.
        created: ISO time of the first fit start.
        optimizer: Class name of the optimizer, e.g. ``Muon``.
        seed: Global seed, if known.
        hparams: The LightningModule's hyper-parameters (for ``pretrain``: the whole recipe).
        versions: Package versions.
        labels: Free labels, e.g. from a sweep (``{"optimizer": "dion_1_16", "ffn_multiplier": "4"}``).
        conventions: Named choices shared by every record of the run.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    created: str
    optimizer: str
    seed: int | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    conventions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


RecordT = TypeVar("RecordT", SpectralRecord, LossRecord, WeightRecord)


@dataclass(frozen=True)
class ReadReport(Generic[RecordT]):
    """Records read from one file and what had to be left out.

    Attributes:
        records: Whole, valid records in file order, first one of each key.
        skipped: ``(line number, reason)`` of every line left out.
    """

    records: list[RecordT]
    skipped: list[tuple[int, str]]


def append_records(path: str | Path, records: Sequence[SpectralRecord | LossRecord | WeightRecord]) -> None:
    """Append ``records`` in one flushed write; a torn tail left by a killed run is closed first."""
    if not records:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = "".join(json.dumps(_finite(asdict(record)), allow_nan=False) + "\n" for record in records).encode()
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            payload = b"\n" + payload
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def read_spectral(path: str | Path) -> ReadReport[SpectralRecord]:
    """Read ``spectral.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, SPECTRAL_FILE), SpectralRecord)


def read_losses(path: str | Path) -> ReadReport[LossRecord]:
    """Read ``losses.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, LOSSES_FILE), LossRecord)


def read_weights(path: str | Path) -> ReadReport[WeightRecord]:
    """Read ``weights.jsonl`` (a file or its run folder), salvaging every whole record.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return _read(_file(path, WEIGHTS_FILE), WeightRecord)


def parse_record(line: bytes, kind: type[RecordT]) -> RecordT:
    """One line of a JSONL file as a record.

    Raises:
        ValueError: If it is not a whole JSON object, not one of our records, or one of a newer schema.
    """
    try:
        content = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("not a whole JSON object") from None
    return _build(content, kind)


def write_run(folder: str | Path, info: RunInfo) -> None:
    """Write ``run.json`` atomically."""
    path = Path(folder) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(_finite(asdict(info)), indent=2, default=str) + "\n")
    os.replace(partial, path)


def read_run(folder: str | Path) -> RunInfo:
    """Read ``run.json`` of a run folder.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is not a run description, or one of a newer schema.
    """
    path = _file(folder, RUN_FILE)
    try:
        return _build(json.loads(path.read_text()), RunInfo)
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"`{path}` is not a run description: {error}. Was it edited by hand?") from error


def _read(path: Path, kind: type[RecordT]) -> ReadReport[RecordT]:
    records: list[RecordT] = []
    skipped: list[tuple[int, str]] = []
    seen: set[tuple[Any, ...]] = set()
    for number, line in _lines(path):
        try:
            record: RecordT = parse_record(line, kind)
            key = (record.run_id, *record.key)
            repeated = key in seen
        except ValueError as error:
            skipped.append((number, str(error)))
            continue
        except TypeError:  # a list or an object where a key has a name or a number
            skipped.append((number, "a field holds a value of the wrong type"))
            continue
        if repeated:
            skipped.append((number, f"duplicate of {key}"))
        else:
            seen.add(key)
            records.append(record)
    if skipped:
        number, reason = skipped[0]
        warnings.warn(
            f"`{path}`: {len(skipped)} of {len(records) + len(skipped)} lines left out; the first is line {number}: "
            f"{reason}.",
            stacklevel=3,
        )
    return ReadReport(records, skipped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


BuiltT = TypeVar("BuiltT", SpectralRecord, LossRecord, WeightRecord, RunInfo)


def _build(content: Any, kind: type[BuiltT]) -> BuiltT:
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError("no schema_version: not one of our records")
    version = content["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"schema_version {version} is newer than {SCHEMA_VERSION}: upgrade lightning-spectral")
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


def _file(path: str | Path, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that could not be computed is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def known_keys(records: Iterable[SpectralRecord | LossRecord | WeightRecord]) -> set[tuple[Any, ...]]:
    """Keys already on disk: what a resumed run must not write again."""
    return {record.key for record in records}
