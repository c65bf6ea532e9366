"""``memory advise``: what one update of each rule can store of a vocabulary, and what holds it back.

The vocabulary's counts are the item weights, a batch is that many draws of them, and the matrices are those of a
feed-forward layer: ``up`` (ffn x d), ``down`` (d x ffn), and a square one as in attention. Nothing is simulated.
"""

# V tokens of the vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Column, Table
from lightning_spectral.theory.capacity import predict_weights, relu_features
from lightning_spectral.theory.exponents import saturating_batch
from lightning_spectral.theory.recovery import recovery_curve
from lightning_spectral.theory.rules import RuleSettings

Array = NDArray[np.float64]
_TAIL_FROM = 2 / 3  # of the probability mass
_ENOUGH = 0.97  # of the exact polar factor's count
_STEPS_AT_MOST = 20
_SEED = 0


@dataclass(frozen=True)
class Layer:
    """One matrix: its shape, and the second moments of its inputs where they are not isotropic."""

    name: str
    outputs: int
    inputs: int
    hidden_relu: bool = False

    @property
    def scales(self) -> Array | None:
        """Second moments of the inputs; those of a random ReLU layer behind ``outputs`` features."""
        return relu_features(self.outputs, self.inputs) if self.hidden_relu else None


@dataclass(frozen=True)
class Advice:
    """What one update of one rule stores in one matrix.

    Attributes:
        layer: Name of the matrix.
        outputs: Its features out.
        inputs: Its features in.
        rule: The rule.
        stored: Tokens whose output wins after one update from zero.
        stored_population: The same with the exact gradient of the counts.
        rank: Frequency rank up to which at least half of the tokens are stored.
        tail_share: Share of the rarest third of the text that is not stored.
        critical_batch: Smallest batch with 90 % of ``stored_population``, tokens.
        gains: Stored tokens, as a factor, if one thing changed: ``batch``, ``d``, ``ffn`` twice as large, ``steps``
            enough of them.
        binds: The largest of the gains.
    """

    layer: str
    outputs: int
    inputs: int
    rule: str
    stored: float
    stored_population: float
    rank: float
    tail_share: float
    critical_batch: float | None
    gains: dict[str, float]
    binds: str

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for ``results.jsonl``."""
        return {"schema_version": 1, "kind": "advice", **asdict(self)}


def read_counts(path: str) -> Array:
    """Counts by frequency rank, descending, shape (V,), of a ``.npy`` file or of text with a number per line.

    Raises:
        CommandError: No such file, or not a list of counts.
    """
    if not Path(path).is_file():
        raise CommandError(f"`--counts` {path}: there is no such file; `lightning-spectral count-tokens` writes one.")
    try:
        counts = np.load(path) if path.endswith(".npy") else np.loadtxt(path, ndmin=1)
        counts = np.asarray(counts, dtype=np.float64)
    except Exception as error:  # whatever numpy says of a file that is none of its own
        raise CommandError(
            f"`--counts` {path} holds no list of counts: give a .npy file or a number per line."
        ) from error
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or (counts > 0).sum() < 2:
        raise CommandError(
            f"`--counts` {path} must hold one count >= 0 per token, at least two of them > 0; it has the shape "
            f"{counts.shape} and {int((counts > 0).sum()) if counts.ndim == 1 else 0} positive ones."
        )
    return np.sort(counts)[::-1]


def layers_of(d: int, ffn: int) -> list[Layer]:
    """The matrices that are judged."""
    made = [Layer("square", d, d), Layer("up", ffn, d), Layer("down", d, ffn)]
    if ffn >= d + 2:
        made.append(Layer("down, behind ReLU", d, ffn, hidden_relu=True))
    return made


class Advisor:
    """Counts, model and batch.

    Args:
        counts: By rank, descending, shape (V,).
        d: Width of the residual stream.
        ffn: Width of the hidden layer.
        batch_tokens: Tokens per step.
        settings: Of the rules; Newton-Schulz set and steps.
    """

    def __init__(self, counts: Array, d: int, ffn: int, batch_tokens: int, settings: RuleSettings) -> None:
        self.frequencies = counts / counts.sum()
        self.d, self.ffn, self.batch_tokens, self.settings = d, ffn, batch_tokens, settings

    def drawn(self, batch: int | None) -> Array:
        """Weights of the tokens in a batch, or of the whole text."""
        if batch is None:
            return self.frequencies
        return np.random.default_rng([_SEED, batch]).multinomial(batch, self.frequencies) / batch

    def probability(self, layer: Layer, rule: str, batch: int | None, settings: RuleSettings) -> Array | None:
        """That each token is stored, shape (V,)."""
        made = predict_weights(
            self.drawn(batch), (layer.outputs, layer.inputs), rule, settings, 0.0, layer.scales, layer.hidden_relu
        )
        return None if made is None else made.probability

    def count(self, layer: Layer, rule: str, batch: int | None, settings: RuleSettings | None = None) -> float | None:
        """Expected number of stored tokens."""
        made = self.probability(layer, rule, batch, settings or self.settings)
        return None if made is None else float(made.sum())

    def advise(self, layer: Layer, rule: str) -> Advice | None:
        """The advice for one matrix and rule, or ``None`` where there is no prediction."""
        probability = self.probability(layer, rule, self.batch_tokens, self.settings)
        whole = self.count(layer, rule, None)
        if probability is None or whole is None:
            return None
        stored = float(probability.sum())
        tail = np.cumsum(self.frequencies) - self.frequencies >= _TAIL_FROM
        mass = float(self.frequencies[tail].sum())
        gains = self._gains(layer, rule, stored)
        return Advice(
            layer=layer.name,
            outputs=layer.outputs,
            inputs=layer.inputs,
            rule=rule,
            stored=stored,
            stored_population=whole,
            rank=_half_rank(probability),
            tail_share=1 - float(self.frequencies[tail] @ probability[tail]) / mass if mass > 0 else 0.0,
            critical_batch=saturating_batch(lambda batch: self.count(layer, rule, batch), self.frequencies),
            gains=gains,
            binds=max(gains, key=lambda name: gains[name]),
        )

    def _gains(self, layer: Layer, rule: str, stored: float) -> dict[str, float]:
        gains = {"batch": self._ratio(self.count(layer, rule, 2 * self.batch_tokens), stored)}
        for name, wider in (("d", layers_of(2 * self.d, self.ffn)), ("ffn", layers_of(self.d, 2 * self.ffn))):
            other = next((one for one in wider if one.name == layer.name), None)
            if other is not None and (other.outputs, other.inputs) != (layer.outputs, layer.inputs):
                gains[name] = self._ratio(self.count(other, rule, self.batch_tokens), stored)
        if rule.startswith("ns"):
            gains["steps"] = self._ratio(self.count(layer, "muon", self.batch_tokens), stored)
        return gains

    @staticmethod
    def _ratio(count: float | None, stored: float) -> float:
        return (count or 0.0) / max(stored, 1e-9)

    def steps_needed(self, layer: Layer, coefficients: str) -> int | None:
        """Newton-Schulz steps that keep 97 % of what the exact polar factor stores, or ``None`` if 20 do not."""
        plain = Layer(layer.name, layer.outputs, layer.inputs)
        exact = self.count(plain, "muon", self.batch_tokens)
        for steps in range(1, _STEPS_AT_MOST + 1):
            settings = RuleSettings(coefficients=coefficients, ns_steps=steps)
            kept = self.count(plain, "ns", self.batch_tokens, settings)
            if kept is not None and exact is not None and kept >= _ENOUGH * exact:
                return steps
        return None


def _half_rank(probability: Array) -> float:
    rank, recall = recovery_curve(probability)
    above = np.flatnonzero(recall >= 0.5)
    return float(rank[above[-1]]) if len(above) else 0.0


def advice_table(found: Sequence[Advice]) -> Table:
    """What each rule stores in each matrix."""
    columns = (
        "matrix", "shape", "rule", Column("stored", ".0f"), Column("at most", ".0f"), Column("to rank", ".0f"),
        Column("TAIL missed", lambda share: f"{100 * share:.1f} %"), Column("crit. batch", ".3g"),
        "gain if doubled",
    )  # fmt: skip
    cells = []
    for one in found:
        gains = ", ".join(f"{name} x{gain:.2f}" for name, gain in sorted(one.gains.items(), key=lambda item: -item[1]))
        cells.append((one.layer, f"{one.outputs} x {one.inputs}", one.rule, one.stored, one.stored_population, one.rank,
                      one.tail_share, one.critical_batch, gains))  # fmt: skip
    return Table(columns, cells, "one update from zero, predicted")


def advice_lines(found: Sequence[Advice], advisor: Advisor, steps: dict[str, int | None]) -> list[str]:
    """Sentences on the vocabulary, the iteration and what binds."""
    distinct = int((advisor.drawn(advisor.batch_tokens) > 0).sum())
    batch = f"{len(advisor.frequencies)} tokens; a batch of {advisor.batch_tokens} holds {distinct} distinct ones."
    needed = [
        f"{layer}: {f'{number} Newton-Schulz' if number is not None else f'more than {_STEPS_AT_MOST}'} steps of "
        f"{advisor.settings.coefficients} keep 97 % of the exact polar factor's tokens."
        for layer, number in steps.items()
    ]
    return [batch, *needed, *closing(found)]


def closing(found: Sequence[Advice]) -> list[str]:
    """What binds the matrix that stores most under the best rule."""
    if not found:
        return []
    best = max(found, key=lambda one: one.stored)
    gain = best.gains[best.binds]
    what = {"batch": "the batch", "d": "the width d", "ffn": "the hidden width", "steps": "the Newton-Schulz steps"}
    if gain < 1.02:
        return [f"Nothing binds {best.rule} in {best.layer}: doubling any of them gains less than 2 %."]
    return [
        f"What binds {best.rule} in {best.layer} is {what[best.binds]}: "
        + ("enough of them store" if best.binds == "steps" else "twice as much stores")
        + f" {gain:.2f} times as many tokens per step."
    ]


def check(d: int, ffn: int, batch_tokens: int, tokens: int) -> None:
    """Raise a ``CommandError`` naming the first option out of range."""
    for name, value, least in (("--d", d, 2), ("--ffn", ffn, 2), ("--batch-tokens", batch_tokens, 1)):
        if value < least:
            raise CommandError(f"`{name}` must be >= {least}, got {value}.")
    if math.log10(max(d, ffn)) > 6:
        raise CommandError(f"`--d`, `--ffn` must be <= 1e6, got {d}, {ffn}.")
    if tokens < 2:
        raise CommandError(f"`--counts` must name at least two tokens, got {tokens}.")
