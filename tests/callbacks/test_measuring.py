"""What the callbacks measure is what an oracle computes from the same activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.functional.buckets import frequency_buckets
from lightning_spectral.probe.accumulate import Accumulator
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.records import read_losses, read_run
from tests.callbacks import tiny
from tests.models import tiny as models


def activations(module, ids: torch.Tensor, layer: int) -> torch.Tensor:
    seen = []
    hook = module.gpt.transformer.h[layer].mlp.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module.gpt(ids)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def oracle_ranks(rows: torch.Tensor) -> tuple[float, float]:
    eigs = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False)).clip(0)
    p = eigs[eigs > 0] / eigs.sum()
    return float(np.exp(-(p * np.log(p)).sum())), float(eigs.sum() ** 2 / (eigs**2).sum())


def fit(path, callback, module=None, **options):
    module = module or tiny.Module()
    batches = options.pop("batches", None) or tiny.loader()
    tiny.trainer(path, [callback] if not isinstance(callback, list) else callback, **options).fit(module, batches)
    return read_spectral(path).records


def one(batch) -> DataLoader:
    return DataLoader([batch], batch_size=None)


def by_key(records):
    return {(r.step, r.layer, r.site, r.bucket): r for r in records}


def test_step_0_is_the_untrained_model_bucket_by_bucket(tmp_path):
    records = by_key(fit(tmp_path, TailTokenProbe(10, counts=tiny.counts()), max_steps=1))
    ids = tiny.data()[:8, :-1]
    buckets = frequency_buckets(tiny.counts())[ids.flatten()]
    for layer in (0, 1):
        rows = activations(tiny.Module(), ids, layer)
        for code, name in enumerate(("head", "mid", "tail", "pooled")):
            own = rows if name == "pooled" else rows[buckets == code]
            record = records[0, layer, "post", name]
            assert record.num_tokens == len(own)
            # fp32 products; one token's rows are equal at layer 0, and 64 null modes of 1e-7 add 1e-4 to the entropy
            assert (record.soft_rank, record.hard_rank) == pytest.approx(oracle_ranks(own), rel=1e-5, abs=1e-4)
            assert record.width == 64
            assert record.tokens_per_dim == len(own) / 64
            assert record.num_sequences <= 8


def test_a_window_of_fewer_rows_than_features_is_the_same_by_gram_and_by_covariance(tmp_path, monkeypatch):
    """128 rows of width 192: no covariance is made, unless more rows come after the flush."""
    states, settle = [], SpectralProbe.settle
    monkeypatch.setattr(
        Accumulator,
        "flush",
        lambda self, window, flush=Accumulator.flush, **kwargs: (
            flush(self, window, **kwargs),
            states.extend(type(state).__name__ for state in window.states.values()),
        ),
    )

    def records(name):
        states.clear()
        callback = TailTokenProbe(1, counts=tiny.counts(), sites=["pre", "post"])
        return by_key(fit(tmp_path / name, callback, tiny.Module(intermediate_size=192), max_steps=1))

    few = records("gram")
    assert set(states) == {"Gram"}
    monkeypatch.setattr(SpectralProbe, "settle", lambda self, *, alone: settle(self, alone=False))
    many = records("covariance")
    assert set(states) == {"Moments"}
    assert few.keys() == many.keys()
    for key, record in few.items():
        assert (record.num_tokens, record.status, record.width) == (many[key].num_tokens, many[key].status, 192)
        for name in (
            "soft_rank",
            "hard_rank",
            "hard_rank_debiased",
            "early_enrichment",
            "top_share",
            "trace",
            "js_divergence",
        ):
            ours, theirs = getattr(record, name), getattr(many[key], name)
            # fp32 products; 192 - 128 null modes of 1e-7 that one has and the other has not
            assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-5, abs=1e-4), (key, name)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_of_a_step_are_one_window(tmp_path, accumulate):
    whole = by_key(fit(tmp_path / "whole", SpectralRankCallback(1), max_steps=1, batches=tiny.loader(batch_size=8)))
    parts = by_key(
        fit(
            tmp_path / "parts",
            SpectralRankCallback(1),
            max_steps=1,
            accumulate_grad_batches=accumulate,
            batches=tiny.loader(batch_size=8 // accumulate),
        )
    )
    assert whole.keys() == parts.keys()
    for key, record in whole.items():
        assert parts[key].num_tokens == record.num_tokens == 8 * tiny.LENGTH
        assert parts[key].hard_rank == pytest.approx(record.hard_rank, rel=1e-6)  # fp32, another order of sums
        assert parts[key].tokens_seen == record.tokens_seen == 0


def test_windows_are_the_first_every_nth_and_the_last_step(tmp_path):
    records = fit(tmp_path, SpectralRankCallback(4), max_steps=11, accumulate_grad_batches=2, max_epochs=-1)
    assert sorted({r.step for r in records}) == [0, 4, 8, 10]
    tokens_per_step = 2 * 8 * tiny.LENGTH
    assert {r.step: r.tokens_seen for r in records} == {s: s * tokens_per_step for s in (0, 4, 8, 10)}


def test_padding_is_not_a_row(tmp_path):
    ids = tiny.data()[:8, :-1]
    mask = torch.arange(tiny.LENGTH) < torch.arange(4, 12).unsqueeze(1)

    class Padded(tiny.Module):
        def training_step(self, batch, batch_idx):
            return self.gpt(batch["input_ids"]).square().mean()

    def records(name, batch):
        return by_key(fit(tmp_path / name, SpectralRankCallback(1), Padded(), max_steps=1, batches=one(batch)))

    rows = activations(tiny.Module(), ids, 1)[mask.flatten()]
    labels = torch.where(mask, ids, -100)
    for name, batch in {"mask": {"attention_mask": mask.long()}, "labels": {"labels": labels}}.items():
        record = records(name, {"input_ids": ids, **batch})[0, 1, "post", "pooled"]
        assert record.num_tokens == int(mask.sum())
        assert record.hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)
    callback = SpectralRankCallback(1, mask_fn=lambda batch: batch["real"])
    record = by_key(
        fit(tmp_path / "fn", callback, Padded(), max_steps=1, batches=one({"input_ids": ids, "real": mask}))
    )
    assert record[0, 0, "post", "pooled"].num_tokens == int(mask.sum())


def test_pre_and_post_with_reinjection(tmp_path):
    callback = SpectralRankCallback(1, sites=["pre", "post"], renyi_orders=[2.0])
    records = by_key(fit(tmp_path, callback, max_steps=1))
    pre, post = records[0, 1, "pre", "pooled"], records[0, 1, "post", "pooled"]
    assert post.reinjection["2"] == pytest.approx(post.renyi["2"] / pre.renyi["2"])
    assert 0 <= post.js_divergence <= np.log(2)
    assert pre.reinjection == {}
    assert pre.js_divergence is None


def test_losses_by_target_bucket(tmp_path):
    fit(tmp_path, TailTokenProbe(1, counts=tiny.counts()), max_steps=1)
    losses = {record.bucket: record for record in read_losses(tmp_path).records}
    module, batch = tiny.Module(), tiny.data()[:8]
    with torch.no_grad():
        logits = module.gpt(batch[:, :-1])
    per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    codes = frequency_buckets(tiny.counts())[batch[:, 1:].flatten()]
    for code, name in enumerate(("head", "mid", "tail")):
        assert losses[name].num_tokens == int((codes == code).sum())
        assert losses[name].loss == pytest.approx(float(per_token[codes == code].mean()), rel=1e-5)
    assert losses["pooled"].loss == pytest.approx(float(module.loss(batch).detach()), rel=1e-5)


def test_target_attribution_and_positions(tmp_path):
    records = by_key(fit(tmp_path / "t", TailTokenProbe(1, counts=tiny.counts(), attribute_to="target"), max_steps=1))
    codes = frequency_buckets(tiny.counts())[tiny.data()[:8, 1:].flatten()]
    assert records[0, 0, "post", "tail"].num_tokens == int((codes == 2).sum())
    records = by_key(fit(tmp_path / "p", TailTokenProbe(1, group_by="position", num_position_groups=4), max_steps=1))
    rows = activations(tiny.Module(), tiny.data()[:8, :-1], 1).view(8, 4, 4, 64)[:, 2].flatten(0, 1)
    assert records[0, 1, "post", "position_02"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)


def test_both_callbacks_give_each_number_once(tmp_path):
    callbacks = [SpectralRankCallback(2), TailTokenProbe(2, counts=tiny.counts())]
    records = fit(tmp_path / "same", callbacks)
    assert sorted({r.bucket for r in records}) == ["head", "mid", "pooled", "tail"]
    assert len(records) == 3 * 2 * 4
    callbacks = [SpectralRankCallback(1), TailTokenProbe(2, counts=tiny.counts())]
    records = fit(tmp_path / "different", callbacks)
    assert sorted(r.step for r in records if r.bucket == "pooled" and r.layer == 0) == [0, 1, 2, 3]
    assert sorted(r.step for r in records if r.bucket == "tail" and r.layer == 0) == [0, 2, 3]
    assert len({r.run_id for r in records}) == 1


@pytest.mark.parametrize(
    "richer", [{"sites": ["pre", "post"]}, {"num_jackknife_groups": 4}, {"renyi_orders": [1, 2, 7]}, {"every_n": 1}]
)
def test_a_poorer_callback_leaves_the_pooled_spectra_to_a_richer_probe(tmp_path, richer):
    """Whatever the order of the callbacks: the first record of a key used to be kept, and the richer one lost."""
    every = richer.pop("every_n", 2)
    probe = TailTokenProbe(every, counts=tiny.counts(), **richer)
    poorer = SpectralRankCallback(2, renyi_orders=[1, 2])
    for name, callbacks in {"before": [poorer, probe], "behind": [probe, poorer]}.items():
        records = fit(tmp_path / name, callbacks)
        alone = fit(tmp_path / f"{name}_alone", [TailTokenProbe(every, counts=tiny.counts(), **richer)])
        assert [(r.key, sorted(r.reinjection), sorted(r.renyi), r.hard_rank_ci_low) for r in records] == [
            (r.key, sorted(r.reinjection), sorted(r.renyi), r.hard_rank_ci_low) for r in alone
        ]


def test_a_record_that_is_lost_to_a_poorer_one_is_said(tmp_path):
    callbacks = [
        SpectralRankCallback(
            2, renyi_orders=[9], num_jackknife_groups=1
        ),  # which the probe does not have: neither stands for the other
        TailTokenProbe(2, counts=tiny.counts(), num_jackknife_groups=4),
    ]
    with pytest.warns(UserWarning, match="hard_rank_ci_high, hard_rank_ci_low.* of the second are lost"):
        fit(tmp_path, callbacks)


def test_evaluation_leaves_no_records_unless_asked(tmp_path):
    module, callback = tiny.Module(), SpectralRankCallback(100)
    trainer = tiny.trainer(tmp_path / "no", [callback], max_steps=2, num_sanity_val_steps=2, val_check_interval=1)
    trainer.fit(module, tiny.loader(), tiny.loader(16))
    trainer.validate(module, tiny.loader(16), verbose=False)
    trainer.test(module, tiny.loader(16), verbose=False)
    trainer.predict(module, tiny.loader(16))
    assert {r.stage for r in read_spectral(tmp_path / "no").records} == {"train"}
    asked = SpectralRankCallback(100, on=["train", "validation"])
    trainer = tiny.trainer(tmp_path / "yes", [asked], max_steps=2, num_sanity_val_steps=2, val_check_interval=1)
    trainer.fit(tiny.Module(), tiny.loader(), tiny.loader(16))
    records = read_spectral(tmp_path / "yes").records
    assert sorted({(r.stage, r.step) for r in records}) == [
        ("train", 0),
        ("train", 1),
        ("validation", 1),
        ("validation", 2),
    ]
    assert {r.num_tokens for r in records if r.stage == "validation"} == {16 * tiny.LENGTH}


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_a_model_is_measured_without_training_it(tmp_path, stage):
    module = tiny.Module()
    trainer = tiny.trainer(tmp_path, [TailTokenProbe(counts=tiny.counts(), on=[stage])])
    run = {"validation": trainer.validate, "test": trainer.test, "predict": trainer.predict}[stage]
    run(module, tiny.loader(16))
    records = {(r.layer, r.bucket): r for r in read_spectral(tmp_path).records}
    rows = activations(module, tiny.data(16)[:, :-1], 1)
    assert records[1, "pooled"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)
    assert sum(len(m._forward_pre_hooks) for m in module.modules()) == 0


def test_validation_between_two_micro_batches_does_not_disturb_the_window(tmp_path):
    callback = SpectralRankCallback(1, on=["train", "validation"])
    trainer = tiny.trainer(tmp_path, [callback], max_steps=1, accumulate_grad_batches=4, val_check_interval=3)
    trainer.fit(tiny.Module(), tiny.loader(batch_size=2), tiny.loader(16))
    assert [r.num_tokens for r in read_spectral(tmp_path).records if r.stage == "train"] == [8 * tiny.LENGTH] * 2


def test_manual_optimization_checkpointing_and_compile(tmp_path):
    from torch.utils.checkpoint import checkpoint

    class Manual(tiny.Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    class Checkpointed(tiny.Module):
        def __init__(self):
            super().__init__()
            for block in self.gpt.transformer.h:
                inner = block.forward
                block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)

    class Compiled(tiny.Module):
        def __init__(self):
            super().__init__()
            self.gpt = torch.compile(self.gpt, backend="eager")
            self.gpt(tiny.data()[:8, :-1])  # compiled before the callback attaches

    reference = by_key(fit(tmp_path / "plain", SpectralRankCallback(2)))
    for kind in (Manual, Checkpointed, Compiled):
        torch._dynamo.reset()
        records = by_key(fit(tmp_path / kind.__name__, SpectralRankCallback(2), kind()))
        assert records.keys() == reference.keys()
        for key, record in records.items():
            assert record.num_tokens == reference[key].num_tokens
            assert record.hard_rank == pytest.approx(reference[key].hard_rank, rel=1e-4)  # fp32, two AdamW steps apart


class BlocksInStep(tiny.Module):
    """A module whose decoder has no forward of its own."""

    def __init__(self):
        super().__init__()
        self.custom = models_custom()
        del self.gpt

    def loss(self, batch):
        x = self.custom["tok"](batch[:, :-1])
        for block in self.custom["blocks"]:
            x = x + block["down"](block["up"](x).relu())
        return x.square().mean()


def models_custom():
    from tests.models.test_families import Custom

    custom = Custom()
    return torch.nn.ModuleDict({"tok": custom.tok, "blocks": custom.blocks})


def test_blocks_run_by_hand_inside_the_training_step(tmp_path):
    callback = SpectralRankCallback(1, modules=["custom.blocks.*.down"])
    records = fit(tmp_path, callback, BlocksInStep(), max_steps=2)
    assert {(r.layer, r.num_tokens, r.width) for r in records} == {(0, 128, 40), (1, 128, 40)}


def test_experts_keep_the_buckets_of_their_tokens(tmp_path):
    records = fit(tmp_path, TailTokenProbe(1, counts=tiny.counts()), tiny.Module("LLaMAMoE"), max_steps=1)
    for bucket, rows in zip(
        ("head", "mid", "tail"),
        torch.bincount(frequency_buckets(tiny.counts())[tiny.data()[:8, :-1].flatten()]),
        strict=True,
    ):
        # every token goes to two experts of each layer
        assert sum(r.num_tokens for r in records if r.bucket == bucket and r.layer == 1) == 2 * int(rows)
    assert {r.expert for r in records} == {0, 1, 2, 3}


def test_run_info_says_what_was_run(tmp_path):
    fit(tmp_path, SpectralRankCallback(1, labels={"sweep": "a"}, run_id="mine"), tiny.Module(optimizer="SGD"))
    info = read_run(tmp_path)
    assert (info.run_id, info.optimizer, info.labels) == ("mine", "SGD", {"sweep": "a"})
    assert info.hparams["optimizer"] == "SGD"
    assert info.conventions["epsilon"] == "0"
    assert models.VOCAB == 64


def test_eigenvalues_lie_beside_the_records(tmp_path):
    from safetensors.torch import load_file

    records = by_key(fit(tmp_path, SpectralRankCallback(1, eigenvalues=True), max_steps=1))
    spectra = load_file(tmp_path / "eigenvalues" / "train_00000000.safetensors")
    stack = records[0, 1, "post", "pooled"].stack
    eigs = spectra[f"{stack}/layer_01.post.pooled"].double()
    assert torch.equal(eigs, eigs.sort(descending=True).values)
    hard = float(eigs.sum() ** 2 / eigs.square().sum())
    assert hard == pytest.approx(records[0, 1, "post", "pooled"].hard_rank, rel=1e-5)
