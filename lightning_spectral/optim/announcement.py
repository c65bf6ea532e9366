"""What an optimizer says once, where it is built."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch

from lightning_spectral.optim.members import Member

LOG = logging.getLogger("lightning_spectral.optim")
_FEW = 0.5  # of the matrix elements; with less under the rule it is another optimizer that trains the model


def show_table() -> None:
    """Let the routing table be seen where nobody configured logging, as Lightning's own loggers do."""
    package = logging.getLogger("lightning_spectral")
    if package.level == logging.NOTSET and not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


def warn_of_lost_updates(members: Sequence[Member]) -> None:
    """Name bf16 weights that round small updates away."""
    narrow = [m.name for m in members if m.param.dtype == torch.bfloat16 and m.param.requires_grad]
    if narrow:
        LOG.warning(
            "%d weights are bf16, %s first: updates smaller than their rounding (0.4 %% of a weight) are lost. Set "
            "`bf16_weights` to stochastic or compensated.",
            len(narrow),
            narrow[0],
        )


def warn_of_few(name: str, share: float, fallback: str, table: str) -> None:
    """Say loudly when most matrix elements do not get the rule that the optimizer is named after."""
    if share < _FEW:
        warnings.warn(
            f"{name} trains only {share:.0%} of the matrix elements; the others go to {fallback}:\n{table}\n"
            "Name them in `roles`, or use AdamW if that is what you want.",
            stacklevel=5,
        )
