"""Losses written by hand, read off the gradient of their logits: the mean is the script's, or there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.probe.loss_tap import NO_GRADIENT, NOT_PROVEN, NOT_SEEN, LossTap
from tests.distributed.harness import run_ranks

B, T, D, V = 4, 30, 8, 23


def parts() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(V, (B, T), generator=g)


MASK = torch.arange(T) < torch.tensor([[30], [20], [7], [11]])


def nll(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]


def logsumexp(logits: Tensor, y: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0]


def one_hot(logits: Tensor, y: Tensor) -> Tensor:
    return -(F.one_hot(y, V) * F.log_softmax(logits, dim=-1)).sum(-1)


def by_index(logits: Tensor, y: Tensor) -> Tensor:
    flat = torch.log(torch.softmax(logits.flatten(0, 1), 1))
    return -flat[torch.arange(B * T), y.flatten()].view(B, T)


def by_distribution(logits: Tensor, y: Tensor) -> Tensor:
    return -torch.distributions.Categorical(logits=logits).log_prob(y)


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    return 0.9 * nll(logits, y) - 0.1 * logits.log_softmax(-1).mean(-1)


CLASS_WEIGHTS = 1 + torch.arange(V) / V
MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda losses, y: losses.mean(),
    "masked": lambda losses, y: (losses * MASK).sum() / MASK.sum(),
    "chosen": lambda losses, y: losses[MASK].mean(),
    "of sequences": lambda losses, y: ((losses * MASK).sum(1) / MASK.sum(1)).mean(),
    "scaled": lambda losses, y: losses.mean() * 3,
    "class weights": lambda losses, y: (losses * CLASS_WEIGHTS[y]).sum() / CLASS_WEIGHTS[y].sum(),
}
LOSSES = [nll, logsumexp, one_hot, by_index, by_distribution, smoothed]


def run(loss_of: Callable[[Tensor, Tensor], Tensor], *, backward: bool = True) -> tuple[float, LossTap, list[Tensor]]:
    hidden, head, y = parts()
    tap = LossTap({V})
    tap.start()
    loss = loss_of(hidden @ head.T, y)
    tap.stop()
    if backward:
        loss.backward()
    return loss.item(), tap, [hidden.grad, head.grad]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_is_the_scripts(loss: Callable[[Tensor, Tensor], Tensor], mean: str) -> None:
    expected, tap, _ = run(lambda logits, y: MEANS[mean](loss(logits, y), y))
    (scored,) = tap.take()
    assert scored.mean * (3 if mean == "scaled" else 1) == pytest.approx(expected, rel=1e-5)
    y = parts()[2]
    kept = MASK if mean in ("masked", "chosen", "of sequences") else torch.ones_like(MASK)
    assert torch.equal(scored.targets.view(B, T), torch.where(kept, y, -1))


@pytest.mark.parametrize("mean", ["masked", "of sequences", "class weights", "chosen"])
def test_what_is_weighed_behind_the_call_is_weighed_here(mean: str) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(B, T)
        return MEANS[mean](losses, y)

    expected, tap, _ = run(loss)
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(expected, rel=1e-6)
    assert int((scored.targets >= 0).sum()) == (B * T if mean == "class weights" else int(MASK.sum()))


EVALUATED = {
    "product": lambda losses, y: (losses * MASK).sum() / MASK.sum(),
    "product, other way": lambda losses, y: (MASK.float() * losses).sum() / MASK.sum(),
    "chosen": lambda losses, y: losses[MASK].mean(),
    "selected": lambda losses, y: torch.masked_select(losses, MASK).mean(),
    "filled": lambda losses, y: losses.masked_fill(~MASK, 0.0).sum() / MASK.sum(),
    "class weights": MEANS["class weights"],
    "all": lambda losses, y: losses.mean(),
}


@pytest.mark.parametrize("mean", EVALUATED)
def test_an_evaluation_has_no_gradient_but_its_masks_are_seen(mean: str) -> None:
    hidden, head, y = parts()
    tap = LossTap({V})
    tap.start(training=False)
    with torch.no_grad():
        losses = F.cross_entropy((hidden @ head.T).flatten(0, 1), y.flatten(), reduction="none").view(B, T)
        expected = EVALUATED[mean](losses, y).item()
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(expected, rel=1e-6)


def test_gradients_are_those_without_us() -> None:
    hidden, head, y = parts()
    nll(hidden @ head.T, y).mean().backward()
    _, tap, found = run(lambda logits, y: nll(logits, y).mean())
    assert torch.equal(found[0], hidden.grad)
    assert torch.equal(found[1], head.grad)
    assert tap.take()


REFUSED = {
    "focal": lambda logits, y: (nll(logits, y) * (1 - torch.exp(-nll(logits, y))) ** 2).mean(),
    "soft targets": lambda logits, y: -(torch.randn(V).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(),
    "policy": lambda logits, y: (nll(logits, y) * torch.linspace(-1, 1, B * T).view(B, T)).mean(),
    "squares": lambda logits, y: logits.softmax(-1).square().mean(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mean_of_cross_entropies_is_refused(name: str) -> None:
    _, tap, _ = run(REFUSED[name])
    assert tap.take() == []
    assert tap.reason == NOT_PROVEN


def test_the_normalisers_penalty_is_left_out() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return nll(logits, y).mean() + 1e-2 * logits.logsumexp(-1).square().mean()

    _, tap, _ = run(loss)
    (scored,) = tap.take()
    hidden, head, y = parts()
    assert scored.mean == pytest.approx(nll(hidden @ head.T, y).mean().item(), rel=1e-5)


def test_a_cap_and_a_temperature_come_before_the_loss() -> None:
    def capped(logits: Tensor) -> Tensor:
        return torch.tanh(logits / 30) * 30 / 0.7

    expected, tap, _ = run(lambda logits, y: nll(capped(logits), y).mean())
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(expected, rel=1e-5)


class Fused(torch.autograd.Function):
    """A loss whose backward pass is written by hand: only the logits that enter it are tensors of the graph."""

    @staticmethod
    def forward(ctx, logits, y):  # type: ignore[no-untyped-def]
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        ctx.save_for_backward(p, y)
        return -p.gather(-1, y[..., None]).log().mean()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        p, y = ctx.saved_tensors
        return gradient * (p - F.one_hot(y, V)) / y.numel(), None


class FusedLinear(torch.autograd.Function):
    """Logits exist in chunks, inside its forward."""

    @staticmethod
    def forward(ctx, hidden, head, y):  # type: ignore[no-untyped-def]
        total = hidden.new_zeros(())
        for h, t in zip(hidden.flatten(0, 1).split(16), y.flatten().split(16), strict=True):
            total += F.cross_entropy(h @ head.T, t, reduction="sum")
        ctx.save_for_backward(hidden, head)
        return total / y.numel()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        hidden, head = ctx.saved_tensors
        return torch.zeros_like(hidden), torch.zeros_like(head), None


def test_a_kernel_of_its_own_over_logits() -> None:
    expected, tap, _ = run(Fused.apply)
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(expected, rel=1e-5)
    assert torch.equal(scored.targets, parts()[2])


def test_a_fused_head_that_calls_cross_entropy() -> None:
    hidden, head, y = parts()
    tap = LossTap({V})
    tap.start()
    loss = FusedLinear.apply(hidden, head, y)
    loss.backward()
    scored = tap.take()
    total = sum(float(one.losses_N.sum()) for one in scored)
    assert total / (B * T) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.12")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
def test_torchs_fused_head(options: dict[str, float]) -> None:
    hidden, head, y = parts()
    tap = LossTap({V})
    tap.start()
    loss = F.linear_cross_entropy(hidden.flatten(0, 1), head, y.flatten(), **options)
    loss.backward()
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(loss.item(), rel=1e-6)


def test_why_there_is_no_loss_and_what_to_do() -> None:
    _, tap, _ = run(lambda logits, y: nll(logits, y).mean(), backward=False)
    assert (tap.take(), tap.reason) == ([], NO_GRADIENT)
    assert "`F.cross_entropy`" in NO_GRADIENT
    expected, tap, _ = run(lambda logits, y: F.cross_entropy(logits.mT, y), backward=False)  # the remedy
    assert tap.take()[0].mean == pytest.approx(expected, rel=1e-6)
    _, tap, _ = run(lambda logits, y: logits[..., :2].square().mean(), backward=False)
    assert (tap.take(), tap.reason) == ([], NOT_SEEN)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo
def test_a_compiled_loss_and_its_remedy() -> None:
    torch._dynamo.reset()
    hidden, head, y = parts()

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.mT, y)

    compiled = torch.compile(lambda loss: loss(hidden @ head.T), backend="aot_eager")
    tap = LossTap({V})
    tap.start()
    compiled(loss_of).backward()
    assert (tap.take(), tap.reason) == ([], NOT_SEEN)
    assert "`torch.compiler.disable`" in NOT_SEEN
    tap.start()
    expected = compiled(torch.compiler.disable(loss_of))
    expected.backward()
    assert tap.take()[0].mean == pytest.approx(expected.item(), rel=1e-6)


def _sharded(rank: int, world_size: int, classes: int) -> tuple[float, float, int]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    hidden, head, y = parts()
    rows = distribute_tensor(hidden.detach(), mesh, [Replicate() if classes else Shard(0)]).requires_grad_()
    weights = distribute_tensor(head.detach(), mesh, [Shard(0) if classes else Replicate()]).requires_grad_()
    targets = distribute_tensor(y, mesh, [Replicate() if classes else Shard(0)])
    tap = LossTap({V})
    tap.start()
    logits = torch.matmul(rows, weights.mT)
    assert isinstance(logits, DTensor)
    assert logits.placements == (Shard(2 if classes else 0),)
    loss = one_hot_of(logits.redistribute(placements=[Replicate()]) if classes else logits, targets)
    loss.backward()
    (scored,) = tap.take()
    return scored.mean, float(loss.detach().full_tensor()), len(scored.losses_N)


def one_hot_of(logits: Tensor, targets: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    expected = F.one_hot(targets.to_local(), V).float()
    chosen = DTensor.from_local(expected, logits.device_mesh, logits.placements)
    return -(chosen * torch.log_softmax(logits, -1)).sum(-1).mean()


@pytest.mark.parametrize("classes", [0, 1])
def test_a_loss_by_hand_on_sharded_logits(classes: int) -> None:
    for mean, expected, number in run_ranks(_sharded, 2, classes):
        assert number == B * T
        assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    hidden, head, y = parts()
    tap = LossTap({V})
    tap.start()
    loss = nll((hidden.to(dtype) @ head.to(dtype).T).float(), y).mean()
    loss.backward()
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(loss.item(), rel=1e-5)
