"""One device: every optimizer against its reference, and the promises that hold for all of them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_spectral.functional.orthogonalize import polar_svd
from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon
from lightning_spectral.optim.gradients import global_norm
from tests.optim.models import TinyLM, train

ALL = {"muon": Muon, "normuon": NorMuon, "dion": Dion, "adamw": AdamW}


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def one_matrix(m: int = 12, n: int = 20, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=False, dtype=dtype)


def set_grad(model: nn.Module, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(model.weight.shape, generator=generator, dtype=torch.float64).to(model.weight.dtype)
    model.weight.grad = grad.clone()
    return grad


@pytest.mark.parametrize("lr_scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_bit_for_bit(lr_scale, nesterov):
    theirs, ours = TinyLM(), TinyLM()
    hidden = [theirs.get_parameter(name) for name in TinyLM.MATRICES]
    reference = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=lr_scale)
    optimizer = Muon.like_torch(ours, lr=0.02, lr_scale=lr_scale, nesterov=nesterov, fallback_lr=0.0)
    train(theirs, reference, 5)
    train(ours, optimizer, 5)
    for one, other in zip(weights(theirs), weights(ours), strict=True):
        assert torch.equal(one, other)


def test_adamw_equals_torch_fused_bit_for_bit():
    theirs, ours = TinyLM(), TinyLM()
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True), 5)
    train(ours, AdamW(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)), 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(theirs), weights(ours), strict=True))


def test_fallback_of_muon_is_torch_adamw():
    theirs, ours = TinyLM(), TinyLM()
    rest = [p for name, p in theirs.named_parameters() if name not in TinyLM.MATRICES]
    train(theirs, torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True), 1)
    train(ours, Muon(ours, lr=1e-2), 1)
    for (name, one), (_, other) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        if name not in TinyLM.MATRICES:
            assert torch.equal(one, other), name


def test_momentum_zero_and_identity_is_sgd():
    theirs, ours = one_matrix(), one_matrix()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3)
    optimizer = Muon(ours, lr=0.3, momentum=0.0, orthogonalize="identity", lr_scale="none", weight_decay=0.0)
    for seed in range(3):
        set_grad(theirs, seed), set_grad(ours, seed)
        sgd.step(), optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=1e-15)  # fp64, same operations


@pytest.mark.parametrize("style", ["ema", "heavy_ball"])
def test_momentum_styles_agree_after_an_exact_polar_factor(style):
    models = one_matrix(), one_matrix()
    settings = {"orthogonalize": "svd", "lr": 0.1}
    pair = Muon(models[0], **settings), Muon(models[1], momentum_style=style, **settings)
    for seed in range(3):
        for model, optimizer in zip(models, pair, strict=True):
            set_grad(model, seed)
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-10, atol=1e-12)  # scale invariant, fp64


@pytest.mark.parametrize(
    ("lr_scale", "factor"),
    [("match_rms_adamw", 0.2 * 20**0.5), ("original", 1.0), ("spectral", (12 / 20) ** 0.5), ("none", 1.0)],
)
def test_lr_scale_conventions(lr_scale, factor):
    model = one_matrix()
    before = model.weight.detach().clone()
    grad = set_grad(model)
    Muon(model, lr=0.1, lr_scale=lr_scale, orthogonalize="svd", weight_decay=0.0).step()
    torch.testing.assert_close(before - model.weight.detach(), 0.1 * factor * polar_svd(grad), rtol=1e-9, atol=1e-12)


def test_normuon_without_normaliser_is_muon():
    models = TinyLM(), TinyLM()
    train(models[0], Muon(models[0], lr=1e-2), 4)
    train(models[1], NorMuon(models[1], lr=1e-2, normalize="none"), 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))


@pytest.mark.parametrize(
    ("normalize", "shape", "dim"), [("rows", (12, 20), 1), ("long_side", (12, 20), 0), ("long_side", (20, 12), 1)]
)
def test_normuon_is_the_papers_formula(normalize, shape, dim):
    model = one_matrix(*shape)
    optimizer = NorMuon(model, lr=0.1, normalize=normalize, orthogonalize="svd", weight_decay=0.0, moment_beta=0.9)
    moment = momentum = 0.0
    for seed in range(3):
        before = model.weight.detach().clone()
        grad = set_grad(model, seed)
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        orthogonal = polar_svd(0.05 * grad + 0.95 * momentum)
        moment = 0.9 * moment + 0.1 * orthogonal.square().mean(dim=dim, keepdim=True)
        normed = orthogonal / (moment.sqrt() + 1e-8)
        expected = 0.1 * 0.2 * (max(shape) ** 0.5) * normed * orthogonal.norm() / normed.norm()
        # the second moment is kept in fp32
        torch.testing.assert_close(before - model.weight.detach(), expected, rtol=1e-5, atol=1e-8)
    if normalize == "rows":
        rms = (before - model.weight.detach()).square().mean().sqrt()
        assert float(rms) == pytest.approx(0.1 * 0.2, rel=1e-5)  # arXiv:2510.05491: RMS 0.2 lr


def test_dion_of_full_rank_converges_to_the_polar_factor():
    model = one_matrix(16, 24)
    optimizer = Dion(model, lr=1.0, rank_fraction=1.0, lr_scale="none", weight_decay=0.0)
    grad = set_grad(model)
    exact = polar_svd(grad)
    for _ in range(300):
        before = model.weight.detach().clone()
        optimizer.step()
    update = before - model.weight.detach()
    assert float((update - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 4, 1 / 8, 1 / 16])
@pytest.mark.parametrize("orthogonal_right", [False, True])
def test_dion_updates_have_the_rank_asked_for_and_keep_the_error(fraction, orthogonal_right):
    model = one_matrix(32, 48)
    optimizer = Dion(
        model, lr=1.0, rank_fraction=fraction, lr_scale="none", weight_decay=0.0, orthogonal_right=orthogonal_right
    )
    before, grad = model.weight.detach().clone(), set_grad(model)
    optimizer.step()
    update = before - model.weight.detach()
    rank = round(32 * fraction)
    assert int(torch.linalg.matrix_rank(update, rtol=1e-6)) == rank
    assert float((update * grad).sum()) > 0
    # M = B - (1 - mu) P P^T B: what the update explains is damped to mu, the rest is kept whole
    left, _, _ = torch.linalg.svd(update)
    explained = left[:, :rank] @ left[:, :rank].T @ grad
    torch.testing.assert_close(
        optimizer.state[model.weight]["momentum_buffer"], grad - 0.05 * explained, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ALL)
def test_lr_zero_changes_nothing_and_gradients_stay(kind):
    model = TinyLM()
    optimizer = ALL[kind](model, lr=0.0)
    before = weights(model)
    model.loss(0).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(kind, dtype):
    def fresh() -> tuple[TinyLM, torch.optim.Optimizer]:
        model = TinyLM().to(dtype)
        return model, ALL[kind](model.parameters(), lr=1e-2)

    straight, optimizer = fresh()
    train(straight, optimizer, 3)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    train(straight, optimizer, 3, first=3)
    resumed, other = fresh()
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(model_state)
    other.load_state_dict(optimizer_state)
    train(resumed, other, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_deepcopy_and_pickle_go_on_alike(kind):
    model = TinyLM()
    optimizer = ALL[kind](model, lr=1e-2)
    train(model, optimizer, 2)
    for clone in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other_model, other = clone((model, optimizer))
        train(other_model, other, 2, first=2)
        reference_model, reference = copy.deepcopy((model, optimizer))
        train(reference_model, reference, 2, first=2)
        assert all(torch.equal(a, b) for a, b in zip(weights(other_model), weights(reference_model), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(weights(other_model), weights(model), strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_degenerate_matrices_and_missing_gradients(kind):
    torch.manual_seed(0)
    shapes = [(1, 9), (9, 1), (3, 300), (300, 3), (7, 7), (7, 7)]
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    optimizer = ALL[kind](model, lr=0.1, weight_decay=0.0)
    for layer in model[:-2]:
        layer.weight.grad = torch.randn_like(layer.weight)
    model[-2].weight.grad = torch.zeros_like(model[-2].weight)
    before = weights(model)
    optimizer.step()
    after = weights(model)
    assert all(torch.isfinite(w).all() for w in after)
    assert torch.equal(before[-1], after[-1])  # no gradient
    assert torch.equal(before[-2], after[-2])  # zero gradient
    assert all(not torch.equal(a, b) for a, b in zip(before[:-2], after[:-2], strict=True))
    optimizer.step()  # Dion's factor must survive a zero gradient
    model[-2].weight.grad = torch.randn_like(model[-2].weight)
    optimizer.step()
    assert not torch.equal(model[-2].weight, after[-2])


def test_nonfinite_gradients():
    def broken(**settings):
        model = TinyLM()
        optimizer = Muon(model, lr=1e-2, **settings)
        model.loss(0).backward()
        model.get_parameter(TinyLM.MATRICES[0]).grad[0, 0] = float("nan")
        return model, optimizer

    model, optimizer = broken(nonfinite="raise")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"NaN or Inf in \['blocks.0.qkv.weight'\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    model, optimizer = broken(nonfinite="skip")
    before = weights(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert not optimizer.state[model.get_parameter(TinyLM.MATRICES[0])]["momentum_buffer"].any()
    model, optimizer = broken()  # as AdamW: the parameter is lost, the others are not
    optimizer.step()
    assert model.get_parameter(TinyLM.MATRICES[0]).isnan().any()
    assert all(p.isfinite().all() for name, p in model.named_parameters() if name != TinyLM.MATRICES[0])


@pytest.mark.parametrize("kind", ALL)
def test_max_grad_norm_is_clip_grad_norm_without_touching_gradients(kind):
    models = TinyLM(), TinyLM()
    clipped, plain = ALL[kind](models[0], lr=1e-2, max_grad_norm=0.1), ALL[kind](models[1], lr=1e-2)
    for i in range(2):
        for model, optimizer in zip(models, (clipped, plain), strict=True):
            optimizer.zero_grad()
            model.loss(i).backward()
            if optimizer is plain:
                assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) > 0.1
            else:
                before = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(before, models[0].parameters(), strict=True))
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(one, other, atol=5e-4, rtol=0)  # lr 1e-2; bf16 products of rounded-alike momenta


def test_the_global_norm_of_mixed_gradients_is_not_rounded_to_bf16():
    model = TinyLM()
    model.blocks.to(torch.bfloat16)
    model.loss(0).backward()
    members = AdamW(model)._members()
    found = global_norm(members, {id(p): p.grad for p in model.parameters()})
    expected = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
    assert float(found) == pytest.approx(expected, rel=1e-6)  # fp32 norms


def test_closure_is_called_and_its_value_returned():
    model = TinyLM()
    optimizer = Muon(model, lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    expected = model.loss(0).item()
    assert optimizer.step(closure).item() == expected
    assert optimizer.step() is None


@pytest.mark.parametrize("kind", ["muon", "normuon", "dion"])
def test_ratios_survive_litgpts_overwrite_and_one_cycle(kind):
    model = TinyLM()
    optimizer = ALL[kind](model, lr=0.02, fallback_lr=0.002)
    for group in optimizer.param_groups:
        group["lr"] = 0.01  # what litgpt's pretrain loop does every iteration
    model.loss(0).backward()
    head = model.head.weight.detach().clone()
    optimizer.step()
    # first AdamW step moves every entry by lr: 0.01 * 0.1 here, plus the decay
    moved = float((head - model.head.weight.detach()).abs().max())
    assert moved == pytest.approx(0.001, rel=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    assert sorted({group["lr_ratio"] for group in optimizer.param_groups}) == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("kind", ALL)
def test_paper_presets(kind):
    model = TinyLM()
    optimizer = ALL[kind].paper(model)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert groups["matrix"]["weight_decay"] == 0.01
    assert groups["embedding"]["weight_decay"] == 0.0
    effective = {role: group["lr"] * group["lr_ratio"] for role, group in groups.items()}
    if kind == "adamw":
        assert effective == pytest.approx(dict.fromkeys(effective, 3e-3))
    else:
        assert effective["matrix"] == pytest.approx(0.02)
        assert effective["embedding"] == pytest.approx(0.02)
        assert effective["head"] == pytest.approx(0.02 / TinyLM.WIDTH**0.5)
        assert groups["embedding"]["algorithm"] == "lion"
        assert tuple(groups["embedding"]["betas"]) == (0.95, 0.98)
    first = model.loss(0).item()
    for group in optimizer.param_groups:
        group["lr"] *= 0.1  # the paper's rates are for 524k tokens a step
    train(model, optimizer, 30)
    assert model.loss(0).item() < first


def test_lion_is_its_paper():
    model = nn.Embedding(5, 3)
    optimizer = Muon(model, lr=0.1, fallback="lion", betas=(0.9, 0.99), weight_decay=0.5)
    weight, momentum = model.weight.detach().clone(), torch.zeros(5, 3)
    for seed in range(3):
        grad = set_grad(model, seed)
        weight = weight * (1 - 0.05) - 0.1 * (0.9 * momentum + 0.1 * grad).sign()
        momentum = 0.99 * momentum + 0.01 * grad
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-6, atol=1e-6)


def test_telemetry_on_demand():
    model = TinyLM()
    optimizer = Muon(model, lr=1e-2, orthogonalize="svd")
    train(model, optimizer, 1)
    assert optimizer.observed == {}
    optimizer.observe_next_step()
    train(model, optimizer, 1, first=1)
    seen = optimizer.observed
    assert sorted(seen) == sorted(TinyLM.MATRICES)
    one = seen[TinyLM.MATRICES[0]]
    torch.testing.assert_close(
        one.update_spectrum, torch.ones_like(one.update_spectrum), atol=2e-2, rtol=0
    )  # bf16 input
    rows, columns = model.get_parameter(TinyLM.MATRICES[0]).shape
    assert one.update_rms == pytest.approx(max(rows, columns) ** -0.5, rel=2e-2)
    assert one.flattened_share is None  # no iteration ran
    other = Muon(model, lr=1e-2)
    other.observe_next_step()
    train(model, other, 1)
    assert 0 < other.observed[TinyLM.MATRICES[0]].flattened_share <= 1
    other.stop_observing()
    assert other.observed == {}


def test_grad_scaler_and_several_dtypes():
    model = TinyLM()
    model.blocks[0].to(torch.bfloat16)
    optimizer = NorMuon(model, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = weights(model)
    scaler.scale(model.loss(0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    model.head.weight.grad.fill_(float("inf"))
    before = weights(model)
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Muon, {"lr": -1.0}, "`lr` must be finite and >= 0, got -1.0"),
        (Muon, {"lr_scale": "adam"}, "`lr_scale` must be one of"),
        (Muon, {"orthogonalize": "qr"}, "`orthogonalize` must be one of"),
        (Muon, {"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        (Muon, {"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
        (Muon, {"fallback": "sgd"}, "`fallback` must be one of"),
        (Muon, {"precision": "fp16"}, "`precision` must be one of"),
        (Muon, {"nonfinite": "ignore"}, "`nonfinite` must be one of"),
        (Muon, {"max_grad_norm": 0.0}, "`max_grad_norm` must be > 0"),
        (Muon, {"lr": 0.0, "fallback_lr": 0.1}, "`fallback_lr` is kept as a ratio"),
        (Muon, {"fallback_lr": "3e-4"}, r"`fallback_lr` must be a number, got '3e-4' of type str.* write `3.0e-4`"),
        (AdamW, {"lr": "1e-3"}, "`lr` must be a number"),
        (Dion, {"weight_decay": True}, "`weight_decay` must be a number, got True"),
        (Muon, {"steps": -1}, "`steps` must be >= 0"),
        (NorMuon, {"normalize": "columns"}, "`normalize` must be one of"),
        (Muon, {"norm_eps": -1.0}, "`norm_eps` must be finite"),
        (Muon, {"norm_eps_style": "torch"}, "`norm_eps_style` must be one of"),
        (Muon, {"split": "q"}, "`split` must be one of"),
        (Muon, {"bf16_weights": "round"}, "`bf16_weights` must be one of"),
        (NorMuon, {"moment_beta": 1.0}, "`moment_beta` in"),
        (Dion, {"rank_fraction": 0.0}, "`rank_fraction` must be in"),
        (Dion, {"power_iterations": 0}, "`power_iterations` must be an integer >= 1, got 0"),
        (AdamW, {"fallback_weight_decay": -1.0}, "`fallback_weight_decay` must be >= 0"),
    ],
)
def test_misuse_is_refused_at_construction(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(TinyLM(), **settings)


def test_sparse_gradients_and_foreign_checkpoints_are_refused():
    model = nn.Embedding(4, 3, sparse=True)
    optimizer = AdamW(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()
    small, large = TinyLM(), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="belongs to another model"):
        Muon(large).load_state_dict(Muon(small).state_dict())
    with pytest.raises(ValueError, match="written by another optimizer"):
        AdamW(small).load_state_dict(Muon(small).state_dict())  # a momentum alone; the other way see `come_and_go`


def test_unfrozen_and_added_parameters_are_trained():
    model = TinyLM()
    model.head.requires_grad_(False)
    optimizer = Muon(model, lr=1e-2)
    assert not optimizer.state[model.head.weight]
    train(model, optimizer, 1)
    before = model.head.weight.detach().clone()
    model.head.requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(before, model.head.weight)
    extra = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.5})
    added = optimizer.param_groups[-1]
    assert (added["role"], added["param_roles"], added["lr"]) == ("mixed", ["matrix", "vector"], 0.5)


SLACK = {dtype: torch.zeros(12, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
ORDERS = {
    "in order": [torch.Tensor.contiguous] * 3,
    "not": [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.t().contiguous().t(),
        lambda t: SLACK[t.dtype][::2].copy_(t),  # every second row
    ],
}


def lying(order, cls, dtype, bf16_weights):
    """The same three weights in this order, trained for three steps; the last gradient lies across in turns."""
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 2), "up": nn.Linear(8, 6), "down": nn.Linear(8, 6)}).to(dtype)
    for seed, (layer, place) in enumerate(zip(net.values(), ORDERS[order], strict=True)):
        value = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
        layer.bias, layer.weight = None, nn.Parameter(place(value.to(dtype)))
    optimizer = cls(net, lr=0.1, roles={"up|down": "vector"}, bf16_weights=bf16_weights)
    for step in range(3):
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            across = step == (1 if order == "not" else 2)
            p.grad = grad.transpose(0, 1).contiguous().transpose(0, 1) if across else grad
        optimizer.step()
    return [{"weight": p.detach(), **optimizer.state[p]} for p in net.parameters()]


@pytest.mark.parametrize("bf16_weights", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("fallback", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_that_do_not_lie_in_order_give_the_same(fallback, dtype, bf16_weights):
    """torch's fused kernel walks along memory."""

    def make(net, **settings):
        return Muon(net, fallback=fallback, **settings)

    for straight, other in zip(*(lying(order, make, dtype, bf16_weights) for order in ORDERS), strict=True):
        for name, value in straight.items():
            assert torch.equal(value, other[name]), name
    assert not SLACK[dtype][1::2].any()
