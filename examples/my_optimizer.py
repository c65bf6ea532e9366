"""An optimizer of your own against AdamW over widths: a class, a sweep, a law.

python examples/my_optimizer.py
"""

from collections.abc import Callable
from typing import Any

import torch

from lightning_spectral.cli import main


class SignDescent(torch.optim.Optimizer):
    """Sign of the momentum, with decoupled weight decay: put your own rule into ``step``.

    Args:
        params: Parameters or groups.
        lr: Step size.
        momentum: Decay of the momentum.
        weight_decay: Decoupled decay.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean.sign(), alpha=group["lr"])
        return loss


if __name__ == "__main__":
    # the axis `optimizer` names its options, widths are multiples of n_embd; see examples/my_optimizer.yaml
    status = main(["sweep", "examples/my_optimizer.yaml", "--workers", "1"])
    raise SystemExit(status or main(["report", "out/examples/my_optimizer", "--last", "1"]))
