"""What a call of `cross_entropy` has computed is taken from its graph, where that is the same and disturbs nobody."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.probe import loss_calls
from lightning_spectral.probe.loss_calls import saved_log_probs, score_cross_entropy
from lightning_spectral.probe.loss_tap import LossTap

N, V = 3_000, 50


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, V, generator=generator).mul(3).to(dtype).requires_grad_()


def targets() -> Tensor:
    found = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    found[::7] = -100
    return found


WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.1
WEIGHT[3] = 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_as_computed_again(reduction, weight, dtype):
    scores, own = logits(dtype), targets()
    weight = None if weight is None else weight.to(dtype)
    known = saved_log_probs(F.cross_entropy(scores, own, weight=weight, reduction=reduction))
    assert known is not None
    taken = score_cross_entropy([V], scores, own, weight, log_probs=known)
    again = score_cross_entropy([V], scores, own, weight)
    assert taken is not None
    assert again is not None
    torch.testing.assert_close(taken.losses_N, again.losses_N, rtol=2e-6, atol=1e-6)
    for name in ("right_N", "weights_N", "targets"):
        assert torch.equal(getattr(taken, name), getattr(again, name))


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores, own: F.cross_entropy(scores, own, label_smoothing=0.1),
        lambda scores, own: F.cross_entropy(scores.to(torch.bfloat16), own),
        lambda scores, own: F.cross_entropy(scores.detach(), own),
        lambda scores, own: F.cross_entropy(scores.view(10, N // 10, V).movedim(-1, 1), own.view(10, -1)),
        lambda scores, own: F.cross_entropy(scores, scores.detach().softmax(-1)),
        lambda scores, own: F.mse_loss(scores, scores.detach() + 1),
    ],
)
def test_what_keeps_something_else(loss):
    assert saved_log_probs(loss(logits(), targets())) is None


def test_nothing_is_brought_back_from_where_it_was_put():
    brought: list[Tensor] = []
    tap = LossTap([V])
    scores, own = logits(), targets()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda t: brought.append(t) or t):
        tap.start()
        F.cross_entropy(scores, own)
        (scored,) = tap.take()
    assert not brought
    expected = F.cross_entropy(scores.detach(), own)
    assert scored.mean == pytest.approx(float(expected), rel=1e-6)


class Counting(TorchDispatchMode):
    """How often log-probabilities are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._log_softmax.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 1 + 3)])
def test_log_probabilities_are_computed_once(dtype, count):
    """Half precision is computed again, in chunks of 1,024 predictions: the script's own numbers have 8 bits."""
    tap = LossTap([V])
    tap.start()
    with Counting() as counting:
        F.cross_entropy(logits(dtype), targets())
    (scored,) = tap.take()
    assert not tap.trouble
    assert counting.count == count
    expected = F.cross_entropy(logits(dtype).detach().float(), targets())
    assert scored.mean == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_the_first_one_counts(dtype):
    scores = torch.randn(2_000, 20, generator=torch.Generator().manual_seed(3)).mul(2).round().to(dtype).float()
    own = torch.randint(0, 20, (2_000,), generator=torch.Generator().manual_seed(4))
    hits = loss_calls._hits(scores, own)
    assert torch.equal(hits, (scores.argmax(-1) == own).double())
    assert 0 < hits.mean() < 0.2
