"""Losses are those of the script's own calls, and the calls are answered as without us."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_spectral.probe import loss_tap
from lightning_spectral.probe.loss_tap import LossTap

V, N = 11, 30


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def targets(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


CALLS = {
    "plain": lambda: F.cross_entropy(logits(N, V), targets(N)),
    "keywords": lambda: F.cross_entropy(input=logits(N, V), target=targets(N)),
    "module": lambda: nn.CrossEntropyLoss()(logits(N, V), targets(N)),
    "classes second": lambda: F.cross_entropy(logits(3, V, 10), targets(3, 10)),
    "ignored": lambda: F.cross_entropy(logits(N, V), targets(N).index_fill(0, torch.arange(9), -100)),
    "another index": lambda: F.cross_entropy(logits(N, V), targets(N), ignore_index=3),
    "smoothed": lambda: F.cross_entropy(logits(N, V), targets(N), label_smoothing=0.2),
    "nll": lambda: F.nll_loss(F.log_softmax(logits(N, V), -1), targets(N)),
    "class weights": lambda: F.cross_entropy(logits(N, V), targets(N), weight=torch.arange(V) / V),
    "class weights, smoothed": lambda: F.cross_entropy(
        logits(N, V), targets(N), weight=torch.arange(1, V + 1) / V, label_smoothing=0.1
    ),
    "nll with class weights": lambda: F.nll_loss(
        F.log_softmax(logits(N, V), -1), targets(N), weight=torch.arange(V) / V
    ),
    "many": lambda: F.cross_entropy(logits(3_000, V), targets(3_000)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_mean_is_the_scripts(name: str) -> None:
    expected = CALLS[name]()
    tap = LossTap({V})
    tap.start()
    found = CALLS[name]()
    (scored,) = tap.take()
    assert torch.equal(found, expected)
    assert scored.mean == pytest.approx(expected.item(), rel=1e-6)
    assert scored.losses_N[scored.targets.flatten() < 0].abs().sum() == 0
    assert set(scored.right_N.tolist()) <= {0.0, 1.0}
    assert tap.reason == ""


def test_what_is_no_prediction_of_a_token_is_not_seen() -> None:
    tap = LossTap({V})
    tap.start()
    F.cross_entropy(logits(N, 3), targets(N) % 3)  # a classifier
    F.cross_entropy(logits(N, V), logits(N, V).softmax(-1).detach())  # distillation
    F.mse_loss(logits(N, V), logits(N, V))
    with torch.no_grad():
        F.cross_entropy(logits(N, V), targets(N))  # a metric
    tap.stop()
    F.cross_entropy(logits(N, V), targets(N))
    assert tap.take() == []
    assert tap.reason
    tap.start(training=False)
    with torch.no_grad():
        F.cross_entropy(logits(N, V), targets(N))
    assert len(tap.take()) == 1


def test_a_call_that_does_not_train_is_left_out() -> None:
    tap = LossTap({V})
    tap.start()
    loss = F.cross_entropy(logits(N, V), targets(N))
    F.cross_entropy(logits(N, V), targets(N).flip(0))  # logged, with its graph
    tap.stop()
    loss.backward()
    (scored,) = tap.take()
    assert torch.equal(scored.targets, targets(N))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    head, tap, x = nn.Linear(4, V), LossTap({V}), torch.ones(N, 4, requires_grad=True)
    tap.start()
    loss = checkpoint(lambda x: F.cross_entropy(head(x), targets(N)), x, use_reentrant=reentrant)
    loss.backward()
    (scored,) = tap.take()
    assert scored.mean == pytest.approx(loss.item(), rel=1e-6)


def test_under_a_transform_nothing_is_kept() -> None:
    tap = LossTap({V})
    tap.start()
    torch.vmap(lambda x, y: F.cross_entropy(x, y))(logits(3, 10, V), targets(3, 10))
    assert tap.take() == []
    assert tap.trouble == ""


def test_an_error_of_ours_does_not_reach_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: Any, **more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(loss_tap.SCORERS, F.cross_entropy, broken)
    tap = LossTap({V})
    tap.start()
    assert torch.equal(F.cross_entropy(logits(N, V), targets(N)), CALLS["plain"]())
    assert tap.take() == []
    assert "ZeroDivisionError" in tap.reason


class Other(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_modes_of_others_stay_in_place() -> None:
    tap = LossTap({V})
    other = Other()
    tap.start()
    with other:
        tap.stop()  # out of order
        other.calls = 0
        F.cross_entropy(logits(N, V), targets(N))
        assert other.calls > 0
    assert tap.take() == []
    assert torch._C._len_torch_function_stack() == 0
    tap.stop()  # once more does nothing
    tap.start()
    tap.start()
    assert torch._C._len_torch_function_stack() == 1
    tap.stop()
    assert torch._C._len_torch_function_stack() == 0


def test_started_amid_modes_of_others_it_outlives_them() -> None:
    tap, other = LossTap({V}), Other()
    with torch.device("cpu"), other:
        tap.start()
        other.calls = 0
        F.cross_entropy(logits(N, V), targets(N))
        assert other.calls > 0
    other.calls = 0
    F.cross_entropy(logits(N, V), targets(N))
    assert other.calls == 0
    assert torch._C._len_torch_function_stack() == 1
    assert len(tap.take()) == 2
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("what", ["net", "function"])
def test_compiled_code_has_no_break_and_one_more_graph(what: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, net = CompileCounter(), nn.Linear(4, V)
    x, y = torch.ones(N, 4), targets(N)
    if what == "net":
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        run = lambda: F.cross_entropy(compiled(x), y)  # noqa: E731
    else:
        run = torch.compile(lambda: F.cross_entropy(net(x), y), backend=counter, fullgraph=True)
    tap = LossTap({V})
    for on in (False, True, False, True, True):
        if on:
            tap.start()
        run().backward()
        tap.stop()
    assert counter.frame_count == 2
