"""The matrices that ``UpdateAudience`` looks at, what an optimizer keeps of them, and what groups gain from a step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_spectral.models.names import clean_names
from lightning_spectral.models.placement import whole
from lightning_spectral.probe import audience
from lightning_spectral.probe.audience_passes import GroupGradients, sum_over_ranks

_HEAD = re.compile(r"(^|\.)(lm_head|head|embed_out|unembed|output_layer)\.")
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")
Gains = dict[str, dict[str, list[float] | None]]  # rule -> matrix -> gain of each group


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


def gains_of(
    matrices: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    measured: GroupGradients,
    states: Mapping[int, dict[str, Any]],
    rules: Sequence[str],
    coefficients: str,
    ns_steps: int,
) -> Gains:
    """Gains of the groups from one update, by rule and matrix; one matrix at a time is whole.

    Args:
        matrices: By name, after the update.
        before: Before it.
        measured: Gradients of the groups.
        states: Of the optimizer, by ``id(matrix)``.
        rules: See ``UpdateAudience``, as the next two.
        coefficients: Newton-Schulz set.
        ns_steps: Its steps.
    """
    gains: Gains = {rule: {} for rule in rules}
    for position, (name, matrix) in enumerate(matrices.items()):
        gradients = [None if of is None else whole(of[position]) for of in measured.of_group]
        applied = whole(before[name] - matrix.detach())
        momentum, second = moments_of(matrix, states.get(id(matrix), {}))
        for rule in rules:
            direction: Tensor | None = applied
            if rule != "applied":
                direction = None if momentum is None else audience.counterfactual(
                    rule, momentum, second, coefficients, ns_steps
                )  # fmt: skip
            gains[rule][name] = None if direction is None else [
                0.0 if gradient is None else audience.gain(gradient, direction) for gradient in gradients
            ]  # fmt: skip
    return gains


def records_of(
    gains: Gains,
    matrices: Mapping[str, Tensor],
    measured: GroupGradients,
    held_out: bool,
    run_id: str,
    step: int,
    buckets: Sequence[str],
) -> list[audience.AudienceRecord]:
    """Records of one window, by rule, kind of matrix and bucket; the same on every rank. A collective."""
    names = list(matrices)
    device = matrices[names[0]].device
    totals = sum_over_ranks(torch.stack([measured.tokens_G, measured.losses_G]), device)
    records: list[audience.AudienceRecord] = []
    for rule, of_matrix in gains.items():
        for kind, own in audience.by_kind(of_matrix).items():
            gain_G = torch.tensor(own, dtype=torch.float64)
            if not measured.of_all:  # the mean over all tokens, from the means over each rank's
                gain_G = sum_over_ranks(gain_G * measured.tokens_G, device) / totals[0]
            alike = sum(audience.kind_of(name) == kind for name in names)
            for group, bucket in enumerate(buckets):
                number = int(totals[0, group])
                mean = float(gain_G[group]) if number else None
                loss = float(totals[1, group] / number) if number else None
                records.append(
                    audience.AudienceRecord(run_id, step, kind, rule, bucket, mean, loss, number, alike, held_out)
                )
    return records
