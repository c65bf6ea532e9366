"""``memory newton-schulz --checkpoint FILE``: does a run's own iteration flatten its own momentum?

Optimizer, iteration and number of steps are read from the ``param_groups`` that lie beside the momentum, names from the
model's ``state_dict``. Embeddings and heads are left out: no optimizer orthogonalises them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Column, Table

Row = dict[str, Any]
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")
_NOT_HIDDEN = re.compile(r"(^|[._])(wte|wpe|embed\w*|emb|embedding|lm_head|head|classifier)([._]|$)")
_ITERATES = ("muon", "normuon")
_DEFAULT = ("polar_express", 5)


@dataclass(frozen=True)
class Momentum:
    """One matrix that an optimizer has, or would have, orthogonalised.

    Attributes:
        name: Of the parameter.
        matrix: Its momentum, shape (M, N).
        optimizer: ``muon``, ``normuon``, ``dion``, ``adam``, ``sgd`` or ``none`` (a bare matrix).
        coefficients: The run's own set, or ``None`` where it runs no iteration.
        steps: Its steps.
    """

    name: str
    matrix: Any
    optimizer: str
    coefficients: str | None
    steps: int | None


def checkpoint_rows(
    path: str, sets: Sequence[str] | None, steps: Sequence[int] | None, as_gradient: bool = False
) -> Iterator[Row]:
    """One row per matrix, coefficient set and number of steps; the run's own set and steps unless they are given.

    Args:
        path: The checkpoint.
        sets: Coefficient sets to judge instead.
        steps: Numbers of steps to judge instead.
        as_gradient: Judge the matrices of a file without momentum.

    Raises:
        CommandError: The file cannot be read, or holds nothing to judge.
    """
    import torch

    from lightning_spectral.functional.flattening import spectrum_flattening

    for one in _found(path, _load(path), as_gradient):
        if not bool(torch.isfinite(one.matrix).all()) or not bool(one.matrix.any()):
            continue
        sigma = torch.linalg.svdvals(one.matrix.double())
        for coefficients in sets or [one.coefficients or _DEFAULT[0]]:
            for number in steps or [one.steps or _DEFAULT[1]]:
                found = spectrum_flattening(sigma, coefficients, number)
                yield {
                    "schema_version": 1,
                    "kind": "flattening",
                    "checkpoint": path,
                    "matrix": one.name,
                    "shape": list(one.matrix.shape),
                    "is_momentum": one.optimizer != "none",
                    "optimizer": one.optimizer,
                    "own_settings": (coefficients, number) == (one.coefficients, one.steps),
                    "coefficients": coefficients,
                    "ns_steps": number,
                    "flattened_share": found.share,
                    "steps_needed": found.steps_needed,
                    "energy_spread": found.energy_spread,
                    "smallest_singular_value": float(sigma[-1] / torch.linalg.vector_norm(sigma)),
                }


def tables(rows: Sequence[Row]) -> tuple[list[Table], list[str]]:
    """A table per setting, the worst matrix first, and one sentence per setting."""
    made, closing = [], []
    settings = dict.fromkeys((row["coefficients"], row["ns_steps"]) for row in rows)
    for coefficients, steps in settings:
        same = [row for row in rows if (row["coefficients"], row["ns_steps"]) == (coefficients, steps)]
        cells = [
            (
                row["flattened_share"],
                row["steps_needed"] if row["steps_needed"] is not None else "> 60",
                f"{row['matrix']} ({' x '.join(str(size) for size in row['shape'])})",
            )
            for row in sorted(same, key=lambda row: float(row["flattened_share"]))
        ]
        columns = (Column("flattened", lambda share: f"{100 * share:.1f} %"), "needed", "matrix")
        made.append(Table(columns, cells, f"{coefficients}, {steps} steps"))
        closing.append(verdict(same))
    return made, closing


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on rows of one setting."""
    coefficients, steps, optimizer = (rows[0][key] for key in ("coefficients", "ns_steps", "optimizer"))
    shares = [float(row["flattened_share"]) for row in rows]
    needed = [row["steps_needed"] for row in rows]
    worst = min(rows, key=lambda row: float(row["flattened_share"]))
    of = {"none": "these matrices", "adam": "this run's momentum", "sgd": "this run's momentum"}
    whose = of.get(optimizer, "its momentum")
    if rows[0]["own_settings"]:
        text = f"this run's {optimizer} with {steps} {coefficients} steps flattens"
    else:
        text = f"{steps} {coefficients} steps would flatten"
        if optimizer in ("adam", "sgd", "dion"):
            text = f"this run used {optimizer}, which runs no Newton-Schulz iteration; {text}"
    text += f" {100 * median(shares):.0f} % of the singular values of {whose} in the median matrix"
    if len(rows) > 1:
        text += f", {100 * min(shares):.0f} % in the worst ({worst['matrix']})"
    known = [int(number) for number in needed if number is not None]
    if len(known) < len(needed):
        return f"{text}; {len(needed) - len(known)} of {len(needed)} matrices are too steep for it in 60 steps."
    return f"{text}; {max(known)} steps would do for all of them." if max(known) > steps else f"{text}: enough."


def _load(path: str) -> Any:
    from lightning_spectral.models.checkpoint_file import read_checkpoint

    try:
        return read_checkpoint(path)
    except (OSError, ValueError) as error:
        remedy = "Give `torch.save(optimizer.state_dict(), FILE)`, or a Lightning or litgpt checkpoint."
        raise CommandError(f"`--checkpoint`: {error} {remedy}") from error


def _found(path: str, content: Any, as_gradient: bool) -> list[Momentum]:
    names = _parameter_names(content)
    found = [one for state in _optimizer_states(content) for one in _momenta(state, names)]
    if found:
        return found
    bare = [
        Momentum(name, matrix, "none", None, None)
        for name, matrix in _matrices(content, ())
        if not _NOT_HIDDEN.search(name)
    ]
    if not bare:
        raise CommandError(f"`--checkpoint` {path} holds no matrix; save an optimizer's state_dict.")
    if not as_gradient:
        raise CommandError(
            f"`--checkpoint` {path} holds {len(bare)} matrices but no momentum: weights are never orthogonalised, so "
            "their spectra say nothing about the iteration; give a checkpoint with optimizer states, or "
            "`--as-gradient` to judge the matrices all the same."
        )
    return bare


def _optimizer_states(content: Any) -> Iterator[dict[str, Any]]:
    """Every ``{"state": ..., "param_groups": ...}`` in the file."""
    if isinstance(content, dict):
        if isinstance(content.get("state"), dict) and isinstance(content.get("param_groups"), list):
            yield content
            return
        for value in content.values():
            yield from _optimizer_states(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _optimizer_states(value)


def _parameter_names(content: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors: the largest flat dictionary of named tensors in the file."""
    import torch

    best: dict[str, tuple[int, ...]] = {}
    if isinstance(content, dict):
        tensors = {key: tuple(value.shape) for key, value in content.items() if isinstance(value, torch.Tensor)}
        if all(isinstance(key, str) for key in tensors) and "exp_avg" not in tensors:
            best = tensors
        for key, value in content.items():
            if key != "state":
                best = max(best, _parameter_names(value), key=len)
    elif isinstance(content, (list, tuple)):
        for value in content:
            best = max(best, _parameter_names(value), key=len)
    return best


def _momenta(optimizer: dict[str, Any], names: dict[str, tuple[int, ...]]) -> Iterator[Momentum]:
    """Momentum of the matrices that are, or would be, orthogonalised, named by shape and order."""
    free = dict(names)
    states = optimizer["state"]
    hidden = [group for group in optimizer["param_groups"] if group.get("role", "matrix") == "matrix"]
    for group in hidden:
        kind, coefficients, steps = _settings(group)
        given = group.get("param_names")
        for position, key in enumerate(group["params"]):
            state = states.get(key, states.get(str(key), {}))
            momentum = next((state[name] for name in _MOMENTUM_KEYS if name in state), None)
            if momentum is None:
                continue
            name = str(given[position]) if given else _next_name(free, tuple(momentum.shape), group, key)
            if momentum.ndim == 2 and min(momentum.shape) > 1 and not _NOT_HIDDEN.search(name):
                yield Momentum(name, momentum, kind, coefficients, steps)


def _next_name(free: dict[str, tuple[int, ...]], shape: tuple[int, ...], group: dict[str, Any], key: Any) -> str:
    """The first parameter of that shape that has no momentum yet; optimizers keep the order of the model."""
    routed = "role" in group  # then embeddings and heads are in groups of their own
    for name, known in free.items():
        if known == shape and not (routed and _NOT_HIDDEN.search(name)):
            del free[name]
            return name
    return f"parameter {key}"


def _settings(group: dict[str, Any]) -> tuple[str, str | None, int | None]:
    """Optimizer, coefficient set and steps of one group: ours, torch's Muon, or none."""
    from lightning_spectral.functional.coefficients import COEFFICIENTS

    algorithm = group.get("algorithm")
    if algorithm in _ITERATES:
        name = group.get("orthogonalize")
        if name in COEFFICIENTS:
            return algorithm, name, group.get("steps") or COEFFICIENTS[name].steps
        return algorithm, None, None
    if "ns_steps" in group:
        return "muon", "muon", int(group["ns_steps"])
    if algorithm is not None:
        return "adam" if algorithm == "adamw" else str(algorithm), None, None
    return ("adam" if "betas" in group else "sgd"), None, None


def _matrices(content: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(content, torch.Tensor):
        if content.ndim == 2 and min(content.shape) > 1 and content.is_floating_point():
            yield ".".join(path), content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _matrices(value, (*path, str(key)))
    elif isinstance(content, (list, tuple)):
        for position, value in enumerate(content):
            yield from _matrices(value, (*path, str(position)))
