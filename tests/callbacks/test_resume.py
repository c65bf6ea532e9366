"""Killed anywhere, a run goes on with no gap and no duplicate."""

from __future__ import annotations

import dataclasses

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback, read_spectral
from lightning_spectral.models.checkpoint_folder import check_checkpoint_folder
from lightning_spectral.records import SPECTRAL_FILE, read_losses, read_run, read_weights
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks


class Killed(Exception):
    pass


class ResumableLoader:
    """Goes on where it was, as Lightning asks for by ``state_dict``."""

    def __init__(self):
        self.next = 0

    def __len__(self):
        return 16

    def __iter__(self):
        while self.next < 16:
            self.next += 1
            yield tiny.data(128)[8 * self.next - 8 : 8 * self.next]
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Mortal(tiny.Module):
    kill_at: int | None = None

    def training_step(self, batch, batch_idx):
        if batch_idx == self.kill_at:
            raise Killed
        return super().training_step(batch, batch_idx)


def callbacks(path):
    saver = ModelCheckpoint(dirpath=path / "checkpoints", save_last=True, every_n_train_steps=3, save_top_k=1)
    return [SpectralRankCallback(2), TailTokenProbe(2, counts=tiny.counts()), saver]


def run(path, *, kill_at=None, resume=False, tear=False):
    module = Mortal()
    module.kill_at = kill_at
    trainer = tiny.trainer(path, callbacks(path), max_steps=8, accumulate_grad_batches=2, enable_checkpointing=True)
    checkpoint = path / "checkpoints" / "last.ckpt"
    loader = ResumableLoader()
    try:
        trainer.fit(module, loader, ckpt_path=str(checkpoint) if resume and checkpoint.exists() else None)
    except Killed:
        if tear:  # a kill while writing
            file = path / SPECTRAL_FILE
            file.write_bytes(file.read_bytes()[:-150])


def measured(path):
    records = read_spectral(path).records
    return {record.key: dataclasses.replace(record, window_s=None, run_id="") for record in records}


# Batch of the kill: 3 before any checkpoint, 7 at the edge of a save, 9 in the middle of a window, 13 at its edge.
# Torn: the window being written at the kill is always newer than the checkpoint (a window is synced before it).
@pytest.mark.filterwarnings("ignore:.*lines left out", "ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize(
    ("kill_at", "tear"), [(3, False), (3, True), (7, False), (9, False), (10, True), (11, True), (13, False)]
)
def test_resume_equals_uninterrupted(tmp_path, kill_at, tear):
    run(tmp_path / "whole")
    run(tmp_path / "killed", kill_at=kill_at, tear=tear)
    saved = (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists()
    assert saved == (kill_at >= 7)
    run(tmp_path / "killed", resume=True)
    whole, resumed = measured(tmp_path / "whole"), measured(tmp_path / "killed")
    assert resumed.keys() == whole.keys()
    assert len(read_losses(tmp_path / "killed").records) == len(read_losses(tmp_path / "whole").records)
    assert resumed == whole


def test_a_fresh_run_in_a_used_folder_moves_the_old_one_aside(tmp_path):
    run(tmp_path, kill_at=5)
    old = read_run(tmp_path).run_id
    kept = measured(tmp_path)
    with pytest.warns(UserWarning, match=f"held the run `{old}`: it was moved to"):
        run(tmp_path)
    assert read_run(tmp_path).run_id != old

    assert measured(tmp_path / "previous" / old) == kept
    assert {r.run_id for r in read_spectral(tmp_path).records} == {read_run(tmp_path).run_id}


class Sharded(tiny.Module):
    def validation_step(self, batch, batch_idx):
        self.loss(batch)

    def configure_model(self):
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for block in self.gpt.transformer.h:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.gpt, mesh=self.device_mesh["data_parallel"])


def sharded_fits(rank, world_size, folder, sanity_steps):
    """A whole run, and one that is cut and resumed; in a process of its own, for threads of a checkpoint stay."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def fit(path, max_steps, ckpt_path=None):
        watch = [TailTokenProbe(2, counts=tiny.counts()), WeightSpectrumCallback(2)]
        trainer = tiny.trainer(
            path, watch, max_steps=max_steps, strategy=ModelParallelStrategy(), num_sanity_val_steps=sanity_steps
        )
        trainer.fit(Sharded(), ResumableLoader(), tiny.loader(8), ckpt_path=ckpt_path)
        trainer.save_checkpoint(path / f"{max_steps}.ckpt")

    fit(folder / "whole", 8)
    fit(folder / "cut", 4)
    fit(folder / "cut", 8, folder / "cut" / "4.ckpt")


@pytest.mark.distributed
@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_a_sharded_run_goes_on_in_its_folder(tmp_path, sanity_steps):
    """FSDP2 reads its checkpoint after every callback's `on_fit_start`: the run looks new until then."""
    run_ranks(sharded_fits, 1, tmp_path, sanity_steps, init=False)
    check_checkpoint_folder(tmp_path / "cut" / "4.ckpt")  # what `pretrain --resume` looks at first
    assert not (tmp_path / "cut" / "previous").exists()
    for read in (read_spectral, read_weights, read_losses):
        whole, cut = (read(tmp_path / name).records for name in ("whole", "cut"))
        assert {r.step for r in whole} <= {r.step for r in cut}
        assert len({r.run_id for r in cut}) == 1
        last = max(r.step for r in whole)
        assert numbers_at(last, whole) == numbers_at(last, cut)


def numbers_at(step, records):
    of_run = {"run_id": "", "window_s": None}
    return [{**dataclasses.asdict(record), **of_run} for record in records if record.step == step]


def fit_on_some_ranks(rank, world_size, path, max_steps):
    checkpoint = path / "last.ckpt"
    several = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    trainer = tiny.trainer(path, [SpectralRankCallback(2)], max_steps=max_steps, **several)
    trainer.fit(tiny.Module(), tiny.loader(256), ckpt_path=checkpoint if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_run_goes_on_on_another_number_of_ranks(tmp_path):
    run_ranks(fit_on_some_ranks, 2, tmp_path, 4, init=False)
    fit_on_some_ranks(0, 1, tmp_path, 8)
    records = [record for record in read_spectral(tmp_path).records if record.layer == 0]
    rows = 8 * tiny.LENGTH
    assert [(r.step, r.world_size, r.num_tokens) for r in records] == [
        (0, 2, 2 * rows), (2, 2, 2 * rows), (3, 2, 2 * rows), (4, 1, rows), (6, 1, rows), (7, 1, rows),
    ]  # fmt: skip
    assert [r.tokens_seen for r in records] == [0, 4 * rows, 6 * rows, 8 * rows, 10 * rows, 11 * rows]
    assert len({record.run_id for record in records}) == 1


class InTheWay(Callback):
    """From a step on a file stands where the records' folder was."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and self.folder.is_dir():
            self.folder.rename(self.folder.with_name("kept"))
            self.folder.write_text("in the way")


@pytest.mark.parametrize(("background", "only_weights"), [(False, False), (True, False), (False, True)])
@pytest.mark.filterwarnings("ignore")
def test_records_that_could_not_be_written_are_in_the_checkpoint(tmp_path, background, only_weights):
    """The run ends, and nothing has been written since step 3: who goes on from its checkpoint has them."""

    def fit(steps, in_the_way, checkpoint=None):
        settings = {"dirpath": str(tmp_path / "records"), "background": background}
        probes = [
            SpectralRankCallback(2, eigenvalues=True, **settings),
            TailTokenProbe(2, counts=tiny.counts(), **settings),
        ]
        saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=6)
        probes = [WeightSpectrumCallback(2, dirpath=settings["dirpath"])] if only_weights else probes
        others = [InTheWay(tmp_path / "records", 3)] if in_the_way else []
        trainer = tiny.trainer(tmp_path, [*others, *probes, saver], max_steps=steps, enable_checkpointing=True)
        trainer.fit(tiny.Module(), tiny.loader(), ckpt_path=checkpoint)

    fit(6, in_the_way=True)
    (tmp_path / "records").unlink()
    (tmp_path / "kept").rename(tmp_path / "records")
    read = read_weights if only_weights else read_spectral
    before = {record.step for record in read(tmp_path / "records").records}
    fit(6, in_the_way=False, checkpoint=tmp_path / "checkpoints" / "last.ckpt")
    records = read(tmp_path / "records").records
    assert before <= {0, 2}
    spectra = sorted(path.stem[-1] for path in (tmp_path / "records").glob("eigenvalues/*.safetensors"))
    assert only_weights or spectra == ["0", "2", "4", "5"]
    assert {record.step for record in records} == {0, 2, 4, 5}
    assert only_weights or {loss.step for loss in read_losses(tmp_path / "records").records} == {0, 2, 4, 5}
    assert len({record.key for record in records}) == len(records)
