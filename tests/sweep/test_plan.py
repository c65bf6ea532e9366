from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.cli import sweep as sweep_verb
from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep import launchers as sweep_launchers
from lightning_spectral.sweep import plan as sweep
from lightning_spectral.sweep import run as sweep_run
from lightning_spectral.sweep import screen as sweep_screen
from lightning_spectral.sweep.monitor import SweepMonitor, _digest
from lightning_spectral.sweep.plan import Job, Plan, State
from lightning_spectral.sweep.run import SweepProgress
from lightning_spectral.training import recipe as recipes
from lightning_spectral.training.recipe import RecipeError

BLOCK = """
sweep:
  axes:
    optimizer:
      Plain: {optimizer.init_args.lr: 3e-3}
      Dion 1/16: {optimizer.init_args.lr: 0.03}
    architecture.ffn_multiplier: [1, 2]
    seed: [0, 1]
  also:
    - optimizer: {Plain lr x3: {optimizer.init_args.lr: 9e-3}}
      architecture.ffn_multiplier: [1]
      seed: [0]
"""
RECIPE = """
model_name: tiny
model_config: {block_size: 32, n_layer: 1, n_head: 1, n_embd: 8}
architecture: {ffn_multiplier: 1}
out_dir: OUT
data: StateOfTheUnion
train: {global_batch_size: 2, micro_batch_size: 2, max_steps: 2, max_seq_length: 16, lr_warmup_steps: 1}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}
callbacks:
  - class_path: lightning_spectral.callbacks.TailTokenProbe
    init_args: {"on": [validation]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")) + BLOCK)
    return path


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a recipe takes most of a second: leave it out where it is not the point."""
    base = recipes.load
    monkeypatch.setattr(sweep, "distinct", lambda *_: [])
    monkeypatch.setattr(recipes, "load", lambda path, overrides=(): _loaded(base, path, overrides))


_CACHE: dict[str, object] = {}


def _loaded(base: Callable[..., object], path: Path, overrides: object) -> object:
    key = f"{Path(path).read_text()}{overrides}"
    if key not in _CACHE:
        _CACHE[key] = base(path, overrides)
    return _CACHE[key]


def test_axes_become_runs_with_stable_ids_and_labels(file: Path) -> None:
    found = sweep.plan(file)
    assert [job.run_id for job in found.jobs][:3] == [
        "optimizer-Plain_ffn_multiplier-1_seed-0",
        "optimizer-Plain_ffn_multiplier-1_seed-1",
        "optimizer-Plain_ffn_multiplier-2_seed-0",
    ]
    assert len(found.jobs) == 2 * 2 * 2 + 1
    job = found.jobs[4]
    assert job.labels == {"optimizer": "Dion 1/16", "ffn_multiplier": "1", "seed": "0"}
    _, recipe = sweep.load_job(sweep.write_json(Path(job.folder) / "job.json", asdict(job)))
    assert recipe.content["optimizer"]["init_args"]["lr"] == 0.03
    assert recipe.content["seed"] == 0
    probe, monitor = recipe.content["callbacks"]
    assert probe["init_args"]["labels"] == job.labels
    assert probe["init_args"]["run_id"] == job.run_id
    assert monitor["class_path"].endswith("SweepMonitor")
    assert recipe.content["resume"] == "auto"
    assert str(recipe.out_dir) == job.folder


@pytest.mark.usefixtures("unchecked")
def test_axes_on_the_command_line_replace_those_of_the_recipe(file: Path) -> None:
    found = sweep.plan(file, axes=["optimizer=Plain", "seed=5,6,7"])
    assert len(found.jobs) == 1 * 2 * 3
    assert found.jobs[0].overrides["optimizer.init_args.lr"] == 3e-3
    assert {job.labels["seed"] for job in found.jobs} == {"5", "6", "7"}
    added = sweep.plan(file, axes=["model_config.n_head=1,2"])
    assert len(added.jobs) == 2 * 2 * 2 * 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["seed"], "--axis `seed`: write `key=a,b,c`"),
        (["optimizer=Sophia"], "axis `optimizer` has no `Sophia`; it has Plain, Dion 1/16"),
        (["seed=0,0"], "two runs of the sweep have the id"),
    ],
)
def test_axes_that_cannot_be_read(file: Path, axes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep.plan(file, axes=axes)


def test_a_wrong_key_is_found_before_anything_runs(file: Path) -> None:
    with pytest.raises(RecipeError, match="max_stepz"):
        sweep.plan(file, axes=["train.max_stepz=1,2"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.split("sweep:")[0], "nothing varies"),
        (lambda text: text.split("sweep:")[0] + "sweep: {grid: {}}", "`sweep:` in"),
        (lambda text: text.split("sweep:")[0] + "sweep: {axes: {seed: 3}}", "axis `seed` is 3"),
        (lambda text: text.split("sweep:")[0] + "sweep: {axes: {o: {A: 3}}}", "each label needs a mapping"),
        (lambda text: text.split("callbacks:")[0] + "sweep: {axes: {seed: [1]}}", "measures nothing"),
    ],
)
def test_blocks_that_cannot_be_read(file: Path, change: Callable[[str], str], message: str) -> None:
    file.write_text(change(file.read_text()))
    with pytest.raises(RecipeError, match=message):
        sweep.plan(file)


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text(max_size=12), min_size=1))
def test_run_ids_are_folder_names(labels: dict[str, str]) -> None:
    name = sweep.run_id_of(labels)
    assert name == sweep.run_id_of(dict(labels))
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_")


@pytest.mark.usefixtures("unchecked")
def test_states_of_a_run_folder(file: Path) -> None:
    job = sweep.plan(file).jobs[0]
    assert sweep.state_of(job) == State("new")
    Path(job.folder).mkdir(parents=True)
    assert sweep.state_of(job) == State("interrupted")
    sweep.write_state(job, "failed", "out of memory")
    assert sweep.state_of(job) == State("failed", "out of memory")
    sweep.write_state(job, "finished")
    assert sweep.plan(file).states[job.run_id].name == "finished"
    assert job.run_id not in {left.run_id for left in sweep.plan(file).to_do()}
    file.write_text(file.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert sweep.plan(file).states[job.run_id].name == "changed"
    state = sweep.plan(file).states[job.run_id]
    assert state.detail == "train.max_steps: 2 -> 3"
    again = sweep.plan(file, rerun_changed=True)
    assert again.states[job.run_id].name == "new"
    assert again.jobs[0].overrides["resume"] is False  # not on from the checkpoint of another recipe
    (Path(job.folder) / sweep.STATE_FILE).write_text('{"state": "fini')
    assert sweep.plan(file).states[job.run_id].name == "interrupted"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("state", ["running", "failed"])
def test_an_interrupted_run_is_compared_with_what_it_was_started_as(file: Path, state: str) -> None:
    job = sweep.plan(file).jobs[0]
    sweep.write_state(job, state, "killed")
    new = ["--optimizer.init_args.betas", "[0.5, 0.9]"]
    # nothing is trained yet: a mistake in the recipe may be put right
    assert sweep.plan(file, overrides=new).states[job.run_id].name == "new"
    (Path(job.folder) / "checkpoints" / "step-00000076.ckpt").mkdir(parents=True)
    assert sweep.plan(file).states[job.run_id].name == ("interrupted" if state == "running" else "failed")
    changed = sweep.plan(file, overrides=new).states[job.run_id]
    assert changed.name == "changed"
    assert "overrides.optimizer.init_args.betas" in changed.detail
    accepted = sweep.plan(file, overrides=new, accept_changes=True)
    assert accepted.states[job.run_id].name == "interrupted"
    assert accepted.jobs[0].accept_changes
    assert accepted.jobs[0].overrides["resume"] == "auto"


def test_how_a_worker_ended_names_the_signal() -> None:
    assert sweep_run.how_it_ended(1) == "exit code 1"
    assert sweep_run.how_it_ended(-9) == "signal SIGKILL: the system often kills for want of memory"
    assert sweep_run.how_it_ended(137) == sweep_run.how_it_ended(-9)
    assert sweep_run.how_it_ended(255) == "exit code 255"


class PretendLauncher:
    """Runs take two polls; ids with `seed-1` fail, and no more than the slots run at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = [f"s{k}" for k in range(slots)]
        self.most = 0
        self.running: dict[str, int] = {}
        self.stopped: list[str] = []
        self.starts: list[str] = []
        self.kills: dict[str, int] = {}

    def start(self, job: Job, slot: str) -> Job:
        self.starts.append(job.run_id)
        self.running[job.run_id] = 2
        self.most = max(self.most, len(self.running))
        return job

    def poll(self, handle: Job) -> int | None:
        self.running[handle.run_id] -= 1
        if self.running[handle.run_id]:
            return None
        del self.running[handle.run_id]
        if "seed-1" in handle.run_id:
            (Path(handle.folder)).mkdir(parents=True, exist_ok=True)
            (Path(handle.folder) / sweep_launchers.LOG_FILE).write_text("Traceback\nKilled by the kernel\n")
            return 137
        if self.kills.get(handle.run_id, 0):
            self.kills[handle.run_id] -= 1
            return -9
        progress = {
            "cpu_s": 10.0,
            "step": 2,
            "num_steps": 2,
            "losses": {"train": 1.5},
            "data": {"train": "aa", "validation": "bb"},
        }
        sweep.write_json(Path(handle.folder) / PROGRESS_FILE, progress)
        sweep.write_state(handle, "finished")
        return 0

    def stop(self, handle: Job) -> None:
        self.stopped.append(handle.run_id)


@pytest.fixture
def found(file: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(sweep_run, "prepare", lambda job: None)
    return sweep.plan(file)


def test_failures_are_reported_and_do_not_stop_the_rest(found: Plan, file: Path) -> None:
    screen = io.StringIO()
    launcher = PretendLauncher(2)
    board = sweep_run.run_all(found, launcher, sweep_screen.ProgressDisplay(screen), poll_s=0)
    assert launcher.most == 2
    assert len(board.done) == 5
    assert len(board.failed) == 4
    assert set(board.failed.values()) == {
        "the worker ended with signal SIGKILL: the system often kills for want of memory: Killed by the kernel"
    }
    assert "5 of 9 runs finished (0 before), 0 running, 0 waiting, 4 failed" in screen.getvalue()
    assert sweep.same_data(found) == {"train": ["aa"], "validation": ["bb"]}
    summary = json.loads((found.out_dir / sweep.SWEEP_FILE).read_text())
    assert [run["state"] for run in summary["runs"]].count("finished") == 5
    assert summary["cpu_s"] == 50.0
    # again: only what failed is tried
    again = sweep.plan(file)
    assert {job.run_id for job in again.to_do()} == set(board.failed)
    assert sweep_run.run_all(again, PretendLauncher(1), lambda board: None, poll_s=0).skipped == 5


@pytest.mark.parametrize(("kills", "outcome"), [(1, "done"), (2, "done"), (3, "failed")])
def test_a_run_whose_worker_is_killed_is_taken_up_again_twice(found: Plan, kills: int, outcome: str) -> None:
    launcher, killed = PretendLauncher(2), found.jobs[0].run_id
    launcher.kills[killed] = kills
    board = sweep_run.run_all(found, launcher, lambda board: None, poll_s=0)
    assert launcher.starts.count(killed) == min(kills, 2) + 1
    assert killed in getattr(board, outcome)
    assert launcher.starts.count(found.jobs[-1].run_id) == 1 or "seed-1" in found.jobs[-1].run_id


def test_an_interrupt_stops_the_workers(found: Plan) -> None:
    launcher = PretendLauncher(2)

    def show(board: sweep_run.SweepProgress) -> None:
        if board.running:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_run.run_all(found, launcher, show, poll_s=0)
    assert launcher.stopped == [job.run_id for job in found.jobs[:2]]


def test_different_data_show(found: Plan) -> None:
    for k, job in enumerate(found.jobs[:2]):
        sweep.write_json(Path(job.folder) / PROGRESS_FILE, {"data": {"train": f"d{k}", "validation": "v"}})
        sweep.write_state(job, "finished")
    assert sweep.same_data(found) == {"train": ["d0", "d1"], "validation": ["v"]}
    assert [job.labels["seed"] for job in found.jobs[:2]] == ["0", "1"]
    assert sweep.one_digest_a_seed(sweep.seen_data(found)["train"])
    job = found.jobs[2]  # of seed 0 again
    sweep.write_json(Path(job.folder) / PROGRESS_FILE, {"data": {"train": "d2", "validation": "v"}})
    sweep.write_state(job, "finished")
    assert not sweep.one_digest_a_seed(sweep.seen_data(found)["train"])


def test_what_is_said_of_the_data_is_of_the_runs_that_ended(
    found: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_run, "run_all", lambda *args: SweepProgress(9, 2))
    for k, job in enumerate(found.jobs[:2]):
        sweep.write_json(Path(job.folder) / PROGRESS_FILE, {"data": {"train": f"d{k}", "validation": "v"}})
        sweep.write_state(job, "finished")
    sweep_verb._run(found, PretendLauncher(1))
    out = capsys.readouterr().out
    assert "train data: the same in the 2 of 9 runs that have ended for each seed (2 seeds)" in out
    assert "validation data: the same in the 2 of 9 runs that have ended (v)" in out


def test_the_table_counts_down(found: Plan) -> None:
    job = found.jobs[0]
    run = sweep_run.Running(job, "s0", None, time.monotonic() - 10.0, 0)
    board = sweep_run.SweepProgress(9, 1, {"x": 40.0}, {}, [run], list(found.jobs[1:3]))
    assert sweep_screen.left_of(run) is None
    sweep.write_json(Path(job.folder) / PROGRESS_FILE, {"step": 25, "num_steps": 100, "losses": {"train": 2.0}})
    assert sweep_screen.left_of(run) == pytest.approx(30.0, rel=0.05)  # 10 s for a quarter
    assert sweep_screen.remaining(board) == pytest.approx(30.0 + 2 * 40.0, rel=0.05)
    lines = sweep_screen.table(board)
    assert "2 of 9 runs finished (1 before), 1 running, 2 waiting, 0 failed" in lines[0]
    assert "25/100" in lines[1]
    assert "train 2.000" in lines[1]
    assert [sweep_screen.duration(s) for s in (75, 3675, None)] == ["1:15", "1:01:15", "?"]


def test_local_workers_have_one_thread_or_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = sweep_launchers.LocalLauncher(3, gpus=[])
    assert len(cpu.slots) == 3
    assert cpu.environment(cpu.slots[0])["OMP_NUM_THREADS"] == "1"
    gpu = sweep_launchers.LocalLauncher(None, gpus=["0", "1"])
    assert [gpu.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in gpu.slots] == ["0", "1"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    shared = sweep_launchers.LocalLauncher(5, gpus=["0"])
    assert {shared.environment(slot)["OMP_NUM_THREADS"] for slot in shared.slots} == {"3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert shared.environment(shared.slots[0])["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert sweep_launchers.visible_gpus() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep_launchers.visible_gpus() == []


def say_and_end(argv: Sequence[str]) -> int:
    print(Path(argv[0]).name, argv[1:])
    print({name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OF_THE_COMMAND")})
    return 3


@pytest.mark.parametrize("gpus", [[], ["1"]], ids=["forked", "spawned"])
def test_a_local_worker_is_a_process_with_a_log(found: Plan, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OF_THE_COMMAND", "x")
    job = found.jobs[0]
    Path(job.folder).mkdir(parents=True)
    launcher = sweep_launchers.LocalLauncher(1, gpus=gpus, work=say_and_end)
    handle = launcher.start(job, launcher.slots[0], "--prepare")
    handle.join(timeout=60)
    assert launcher.poll(handle) == 3
    one_gpu, one_thread = ("1", str(len(os.sched_getaffinity(0)))) if gpus else (None, "1")
    limits = {"CUDA_VISIBLE_DEVICES": one_gpu, "OMP_NUM_THREADS": one_thread, "OF_THE_COMMAND": "x"}
    said = (Path(job.folder) / sweep_launchers.LOG_FILE).read_text()
    assert said == f"{sweep.JOB_FILE} ['--prepare']\n{limits}\n"


def hang_with_a_child(argv: Sequence[str]) -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    return child.wait()


def pid_in(log: Path) -> int:
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(log.read_text())


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_a_stopped_worker_takes_its_children_along(found: Plan) -> None:
    job = found.jobs[0]
    Path(job.folder).mkdir(parents=True)
    launcher = sweep_launchers.LocalLauncher(1, gpus=[], work=hang_with_a_child)
    endless = launcher.start(job, launcher.slots[0])
    child = pid_in(Path(job.folder) / sweep_launchers.LOG_FILE)
    assert launcher.poll(endless) is None
    assert is_running(child)
    launcher.stop(endless)
    assert launcher.poll(endless) == -15
    assert not is_running(child)


def start_and_be_killed(job: Job) -> None:
    launcher = sweep_launchers.LocalLauncher(1, gpus=[], work=hang_with_a_child)
    launcher.start(job, launcher.slots[0]).join()


def test_no_worker_outlives_its_sweep(found: Plan) -> None:
    job = found.jobs[0]
    Path(job.folder).mkdir(parents=True)
    killed = multiprocessing.get_context("spawn").Process(target=start_and_be_killed, args=(job,))
    killed.start()
    child = pid_in(Path(job.folder) / sweep_launchers.LOG_FILE)
    killed.kill()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-spectral\[ray\]'"):
        sweep_launchers.RayLauncher(1)


def test_the_digest_knows_order_and_survives_a_resume(tmp_path: Path) -> None:
    batches = [torch.arange(6).reshape(2, 3) + k for k in range(4)]

    def after(order: list[int], monitor: SweepMonitor | None = None) -> SweepMonitor:
        monitor = monitor or SweepMonitor(str(tmp_path / "p.json"))
        for k in order:
            monitor.on_train_batch_start(None, None, batches[k], 0)  # type: ignore[arg-type]
        return monitor

    whole = after([0, 1, 2, 3]).state_dict()
    assert after([0, 2, 1, 3]).state_dict()["train"] != whole["train"]
    resumed = SweepMonitor(str(tmp_path / "p.json"))
    resumed.load_state_dict(after([0, 1]).state_dict())
    assert after([2, 3], resumed).state_dict() == whole
    assert _digest(batches[0], 0) == _digest((batches[0], batches[1]), 0) == _digest({"input_ids": batches[0]}, 0)
    assert _digest(object(), 0) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_sweep_runs_resumes_and_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_spectral"]
    options = [
        "--out",
        str(tmp_path / "out"),
        "--axis",
        "architecture.ffn_multiplier=1,2,3",
        "--axis",
        "optimizer=AdamW",
    ]
    options += ["--workers", "2", "--train.max_steps", "6", "--eval.interval", "3", "--eval.max_iters", "2"]
    first = subprocess.run([*command, "sweep", "pocket_demo", *options], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 of 3 runs finished (0 before)" in first.stdout
    assert "train data: the same in all runs" in first.stdout
    assert re.search(r"cost: \d+ CPU-seconds in 3 runs", first.stdout)
    again = subprocess.run([*command, "sweep", "pocket_demo", *options], capture_output=True, text=True, check=True)
    assert "3 of 3 runs finished (3 before)" in again.stdout
    report = [*command, "report", str(tmp_path / "out"), "--out", str(tmp_path / "report"), "--last", "1"]
    subprocess.run(report, check=True, capture_output=True)
    assert "AdamW" in (tmp_path / "report" / "report.html").read_text()


def test_what_forked_workers_share_can_be_imported():
    for module in sweep_launchers.PRELOADED:  # the fork server itself passes over a name that is not there
        assert find_spec(module) is not None, module


def test_a_run_that_diverges_is_done_and_not_called_finished(tmp_path: Path) -> None:
    """Its loss is NaN from the second step on; before, the sweep said "done" and nothing else."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")).replace("lr: 1e-3", "lr: 1.0e+30"))
    command = [sys.executable, "-m", "lightning_spectral", "sweep", str(path), "--axis", "seed=0", "--workers", "1"]
    command += ["--train.max_steps", "6"]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert re.search(r"done .* seed-0: diverged, its loss is no number", first.stdout)
    assert "1 of 1 runs finished (0 before), 0 running, 0 waiting, 0 failed, 1 diverged" in first.stdout
    assert "1 of 1 runs finished (1 before), 0 running, 0 waiting, 0 failed, 1 diverged" in again.stdout
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"][0]["state"] == "diverged"
    losses = sweep.read_json(tmp_path / "out" / "seed-0" / PROGRESS_FILE)["losses"]
    assert losses["train"] is None


def test_the_smoke_form_is_the_same_sweep_made_small(tmp_path):
    _, _, common, grids = sweep.read("paper/160m", smoke=True, overrides=["--train.max_steps", "3"])
    assert [[label for label, _ in axis.values] for axis in grids[0]] == [["AdamW", "Muon"], ["1", "2", "4"]]
    assert (common["model_config.n_embd"], common["train.max_steps"]) == (32, 3)  # the command line has the last word


def test_a_recipe_takes_labels_of_its_bases_axis():
    _, _, _, grids = sweep.read("paper/heads")
    optimizers = dict(grids[0][0].values)
    assert list(optimizers) == ["AdamW", "Muon", "NorMuon", "Dion 1/2", "Dion 1/16"]
    assert optimizers["Dion 1/16"]["optimizer.init_args"]["rank_fraction"] == 0.0625


@pytest.mark.parametrize(
    "name", ["160m", "350m", "dion_rank", "matched_loss", "heads", "positions", "post_norm", "learning_rate", "renyi"]
)
def test_every_family_of_the_paper_has_a_sweep_and_a_smoke_form(name, tmp_path):
    _, _, _, whole = sweep.read(f"paper/{name}")
    _, _, _, small = sweep.read(f"paper/{name}", smoke=True)
    assert len(small[0]) == len(whole[0])
    widths = next(axis for axis in small[0] if axis.name == "architecture.ffn_multiplier")
    assert len(widths.values) == 3  # a slope needs three
    found = sweep.plan(f"paper/{name}", smoke=True, out_dir=tmp_path / "out")  # every value of every axis is tried out
    assert all(job.overrides["train.max_steps"] <= 24 for job in found.jobs)


def test_a_smoke_block_may_set_what_an_axis_sets():
    _, _, _, grids = sweep.read("paper/matched_loss", smoke=True)
    steps = {label: own.get("train.max_steps") for label, own in grids[0][0].values}
    assert steps == {"AdamW 6K": 12, "AdamW 12K": 24, "Dion 1/16": None}


def test_a_smoke_block_that_keeps_what_is_not_there_is_named(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("base: paper/160m\nsmoke: {axes: {optimizer: [Adam]}}\n")
    with pytest.raises(RecipeError, match=r"`smoke.axes.optimizer` keeps `Adam`; the axis has AdamW, Muon"):
        sweep.read(file, smoke=True)
    with pytest.raises(RecipeError, match=r"has no `smoke:` block"):
        sweep.read("quickstart", axes=["seed=0,1"], smoke=True)
