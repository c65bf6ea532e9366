"""Gains against naive fp64 and finite differences; training and other callbacks' records unchanged."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_spectral.callbacks import TailTokenProbe, UpdateAudience, update_audience
from lightning_spectral.callbacks.update_audience import read_audience, token_losses
from lightning_spectral.functional.buckets import frequency_buckets
from lightning_spectral.optim import Muon
from lightning_spectral.probe.audience import (
    AudienceRecord,
    counterfactual,
    gain,
    kind_of,
    octaves,
    recall_front,
)
from lightning_spectral.records import read_spectral
from tests.callbacks import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")


class Module(tiny.Module):
    def forward(self, ids):
        return self.gpt(ids)


def run(path, *callbacks, optimizer="AdamW", steps=4, **options):
    module = Module(optimizer=optimizer)
    tiny.trainer(path, list(callbacks), max_steps=steps, **options).fit(module, tiny.loader())
    return module


class Watch(UpdateAudience):
    """Keeps what a naive computation needs: the model before and after the first held-out update."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            self.model, self.batch = copy.deepcopy(pl_module.gpt), self._earlier.clone()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.after = copy.deepcopy(pl_module.gpt)
            self.moments = {n: trainer.optimizers[0].state.get(p, {}) for n, p in pl_module.gpt.named_parameters()}
            self.moments = copy.deepcopy(self.moments)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def losses_by_bucket(model, batch):
    logits = model(batch[:, :-1]).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
    buckets = frequency_buckets(tiny.counts())[batch[:, 1:].flatten()]
    return [losses[buckets == b].mean() for b in range(3)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    path = tmp_path_factory.mktemp("audience")
    watch = Watch(every_n_steps=1, counts=tiny.counts(), dirpath=str(path))
    run(path, watch, steps=3)
    return watch, [record for record in read_audience(path) if record.step == 1]


def test_gains_are_the_naive_ones(watched):
    watch, records = watched
    model = watch.model.double()
    names = dict(model.named_parameters())
    for bucket, loss in zip(("head", "mid", "tail"), losses_by_bucket(model, watch.batch), strict=True):
        gradients = dict(
            zip(
                names,
                torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        for kind in ("mlp.proj", "mlp.fc", "attn.proj"):
            mine = [name for name in names if kind_of(name) == kind and name.endswith("weight")]
            expected = {"applied": 0.0, "momentum": 0.0, "sign": 0.0, "polar": 0.0, "adam": 0.0}
            for name in mine:
                step = names[name].detach() - dict(watch.after.named_parameters())[name].detach().double()
                momentum = watch.moments[name]["exp_avg"].double()
                left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                adam = momentum / (watch.moments[name]["exp_avg_sq"].double().sqrt() + 1e-8)
                for rule, d in {
                    "applied": step, "momentum": momentum, "sign": momentum.sign(), "polar": left @ right, "adam": adam,
                }.items():  # fmt: skip
                    expected[rule] += float((gradients[name] * d).sum() * math.sqrt(d.numel()) / d.norm())
            for rule, value in expected.items():
                found = next(r for r in records if (r.kind, r.bucket, r.rule) == (kind, bucket, rule))
                assert found.gain == pytest.approx(value, rel=2e-3, abs=1e-4), (kind, bucket, rule)  # fp32 gradients
                assert found.loss == pytest.approx(float(loss.detach()), rel=1e-4)
                assert found.num_matrices == len(mine)
                assert found.held_out


def test_gains_are_finite_differences(watched):
    watch, records = watched
    # wide enough that the fp32 norms inside litgpt's fp64 model do not show: their noise is 1e-7 of a loss
    size = 1e-3
    for kind in ("mlp.proj", "attn.proj"):
        forth, back = (losses_after(watch, kind, sign * size) for sign in (1, -1))
        for bucket, low, high in zip(("head", "mid", "tail"), forth, back, strict=True):
            found = next(r for r in records if (r.kind, r.bucket, r.rule) == (kind, bucket, "applied"))
            assert found.gain == pytest.approx((high - low) / (2 * size), rel=5e-3, abs=1e-3)


def losses_after(watch, kind, size):
    """Losses by bucket after ``size`` times the normalised update of every matrix of a kind."""
    moved = copy.deepcopy(watch.model).double()
    after = dict(watch.after.named_parameters())
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if kind_of(name) == kind and name.endswith("weight"):
                step = after[name].detach().double() - parameter
                parameter.add_(step * (size * math.sqrt(step.numel()) / step.norm()))
        return [float(loss) for loss in losses_by_bucket(moved, watch.batch)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_training_is_bit_identical(options, optimizer, tmp_path):
    plain = run(tmp_path / "a", optimizer=optimizer, **options)
    audience = UpdateAudience(every_n_steps=1, counts=tiny.counts(), dirpath=str(tmp_path / "b"))
    watched = run(tmp_path / "b", audience, optimizer=optimizer, **options)
    for (name, one), other in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other), name
    records = read_audience(tmp_path / "b")
    assert {record.step for record in records} == {0, 1, 2, 3}
    assert {record.held_out for record in records if record.step} == {True}
    rules = {"applied", "momentum", "sign", "newton_schulz", "polar"} | ({"adam"} if optimizer == "AdamW" else set())
    assert {record.rule for record in records} == rules


def test_records_of_other_callbacks_do_not_change(tmp_path):
    found = []
    for name, others in (("a", []), ("b", [UpdateAudience(every_n_steps=1, counts=tiny.counts())])):
        probe = TailTokenProbe(every_n_steps=2, counts=tiny.counts(), dirpath=str(tmp_path / name), strict=True)
        run(tmp_path / name, *others, probe)
        found.append(
            [(r.step, r.bucket, r.layer, r.num_tokens, r.soft_rank) for r in read_spectral(tmp_path / name).records]
        )
    assert found[0]
    assert found[0] == found[1]


def test_muon_s_own_momentum_is_used(tmp_path):
    module = Module()
    module.configure_optimizers = lambda: Muon(module.gpt, lr=0.01)
    tiny.trainer(tmp_path, [UpdateAudience(every_n_steps=2, counts=tiny.counts())]).fit(module, tiny.loader())
    found = {(r.step, r.rule, r.bucket, r.kind): r.gain for r in read_audience(tmp_path)}
    # five steps of polar express are nearly the polar factor
    for bucket in ("head", "mid", "tail"):
        polar, made = (found[2, rule, bucket, "mlp.proj"] for rule in ("polar", "newton_schulz"))
        assert made == pytest.approx(polar, rel=0.25, abs=0.3)


def test_octaves_of_rank():
    names, codes = octaves(torch.tensor([5, 90, 30, 1, 60, 2, 8]))
    assert names == ("octave_00", "octave_01", "octave_02")
    assert codes.tolist() == [2, 0, 1, 2, 1, 2, 2]


def test_the_front_is_where_half_the_way_is_done():
    def record(step, bucket, loss):
        return AudienceRecord("r", step, "k", "applied", bucket, 0.0, loss, 1, 1, True)

    rows = [record(s, "head", v) for s, v in ((0, 8.0), (10, 5.9), (20, 4.0))] + [
        record(0, "tail", 8.0),
        record(10, "tail", 9.0),
    ]
    assert recall_front(rows) == {"head": 10, "tail": None}


def test_rules_of_a_known_momentum():
    momentum = torch.diag(torch.tensor([3.0, -1.0]))
    assert torch.allclose(counterfactual("polar", momentum, None, "muon", 5), torch.diag(torch.tensor([1.0, -1.0])))
    assert torch.equal(counterfactual("sign", momentum, None, "muon", 5), momentum.sign())
    assert counterfactual("adam", momentum, None, "muon", 5) is None
    assert gain(momentum, torch.zeros(2, 2)) == 0.0
    assert gain(momentum, 7 * momentum) == pytest.approx(math.sqrt(10) * 2)  # scale-free


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"every_n_steps": 0}, "every_n_steps"), ({"group_by": "size"}, "group_by"), ({"rules": ["lion"]}, "rules"),
     ({"coefficients": "best"}, "coefficients"), ({"ns_steps": 0}, "ns_steps")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        UpdateAudience(**arguments)


def test_set_ups_that_cannot_be_measured_are_refused_before_step_1(tmp_path):
    with pytest.raises(MisconfigurationException, match="token counts"):
        run(tmp_path, UpdateAudience())
    with pytest.raises(ValueError, match="`counts`.*must be >= 0"):
        UpdateAudience(counts=np.array([-1, 2, 3]))
    with pytest.raises(MisconfigurationException, match="token_losses"):
        token_losses(Module(), torch.zeros(3))
    with pytest.raises(MisconfigurationException, match="forward"):
        token_losses(tiny.Module(), torch.zeros(3, 4).long())


class Fails(UpdateAudience):
    """Raises once in its own computing."""

    where, error, times = "", MemoryError("no room"), 1

    def __init__(self, where, error, path):
        self.where, self.error, self.times = where, error, 1

        def losses_fn(module, batch):
            self._at("passes")
            return token_losses(module, batch)

        super().__init__(1, counts=tiny.counts(), dirpath=str(path), losses_fn=losses_fn)

    def _at(self, where):
        if where == self.where and self.times:
            self.times -= 1
            raise self.error

    def _publish(self, *arguments):
        self._at("publishing")
        super()._publish(*arguments)


ERRORS = [MemoryError("no room"), torch.OutOfMemoryError("CUDA"), torch.linalg.LinAlgError("svd"), OverflowError("big")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["passes", "gains", "publishing"])
def test_an_error_of_the_measurement_loses_a_window_and_not_the_training(tmp_path, monkeypatch, where, error):
    plain, watching = run(tmp_path / "a"), Fails(where, error, tmp_path / "b")
    gains_of = update_audience.gains_of
    monkeypatch.setattr(update_audience, "gains_of", lambda *given: (watching._at("gains"), gains_of(*given))[1])
    with pytest.warns(UserWarning, match=f"{type(error).__name__}.*Training goes on"):
        watched = run(tmp_path / "b", watching)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert {record.step for record in read_audience(tmp_path / "b")} == {1, 2, 3}


def test_a_batch_that_it_does_not_know_is_still_an_error(tmp_path):
    class NoForward(tiny.Module):
        pass

    audience = UpdateAudience(1, counts=tiny.counts(), dirpath=str(tmp_path))
    with pytest.raises(RuntimeError, match="knows batches of token ids"):
        tiny.trainer(tmp_path, [audience]).fit(NoForward(), tiny.loader())


class Blocked(Callback):
    """A file stands where the folder should be, until a step."""

    def __init__(self, folder, until):
        self.folder, self.until = folder, until
        folder.write_text("in the way")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.until:
            self.folder.unlink()


@pytest.mark.parametrize(("until", "steps"), [(2, {0, 1, 2, 3}), (99, None)])
def test_what_cannot_be_written_waits_and_is_tried_again(tmp_path, until, steps):
    plain, folder = run(tmp_path / "a"), tmp_path / "records"
    audience = UpdateAudience(1, counts=tiny.counts(), dirpath=str(folder))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched = run(tmp_path / "b", Blocked(folder, until), audience)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    said = [str(one.message) for one in told if "UpdateAudience" in str(one.message)]
    assert "writing to" in said[0]
    if steps is None:
        assert len(said) == 2
        assert "records are lost" in said[1]
    else:
        assert len(said) == 1
        assert {record.step for record in read_audience(folder)} == steps
