"""The further rules are the formulas of their papers."""

import pytest
import torch
from torch import nn

from lightning_spectral.functional.orthogonalize import polar_svd
from lightning_spectral.optim import SOAP, AdaMuon, Dion2, Muon, MuonH, NorDion2
from tests.optim.models import TinyLM, train


def one_matrix(m: int, n: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=False, dtype=torch.float64)


def gradient(seed: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_adamuon_is_its_papers_formula(shape):
    layer = one_matrix(*shape)
    optimizer = AdaMuon(layer, lr=0.1, orthogonalize="svd", weight_decay=0.0, moment_beta=0.9)
    moment = momentum = 0.0
    for seed in range(3):
        before, grad = layer.weight.detach().clone(), gradient(seed, layer.weight.shape)
        layer.weight.grad = grad
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        orthogonal = polar_svd((0.05 * grad + 0.95 * momentum).sign())
        moment = 0.9 * moment + 0.1 * orthogonal.square()
        normed = orthogonal / (moment.sqrt() + 1e-8)
        expected = 0.1 * 0.2 * max(shape) ** 0.5 * normed * orthogonal.norm() / normed.norm()
        torch.testing.assert_close(before - layer.weight.detach(), expected, rtol=2e-5, atol=1e-7)  # fp32 moments


@pytest.mark.parametrize(("shape", "dim"), [((8, 20), 0), ((20, 8), 1)])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_dion2_orthogonalises_the_largest_slices_of_the_short_side(shape, dim, fraction):
    layer = one_matrix(*shape)
    optimizer = Dion2(layer, lr=0.1, fraction=fraction, orthogonalize="svd", weight_decay=0.0, lr_scale="none")
    momentum = torch.zeros(shape, dtype=torch.float64)
    for seed in range(4):
        before, grad = layer.weight.detach().clone(), gradient(seed, layer.weight.shape)
        layer.weight.grad = grad
        optimizer.step()
        momentum = momentum + grad
        chosen = momentum.abs().sum(dim=1 - dim).topk(round(8 * fraction)).indices
        expected = torch.zeros_like(momentum)
        expected.index_copy_(dim, chosen, polar_svd(momentum.index_select(dim, chosen)))
        momentum = momentum.index_copy(dim, chosen, 0.95 * momentum.index_select(dim, chosen))
        torch.testing.assert_close(before - layer.weight.detach(), 0.1 * expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(optimizer.state[layer.weight]["momentum_buffer"], momentum, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_nordion2_is_dion2_over_rows_with_equal_norms_of_the_selected(shape):
    layer = one_matrix(*shape)
    settings = {"orthogonalize": "svd", "weight_decay": 0.0, "lr_scale": "none"}
    optimizer = NorDion2(layer, lr=0.1, fraction=0.25, moment_beta=0.9, **settings)
    momentum, moment = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
    for seed in range(4):
        before, grad = layer.weight.detach().clone(), gradient(seed, layer.weight.shape)
        layer.weight.grad = grad
        optimizer.step()
        momentum = momentum + grad
        chosen = momentum.abs().sum(dim=1).topk(shape[0] // 4).indices
        orthogonal = polar_svd(momentum[chosen])
        moment[chosen] = 0.9 * moment[chosen] + 0.1 * orthogonal.square().mean(dim=1)
        normed = orthogonal / (moment[chosen].sqrt() + 1e-8).unsqueeze(1)
        expected = torch.zeros_like(momentum)
        expected[chosen] = normed * orthogonal.norm() / normed.norm()
        momentum[chosen] = 0.95 * momentum[chosen]
        torch.testing.assert_close(before - layer.weight.detach(), 0.1 * expected, rtol=2e-5, atol=1e-7)  # fp32 moments


@pytest.mark.parametrize("lr", [0.3, 1e-3, 1e-9, 0.0])
def test_muonh_is_its_papers_formula_and_stays_on_its_sphere(lr):
    layer = one_matrix(12, 20)
    optimizer = MuonH(layer, lr=lr, orthogonalize="svd", nesterov=False)
    radius = layer.weight.detach().norm()
    momentum = torch.zeros(12, 20, dtype=torch.float64)
    for seed in range(5):
        before, grad = layer.weight.detach().clone(), gradient(seed, layer.weight.shape)
        layer.weight.grad = grad
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        orthogonal = polar_svd(momentum)
        moved = before - lr * radius * orthogonal / orthogonal.norm()
        expected = radius * moved / moved.norm()
        # a squared norm that is off by 1e-6 is left alone
        torch.testing.assert_close(layer.weight.detach() - before, expected - before, rtol=1e-6, atol=2e-7)
        torch.testing.assert_close(layer.weight.detach().norm(), radius, rtol=5e-7, atol=0)


def test_muonh_stays_on_its_sphere_in_bf16_products_and_fp32_weights():
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=False)
    optimizer, radius = MuonH(layer, lr=0.02, precision="bf16"), float(layer.weight.detach().norm())
    for _ in range(200):
        layer.weight.grad = torch.randn(96, 64)
        optimizer.step()
    assert float(layer.weight.detach().norm()) == pytest.approx(radius, rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_soap_is_adam_in_the_eigenbasis(shape):
    layer = one_matrix(*shape)
    optimizer = SOAP(layer, lr=0.1, weight_decay=0.0, basis_every=2, moment_beta=0.9)
    momentum, second = torch.zeros(shape, dtype=torch.float64), torch.zeros(8, max(shape), dtype=torch.float64)
    gram = torch.zeros(8, 8, dtype=torch.float64)
    for step in range(1, 6):
        before, grad = layer.weight.detach().clone(), gradient(step, layer.weight.shape)
        layer.weight.grad = grad
        optimizer.step()
        wide = grad if shape[0] <= shape[1] else grad.mT  # a square matrix is turned from the left
        momentum = 0.95 * momentum + 0.05 * grad
        if step == 1:
            gram = 0.1 * wide @ wide.mT
            basis = torch.linalg.eigh(gram)[1].flip(1)
        second = 0.9 * second + 0.1 * (basis.mT @ wide).square()
        mean = (momentum if shape[0] <= shape[1] else momentum.mT) / (1 - 0.95**step)
        update = basis @ ((basis.mT @ mean) / (second / (1 - 0.9**step)).sqrt())
        expected = 0.1 * (update if shape[0] <= shape[1] else update.mT)
        torch.testing.assert_close(before - layer.weight.detach(), expected, rtol=2e-4, atol=2e-5)  # fp32 state
        gram = 0.9 * gram + 0.1 * wide @ wide.mT
        if step % 2 == 0:
            order = (basis.mT @ gram @ basis).diagonal().argsort(descending=True)
            basis, second = torch.linalg.qr(gram @ basis[:, order])[0], second[order]


def test_scion_moves_every_layer_by_the_steepest_direction_of_its_norm():
    model = TinyLM()
    optimizer = Muon.scion(model, lr=0.1, orthogonalize="svd", precision="fp32", weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    head = moved["head.weight"]
    torch.testing.assert_close(head.abs(), torch.full_like(head, 0.1 / TinyLM.WIDTH), rtol=1e-4, atol=1e-6)
    fc = moved["blocks.0.fc.weight"]
    expected = 0.1 * (fc.shape[0] / fc.shape[1]) ** 0.5
    assert float(torch.linalg.svdvals(fc)[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: AdaMuon(m, moment_beta=1.0), "`moment_beta` in"),
        (lambda m: Dion2(m, fraction=0.0), r"`fraction` must be in \(0, 1\]"),
        (lambda m: Dion2(m, orthogonalize="qr"), "`orthogonalize` must be one of"),
        (lambda m: NorDion2(m, moment_beta=-0.1), "`moment_beta` in"),
        (lambda m: NorDion2(m, fraction=2), r"`fraction` must be in \(0, 1\]"),
        (lambda m: SOAP(m, moment_beta=1.0), "`moment_beta` in"),
        (lambda m: SOAP(m, basis_every=0), "`basis_every` must be an integer >= 1, got 0"),
    ],
)
def test_misuse_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(TinyLM())


@pytest.mark.parametrize("cls", [AdaMuon, Dion2, NorDion2, MuonH, SOAP])
def test_training_learns_and_resumes_bit_equal(cls):
    import copy

    model = TinyLM()
    optimizer = cls(model, lr=1e-2)
    first = model.loss(0).item()
    train(model, optimizer, 20)
    assert model.loss(0).item() < first
    twin = copy.deepcopy(model)
    other = cls(twin, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, first=20)
    train(twin, other, 2, first=20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
