"""The promise: adding a callback never changes the training run, and leaves nothing behind."""

from __future__ import annotations

import importlib
import random

import numpy as np
import pytest
import torch

from lightning_spectral import SpectralAlarm, SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback
from tests.callbacks import tiny

MODULES = {
    "TailTokenProbe": "lightning_spectral.callbacks.saved_state",
    "WeightSpectrumCallback": "lightning_spectral.callbacks.weight_spectrum",
    "SpectralAlarm": "lightning_spectral.callbacks.alarm",
}


def run(path, callbacks, **options):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    module = tiny.Module()
    losses = []
    module.on_before_zero_grad = lambda optimizer: losses.append(torch.get_rng_state().sum().item())
    tiny.trainer(path, callbacks, max_steps=20, **options).fit(module, tiny.loader(shuffle=True), tiny.loader(16))
    states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    return module.state_dict(), states, losses


@pytest.mark.parametrize("counts", ["stream", "given"])
def test_weights_and_random_states_are_bit_identical(tmp_path, counts):
    def callbacks():
        given = tiny.counts() if counts == "given" else "stream"
        common = {"on": ["train", "validation"], "token_fraction": 0.5, "sites": ["pre", "post"]}
        return [SpectralRankCallback(3), TailTokenProbe(4, counts=given, eigenvalues=True, **common)]

    plain_weights, plain_states, plain_trace = run(tmp_path / "plain", [], accumulate_grad_batches=2)
    weights, states, trace = run(tmp_path / "probed", callbacks(), accumulate_grad_batches=2)
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)
    assert torch.equal(states[0], plain_states[0])
    assert np.array_equal(states[1], plain_states[1])
    assert states[2] == plain_states[2]
    assert trace == plain_trace


def hooks_of(module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def test_no_hook_is_left_after_the_fit(tmp_path):
    module = tiny.Module()
    tiny.trainer(tmp_path, [TailTokenProbe(1, counts=tiny.counts())]).fit(module, tiny.loader())
    assert hooks_of(module) == 0


def test_an_error_in_the_training_step_removes_hooks_and_keeps_whole_records(tmp_path):
    from lightning_spectral import read_spectral

    class Failing(tiny.Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("user bug")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError, match="user bug"):
        tiny.trainer(tmp_path, [SpectralRankCallback(1)]).fit(module, tiny.loader())
    assert hooks_of(module) == 0
    assert sorted({record.step for record in read_spectral(tmp_path).records}) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["TailTokenProbe", "WeightSpectrumCallback", "SpectralAlarm"])
def test_the_key_of_the_state_is_made_once(tmp_path, monkeypatch, kind):
    """Lightning asks for it at every hook; a digest of the token counts at each of them took longer than some steps."""
    made = []
    room = importlib.import_module(MODULES[kind])
    known = room.state_key
    monkeypatch.setattr(room, "state_key", lambda callback, **identity: made.append(1) or known(callback, **identity))
    callbacks = {
        "TailTokenProbe": lambda: [TailTokenProbe(100, counts=tiny.counts())],
        "WeightSpectrumCallback": lambda: [WeightSpectrumCallback(100)],
        "SpectralAlarm": lambda: [SpectralRankCallback(100), SpectralAlarm("hard_rank", bucket="pooled", below=0.1)],
    }[kind]()
    tiny.trainer(tmp_path, callbacks, max_steps=8).fit(tiny.Module(), tiny.loader())
    assert len(made) <= 1
