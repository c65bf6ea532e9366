"""The gradients of one step: local, dense, clipped by the global norm if asked, and refused when not finite.

``p.grad`` is only read; callbacks may look at it after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.optim.shards import Piece, fsdp1_pieces, local, piece_of


def usable_gradients(
    params: Sequence[Tensor], max_grad_norm: float | None, nonfinite: str, name: Callable[[Tensor], str]
) -> dict[int, Tensor] | None:
    """Local gradients by ``id(param)``, or None when this step is to be skipped.

    Args:
        params: All parameters of the optimizer.
        max_grad_norm: Global norm to clip to, or None.
        nonfinite: ``propagate``, ``raise`` or ``skip``; the last two decide alike on all ranks.
        name: Names a parameter in messages.

    Raises:
        RuntimeError: If a gradient is sparse or complex, or not finite under ``raise``.
    """
    grads: dict[int, Tensor] = {}
    for param in params:
        if param.grad is None:
            continue
        grad = local(param.grad)
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError(
                f"`{name(param)}` has a {'sparse' if grad.is_sparse else 'complex'} gradient; only dense real ones are "
                "supported (build nn.Embedding with sparse=False)."
            )
        held = local(param)
        grads[id(param)] = grad if grad.dtype == held.dtype else grad.to(held.dtype)
    if max_grad_norm is None and nonfinite == "propagate":
        return grads
    flat_views = fsdp1_pieces()
    pieces = [piece_of(param, flat_views) for param in params]
    if nonfinite != "propagate" and not _all_finite(params, pieces, grads):
        if nonfinite == "skip":
            return None
        bad = [name(p) for p in params if id(p) in grads and not bool(torch.isfinite(grads[id(p)]).all())]
        raise RuntimeError(
            f"gradient with NaN or Inf in {bad[:3] or 'a parameter held by another rank'} "
            f"({len(bad)} parameters here). Lower the learning rate, clip, or set nonfinite='skip'."
        )
    if max_grad_norm is not None:
        norm = global_norm(params, pieces, grads)
        # The same factor as torch.nn.utils.clip_grad_norm_
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = {key: grad * factor.to(grad.device, grad.dtype) for key, grad in grads.items()}
    return grads


def global_norm(params: Sequence[Tensor], pieces: Sequence[Piece], grads: dict[int, Tensor]) -> Tensor:
    """2-norm of the whole gradient; one all_reduce per process group that cuts parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for group, members in _by_group(params, pieces).items():
        held = [grads[id(p)] for p, _ in members if id(p) in grads and grads[id(p)].numel()]
        square = torch.zeros((), dtype=torch.float64, device=local(members[0][0]).device)
        # A norm in bf16 is rounded to 8 bits, and differently for every way to cut the gradient.
        for narrow in (False, True):
            alike = [grad for grad in held if (grad.dtype.itemsize < 4) == narrow]
            for norm in torch._foreach_norm(alike, dtype=torch.float32 if narrow else None) if alike else []:
                square += norm.double().square()
        process_group = members[0][1].group
        if process_group is not None:
            square = square.float() if square.device.type == "mps" else square
            dist.all_reduce(square, group=process_group)
        del group
        total = total.to(square.device) + square
    return total.sqrt()


def _all_finite(params: Sequence[Tensor], pieces: Sequence[Piece], grads: dict[int, Tensor]) -> bool:
    answer = True
    for members in _by_group(params, pieces).values():
        held = [grads[id(p)] for p, _ in members if id(p) in grads and grads[id(p)].numel()]
        # The largest magnitude is finite exactly when all entries are.
        bad = torch.zeros((), device=local(members[0][0]).device)
        for largest in torch._foreach_norm(held, float("inf")) if held else []:
            bad += (~torch.isfinite(largest)).float()
        if members[0][1].group is not None:
            dist.all_reduce(bad, group=members[0][1].group)
        answer = answer and float(bad) == 0.0
    return answer


def _by_group(params: Sequence[Tensor], pieces: Sequence[Piece]) -> dict[int, list[tuple[Tensor, Piece]]]:
    """Parameters cut over one process group together; groups come in the order of the model, on every rank."""
    groups: dict[int, list[tuple[Tensor, Piece]]] = {}
    for param, piece in zip(params, pieces, strict=True):
        groups.setdefault(0 if piece.group is None else id(piece.group), []).append((param, piece))
    return groups
