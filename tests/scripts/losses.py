"""Scripts that compute their loss in other ways; the harness compares the record with what they returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.architectures import NormHead
from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.models import EVALUATED, MASK, batches, with_validation
from tests.scripts.toys import Lit, cross_entropy

CLASS_WEIGHTS = 1 + torch.arange(toys.V) / toys.V


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


class ClassWeights(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-1]), ids[:, 1:], weight=CLASS_WEIGHTS, label_smoothing=0.1)


class LogSumExp(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        logits, targets = self.net(ids[:, :-1]), ids[:, 1:]
        return (logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)).mean()


class OneHot(Lit):
    """Targets as probabilities."""

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy_of(self.net(ids[:, :-1]), F.one_hot(ids[:, 1:], toys.V).float())


def cross_entropy_of(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), probabilities.flatten(0, 1))


class SmoothedByHand(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        log_p, targets = self.net(ids[:, :-1]).log_softmax(-1), ids[:, 1:]
        own = -log_p.gather(-1, targets[..., None]).squeeze(-1)
        return (0.9 * own - 0.1 * log_p.mean(-1)).mean()


class MaskedBehind(Lit):
    """One loss a token, a mask behind it."""

    def loss(self, ids: Tensor) -> Tensor:
        losses = cross_entropy(self.net(ids[:, :-1]), ids[:, 1:], reduction="none")
        keep = (torch.arange(len(losses)) % 3 > 0).float()
        return (losses * keep).sum() / keep.sum()


class MaskedByHand(Lit):
    """Means of sequences, of unequal length."""

    def loss(self, ids: Tensor) -> Tensor:
        keep = MASK[: len(ids)].float()
        losses = nll(self.net(ids[:, :-1]), ids[:, 1:])
        return ((losses * keep).sum(1) / keep.sum(1)).mean()


class Capped(Lit):
    """Logits capped as Gemma does, a penalty on the normaliser that is logged apart."""

    def loss(self, ids: Tensor) -> Tensor:
        return nll(30 * torch.tanh(self.net(ids[:, :-1]) / 30), ids[:, 1:]).mean()


class Fused(torch.autograd.Function):
    """Head and loss in one, logits in chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        gradients, total = torch.zeros_like(hidden), hidden.new_zeros(())
        for rows in torch.arange(len(hidden)).chunk(4):
            logits = hidden[rows] @ head.T
            total += F.cross_entropy(logits, targets[rows], reduction="sum")
            gradients[rows] = (logits.softmax(-1) - F.one_hot(targets[rows], toys.V)) @ head / len(hidden)
        ctx.save_for_backward(gradients)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * gradient, None, None


class FusedHead(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return Fused.apply(self.net.model(ids[:, :-1]).flatten(0, 1), self.net.lm_head.weight, ids[:, 1:].flatten())


class LinearCrossEntropy(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        head, hidden = self.net.lm_head, self.net.model(ids[:, :-1]).flatten(0, 1)
        return F.linear_cross_entropy(hidden, head.weight, ids[:, 1:].flatten(), linear_bias=head.bias)


class NormalisedHead(Lit):
    """Baichuan 2's NormHead: the head's weight is normalised in the forward pass."""

    def make(self) -> nn.Module:
        model = toys.LM()
        model.lm_head = NormHead()
        nn.init.normal_(model.lm_head.weight)
        return model


class Focal(Lit):
    """No mean of cross-entropies: the losses are ``not_matched``, the ranks as ever."""

    def loss(self, ids: Tensor) -> Tensor:
        losses = nll(self.net(ids[:, :-1]), ids[:, 1:])
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class LogsAnother(Lit):
    """A second cross-entropy, with its graph, that is only logged."""

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.net(ids[:, :-1])
        self.last = cross_entropy(logits[:, :4], ids[:, 1:5]).item() if self.training else 0.0
        cross_entropy(logits, ids[:, :-1])
        return cross_entropy(logits, ids[:, 1:])


class Preference(Lit):
    """DPO: log-probabilities of pairs, of the model and of a frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = [type(self.net)().requires_grad_(False)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x, y = batch[:, :-1], batch[:, 1:]
        own = -nll(self.net(x), y).sum(1)
        with torch.no_grad():
            reference = -nll(self.frozen[0](x), y).sum(1)
        better, worse = (own - reference).chunk(2)
        return -F.logsigmoid(0.1 * (better - worse)).mean()


class PolicyGradient(Lit):
    """GRPO: log-probabilities times advantages of mean zero."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        log_p = -nll(self.net(batch[:, :-1]), batch[:, 1:])
        advantages = torch.linspace(-1, 1, len(batch))
        return -((log_p - log_p.detach()).exp() * advantages[:, None]).mean()


class TwoHeads(Lit):
    """Next token and the one after: two calls, both train."""

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.net(ids[:, :-2])
        return (cross_entropy(logits, ids[:, 1:-1]) + cross_entropy(logits.flip(-1), ids[:, 2:])) / 2


class InstructionTuning(Lit):
    """Labels of the prompt are left out, as Hugging Face shifts them; no mask says that its rows are no padding."""

    def counted(self, rows: Tensor) -> Tensor:
        return rows[:, 5:]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self.net(batch["input_ids"]), batch["labels"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class EvaluatesAndGenerates(Lit):
    """The loss of the batch, then text from its beginnings, then a fixed prompt."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)
        text = batch[:, :4]
        for _ in range(3):
            text = torch.cat([text, self.net(text)[:, -1:].argmax(-1)], 1)
        self.net(torch.zeros(2, 5, dtype=torch.int64))


class EvaluatesTwice(Lit):
    """Two passes over one batch, as Monte-Carlo dropout makes them."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)
        self.loss(batch)


SCRIPTS = {
    "class weights": Script(ClassWeights),
    "logsumexp by hand": Script(LogSumExp),
    "one-hot targets": Script(OneHot),
    "smoothing by hand": Script(SmoothedByHand),
    "mask behind the losses": Script(MaskedBehind),
    "means of sequences": Script(MaskedByHand),
    "capped logits": Script(Capped),
    "head and loss fused": Script(FusedHead),
    "logs another loss": Script(LogsAnother),
    "normalised head": Script(NormalisedHead),
    "focal": Script(Focal, losses=False, unscored=True),
    "preference pairs": Script(Preference, losses=False, unscored=True),
    "policy gradient": Script(PolicyGradient, losses=False, unscored=True),
    "two heads": Script(TwoHeads),
    "instruction tuning": Script(
        InstructionTuning,
        batches(lambda x, m: {"input_ids": x, "labels": x.masked_fill(torch.arange(toys.T) < 5, -100)}),
    ),
    "loss and generate() in validation": Script(
        EvaluatesAndGenerates, with_validation, **EVALUATED, evaluated_rows=16 * toys.T
    ),
    "two passes in validation": Script(EvaluatesTwice, with_validation, **EVALUATED, evaluated_rows=16 * toys.T),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.12
    SCRIPTS["torch's fused head"] = Script(LinearCrossEntropy)
