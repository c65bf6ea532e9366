"""A Fabric loop is measured as a Trainer would be: same rows, same ranks, no call of its own."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, read_spectral
from lightning_spectral.callbacks.fabric import FabricSpectralProbe
from lightning_spectral.records import read_losses, read_run
from tests.callbacks import tiny
from tests.callbacks.test_measuring import by_key, fit
from tests.models import tiny as models

ROWS = 8 * tiny.LENGTH


def model(mlp: str = "GptNeoxMLP") -> torch.nn.Module:
    torch.manual_seed(0)
    return models.litgpt(mlp)


def train(fabric, module, optimizer, *, steps=3, accumulate=1, validate=False, call=None):
    batches = list(tiny.data().split(8))
    for step in range(steps):
        for part in batches[step % len(batches)].chunk(accumulate):
            logits = (call or module)(part[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            fabric.backward(loss / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        if validate:
            module.eval()
            with torch.no_grad():
                module(batches[0][:, :-1])
            module.train()


def run(path, callback, *, module=None, num_steps=None, fabric_options=None, loggers=(), wrap=None, **options):
    probe = FabricSpectralProbe(callback, num_steps=num_steps)
    if not loggers and callback.measurement.settings.dirpath is None:
        settings = replace(callback.measurement.settings, dirpath=str(path))
        callback.measurement = replace(callback.measurement, settings=settings)
        probe = FabricSpectralProbe(callback, num_steps=num_steps)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe], loggers=list(loggers), **(fabric_options or {}))
    module = model() if module is None else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module, optimizer = fabric.setup(module, optimizer)
    train(fabric, wrap(module) if wrap else module, optimizer, **options)
    return probe


def test_equal_to_a_trainer(tmp_path):
    expected = by_key(
        fit(tmp_path / "trainer", TailTokenProbe(2, counts=tiny.counts(), sites=["pre", "post"]), max_steps=5)
    )
    callback = TailTokenProbe(2, counts=tiny.counts(), sites=["pre", "post"])
    probe = run(tmp_path / "fabric", callback, steps=5, validate=True)
    found = by_key(read_spectral(tmp_path / "fabric").records)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert (record.num_tokens, record.num_sequences) == (expected[key].num_tokens, expected[key].num_sequences)
        assert (record.tokens_seen, record.status, record.stage) == (
            expected[key].tokens_seen,
            expected[key].status,
            "train",
        )
        if key[0] == 0:  # the same kernels on the same weights
            assert record.hard_rank == expected[key].hard_rank
        else:
            assert record.hard_rank == pytest.approx(expected[key].hard_rank, rel=1e-4)  # fp32, two AdamW steps apart
    assert probe.latest["spectral/hard_rank.tail"] > 0
    info = read_run(tmp_path / "fabric")
    assert info.optimizer == "AdamW"
    assert info.hparams["model_config"]["n_embd"] == 16


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_are_one_window_and_validation_is_not_in_it(tmp_path, accumulate):
    run(tmp_path, SpectralRankCallback(1), steps=2, accumulate=accumulate, validate=True)
    records = read_spectral(tmp_path).records
    assert [(r.step, r.layer, r.num_tokens, r.tokens_seen) for r in records] == [
        (0, 0, ROWS, 0), (0, 1, ROWS, 0), (1, 0, ROWS, ROWS), (1, 1, ROWS, ROWS),
    ]  # fmt: skip


def test_schedule_and_last_step(tmp_path):
    run(tmp_path, SpectralRankCallback(2), steps=6, num_steps=6)
    assert sorted({r.step for r in read_spectral(tmp_path).records}) == [0, 2, 4, 5]


def test_losses_by_bucket(tmp_path):
    run(tmp_path, TailTokenProbe(1, counts=tiny.counts()), steps=1)
    pooled = {record.bucket: record for record in read_losses(tmp_path).records}["pooled"]
    assert pooled.num_tokens == 8 * tiny.LENGTH
    batch = tiny.data()[:8]
    with torch.no_grad():
        logits = model()(batch[:, :-1])
    assert pooled.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())), rel=1e-5
    )


# Dynamo up to torch 2.12 does itself what torch advises against
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled(tmp_path, when):
    reference = by_key(read_of(run, tmp_path / "eager", SpectralRankCallback(1)))
    torch._dynamo.reset()
    module = torch.compile(model(), backend="eager") if when == "before" else model()
    wrap = (lambda fabric_module: torch.compile(fabric_module, backend="eager")) if when == "after" else None
    found = by_key(
        read_of(run, tmp_path / when, SpectralRankCallback(1), module=module, wrap=wrap, accumulate=2, validate=True)
    )
    assert found.keys() == reference.keys()
    for key, record in found.items():
        assert (record.num_tokens, record.tokens_seen) == (ROWS, reference[key].tokens_seen)
        assert record.hard_rank == pytest.approx(reference[key].hard_rank, rel=1e-4)  # fp32, other kernels


def read_of(function, path, *args, **options):
    function(path, *args, **options)
    return read_spectral(path).records


def test_bf16_mixed_and_experts(tmp_path):
    run(tmp_path / "bf16", SpectralRankCallback(1), steps=1, fabric_options={"precision": "bf16-mixed"})
    assert {(r.dtype, r.num_tokens) for r in read_spectral(tmp_path / "bf16").records} == {("bfloat16", ROWS)}
    run(tmp_path / "moe", SpectralRankCallback(1), module=model("LLaMAMoE"), steps=1)
    records = read_spectral(tmp_path / "moe").records
    assert sum(r.num_tokens for r in records if r.layer == 1) == 2 * ROWS


def test_activation_checkpointing_is_not_counted_twice(tmp_path):
    from torch.utils.checkpoint import checkpoint

    module = model()
    for block in module.transformer.h:
        inner = block.forward
        block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    run(tmp_path, SpectralRankCallback(1), module=module, steps=2, accumulate=2)
    assert {r.num_tokens for r in read_spectral(tmp_path).records} == {ROWS}


def test_padding_by_keyword(tmp_path):
    module = models.hugging_face("llama")
    probe = FabricSpectralProbe(SpectralRankCallback(1, dirpath=str(tmp_path)))
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    ids = tiny.data()[:8, :-1]
    mask = (torch.arange(tiny.LENGTH) < torch.arange(4, 12).unsqueeze(1)).long()
    fabric.backward(module(input_ids=ids, attention_mask=mask).logits.square().mean())
    optimizer.step()
    assert {r.num_tokens for r in read_spectral(tmp_path).records} == {int(mask.sum())}
    assert probe.tokens_seen == ids.numel()


def test_a_loop_that_calls_training_step(tmp_path):
    class Wrapped(tiny.Module):
        def training_step(self, batch, batch_idx=0):
            return self.loss(batch)

    probe = FabricSpectralProbe(SpectralRankCallback(1, dirpath=str(tmp_path)))
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    module = Wrapped()
    module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))

    def step():
        for batch in tiny.data()[:8].split(4):
            fabric.backward(module.training_step(batch))
        optimizer.step()
        module.eval()
        with torch.no_grad():
            module.gpt(tiny.data()[:8, :-1])
        module.train()

    step()
    step()
    records = read_spectral(tmp_path).records
    assert [(r.step, r.num_tokens) for r in records if r.layer == 0] == [(0, ROWS), (1, ROWS)]
    assert {r.tokens_seen for r in records if r.step == 1} == {None}


def test_weights_are_bit_identical_with_and_without(tmp_path):
    def weights(callbacks):
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
        module = model()
        wrapped, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
        train(fabric, wrapped, optimizer)
        return torch.cat([p.detach().flatten() for p in module.parameters()]), torch.get_rng_state()

    probe = FabricSpectralProbe(SpectralRankCallback(1, dirpath=str(tmp_path), token_fraction=0.5))
    for with_it, without in zip(weights([probe]), weights([]), strict=True):
        assert torch.equal(with_it, without)
    assert {r.num_tokens for r in read_spectral(tmp_path).records} == {ROWS // 2}


def test_scalars_and_records_beside_the_loggers_files(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=1)
    run(tmp_path, SpectralRankCallback(1), loggers=[logger], steps=1)
    folder = tmp_path / "csv" / "version_0"
    assert len(read_spectral(folder).records) == 2
    assert "spectral/hard_rank.pooled" in (folder / "metrics.csv").read_text()


def test_of_several_loggers_records_lie_beside_tensorboards_files(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    run(tmp_path, SpectralRankCallback(1), loggers=loggers, steps=1)
    (file,) = tmp_path.rglob("spectral.jsonl")
    assert file.parent == tmp_path / "tb" / "version_0"


def test_resume_appends(tmp_path):
    first = run(tmp_path, SpectralRankCallback(2), steps=3)
    state = first.state_dict()
    assert (state["step"], state["tokens_seen"], state["previous"]) == (3, 3 * ROWS, 2)
    second = FabricSpectralProbe(SpectralRankCallback(2, dirpath=str(tmp_path)))
    second.load_state_dict(state)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[second])
    module = model()
    wrapped, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    train(fabric, wrapped, optimizer, steps=3)
    records = read_spectral(tmp_path).records
    assert [(r.step, r.tokens_seen) for r in records if r.layer == 0] == [(0, 0), (2, 2 * ROWS), (4, 4 * ROWS)]
    assert len({r.run_id for r in records}) == 1


def test_a_loop_that_resumes_without_our_state_is_followed_by_its_optimizer(tmp_path):
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(5):
        probe = FabricSpectralProbe(SpectralRankCallback(1, dirpath=str(tmp_path), run_id=f"try_{step}"))
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
        wrapped, wrapped_optimizer = fabric.setup(module, optimizer)
        train(fabric, wrapped, wrapped_optimizer, steps=1)
        probe.remove()
    records = read_spectral(tmp_path).records
    assert [(r.step, r.tokens_seen) for r in records if r.layer == 0] == [(0, 0), *((s, None) for s in range(1, 5))]
    assert {r.run_id for r in records} == {"try_0"}


def test_remove_and_second_module_and_second_optimizer(tmp_path):
    probe = FabricSpectralProbe(SpectralRankCallback(1, dirpath=str(tmp_path)))
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    module, teacher = model(), torch.nn.Linear(2, 2)
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.setup(teacher)  # only the first module is measured
    other = fabric.setup_optimizers(torch.optim.SGD(wrapped.module.parameters(), lr=0.1))
    wrapped(tiny.data()[:8, :-1]).mean().backward()
    optimizer.step()
    other.step()  # steps are the first optimizer's
    assert probe.step == 1
    probe.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in wrapped.modules())


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match="not WeightSpectrumCallback: that one needs a Trainer"):
        FabricSpectralProbe(WeightSpectrumCallback())
    with pytest.raises(ValueError, match="`num_steps` must be an integer >= 1, got 0"):
        FabricSpectralProbe(SpectralRankCallback(), num_steps=0)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[FabricSpectralProbe(SpectralRankCallback())])
    with pytest.raises(MisconfigurationException, match="No feed-forward network was found.*`Linear`"):
        fabric.setup(torch.nn.Linear(2, 2))
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[FabricSpectralProbe(TailTokenProbe())])
    with pytest.raises(MisconfigurationException, match="no token counts"):
        fabric.setup(model())
    unattached = FabricSpectralProbe(SpectralRankCallback(dirpath=str(tmp_path)))
    with pytest.warns(UserWarning, match=r"it is not attached: this loop uses `fabric.setup_module`"):
        unattached.on_after_optimizer_step(Mock(), Mock())
    assert not list(tmp_path.iterdir())
