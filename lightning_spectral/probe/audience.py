"""Which tokens does an update help? What each group of tokens gains from a step, and would gain from other rules.

For tokens of group b and a direction D of descent, ``gain_b = <grad L_b, D> / (|D|_F / sqrt(numel))``: the fall of
their mean loss, to first order, for a step of root-mean-square size one. D is the update that was applied, or what
another rule makes of the same momentum.
"""

# N tokens, M rows, D columns of a matrix

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.orthogonalize import coefficient_set, newton_schulz, polar_svd
from lightning_spectral.text.arguments import require_count

RULES = ("applied", "momentum", "sign", "adam", "newton_schulz", "polar")
_EPS = 1e-8  # of the counterfactual Adam


@dataclass(frozen=True)
class AudienceRecord:
    """Gain of one group of tokens from one rule, summed over the matrices of one kind.

    Attributes:
        run_id: The run.
        step: Optimizer steps done before the update.
        kind: Of the matrices, e.g. ``mlp.proj``.
        rule: ``applied``, or the counterfactual rule on the same momentum.
        bucket: The group of tokens, by the token to be predicted.
        gain: Fall of the group's mean loss to first order, for steps of root-mean-square size one; nats.
        loss: The group's mean loss before the update, nats.
        num_tokens: Tokens of the group, over all processes.
        num_matrices: Matrices summed over.
        held_out: Whether the tokens are of another batch than the gradient's.
    """

    run_id: str
    step: int
    kind: str
    rule: str
    bucket: str
    gain: float | None
    loss: float | None
    num_tokens: int
    num_matrices: int
    held_out: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


def kind_of(parameter: str) -> str:
    """The name of a matrix without its layer: ``transformer.h.3.mlp.proj.weight`` is ``mlp.proj``."""
    parts = re.split(r"(?:^|\.)\d+\.", parameter.removesuffix(".weight"))
    return parts[-1]


def octaves(counts_V: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Names and group of each token by the octave of its frequency rank: rank 1; 2 and 3; 4 to 7; ..."""
    rank_V = torch.empty(len(counts_V), dtype=torch.long)
    rank_V[counts_V.argsort(descending=True, stable=True)] = torch.arange(1, len(counts_V) + 1)
    code_V = torch.floor(torch.log2(rank_V.double())).long()
    return tuple(f"octave_{number:02d}" for number in range(int(code_V.max()) + 1)), code_V


def counterfactual(
    rule: str, momentum: Tensor, second_moment: Tensor | None, coefficients: str, ns_steps: int
) -> Tensor | None:
    """What ``rule`` makes of a momentum, a direction of descent like the momentum itself; ``None`` if it cannot."""
    matrix_MD = momentum.flatten(1)
    if rule == "momentum":
        made = matrix_MD
    elif rule == "sign":
        made = matrix_MD.sign()
    elif rule == "adam":
        if second_moment is None or second_moment.shape != momentum.shape:
            return None
        made = matrix_MD / (second_moment.flatten(1).sqrt() + _EPS)
    elif rule == "newton_schulz":
        scaled = matrix_MD.float() / matrix_MD.abs().max().float().clamp(min=1e-30)
        made = newton_schulz(scaled, coefficients, ns_steps, torch.float32)
    else:
        made = polar_svd(matrix_MD)
    return made.view_as(momentum)


def gain(gradient: Tensor, direction: Tensor) -> float:
    """``<gradient, direction>`` for a direction of root-mean-square one; 0 for a direction of zeros."""
    norm = float(torch.linalg.vector_norm(direction.double()))
    if norm == 0:
        return 0.0
    return float((gradient.double() * direction.double()).sum()) * math.sqrt(direction.numel()) / norm


def check_rules(rules: Iterable[str], coefficients: str, ns_steps: int) -> tuple[str, ...]:
    """Raise a ``ValueError`` naming the first argument out of range."""
    chosen = tuple(rules)
    if isinstance(rules, str) or not chosen or set(chosen) - set(RULES):
        raise ValueError(f"`rules` must be a list from {list(RULES)}, got {rules!r}.")
    coefficient_set(coefficients)
    require_count("ns_steps", ns_steps)
    return chosen


def recall_front(records: Iterable[AudienceRecord]) -> dict[str, int | None]:
    """The step at which each group's loss had fallen half its way, from first to lowest; ``None`` if it only rose."""
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        if record.loss is not None:
            curves.setdefault(record.bucket, {})[record.step] = record.loss
    front: dict[str, int | None] = {}
    for bucket, curve in sorted(curves.items()):
        steps = sorted(curve)
        first, lowest = curve[steps[0]], min(curve.values())
        half = (first + lowest) / 2
        front[bucket] = next((step for step in steps if curve[step] <= half), None) if lowest < first else None
    return front


def by_kind(gains: dict[str, list[float] | None]) -> dict[str, list[float]]:
    """Gains of the groups, by matrix, summed by kind; kinds with a matrix that has none are left out."""
    missing = {kind_of(name) for name, of in gains.items() if of is None}
    made: dict[str, list[float]] = {}
    for name, of in gains.items():
        kind = kind_of(name)
        if of is None or kind in missing:
            continue
        made[kind] = [total + one for total, one in zip(made.get(kind, [0.0] * len(of)), of, strict=True)]
    return made
