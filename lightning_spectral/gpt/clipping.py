"""Clipping by the norm of the whole gradient, whatever cut the parameters; torch takes one kind of tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_spectral.models.placement import as_cut, is_dtensor, local, whole


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
            grad = parameter.grad = as_cut(parameter.grad, parameter)
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


def _square(grads: list[Tensor]) -> Tensor:
    """Sum of squares of gradients of one kind, over all ranks that hold a part."""
    return whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))).square()
