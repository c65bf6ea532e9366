"""Elementwise rules for everything that is not a hidden matrix: AdamW and Lion.

Each rule updates the local storage of parameters that share one group, so that the same code serves one device, DDP,
FSDP1 and FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# (parameters, gradients, their states, group with its effective `lr` resolved) -> nothing, in place
VectorRule = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[dict[str, Any]], dict[str, Any], float], None]

_FUSED_ON = ("cpu", "cuda", "xpu", "mps")


def adamw_rule(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    group: dict[str, Any],
    lr: float,
) -> None:
    """Decoupled AdamW through torch's fused kernel (3.7 times its foreach one on a CPU)."""
    beta1, beta2 = group["betas"]
    fused = all(p.device.type in _FUSED_ON for p in params)
    adamw(
        list(params),
        list(grads),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def lion_rule(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    group: dict[str, Any],
    lr: float,
) -> None:
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum, with decoupled weight decay."""
    beta1, beta2 = group["betas"]
    momenta = [state["exp_avg"] for state in states]
    if group["weight_decay"] != 0:
        torch._foreach_mul_(list(params), 1 - lr * group["weight_decay"])
    directions = torch._foreach_lerp(list(grads), momenta, beta1)
    torch._foreach_sign_(directions)
    torch._foreach_add_(list(params), directions, alpha=-lr)
    torch._foreach_lerp_(momenta, list(grads), 1 - beta2)
    torch._foreach_add_([state["step"] for state in states], 1)


VECTOR_RULES: dict[str, VectorRule] = {"adamw": adamw_rule, "lion": lion_rule}
# State of the same layout as the parameter, by rule. Every state also has a scalar `step`.
VECTOR_STATE: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
