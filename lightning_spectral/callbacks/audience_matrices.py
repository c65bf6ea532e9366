"""The matrices that ``UpdateAudience`` looks at, and what an optimizer keeps of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_spectral.models.names import clean_names
from lightning_spectral.probe.audience_passes import whole

_HEAD = re.compile(r"(^|\.)(lm_head|head|embed_out|unembed|output_layer)\.")
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")


def matrices_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable matrices but embeddings (tied heads among them) and what is called a head."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = clean_names(name for name, _ in model.named_parameters())
    for raw, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and id(parameter) not in embeddings and not _HEAD.search(names[raw])
        if hidden and parameter.requires_grad and parameter.numel():
            yield names[raw], parameter


def moments_of(matrix: Tensor, state: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Momentum (the gradient where the optimizer keeps none) and second moment, whole; ``None`` what there is not."""
    momentum = next((state[key] for key in _MOMENTUM_KEYS if isinstance(state.get(key), Tensor)), matrix.grad)
    if momentum is None or momentum.shape != matrix.shape:
        return None, None
    momentum, second = whole(momentum.detach()), state.get("exp_avg_sq")
    finite = bool(torch.isfinite(momentum).all())
    return momentum if finite else None, whole(second) if isinstance(second, Tensor) else None


def refuse_what_hides_matrices(trainer: pl.Trainer) -> None:
    """Before step 1.

    Raises:
        MisconfigurationException: Under FSDP1 or tensor parallelism.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "UpdateAudience needs matrices, and FSDPStrategy (FSDP1) flattens them; use ModelParallelStrategy with "
            "`fully_shard` (FSDP2), or DDP."
        )
    mesh = getattr(strategy, "device_mesh", None) if isinstance(strategy, ModelParallelStrategy) else None
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            f"UpdateAudience does not support tensor parallelism, got tensor_parallel_size="
            f"{mesh['tensor_parallel'].size()}; set it to 1 (FSDP2), or use DDP."
        )


def states_of(optimizers: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """State of every parameter by its id."""
    return {
        id(parameter): state
        for optimizer in optimizers
        for parameter, state in getattr(optimizer, "_optimizer", optimizer).state.items()
    }
