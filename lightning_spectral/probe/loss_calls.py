"""What a script's own call of ``cross_entropy``, ``nll_loss`` or ``linear_cross_entropy`` scores, token by token.

Pure: arguments in, predictions out. Axes: N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.models.placement import whole

IGNORED = -1
_CHUNK_ROWS = 1_024  # log-probabilities of all predictions at once would be the largest tensor around


@dataclass
class Scored:
    """Predictions of one call.

    Attributes:
        losses_N: Loss of each prediction, nats, fp64: its cross-entropy, smoothed if the script smooths.
        right_N: 1 where the most likely token was right, else 0, fp64.
        weights_N: Weight of each prediction in the script's mean, fp64.
        targets: Token to be predicted, in the shape in which the script has them; :data:`IGNORED` where none counts.
        trains: Whether a gradient came back to the call; ``None`` where that cannot be seen.
    """

    losses_N: Tensor
    right_N: Tensor
    weights_N: Tensor
    targets: Tensor
    trains: bool | None = None

    @property
    def mean(self) -> float:
        """The script's mean."""
        scored_N = self.targets.flatten() != IGNORED
        return float((self.losses_N * self.weights_N)[scored_N].sum() / self.weights_N[scored_N].sum())

    def weigh(self, weights_N: Tensor) -> None:
        """Weights as the gradient has shown them; those of zero leave a prediction out, a common factor is no matter.

        Where one is negative the script's mean is no mean of losses (a policy gradient): all that count are equal.
        """
        weights_N = weights_N.to(self.weights_N) * self.weights_N
        counts_N = (weights_N != 0) & (self.targets.flatten() != IGNORED)
        if not bool(counts_N.any()) or not bool(weights_N.isfinite().all()):
            return
        largest = weights_N.abs().max()
        level = (weights_N[counts_N] / largest).abs()
        if bool((weights_N[counts_N] < 0).any() and (weights_N[counts_N] > 0).any()) or bool(level.min() > 0.99):
            weights_N = counts_N.to(weights_N)
        self.weights_N = weights_N.abs() * (counts_N.sum() / weights_N[counts_N].abs().sum())
        self.targets = torch.where(counts_N.view(self.targets.shape), self.targets, IGNORED)


def score_cross_entropy(
    widths: Collection[int],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    log_probs: Tensor | None = None,
) -> Scored | None:
    """Arguments of ``F.cross_entropy``; ``None`` for classes that are no vocabulary and for soft targets.

    ``log_probs`` are what the call itself has computed, if that is known.
    """
    smoothing = {"label_smoothing": label_smoothing}
    return _score(F.cross_entropy, widths, input, target, weight, ignore_index, log_probs, **smoothing)


def score_nll_loss(
    widths: Collection[int],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Scored | None:
    """Arguments of ``F.nll_loss``."""
    return _score(F.nll_loss, widths, input, target, weight, ignore_index)


def score_linear_cross_entropy(
    widths: Collection[int],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Scored | None:
    """Arguments of ``F.linear_cross_entropy``, whose logits are never whole in memory."""
    if target.is_floating_point() or linear_weight.ndim != 2 or len(linear_weight) not in widths:
        return None
    hidden_ND, head_VD = input.detach().reshape(-1, input.shape[-1]), linear_weight.detach()
    bias_V = None if linear_bias is None else linear_bias.detach()
    return _by_rows(
        F.cross_entropy,
        lambda part: F.linear(hidden_ND[part], head_VD, bias_V).float(),
        target.detach(),
        weight,
        -100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


SCORERS: dict[Any, Callable[..., Scored | None]] = {
    F.cross_entropy: score_cross_entropy,
    F.nll_loss: score_nll_loss,
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.12
    SCORERS[F.linear_cross_entropy] = score_linear_cross_entropy


def _score(
    func: Callable[..., Tensor],
    widths: Collection[int],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    log_probs: Tensor | None = None,
    **smoothing: float,
) -> Scored | None:
    classes = 1 if input.ndim > 1 else 0
    if target.is_floating_point() or input.ndim < 1 or input.shape[classes] not in widths:
        return None
    logits, target = whole(input.detach()), whole(target)
    rows_NV = logits.movedim(classes, -1).reshape(-1, logits.shape[classes])
    known_NV = log_probs if log_probs is not None and log_probs.shape == rows_NV.shape else None
    scores_of = lambda part: rows_NV[part].float()  # noqa: E731
    return _by_rows(func, scores_of, target.detach(), weight, ignore_index, known_NV, **smoothing)


def saved_log_probs(loss: Tensor) -> Tensor | None:
    """What a ``cross_entropy`` that has just run keeps for its backward pass: (N, V), in fp32 or fp64.

    ``None`` where it keeps something else, or where hooks would be called to bring it back (offloading, checkpointing).
    """
    node: Any = loss.grad_fn
    softmax: Any = node.next_functions[0][0] if type(node).__name__ == "NllLossBackward0" else None
    if type(softmax).__name__ != "LogSoftmaxBackward0" or _saving_is_hooked():
        return None
    log_probs: Tensor = softmax._saved_result
    is_plain = type(log_probs) is Tensor and log_probs.ndim == 2 and log_probs.dtype in (torch.float32, torch.float64)
    return log_probs.detach() if is_plain else None


def _saving_is_hooked() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _by_rows(
    func: Callable[..., Tensor],
    scores_of: Callable[[slice], Tensor],
    targets: Tensor,
    weight_V: Tensor | None,
    ignore_index: int,
    log_probs_NV: Tensor | None = None,
    **smoothing: float,
) -> Scored:
    flat_N = targets.reshape(-1)
    scored_N = flat_N != ignore_index
    own_N = torch.where(scored_N, flat_N, 0)
    weight_V = None if weight_V is None else weight_V.detach().float()
    weights_N = torch.ones(len(flat_N), dtype=torch.float64, device=flat_N.device)
    if weight_V is not None:
        weights_N = weight_V.double()[own_N]
        scored_N &= weights_N != 0
    losses_N, right_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
    options = {name: value for name, value in smoothing.items() if value}
    for start in range(0, len(flat_N), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        scores, own = scores_of(part), own_N[part]
        if log_probs_NV is None:
            losses = func(scores, own, weight=weight_V, reduction="none", **options).double() / weights_N[part]
        else:
            losses = -log_probs_NV[part].gather(1, own.unsqueeze(1)).squeeze(1).double()
        losses_N[part] = torch.where(scored_N[part], losses, 0.0)
        right_N[part] = _hits(scores, own)
    return Scored(losses_N, right_N, weights_N, torch.where(scored_N, flat_N, IGNORED).view(targets.shape))


def _hits(scores_NV: Tensor, own_N: Tensor) -> Tensor:
    """1 where the first of the largest scores is the token's own, else 0, fp64."""
    if scores_NV.device.type != "cpu":
        return (scores_NV.argmax(-1) == own_N).double()
    # on a CPU the largest value takes a fifth of the time of its place, which is wanted only where it is the own one
    largest_N = scores_NV.gather(1, own_N.unsqueeze(1)).squeeze(1) == scores_NV.amax(-1)
    places = largest_N.nonzero().squeeze(1)
    hits_N = torch.zeros(len(own_N), dtype=torch.float64)
    hits_N[places] = (scores_NV[places].argmax(-1) == own_N[places]).double()
    return hits_N
