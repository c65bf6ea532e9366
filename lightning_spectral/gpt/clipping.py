"""Clipping by the norm of the whole gradient, whatever cut the parameters; torch takes one kind of tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.models.placement import is_dtensor, local


def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their 2-norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``.

    Plain gradients, alike on the ranks that share them, and DTensors of several meshes may stand side by side, as under
    tensor parallelism.

    Args:
        parameters: Those of the optimizer; every rank must call it.
        max_norm: Largest norm.

    Returns:
        The norm before, the same on every rank.
    """
    by_placement: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = _as_placed(parameter)
            key = (grad.device_mesh, grad.placements) if is_dtensor(grad) else grad.device
            by_placement.setdefault(key, []).append(grad)
    squares = [_square(grads) for grads in by_placement.values()]
    if not squares:
        return torch.zeros(())
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in by_placement.values():
        here = [local(grad) for grad in grads]
        torch._foreach_mul_(here, factor.to(here[0].device))
    return norm


def _as_placed(parameter: Any) -> Any:
    """The gradient, cut as its parameter is: tensor parallelism leaves partial sums."""
    grad = parameter.grad
    if is_dtensor(grad) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return parameter.grad


def _square(grads: list[Tensor]) -> Tensor:
    """Sum of squares of gradients of one kind, over all ranks that hold a part."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    whole: Tensor = norm.full_tensor() if is_dtensor(norm) else norm  # type: ignore[attr-defined]
    return whole.square()
