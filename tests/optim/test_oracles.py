"""Beside other people's implementations, where they are installed: the same direction, the same length.

None is a dependency: `pip install pytorch_optimizer heavyball`; microsoft/dion and KellerJordan/Muon on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral.optim import SOAP, AdaMuon, Dion2, Muon, NorDion2, NorMuon

pytestmark = pytest.mark.filterwarnings("ignore")  # of the others
SHAPES = [(24, 64), (64, 24)]
SETTINGS = {"lr": 1.0, "weight_decay": 0.0, "lr_scale": "none", "precision": "fp32"}


def gradient(step: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def updates(
    make: Callable[[nn.Module], torch.optim.Optimizer], shape: tuple[int, int], steps: list[int]
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer, found = make(layer), []
    for step in steps:
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient(step, shape)
        optimizer.step()
        found.append(before - layer.weight.detach())
    return found


def compare(ours: Any, theirs: Any, shape: tuple[int, int], cosine: float, ratio: float, first: int = 0) -> None:
    steps = list(range(1, 7))
    pairs = zip(updates(ours, shape, steps)[first:], updates(theirs, shape, steps)[first:], strict=True)
    for mine, other in pairs:
        assert float((mine * other).sum() / mine.norm() / other.norm()) > cosine
        assert float(mine.norm() / other.norm()) == pytest.approx(1.0, abs=ratio)


@pytest.fixture
def dion():
    found = pytest.importorskip("dion", reason="microsoft/dion is not on PYTHONPATH")
    torch.compiler.set_stance("force_eager")
    yield found
    torch.compiler.set_stance("default")


DION = {
    # they round to bf16, and their coefficients are their own
    "Muon": (
        lambda m: Muon(m, orthogonalize="polar_express_frobenius", momentum_style="heavy_ball", **SETTINGS),
        lambda d, m: d.Muon(list(m.parameters()), lr=1.0, mu=0.95, weight_decay=0.0, adjust_lr=None, nesterov=True),
    ),
    "NorMuon": (
        lambda m: NorMuon(m, orthogonalize="polar_express_frobenius", momentum_style="heavy_ball", **SETTINGS),
        lambda d, m: d.NorMuon(list(m.parameters()), lr=1.0, mu=0.95, weight_decay=0.0, adjust_lr=None, nesterov=True),
    ),
    "Dion2": (
        lambda m: Dion2(m, orthogonalize="polar_express_frobenius", fraction=0.25, **SETTINGS),
        lambda d, m: d.Dion2(
            list(m.parameters()), lr=1.0, fraction=0.25, ef_decay=0.95, weight_decay=0.0, adjust_lr=None
        ),
    ),
    "NorDion2": (
        lambda m: NorDion2(m, orthogonalize="polar_express_frobenius", fraction=0.25, **SETTINGS),
        lambda d, m: d.NorDion2(list(m.parameters()), lr=1.0, fraction=0.25, mu=0.95, weight_decay=0.0, adjust_lr=None),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DION)
def test_microsoft_dion(dion, kind, shape):
    ours, theirs = DION[kind]
    compare(ours, lambda m: theirs(dion, m), shape, cosine=0.98, ratio=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_keller_jordans_muon(shape):
    muon = pytest.importorskip("muon", reason="KellerJordan/Muon is not on PYTHONPATH")
    ours = lambda m: Muon(m, orthogonalize="muon", **{**SETTINGS, "precision": "bf16", "lr_scale": "original"})  # noqa: E731
    theirs = lambda m: muon.SingleDeviceMuon(list(m.parameters()), lr=1.0, weight_decay=0.0)  # noqa: E731
    compare(ours, theirs, shape, cosine=0.9995, ratio=0.005)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["Muon", "AdaMuon"])
def test_pytorch_optimizer(kind, shape):
    peer = pytest.importorskip("pytorch_optimizer")
    group = lambda m: [{"params": list(m.parameters()), "use_muon": True}]  # noqa: E731
    if kind == "Muon":
        ours = lambda m: Muon(m, orthogonalize="muon", **SETTINGS)  # noqa: E731
        theirs = lambda m: peer.Muon(group(m), lr=1.0, weight_decay=0.0)  # noqa: E731
    else:
        ours = lambda m: AdaMuon(m, orthogonalize="muon", **SETTINGS)  # noqa: E731
        theirs = lambda m: peer.AdaMuon(group(m), lr=1.0, weight_decay=0.0)  # noqa: E731
    steps = list(range(1, 7))
    for mine, other in zip(updates(ours, shape, steps), updates(theirs, shape, steps), strict=True):
        # lengths follow other conventions; AdaMuon there has the element-wise moment without the sign
        assert float((mine * other).sum() / mine.norm() / other.norm()) > (0.999 if kind == "Muon" else 0.8)


@pytest.mark.parametrize("shape", SHAPES)
def test_soap_of_pytorch_optimizer(shape):
    """One-sided there, too, by a limit between the sides; its first step only makes the basis, so it gets one more."""
    peer = pytest.importorskip("pytorch_optimizer")
    settings = {"lr": 1e-2, "weight_decay": 0.0}
    theirs = updates(
        lambda m: peer.SOAP(
            m.parameters(), betas=(0.95, 0.95), precondition_frequency=2, max_precondition_dim=32, **settings
        ),
        shape,
        [1, 1, 2, 3, 4, 5],
    )[1:]
    ours = updates(lambda m: SOAP(m, basis_every=2, **settings), shape, [1, 2, 3, 4, 5])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4)  # fp32, divided by small second moments


@pytest.mark.parametrize("shape", SHAPES)
def test_heavyball(shape):
    peer = pytest.importorskip("heavyball")
    peer.utils.compile_mode = None
    ours = lambda m: Muon(m, orthogonalize="muon", nesterov=False, **SETTINGS)  # noqa: E731
    theirs = lambda m: peer.Muon(m.parameters(), lr=1.0, weight_decay=0.0, nesterov=False, betas=(0.95, 0.99))  # noqa: E731
    steps = list(range(1, 5))
    for mine, other in zip(updates(ours, shape, steps), updates(theirs, shape, steps), strict=True):
        assert float((mine * other).sum() / mine.norm() / other.norm()) > 0.99
