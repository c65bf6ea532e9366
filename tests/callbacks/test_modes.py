"""Modes of a Trainer that a user may switch on: each leaves exactly the rows that flowed through the model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, TailTokenProbe, read_spectral
from lightning_spectral.functional.buckets import frequency_buckets
from tests.callbacks import tiny
from tests.callbacks.test_measuring import activations, by_key, fit, one, oracle_ranks

ROWS = 8 * tiny.LENGTH


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"), ("64-true", "float64")],
)
def test_precision(tmp_path, precision, dtype):
    records = by_key(
        fit(tmp_path, TailTokenProbe(2, counts=tiny.counts(), losses=False), max_steps=3, precision=precision)
    )
    assert {(r.dtype, r.status) for r in records.values() if r.bucket == "pooled"} == {(dtype, "few_tokens")}
    assert {r.num_tokens for r in records.values() if r.bucket == "pooled"} == {ROWS}
    module = tiny.Module()
    rows = activations(module, tiny.data()[:8, :-1], 1)
    # 8 bits of mantissa move each activation by up to 0.4 %, and the ranks of 128 of them less than that
    assert records[0, 1, "post", "pooled"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_products_are_fp32_whatever_the_precision(tmp_path, precision):
    class Seen(tiny.Module):
        """Remembers the bf16 rows that reached the last projection of step 0."""

        def training_step(self, batch, batch_idx):
            rows = []
            handle = self.gpt.transformer.h[1].mlp.proj.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
            loss = self.loss(batch)
            handle.remove()
            self.rows = rows[0].detach().flatten(0, 1).double() if batch_idx == 0 else self.rows
            return loss

    module = Seen()
    records = by_key(fit(tmp_path, SpectralRankCallback(1), module, max_steps=1, precision=precision))
    record = records[0, 1, "post", "pooled"]
    # an oracle on the same bf16 rows: what is left is the rounding of fp32 products
    assert record.hard_rank == pytest.approx(oracle_ranks(module.rows)[1], rel=1e-5)


def test_fp16_overflow_is_a_status_not_a_crash(tmp_path):
    class Overflow(tiny.Module):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.gpt.transformer.h[1].mlp.fc.weight.fill_(6e4)
            return self.loss(batch)

    callback = SpectralRankCallback(1, on_nonfinite="record")
    records = by_key(fit(tmp_path, callback, Overflow(), max_steps=1, precision="16-true"))
    assert records[0, 0, "post", "pooled"].status == "few_tokens"
    assert (records[0, 1, "post", "pooled"].status, records[0, 1, "post", "pooled"].hard_rank) == ("nonfinite", None)


def test_packed_sequences_need_no_mask(tmp_path):
    """Several documents a row, told apart by an id: every position is a row, the separator in its own bucket."""
    separator = 0
    packed = tiny.data()[:8].clone()
    packed[:, 5] = packed[:, 11] = separator
    counts = torch.bincount(packed.flatten(), minlength=64)
    callback = TailTokenProbe(1, counts=counts)
    records = by_key(fit(tmp_path, callback, max_steps=1, batches=one(packed)))
    codes = frequency_buckets(counts)[packed[:, :-1].flatten()]
    for code, name in enumerate(("head", "mid", "tail")):
        assert records[0, 1, "post", name].num_tokens == int((codes == code).sum())
    assert records[0, 1, "post", "pooled"].num_tokens == ROWS
    rows = activations(tiny.Module(), packed[:, :-1], 1)
    assert records[0, 1, "post", "pooled"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)


def test_packed_labels_mask_the_prompt(tmp_path):
    class Packed(tiny.Module):
        def training_step(self, batch, batch_idx):
            return self.gpt(batch["input_ids"]).square().mean()

    ids = tiny.data()[:8, :-1]
    labels = torch.where(torch.arange(tiny.LENGTH) % 5 == 0, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    records = by_key(fit(tmp_path, SpectralRankCallback(1), Packed(), max_steps=1, batches=one(batch)))
    assert records[0, 0, "post", "pooled"].num_tokens == int((labels != -100).sum())


def test_several_training_dataloaders_are_one_window(tmp_path):
    class Both(tiny.Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["web"]) + self.loss(batch["code"])

    loaders = {"web": tiny.loader(16, 4), "code": tiny.loader(16, 4, seed=1)}
    records = fit(tmp_path, SpectralRankCallback(1), Both(), max_steps=2, batches=loaders)
    assert {(r.step, r.num_tokens) for r in records} == {(0, ROWS), (1, ROWS)}
    rows = activations(tiny.Module(), torch.cat([tiny.data(16)[:4, :-1], tiny.data(16, 1)[:4, :-1]]), 1)
    assert by_key(records)[0, 1, "post", "pooled"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)


def test_several_validation_dataloaders_are_a_window_each(tmp_path):
    class Module(tiny.Module):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.loss(batch)

    callback = SpectralRankCallback(100, on=["validation"])
    trainer = tiny.trainer(tmp_path, [callback])
    trainer.validate(Module(), [tiny.loader(16), tiny.loader(8, seed=1)], verbose=False)
    records = read_spectral(tmp_path).records
    assert {(r.stage, r.loader, r.num_tokens) for r in records} == {
        ("validation", 0, 16 * tiny.LENGTH),
        ("validation", 1, 8 * tiny.LENGTH),
    }


def test_overfit_batches(tmp_path):
    records = fit(tmp_path, SpectralRankCallback(2), max_steps=5, max_epochs=-1, overfit_batches=1)
    assert [(r.step, r.num_tokens) for r in records if r.layer == 0] == [(0, ROWS), (2, ROWS), (4, ROWS)]
    rows = activations(tiny.Module(), tiny.data()[:8, :-1], 1)
    assert by_key(records)[0, 1, "post", "pooled"].hard_rank == pytest.approx(oracle_ranks(rows)[1], rel=1e-5)


@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run_measures_and_writes_nothing(tmp_path, batches):
    callback = SpectralRankCallback(2, on=["train", "validation"], dirpath=str(tmp_path / "records"))
    trainer = tiny.trainer(tmp_path, [callback], fast_dev_run=batches, max_steps=-1)
    trainer.fit(tiny.Module(), tiny.loader(), tiny.loader(32))
    assert list(tmp_path.iterdir()) == []
    windows = {True: 2, 3: 3}  # steps 0 and 2, and the validation
    assert (callback.observer.tally.windows, callback.observer.tally.lost) == (windows[batches], 0)
    assert float(trainer.callback_metrics["spectral/hard_rank.pooled"]) > 1


def test_two_probes_that_group_differently_share_a_trainer(tmp_path):
    callbacks = [TailTokenProbe(2, counts=tiny.counts()), TailTokenProbe(2, group_by="position", num_position_groups=2)]
    records = fit(tmp_path, callbacks, max_steps=1)
    buckets = ["head", "mid", "pooled", "position_00", "position_01", "tail"]
    assert sorted(r.bucket for r in records if r.layer == 0) == buckets


def test_limit_train_batches_and_epochs(tmp_path):
    records = fit(tmp_path, SpectralRankCallback(3), max_steps=-1, max_epochs=2, limit_train_batches=4)
    assert sorted({r.step for r in records}) == [0, 3, 6, 7]


def test_a_last_short_batch_and_iterable_data(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.data(20))

    loader = DataLoader(Stream(), batch_size=8)
    tiny.trainer(tmp_path, [SpectralRankCallback(1)], max_steps=3).fit(tiny.Module(), loader)
    records = read_spectral(tmp_path).records
    assert [r.num_tokens for r in records if r.layer == 0] == [ROWS, ROWS, ROWS // 2]


# Dynamo looks at `.grad` of every tensor that it meets, and silences torch's remark only where it is not an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("when", ["before", "after"])
def test_model_compiled_before_or_after_the_callback_attaches(tmp_path, when):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    class Compiled(tiny.Module):
        def on_train_start(self):
            if when == "after":
                self.gpt = torch.compile(self.gpt, backend=counter, fullgraph=True)

    torch._dynamo.reset()
    module = Compiled()
    if when == "before":
        module.gpt.compile(backend=counter, fullgraph=True)
    records = fit(tmp_path, SpectralRankCallback(2), module, max_steps=4, accumulate_grad_batches=2, max_epochs=-1)
    assert [(r.step, r.num_tokens) for r in records if r.layer == 1] == [(step, 2 * ROWS) for step in (0, 2, 3)]
    assert counter.frame_count == 2  # one graph that measures, one that does not; no graph break
