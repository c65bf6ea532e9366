"""The gradients of one step: local, dense, clipped by the global norm if asked, and refused when not finite.

``p.grad`` is only read; callbacks may look at it after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.magnitude import answers_at_once, largest_magnitudes
from lightning_spectral.models.placement import as_cut, is_dtensor, local
from lightning_spectral.optim.members import Member


def usable_gradients(
    members: Sequence[Member],
    grads: dict[int, Tensor],
    max_grad_norm: float | None,
    nonfinite: str,
    read: Callable[[Tensor], float] = float,
) -> dict[int, Tensor] | None:
    """Clipped gradients by ``id(param)``, or None when this step is to be skipped.

    Args:
        members: All parameters of the optimizer.
        grads: What ``local_gradients`` found.
        max_grad_norm: Global norm to clip to, or None.
        nonfinite: ``propagate``, ``raise`` or ``skip``; the last two decide alike on all ranks.
        read: Brings one number to the host: the only point where it waits for the device.

    Raises:
        RuntimeError: If a gradient is not finite under ``raise``.
    """
    if max_grad_norm is None and nonfinite == "propagate":
        return grads
    if nonfinite != "propagate" and read(_nonfinite(members, grads)) > 0:
        if nonfinite == "skip":
            return None
        bad = [m.name for m in members if id(m.param) in grads and not bool(torch.isfinite(grads[id(m.param)]).all())]
        raise RuntimeError(
            f"gradient with NaN or Inf in {bad[:3] or 'a parameter held by another rank'} "
            f"({len(bad)} parameters here). Lower the learning rate, clip, or set nonfinite='skip'."
        )
    if max_grad_norm is not None:
        norm = global_norm(members, grads)
        # The same factor as torch.nn.utils.clip_grad_norm_
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = {key: grad * factor.to(grad.device, grad.dtype) for key, grad in grads.items()}
    return grads


def local_gradients(members: Sequence[Member]) -> dict[int, Tensor]:
    """What of every gradient is here, by ``id(param)``, in the parameter's dtype.

    Raises:
        RuntimeError: If a gradient is sparse or complex.
    """
    return {id(m.param): _local_gradient(m) for m in members if m.param.grad is not None}


def _local_gradient(member: Member) -> Tensor:
    grad = local(as_cut(member.param.grad, member.param))
    if grad.is_sparse:
        raise RuntimeError(
            f"`{member.name}` has a sparse gradient; only dense ones are supported: build nn.Embedding(sparse=False)."
        )
    if grad.is_complex():
        raise RuntimeError(
            f"`{member.name}` is complex; only real parameters are supported: keep it as torch.view_as_real()."
        )
    held = local(member.param)
    return grad if grad.dtype == held.dtype else grad.to(held.dtype)


def global_norm(members: Sequence[Member], grads: dict[int, Tensor]) -> Tensor:
    """2-norm of the whole gradient, the same on every rank; one all_reduce per process group that cuts parameters.

    Beside DDP modules a parameter that none of them holds is one of this rank alone (an expert, an adapter): its norm
    counts on all ranks, as those of other ranks count here. Otherwise ranks would clip what they share differently.
    """
    total: Tensor | None = None  # a zero of the host's would be copied to the device, which waits
    shared = _largest_replica_group(members)
    for groups, alike in _by_cut(members):
        square = _square(alike, grads)
        for group in groups:
            dist.all_reduce(square, group=group)
        total = square if total is None else total.to(square.device) + square
    if total is None:
        return torch.zeros((), dtype=torch.float64)
    if shared is not None:  # also where none is here: another rank may have some
        others = [m for m in members if _is_replica(m) and m.shard.group is not shared]
        everywhere = torch.zeros_like(total)
        for copies, alike in _by_copies(others):
            here = _square(alike, grads).to(total)
            total, everywhere = total - here, everywhere + here / copies
        dist.all_reduce(everywhere, group=shared)
        total = total + everywhere
    return total.sqrt()


def _square(members: Sequence[Member], grads: dict[int, Tensor]) -> Tensor:
    """Sum of squares of what is here of some gradients."""
    held = [grads[id(m.param)] for m in members if id(m.param) in grads and grads[id(m.param)].numel()]
    device = local(members[0].param).device
    square = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    # A norm in bf16 is rounded to 8 bits, and differently for every way to cut the gradient.
    for narrow in (False, True):
        some = [grad for grad in held if (grad.dtype.itemsize < 4) == narrow]
        for norm in _norms(some, torch.float32 if narrow else None):
            square += norm.to(square.dtype).square()
    return square


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """2-norms; a CPU takes those whose squares are beyond fp32 again in fp64: clipping would make zeros of them."""
    found = torch._foreach_norm(list(tensors), dtype=dtype) if tensors else []
    if not all(answers_at_once(norm) for norm in found) or all(bool(norm.isfinite()) for norm in found):
        return found
    return torch._foreach_norm(list(tensors), dtype=torch.float64)


def _is_replica(member: Member) -> bool:
    """Whole here and no DTensor: under DDP, or of this rank alone."""
    return member.shard.is_whole and not member.shard.cut_over and not is_dtensor(member.param)


def _largest_replica_group(members: Sequence[Member]) -> Any:
    """Of the process groups of DDP modules the one of most ranks; None without any."""
    groups = {id(m.shard.group): m.shard.group for m in members if _is_replica(m) and m.shard.group is not None}
    return max(groups.values(), key=dist.get_world_size) if groups else None


def _by_copies(members: Sequence[Member]) -> list[tuple[int, list[Member]]]:
    """Parameters by the number of ranks that hold a copy."""
    alike: dict[int, list[Member]] = {}
    for member in members:
        copies = 1 if member.shard.group is None else dist.get_world_size(member.shard.group)
        alike.setdefault(copies, []).append(member)
    return list(alike.items())


def _nonfinite(members: Sequence[Member], grads: dict[int, Tensor]) -> Tensor:
    """How many gradients are not finite, over all ranks that share a parameter with this one."""
    bad = torch.zeros((), device=local(members[0].param).device)
    # The largest magnitude is finite exactly when all entries are.
    held = [grad for grad in grads.values() if grad.numel()]
    for largest in largest_magnitudes(held):
        bad += (~torch.isfinite(largest)).to(bad)
    for group in {id(m.shard.group): m.shard.group for m in members if m.shard.group is not None}.values():
        dist.all_reduce(bad, group=group)
    return bad


def _by_cut(members: Sequence[Member]) -> list[tuple[tuple[Any, ...], list[Member]]]:
    """Parameters cut over the same process groups together; in the order of the model, on every rank."""
    alike: dict[tuple[int, ...], tuple[tuple[Any, ...], list[Member]]] = {}
    for member in members:
        groups = member.shard.cut_over
        alike.setdefault(tuple(id(group) for group in groups), (groups, []))[1].append(member)
    return list(alike.values())
