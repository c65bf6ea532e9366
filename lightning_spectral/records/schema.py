"""What is in a record: the fields of ``run.json`` and of the JSONL files beside it. Needs the standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2

RUN_FILE = "run.json"
SPECTRAL_FILE = "spectral.jsonl"
LOSSES_FILE = "losses.jsonl"
WEIGHTS_FILE = "weights.jsonl"
ALARMS_FILE = "alarms.jsonl"
EIGENVALUES_FOLDER = "eigenvalues"
RUN_FILES = (RUN_FILE, SPECTRAL_FILE, LOSSES_FILE, WEIGHTS_FILE, ALARMS_FILE, EIGENVALUES_FOLDER)
PROGRESS_FILE = "sweep_progress.json"  # what a sweep's monitor writes beside them

POOLED = "pooled"
BUCKETS = ("head", "mid", "tail")

# status of a number, worst first; a reader decides which it accepts
STAGES = ("train", "validation", "test", "predict", "measure")  # the last: a finished model, outside of any loop
STATUSES = (
    "no_forward",  # the model did not run in the window
    "not_matched",  # it ran, but which row is of which token could not be proven
    "solve_failed",  # the eigensolver or the memory gave up
    "not_in_turn",  # layers take turns, for want of memory: it is measured in other windows
    "empty",
    "nonfinite",
    "degenerate",
    "few_tokens",
    "undersampled",
    "ok",
)


def layer_name(layer: int, expert: int | None = None) -> str:
    """``layer_03`` or ``layer_03.expert_01``: zero-padded, so that lists sort by depth."""
    return f"layer_{layer:02d}" + ("" if expert is None else f".expert_{expert:02d}")


@dataclass(frozen=True)
class SpectralRecord:
    """Ranks of one covariance: one window, one layer, one site, one bucket.

    ``null`` stands for a number that could not be computed; ``status`` says why. Definitions:
    ``lightning_spectral.functional.rank``.

    Attributes:
        run_id: The run that measured it; equal to ``run.json``'s.
        stage: One of :data:`STAGES`.
        step: Optimizer steps done when the model processed these tokens (0: untrained); ``None`` if unknown.
        tokens_seen: Training tokens before ``step``, over all ranks; ``None`` if they were not counted.
        layer: Depth of the block in its stack.
        stack: Path of the list of blocks (``model.transformer.h``, ``encoder.layers``): one model may have several.
        module: Path of the tapped module, wrapper prefixes removed.
        expert: Expert index inside a mixture of experts, else ``None``.
        site: ``pre`` or ``post`` the nonlinearity.
        bucket: ``pooled``, ``head``, ``mid``, ``tail`` or a group of the user's own.
        num_tokens: Tokens N in the covariance, one row per token.
        num_sequences: Sequences that those tokens come from, or ``None``.
        width: Features D.
        tokens_per_dim: N / D.
        status: One of :data:`STATUSES`.
        reason: Why the status is not ``ok``, where the status alone does not say.
        soft_rank: ``exp(spectral_entropy)``.
        soft_method: ``exact`` or ``approx``.
        hard_rank: Participation ratio.
        hard_rank_debiased: Participation ratio with the finite-sample bias removed (rows taken as independent).
        hard_rank_ci_low: Lower end of the 95 % sequence-level interval, or ``None``.
        hard_rank_ci_high: Upper end.
        soft_rank_debiased: Soft rank extrapolated to many sequences, or ``None``.
        soft_rank_ci_low: Lower end of the 95 % sequence-level interval, or ``None``.
        soft_rank_ci_high: Upper end.
        spectral_entropy: Shannon entropy of the normalised spectrum, nats.
        early_enrichment: Eigenvalue early enrichment, in [0, 1].
        top_share: Largest eigenvalue over the trace.
        trace: Total variance.
        renyi: Renyi rank by order, keys as in ``{"0.5": 12.3}``.
        reinjection: ``R_a(post) / R_a(pre)`` by order, on post records when both sites are measured.
        js_divergence: Jensen-Shannon divergence of the pre and post spectra, likewise.
        dtype: Type of the activations.
        loader: Index of the evaluation dataloader, or ``None``.
        ordinal: 0 for the first evaluation of this stage at this step, 1 for the second, ...
        layout: How the rows of an activation were matched to token ids, e.g. ``(B, T)``; empty where they were not.
        layout_agreement: Share of rows that the match was proven for, in [0, 1], or ``None``.
        world_size: Ranks that the tokens were reduced over.
        window_s: Wall time of the whole window's measurement, in seconds.
        conventions: Named choices that change the number (row attribution, reduction, thinning, epsilon).
        extra: Values of further metrics by name; in the file they stand beside the other fields.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    stage: str
    step: int | None
    tokens_seen: int | None
    layer: int
    module: str
    site: str
    bucket: str
    num_tokens: int
    width: int
    tokens_per_dim: float
    status: str
    soft_rank: float | None
    hard_rank: float | None
    hard_rank_debiased: float | None
    spectral_entropy: float | None
    early_enrichment: float | None
    top_share: float | None
    trace: float | None
    renyi: dict[str, float] = field(default_factory=dict)
    reinjection: dict[str, float] = field(default_factory=dict)
    js_divergence: float | None = None
    soft_method: str = "exact"
    soft_rank_debiased: float | None = None
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
    stack: str = ""
    reason: str = ""
    loader: int | None = None
    ordinal: int = 0
    layout: str = ""
    layout_agreement: float | None = None
    schema_version: int = SCHEMA_VERSION
    extra: dict[str, float | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        place = (self.stack, self.layer, self.module, self.expert, self.site, self.bucket)  # a block may have two
        return (self.stage, self.step, *place, self.loader, self.ordinal)

    def value(self, metric: str) -> float | None:
        """A metric by name, be it a field or one of :attr:`extra`; ``None`` if it was not measured."""
        found: float | None = getattr(self, metric, None) if metric not in self.extra else self.extra[metric]
        return found

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
        step: Optimizer steps done; ``None`` if unknown.
        tokens_seen: Training tokens before ``step``.
        bucket: As in :class:`SpectralRecord`; ``pooled`` for all rows.
        num_tokens: Target tokens that were scored.
        loss: Mean cross-entropy, nats.
        accuracy: Share of scored tokens whose most likely token is the target.
        loader: Index of the evaluation dataloader, or ``None``.
        ordinal: 0 for the first evaluation of this stage at this step, 1 for the second, ...
        status: ``ok``, or why there is no loss.
        reason: What the status means here, in words; empty for ``ok``.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    stage: str
    step: int | None
    tokens_seen: int | None
    bucket: str
    num_tokens: int
    loss: float | None
    accuracy: float | None
    loader: int | None = None
    ordinal: int = 0
    status: str = "ok"
    reason: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        return (self.stage, self.step, self.bucket, self.loader, self.ordinal)


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
class AlarmRecord:
    """A rank that crossed the threshold of a :class:`~lightning_spectral.SpectralAlarm`.

    Attributes:
        run_id: The run that it happened in.
        stage: Stage of the records that it is about.
        step: Optimizer steps done at the window that raised it.
        metric: Name of the rank.
        site: ``post`` or ``pre``.
        bucket: As in :class:`SpectralRecord`.
        value: The rank: median over layers.
        reference: What it was compared with: the width, the untrained network's rank, or the highest one so far.
        relative_to: ``width``, ``untrained`` or ``past``.
        threshold: Share of ``reference`` that the rank fell below, or rose above.
        message: One sentence for people.
        schema_version: :data:`SCHEMA_VERSION` at writing time.
    """

    run_id: str
    stage: str
    step: int
    metric: str
    site: str
    bucket: str
    value: float
    reference: float
    relative_to: str
    threshold: float
    message: str
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a record unique inside its run."""
        return (self.stage, self.step, self.metric, self.site, self.bucket, self.relative_to, self.threshold)


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
        finished: Whether the run reached its end; ``None`` if it is not known (a run of schema 1, or cut off).
        last_step: Optimizer steps done when it ended, or ``None``.
        num_windows: Windows that were due.
        num_lost_windows: Windows of these that gave no number.
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
    finished: bool | None = None
    last_step: int | None = None
    num_windows: int = 0
    num_lost_windows: int = 0
    schema_version: int = SCHEMA_VERSION
