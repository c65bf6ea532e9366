"""``memory newton-schulz --checkpoint FILE``: is the momentum of a real run flattened by its iteration?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_spectral.text import CommandError

Row = dict[str, Any]
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")


def checkpoint_rows(path: str, sets: list[str], steps: list[int]) -> Iterator[Row]:
    """One row per matrix, coefficient set and number of steps.

    Momentum buffers where the file holds optimizer states, else every matrix of it.

    Raises:
        CommandError: The file cannot be read, or holds no matrix.
    """
    import torch

    from lightning_spectral.functional.flattening import spectrum_flattening

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any of pickle's, zip's and torch's: the file is the user's
        raise CommandError(
            f"`--checkpoint` {path} cannot be read ({str(error).splitlines()[0]}); it must hold tensors and plain "
            "values only, as `torch.save(optimizer.state_dict(), FILE)` writes them."
        ) from error
    matrices = list(_matrices(content, ()))
    momentum = [(name, matrix) for name, matrix in matrices if name.split("/")[-1] in _MOMENTUM_KEYS]
    chosen = momentum or matrices
    if not chosen:
        raise CommandError(f"`--checkpoint` {path} holds no matrix; save an optimizer's or a model's state_dict.")
    for name, matrix in chosen:
        if not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
            continue
        sigma = torch.linalg.svdvals(matrix.double())
        for coefficients in sets:
            for number in steps:
                found = spectrum_flattening(sigma, coefficients, number)
                yield {
                    "schema_version": 1,
                    "kind": "flattening",
                    "checkpoint": path,
                    "matrix": name,
                    "shape": list(matrix.shape),
                    "is_momentum": bool(momentum),
                    "coefficients": coefficients,
                    "ns_steps": number,
                    "flattened_share": found.share,
                    "steps_needed": found.steps_needed,
                    "energy_spread": found.energy_spread,
                    "smallest_singular_value": float(sigma[-1] / torch.linalg.vector_norm(sigma)),
                }


def table(rows: list[Row]) -> list[str]:
    """Lines to print: worst matrices first."""
    lines = [f"{'flattened':>10} {'needed':>7} {'set':>16} {'steps':>6}  matrix"]
    for row in sorted(rows, key=lambda row: float(row["flattened_share"])):
        needed = row["steps_needed"] if row["steps_needed"] is not None else "> 60"
        shape = " x ".join(str(size) for size in row["shape"])
        lines.append(
            f"{100 * row['flattened_share']:>8.1f} % {needed:>7} {row['coefficients']:>16} {row['ns_steps']:>6}  "
            f"{row['matrix']} ({shape})"
        )
    return lines


def _matrices(content: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(content, torch.Tensor):
        if content.ndim == 2 and min(content.shape) > 1 and content.is_floating_point():
            yield "/".join(path), content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _matrices(value, (*path, str(key)))
    elif isinstance(content, (list, tuple)):
        for position, value in enumerate(content):
            yield from _matrices(value, (*path, str(position)))
