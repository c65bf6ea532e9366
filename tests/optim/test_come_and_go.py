"""Checkpoints of others, groups that are added or replaced, parameters that change under the optimizer."""

import copy

import pytest
import torch
from torch import nn

from lightning_spectral.optim import SOAP, AdamW, Muon, NorMuon
from tests.optim.models import TinyLM, train


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("named", [False, True])
def test_adamw_goes_on_from_torch_adamw_bit_for_bit(named):
    theirs = TinyLM()
    params = theirs.named_parameters() if named else theirs.parameters()
    reference = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    train(theirs, reference, 3)
    for group in reference.param_groups:
        group["lr"] = 5e-3
    ours = copy.deepcopy(theirs)
    optimizer = AdamW(ours, lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert {(g["lr"], g["betas"]) for g in optimizer.param_groups} == {(5e-3, (0.9, 0.95))}
    train(theirs, reference, 3, first=3)
    train(ours, optimizer, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(theirs), weights(ours), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_muon_takes_momenta_from_torch_muon(named):
    theirs = TinyLM()
    hidden = [(name, theirs.get_parameter(name)) for name in TinyLM.MATRICES]
    reference = torch.optim.Muon(hidden if named else [p for _, p in hidden], lr=0.02)
    train(theirs, reference, 3)
    ours = copy.deepcopy(theirs)
    optimizer = Muon.like_torch(ours, lr=0.5, fallback_lr=0.0)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    train(theirs, reference, 2, first=3)
    train(ours, optimizer, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(theirs), weights(ours), strict=True))


@pytest.mark.parametrize("adamw", [torch.optim.AdamW, AdamW])
def test_muon_begins_with_the_first_moments_of_adamw(adamw):
    model = TinyLM()
    reference = adamw(model.named_parameters(), lr=1e-2)
    train(model, reference, 3)
    optimizer = Muon(model, lr=0.02)
    optimizer.load_state_dict(reference.state_dict())
    for name, p in model.named_parameters():
        key = "momentum_buffer" if name in TinyLM.MATRICES else "exp_avg"
        assert torch.equal(optimizer.state[p][key], reference.state[p]["exp_avg"])
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    train(model, optimizer, 1)


def test_a_checkpoint_of_an_older_version_without_names_settings_and_new_state():
    model = TinyLM()
    optimizer = NorMuon(model, lr=0.01)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("momentum_style", "norm_eps", "param_names", "param_roles", "param_views", "param_lr_ratios"):
            del group[key]
    for of_param in state["state"].values():
        of_param.pop("peak", None)
    fresh = NorMuon(model, lr=0.5)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == 0.01
    assert fresh.param_groups[0]["momentum_style"] == "ema"
    train(model, fresh, 1)


def test_parameters_are_matched_by_name_where_the_set_of_groups_changed():
    model = TinyLM()
    optimizer = Muon(model, lr=0.01)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    parts = [{"params": model.head.parameters()}, {"params": model.blocks.parameters()}]
    other = Muon(model, lr=0.01, roles={"blocks.1.fc.weight": "vector"})
    with pytest.raises(ValueError, match="no `exp_avg` for `blocks.1.fc.weight`: it was written by another optimizer"):
        other.load_state_dict(state)
    del parts
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    other = Muon([{"params": named[5:]}, {"params": named[:5]}], lr=0.01)
    other.load_state_dict(state)
    for _, p in named:
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[p][key])


def test_swapped_parameters_keep_their_state():
    model = TinyLM()
    optimizer = Muon(model, lr=0.01)
    train(model, optimizer, 2)
    twin, reference = copy.deepcopy((model, optimizer))
    other = copy.deepcopy(model)
    new = dict(zip(map(id, model.parameters()), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    train(other, optimizer, 2, first=2)
    train(twin, reference, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(twin), strict=True))
    assert len(optimizer.state) == len(optimizer.state_dict()["state"]) == len(list(other.parameters()))


def test_a_checkpoint_by_positions_fits_parameters_that_were_put_in_the_place_of_others():
    """torch's AdamW without names: the order in which the parameters were given outlives them."""
    theirs = TinyLM()
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    train(theirs, reference, 3)
    first = TinyLM()
    optimizer = AdamW(first, lr=1.0)
    ours = copy.deepcopy(theirs)
    new = dict(zip(map(id, first.parameters()), ours.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    train(theirs, reference, 2, first=3)
    train(ours, optimizer, 2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(theirs), weights(ours), strict=True))


def test_an_added_group_is_one_group_and_follows_its_learning_rate():
    model, extra = TinyLM(), nn.Linear(6, 4)
    optimizer = Muon(model, lr=0.01)
    before = list(optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0] * len(before))
    optimizer.add_param_group({"params": extra.parameters(), "lr": 1e-4, "name": "extra"})
    assert [a is b for a, b in zip(before, optimizer.param_groups, strict=False)] == [True] * len(before)
    assert len(optimizer.param_groups) == len(before) + 1
    optimizer.param_groups[-1]["lr"] = 0.0  # what a callback does that schedules the last group
    kept = weights(extra)
    for p in extra.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(extra), strict=True))
    del scheduler


def test_groups_have_names_that_a_monitor_can_tell_apart():
    optimizer = Muon(TinyLM(), head_lr_scale="inverse_sqrt_width")
    assert [g["name"] for g in optimizer.param_groups] == ["matrix", "embedding", "head", "vector"]
    pair = [nn.Linear(8, 8), nn.Linear(8, 8)]  # of no common module
    optimizer = Muon([{"params": layer.parameters(), "name": str(i), "mine": i} for i, layer in enumerate(pair)])
    assert [(g["name"], g["mine"]) for g in optimizer.param_groups] == [("0", 0), ("1", 1)]
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == ["weight", "bias", "weight#2", "bias#2"]


def test_groups_of_parts_of_a_model_have_its_names_and_its_head():
    """Also those that are added later: a checkpoint goes into an optimizer of the whole model, and back."""
    outer = nn.ModuleDict({"other": nn.Linear(2, 2), "model": TinyLM()})
    model = outer["model"]
    late, early = model.blocks[1], [model.embed, model.blocks[0], model.head]
    optimizer = Muon([{"params": part.parameters()} for part in early], lr=0.02)
    assert optimizer.param_groups[2]["param_roles"] == ["head"]
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.1})
    assert optimizer.param_groups[3]["param_names"] == [f"blocks.1.{name}" for name, _ in late.named_parameters()]
    train(model, optimizer, 2)
    whole = Muon(copy.deepcopy(model), lr=0.02)
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, p in model.named_parameters():
        other = whole.state[next(m.param for m in whole._members() if m.name == name)]
        assert optimizer.state[p]
        assert all(torch.equal(value, other[key]) for key, value in optimizer.state[p].items())
    within = Muon(p for name, p in outer.named_parameters() if ".1." not in name)  # named from further out
    within.add_param_group({"params": late.parameters()})
    assert within.param_groups[-1]["param_names"][0] == f"model.blocks.1.{next(late.named_parameters())[0]}"


def test_flat_partitions_are_refused_with_the_remedy():
    flat = nn.Parameter(torch.zeros(100))
    with pytest.raises(ValueError, match=r"flat partition \(DeepSpeed ZeRO.*Use DDP, FSDP"):
        Muon([flat])
    model = TinyLM()
    optimizer = Muon(model)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"6 parameters now holds 1.*flat partition"):
        optimizer.step()
    single = nn.Linear(8, 8, bias=False)
    optimizer = Muon(single)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="flat partition"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_backbone_finetuning_schedules_every_parameter_of_its_group():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def training_step(self, batch, index):
            return self.head(self.backbone(batch[0])).square().mean()

        def configure_optimizers(self):
            return Muon([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 16)), batch_size=8)
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[callback], enable_model_summary=False, **options)
    trainer.fit(Net(), data)
    rates = {member.name: member.lr for member in trainer.optimizers[0]._members()}
    assert rates["backbone.weight"] == rates["backbone.bias"] == pytest.approx(4e-4)


def test_soap_from_a_checkpoint_of_adamw_takes_steps_of_its_own_size():
    """Momentum of 50 steps under the bias correction of the first one moved weights by a hundred learning rates."""
    torch.manual_seed(0)
    model = nn.Linear(32, 64, bias=False)
    before = torch.optim.AdamW(model.parameters(), lr=1e-3)
    signal = torch.randn_like(model.weight)

    def move(optimizer: torch.optim.Optimizer) -> float:
        start = model.weight.detach().clone()
        model.weight.grad = signal + 0.1 * torch.randn_like(signal)
        optimizer.step()
        return float((model.weight.detach() - start).square().mean().sqrt())

    for _ in range(50):
        move(before)
    after = SOAP(model, lr=1e-3)
    after.load_state_dict(before.state_dict())
    assert all(0.5e-3 < move(after) < 1.5e-3 for _ in range(15))
