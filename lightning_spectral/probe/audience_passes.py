"""The extra passes behind ``UpdateAudience``: each group's gradient, of whole parameters or of FSDP2's.

Under FSDP2 a parameter is in no graph (its gathered copy is), so ``torch.autograd.grad`` knows nothing of it: there
each group takes a forward and a backward pass of its own, whose reduced gradients are read from ``.grad`` before the
training's own are put back. FSDP averages over the ranks; each rank's loss is its share of the sum over all tokens of
the group times the number of ranks, so that the average is the gradient of the group's mean loss over all processes.
"""

# N tokens of this process, G groups

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.models.placement import is_dtensor

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class GroupGradients:
    """Gradients of each group's mean loss.

    Attributes:
        of_group: By group, one tensor per matrix (a shard of it under FSDP2); ``None`` for a group without tokens.
        tokens_G: Tokens of each group in this process, fp64.
        losses_G: Their summed loss, fp64.
        of_all: Whether the gradients are those of all processes together, not of this one's tokens.
    """

    of_group: list[list[Tensor] | None]
    tokens_G: Tensor
    losses_G: Tensor
    of_all: bool = False


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum over all processes, on the CPU in fp64; every rank comes here the same number of times."""
    if not (dist.is_available() and dist.is_initialized()):
        return values.double()
    sent = values.to(device, torch.float64, copy=True)
    dist.all_reduce(sent)
    return sent.cpu()


def group_totals(loss_N: Tensor, code_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Tokens and summed loss of each group, shape (G,) each, fp64 on the CPU; negative codes are in none."""
    known_N = code_N >= 0
    code_N, loss_N = code_N[known_N].long().cpu(), loss_N.detach()[known_N].double().cpu()
    zeros_G = torch.zeros(num_groups, dtype=torch.float64)
    return zeros_G.scatter_add(0, code_N, torch.ones_like(loss_N)), zeros_G.scatter_add(0, code_N, loss_N)


def group_gradients(
    forward: Callable[[], tuple[Tensor, Tensor]], num_groups: int, matrices: Sequence[Tensor]
) -> GroupGradients:
    """One forward pass, and one backward pass a group; nothing is added to ``.grad``.

    Args:
        forward: Gives the loss of each token, with its graph, and its group; negative groups are none.
        num_groups: G.
        matrices: What to differentiate by, whole.
    """
    loss_N, code_N = forward()
    tokens_G, losses_G = group_totals(loss_N, code_N, num_groups)
    found: list[list[Tensor] | None] = []
    for group in range(num_groups):
        if not tokens_G[group]:
            found.append(None)
            continue
        mean = loss_N[code_N == group].mean()
        gradients = torch.autograd.grad(mean, matrices, retain_graph=True, allow_unused=True)
        found.append(
            [torch.zeros_like(m) if g is None else g.detach() for g, m in zip(gradients, matrices, strict=True)]
        )
    return GroupGradients(found, tokens_G, losses_G)


def sharded_group_gradients(
    forward: Callable[[], tuple[Tensor, Tensor]], num_groups: int, matrices: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> GroupGradients:  # fmt: skip
    """A forward and a backward pass a group, by every rank; ``.grad`` is as before at the end.

    Args:
        forward: As in :func:`group_gradients`.
        num_groups: G.
        matrices: What to differentiate by.
        parameters: All parameters of the model, as the optimizer knows them.
    """
    kept = [parameter.grad for parameter in parameters]
    found: list[list[Tensor] | None] = []
    tokens_G = losses_G = all_G = torch.zeros(num_groups)
    try:
        for group in range(num_groups):
            if group and not all_G[group]:
                found.append(None)
                continue
            for parameter in parameters:
                parameter.grad = None
            loss_N, code_N = forward()
            if group == 0:
                tokens_G, losses_G = group_totals(loss_N, code_N, num_groups)
                all_G = sum_over_ranks(tokens_G, loss_N.device)
            # a rank without such tokens, too, goes backward: FSDP gathers and reduces on the way
            share = loss_N[code_N == group].sum() * (dist.get_world_size() / float(all_G[group].clamp(min=1)))
            share.backward()  # type: ignore[no-untyped-call]
            found.append([_reduced(matrix) for matrix in matrices] if all_G[group] else None)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return GroupGradients(found, tokens_G, losses_G, of_all=True)


def _reduced(matrix: Tensor) -> Tensor:
    if matrix.grad is None:
        return torch.zeros_like(matrix)
    if not is_dtensor(matrix):  # left out of FSDP: nobody has averaged it
        dist.all_reduce(matrix.grad.div_(dist.get_world_size()))
    return matrix.grad.detach()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Extra passes that leave no trace: evaluation mode, no hooks (other callbacks count calls), no randomness.

    What torch's own distributed code hooks in stays: without it FSDP2's modules have no weights.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [{name: getattr(module, name) for name in _HOOKS} for module in modules]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
                for name in _HOOKS:
                    own = OrderedDict((key, hook) for key, hook in getattr(module, name).items() if _torch_s(hook))
                    setattr(module, name, own)
            yield
        finally:
            for module, mode, kept in zip(modules, training, hooks, strict=True):
                module.training = mode
                for name, value in kept.items():
                    setattr(module, name, value)


def _torch_s(hook: Any) -> bool:
    origin = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return origin.startswith("torch.distributed.")
