"""Windows solved beside training: the same records, the same weights, and nothing lost when a run ends early."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_spectral.callbacks import SpectralRankCallback, TailTokenProbe
from lightning_spectral.callbacks.trainer_host import host_of
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.probe.attaching import solves_beside
from lightning_spectral.probe.background import BackgroundSolver
from lightning_spectral.probe.window import ClosedWindow
from lightning_spectral.records import read_run, read_spectral
from tests.callbacks.tiny import Module, counts, loader, trainer


@pytest.fixture
def solving_threads(monkeypatch) -> list[str]:
    """Names of the threads in which windows were solved."""
    names: list[str] = []
    solve = ClosedWindow.solve

    def noted(closed):
        names.append(threading.current_thread().name)
        return solve(closed)

    monkeypatch.setattr(ClosedWindow, "solve", noted)
    return names


def fit(path, *, background, callbacks=(), model=None, steps=6, **options):
    callback = TailTokenProbe(every_n_steps=1, counts=counts(), dirpath=str(path), background=background, **options)
    model = model or Module()
    with contextlib.suppress(InterruptedError):
        trainer(path, [callback, *callbacks], max_steps=steps).fit(model, loader(), loader(16))
    return model, callback


def records(path):
    """Without the time they took."""
    return [replace(record, window_s=None, run_id="") for record in read_spectral(path).records]


class Stop(pl.Callback):
    """Raises after a batch, as a crash or a failing step would."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            raise InterruptedError


@pytest.mark.parametrize("on", [("train",), ("train", "validation")])
def test_records_and_weights_are_those_of_the_synchronous_path(tmp_path, solving_threads, on):
    beside, _ = fit(tmp_path / "beside", background=True, on=on)
    assert [name for name in solving_threads if name != "MainThread"], "nothing ran in the background"
    within, _ = fit(tmp_path / "within", background=False, on=on)
    assert records(tmp_path / "beside") == records(tmp_path / "within")
    for name, weight in within.state_dict().items():
        assert torch.equal(weight, beside.state_dict()[name]), name


def test_nothing_is_lost_when_the_run_stops(tmp_path, solving_threads):
    before = threading.enumerate()
    fit(tmp_path, background=True, callbacks=[Stop(3)])
    assert sorted({record.step for record in records(tmp_path)}) == [0, 1, 2, 3]
    assert not [t for t in threading.enumerate() if t.name.startswith("spectral-solve") and t not in before]


class Steps(pl.Callback):
    """Steps on record at the moment a checkpoint is written."""

    def __init__(self, path) -> None:
        self.path, self.seen = path, []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.seen.append((trainer.global_step, max(record.step for record in records(self.path))))


def test_a_checkpoint_waits_for_the_window_before_it(tmp_path):
    steps = Steps(tmp_path)
    run = trainer(
        tmp_path,
        [
            SpectralRankCallback(every_n_steps=1, dirpath=str(tmp_path), background=True),
            steps,
            ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1),
        ],
        max_steps=4,
        enable_checkpointing=True,
    )
    run.fit(Module(), loader())
    assert steps.seen == [(2, 1), (4, 3)]


def test_medians_reach_callback_metrics(tmp_path):
    run = trainer(tmp_path, [SpectralRankCallback(every_n_steps=2, dirpath=str(tmp_path), background=True)])
    run.fit(Module(), loader())
    assert float(run.callback_metrics["spectral/hard_rank.pooled"]) > 1


def test_at_most_one_window_waits():
    release, order = threading.Event(), []
    solver = BackgroundSolver()

    def solve(name):
        def run():
            release.wait(10)
            return [name]

        return run

    def publish(owned):
        order.extend(owned)
        return {}

    solver.submit(solve(1), publish)
    assert solver.poll() == {}
    assert order == []
    release.set()
    solver.submit(solve(2), publish)  # waits for the first
    assert order == [1]
    solver.close()
    assert order == [1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_of_the_solve_is_a_status(tmp_path, monkeypatch, background):
    def broken(measured, *args, **kwargs):
        raise ArithmeticError("no convergence")

    monkeypatch.setattr("lightning_spectral.probe.window.measure", broken)
    with pytest.warns(UserWarning, match="ArithmeticError: no convergence") as caught:
        fit(tmp_path, background=background)
    assert len([warning for warning in caught if "no convergence" in str(warning.message)]) == 1
    found = records(tmp_path)
    assert {(record.status, record.reason, record.hard_rank) for record in found} == {
        ("solve_failed", "ArithmeticError: no convergence", None)
    }
    assert sorted({record.step for record in found}) == list(range(6))
    info = read_run(tmp_path)
    assert (info.finished, info.last_step, info.num_windows, info.num_lost_windows) == (True, 6, 6, 6)


@pytest.mark.filterwarnings("ignore:SpectralRankCallback")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("scale", "status"), [(1e76, "few_tokens"), (1e150, "solve_failed"), (1e200, "nonfinite")])
def test_activations_beyond_what_a_fourth_power_holds_end_no_run(tmp_path, background, scale, status):
    module = Module().double()
    for block in module.gpt.transformer.h:
        block.mlp.fc.register_forward_hook(lambda module, inputs, output: output * scale)
    callback = SpectralRankCallback(dirpath=str(tmp_path), every_n_steps=1, background=background)
    trainer(tmp_path, [callback], max_steps=1, gradient_clip_val=1.0).fit(module, loader())
    # what it makes of the second layer's inputs is not finite
    assert {r.layer: r.status for r in records(tmp_path)} == {0: status, 1: "nonfinite"}
    assert read_run(tmp_path).finished


def decision(path, *, cores=8, num_devices=1, callbacks=(), state_mib=1.0, **options) -> bool:
    callback = SpectralRankCallback(dirpath=str(path), **options)
    run = trainer(path, [callback, *callbacks], enable_checkpointing=True)
    run.state.fn = "fit"
    host = host_of(run, Module(), dirpath=None, run_id=None)
    host.num_local_processes = num_devices
    stand_in = SimpleNamespace(device=torch.device("cpu"), state_mib=state_mib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda pid: range(cores), raising=False)
        patch.setattr("torch.get_num_threads", lambda: 4)
        return solves_beside(callback.measurement, stand_in, host)


def test_the_default_needs_a_free_core_memory_and_nobody_who_waits(tmp_path):
    assert decision(tmp_path)
    assert not decision(tmp_path, cores=7)
    assert decision(tmp_path, cores=7, background=True)
    assert not decision(tmp_path, background=False)
    assert not decision(tmp_path, on_nonfinite="raise")
    assert not decision(tmp_path, callbacks=[ModelCheckpoint(monitor="spectral/hard_rank.pooled")])
    assert not decision(tmp_path, memory_limit_mib=1.5)
    assert decision(tmp_path, memory_limit_mib=2.5)
    assert not decision(tmp_path, num_devices=2)
    assert decision(tmp_path, cores=16, num_devices=2)


def test_with_other_ranks_results_wait_for_all_of_them_and_an_error_waits_for_none():
    published, solver = [], BackgroundSolver(alone=False)
    done = threading.Event()

    def solve():
        done.set()
        return [1]

    def publish(owned):
        published.extend(owned)
        return {}

    solver.submit(solve, publish)
    assert done.wait(10)
    assert solver.poll() == {}
    assert published == []
    solver.drain()
    assert published == [1]
    assert solver.drain_after_error()
    solver.submit(solve, publish)
    assert not solver.drain_after_error()
    solver.close()
    assert published == [1]


@pytest.mark.parametrize("background", [True, False])
def test_the_second_window_counts_as_memory(tmp_path, background):
    state_mib = 2 * 2 * 4 * packed_size(64) / 2**20  # two layers of fp32 strips, two groups of sequences
    options = {"dirpath": str(tmp_path), "background": background, "memory_limit_mib": 1.5 * state_mib}
    run = trainer(tmp_path, [SpectralRankCallback(**options)], max_steps=1)
    run.fit(Module(intermediate_size=64), loader())
    waiting = [record.layer for record in read_spectral(tmp_path).records if record.status == "not_in_turn"]
    assert waiting == ([1] if background else [])  # room for two windows' states of one layer only


@pytest.mark.parametrize("how", ["poll", "drain", "close"])
def test_of_two_observers_of_a_folder_the_window_that_ended_first_is_published_first(how):
    """Whose solve is done first is chance: records of one key, the first of which stays, must not depend on it."""
    queue, published, may_end = [], [], threading.Event()
    first, second = BackgroundSolver(), BackgroundSolver()

    def slow():
        may_end.wait(30)
        return ["first"]

    def publish(result):
        published.extend(result)
        return dict.fromkeys(result, 1.0)

    first.submit(slow, publish, queue)
    second.submit(lambda: ["second"], publish, queue)
    while not second._pending[0].done():
        time.sleep(0.01)
    assert second.poll() == {}
    may_end.set()
    if how == "poll":
        while not first._pending[0].done():
            time.sleep(0.01)
        assert second.poll() == {}  # not its turn
        assert first.poll() == {"first": 1.0}
        assert second.poll() == {"second": 1.0}
    elif how == "drain":
        assert second.drain() == {"second": 1.0}
        assert first.drain() == {"first": 1.0}  # what was published in its turn is told by itself
    else:
        second.close()
    first.close()
    second.close()
    assert published == ["first", "second"]
    assert queue == []
