"""No NaN at any scale, nothing moves that has no gradient, and bf16 weights keep what they are told."""

import pytest
import torch
from torch import nn

from lightning_spectral.functional.orthogonalize import COEFFICIENTS
from lightning_spectral.optim import SOAP, AdaMuon, AdamW, Dion, Dion2, Muon, MuonH, NorDion2, NorMuon
from tests.optim.models import TinyLM, train

RULES = {
    **{
        f"muon, {name}": lambda m, name=name: Muon(m, lr=1e-2, weight_decay=0.0, orthogonalize=name)
        for name in (*COEFFICIENTS, "turbo")
    },
    "muon, svd": lambda m: Muon(m, lr=1e-2, weight_decay=0.0, orthogonalize="svd"),
    "muon, paper": lambda m: Muon.paper(m, weight_decay=0.0),
    "muon, like torch": lambda m: Muon.like_torch(m, weight_decay=0.0),
    "normuon": lambda m: NorMuon(m, lr=1e-2, weight_decay=0.0),
    "adamuon": lambda m: AdaMuon(m, lr=1e-2, weight_decay=0.0),
    "dion2": lambda m: Dion2(m, lr=1e-2, weight_decay=0.0, fraction=1.0),
    "nordion2": lambda m: NorDion2(m, lr=1e-2, weight_decay=0.0, fraction=1.0),
    "muonh": lambda m: MuonH(m, lr=1e-2),
    "soap": lambda m: SOAP(m, lr=1e-2, weight_decay=0.0),
    "normuon, paper": lambda m: NorMuon.paper(m, weight_decay=0.0),
    # of a low rank it takes 1 / rank_fraction times as long until the momentum is spent
    "dion": lambda m: Dion(m, lr=1e-2, weight_decay=0.0, rank_fraction=1.0),
    "dion, qr": lambda m: Dion(m, lr=1e-2, weight_decay=0.0, rank_fraction=1.0, orthogonal_right=True),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_dead_matrix_stays_finite_and_comes_to_rest(rule):
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=False)
    optimizer = RULES[rule](layer)
    for step in range(650):
        if step == 600:
            rested = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(12, 8) * 1e-20 if step < 20 else torch.zeros(12, 8)
        optimizer.step()
    assert layer.weight.isfinite().all()
    torch.testing.assert_close(layer.weight, rested, rtol=0, atol=1e-7)
    layer.weight.grad = torch.randn(12, 8) * 1e-2  # and wakes up
    optimizer.step()
    assert float((layer.weight.detach() - rested).abs().max()) > 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exponent", [-45, -44, -41, -38, -30, -23, -15, 0, 15, 30])
def test_gradients_of_every_scale_give_finite_updates(rule, exponent):
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=False)
    start = layer.weight.detach().clone()
    optimizer = RULES[rule](layer)
    for _ in range(3):
        layer.weight.grad = (torch.randn(12, 8, dtype=torch.float64) * 10.0**exponent).float()
        optimizer.step()
    assert layer.weight.isfinite().all()
    if exponent >= -38 and "torch" not in rule:  # what is not subnormal moves the weight as any other gradient
        assert float((layer.weight.detach() - start).norm()) > 0.01


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exponent", [-200, -45, -40, 30])
def test_fp64_gradients_beyond_fp32_give_finite_updates(rule, exponent):
    layer = nn.Linear(8, 12, bias=False, dtype=torch.float64)
    optimizer = RULES[rule](layer)
    for seed in range(3):
        gradient = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        layer.weight.grad = gradient * 10.0**exponent
        optimizer.step()
    assert layer.weight.isfinite().all()


BF16 = {
    "muon": lambda m, how, lr: Muon(m, lr=lr, weight_decay=0.0, precision="fp32", bf16_weights=how),
    "adamw": lambda m, how, lr: AdamW(m, lr=lr, weight_decay=0.0, bf16_weights=how),
    "lion": lambda m, how, lr: Muon(
        m, lr=lr, weight_decay=0.0, roles={"": "vector"}, fallback="lion", bf16_weights=how
    ),
}


@pytest.mark.parametrize("kind", BF16)
@pytest.mark.parametrize("how", ["nearest", "stochastic", "compensated"])
def test_movement_that_bf16_weights_keep(kind, how):
    """Of what fp32 weights move in 50 steps at lr 1e-4."""
    torch.manual_seed(0)
    wide = nn.Linear(64, 64, bias=False)
    wide.weight.data = wide.weight.data.sign() * 0.5  # a bf16 step is 4e-3 there, far above an update
    narrow = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    narrow.weight.data = wide.weight.data.bfloat16()
    start = wide.weight.detach().clone()
    pair = BF16[kind](wide, "nearest", 1e-4), BF16[kind](narrow, how, 1e-4)
    gradient = torch.randn(64, 64).bfloat16()
    for _ in range(50):
        wide.weight.grad, narrow.weight.grad = gradient.float(), gradient.clone()
        for optimizer in pair:
            optimizer.step()
    moved, kept = wide.weight.detach() - start, narrow.weight.detach().float() - start
    along = float((moved * kept).sum() / moved.square().sum())
    if how == "nearest":
        assert along < 0.05
    else:
        assert along == pytest.approx(1.0, abs=0.1 if how == "stochastic" else 0.5)
    if how == "compensated":  # with the bits that bf16 has no room for it is the fp32 weight
        from lightning_spectral.optim.weights import widened

        full = widened(pair[1].state[narrow.weight], narrow.weight.detach())
        assert float((full - wide.weight.detach()).norm() / moved.norm()) < 0.02


def test_bf16_options_leave_fp32_weights_and_torchs_random_numbers_alone():
    models = TinyLM(), TinyLM()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for model, how in zip(models, ("nearest", "stochastic"), strict=True):
        train(model, Muon(model, lr=1e-2, bf16_weights=how), 2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("how", ["stochastic", "compensated"])
def test_bf16_weights_resume_bit_equal(how):
    def fresh() -> tuple[TinyLM, Muon]:
        model = TinyLM().to(torch.bfloat16)
        return model, Muon(model, lr=1e-3, bf16_weights=how)

    straight, optimizer = fresh()
    train(straight, optimizer, 3)
    model_state = {k: v.clone() for k, v in straight.state_dict().items()}
    import copy

    saved = copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, 3, first=3)
    resumed, other = fresh()
    resumed.load_state_dict(model_state)
    other.load_state_dict(saved)
    train(resumed, other, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "how", "said"),
    [("bfloat16", "nearest", True), ("bfloat16", "stochastic", False), ("float32", "nearest", False)],
)
def test_bf16_weights_that_lose_updates_are_named(dtype, how, said, caplog):
    with caplog.at_level("WARNING", logger="lightning_spectral"):
        Muon(TinyLM().to(getattr(torch, dtype)), bf16_weights=how)
    assert ("are bf16, blocks.0.qkv.weight first: updates smaller than their rounding" in caplog.text) == said


@pytest.mark.parametrize("exponent", [-10, 10, 19, 25, 30, 37])
def test_clipped_gradients_whose_squares_have_no_place_in_fp32_are_clipped_and_not_lost(exponent):
    layer = nn.ModuleDict({"wide": nn.Linear(8, 12, bias=False), "fine": nn.Linear(2, 2).double()})
    gradient = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW(layer, max_grad_norm=1.0, betas=(0.0, 0.0))
    layer["wide"].weight.grad = (gradient * 10.0**exponent).float()
    layer["fine"].weight.grad = torch.zeros(2, 2, dtype=torch.float64)
    optimizer.step()
    clipped = gradient * min(1.0, 1 / float(gradient.norm() * 10.0**exponent)) * 10.0**exponent
    found = optimizer.state[layer["wide"].weight]["exp_avg"].double()
    torch.testing.assert_close(found, clipped, rtol=1e-5, atol=0)
