"""Beside other people's implementations, where they are installed: the same direction, the same length.

None is a dependency: `pip install pytorch_optimizer heavyball`; microsoft/dion and KellerJordan/Muon on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral.functional.orthogonalize import newton_schulz, polar_svd
from lightning_spectral.optim import SOAP, Dion2, Muon, NorDion2, NorMuon

pytestmark = pytest.mark.filterwarnings("ignore")  # of the others
SHAPES = [(24, 64), (64, 24)]
SETTINGS = {"lr": 1.0, "weight_decay": 0.0, "lr_scale": "none", "precision": "fp32", "orthogonalize": "svd"}


def gradient(step: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def exact(direction: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The polar factor, in the place of an iteration: what is left to differ is the rule."""
    return polar_svd(direction.float()).to(direction.dtype)


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


THEIRS = {"lr": 1.0, "weight_decay": 0.0, "adjust_lr": None, "newton_schulz_func": exact}
DION = {
    "Muon": (
        lambda m: Muon(m, momentum_style="heavy_ball", **SETTINGS),
        lambda d, params: d.Muon(params, mu=0.95, nesterov=True, **THEIRS),
    ),
    "NorMuon": (
        lambda m: NorMuon(m, momentum_style="heavy_ball", **SETTINGS),
        lambda d, params: d.NorMuon(params, mu=0.95, nesterov=True, **THEIRS),
    ),
    "Dion2": (
        lambda m: Dion2(m, fraction=0.25, **SETTINGS),
        lambda d, params: d.Dion2(params, fraction=0.25, ef_decay=0.95, **THEIRS),
    ),
    "NorDion2": (
        lambda m: NorDion2(m, fraction=0.25, **SETTINGS),
        lambda d, params: d.NorDion2(params, fraction=0.25, mu=0.95, **THEIRS),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DION)
def test_microsoft_dion(dion, kind, shape):
    """They round directions to bf16."""
    ours, theirs = DION[kind]
    compare(
        ours, lambda m: theirs(dion, list(m.parameters())), shape, cosine=0.9999, ratio=0.01
    )  # they round directions to bf16


@pytest.mark.parametrize("shape", SHAPES)
def test_keller_jordans_muon(shape, monkeypatch):
    muon = pytest.importorskip("muon", reason="KellerJordan/Muon is not on PYTHONPATH")
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz5", exact)
    ours = lambda m: Muon(m, **{**SETTINGS, "lr_scale": "original"})  # noqa: E731
    theirs = lambda m: muon.SingleDeviceMuon(list(m.parameters()), lr=1.0, weight_decay=0.0)  # noqa: E731
    compare(ours, theirs, shape, cosine=0.99999, ratio=1e-4)


def test_in_bf16_we_are_no_farther_from_fp64_than_keller_jordan():
    muon = pytest.importorskip("muon", reason="KellerJordan/Muon is not on PYTHONPATH")
    for seed in range(5):
        direction = gradient(seed, (24, 64))
        truth = newton_schulz(direction.double(), "muon")
        theirs = (muon.zeropower_via_newtonschulz5(direction, 5).double() - truth).norm()
        assert (newton_schulz(direction, "muon", dtype=torch.bfloat16).double() - truth).norm() < theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_optimizer(shape):
    """Lengths follow another convention there."""
    peer = pytest.importorskip("pytorch_optimizer")
    ours = lambda m: Muon(m, **{**SETTINGS, "orthogonalize": "muon"})  # noqa: E731
    theirs = lambda m: peer.Muon([{"params": list(m.parameters()), "use_muon": True}], lr=1.0, weight_decay=0.0)  # noqa: E731
    steps = list(range(1, 7))
    for mine, other in zip(updates(ours, shape, steps), updates(theirs, shape, steps), strict=True):
        assert float((mine * other).sum() / mine.norm() / other.norm()) > 0.999


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
def test_heavyball(shape, monkeypatch):
    """Lengths follow another convention there."""
    peer = pytest.importorskip("heavyball")
    peer.utils.compile_mode = None
    monkeypatch.setattr(peer.utils, "zeropower_via_newtonschulz5", exact)
    ours = lambda m: Muon(m, nesterov=False, **SETTINGS)  # noqa: E731
    theirs = lambda m: peer.Muon(m.parameters(), lr=1.0, weight_decay=0.0, nesterov=False, betas=(0.95, 0.99))  # noqa: E731
    steps = list(range(1, 5))
    for mine, other in zip(updates(ours, shape, steps), updates(theirs, shape, steps), strict=True):
        assert float((mine * other).sum() / mine.norm() / other.norm()) > 0.9999
