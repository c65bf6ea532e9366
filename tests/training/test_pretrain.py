"""A recipe, run: what it leaves, how it resumes, what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_spectral import records
from lightning_spectral.gpt.export import load_final
from lightning_spectral.gpt.module import LitGPT
from lightning_spectral.probe.run_lock import RunLock
from lightning_spectral.training import checkpoints
from lightning_spectral.training.pretrain import TRAINING_LOCK, RunResult, pretrain
from lightning_spectral.training.recipe import RecipeError, load
from tests.tiny import LIGHTNING_WARNINGS, tiny_tree, write_recipe

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

PROBES = [
    {"class_path": "lightning_spectral.SpectralRankCallback", "init_args": {"every_n_steps": 3}},
    {"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"every_n_steps": 3}},
]


def _run(folder: Path, out: str = "run", accept_changes: bool = False, **changes: Any) -> RunResult:
    overrides = {"out_dir": str(folder / out), **{key.replace("__", "."): value for key, value in changes.items()}}
    return pretrain(load(write_recipe(folder), overrides), progress_bar=False, accept_changes=accept_changes)


def _weights(outcome: RunResult) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(outcome.run_folder / "final" / "lit_model.pth", weights_only=True)
    return weights


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class _Stop(Exception):
    pass


# a constant rate: litgpt's own counts in micro-batches, so it depends on them
CONSTANT: dict[str, Any] = {
    "train__lr_warmup_steps": 0,
    "lr_schedule__kind": "constant_linear_decay",
    "lr_schedule__decay_fraction": 1e-6,
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
}


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int, error: type[BaseException] = _Stop) -> None:
    """The ``micro_batch``-th training step of the process fails."""
    step, calls = LitGPT.training_step, [0]

    def failing(self: LitGPT, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == micro_batch:
            raise error
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "training_step", failing)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    outcome = _run(tmp_path, callbacks=PROBES)
    folder = outcome.run_folder
    assert (outcome.step, outcome.tokens, outcome.already_done) == (12, 12 * 4 * 16, False)
    assert outcome.val_loss is not None
    assert outcome.unigram_entropy is not None
    assert {r.bucket for r in records.read_spectral(folder).records} == {"pooled", "head", "mid", "tail"}
    assert {r.step for r in records.read_losses(folder).records} == {0, 3, 6, 9, 11}
    assert records.read_run(folder).hparams["train"]["max_steps"] == 12  # the whole recipe
    assert yaml.safe_load((folder / "hyperparameters.yaml").read_text())["model_name"] == "tiny"
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000008.ckpt", "step-00000012.ckpt"]
    header = (folder / "logs" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "learning_rate", "val_loss"} <= set(header)


def test_litgpt_loads_the_final_model(tmp_path: Path) -> None:
    from litgpt import LLM

    outcome = _run(tmp_path)
    llm = LLM.load(outcome.run_folder / "final", distribute="auto")
    # litgpt loads in bfloat16
    rounded = {name: value.to(torch.bfloat16) for name, value in _weights(outcome).items()}
    assert _same(rounded, llm.model.state_dict())
    assert llm.preprocessor.tokenizer.vocab_size == 300


def test_a_model_that_litgpt_cannot_build_is_refused_by_it_and_loaded_by_us(tmp_path: Path) -> None:
    from litgpt.config import Config

    outcome = _run(tmp_path, architecture__activation="relu2")
    with pytest.raises(TypeError, match=r"architecture"):
        Config.from_file(outcome.run_folder / "final" / "model_config.yaml")
    model = load_final(outcome.run_folder / "final")
    assert model.transformer.h[0].mlp.activation == "relu2"
    assert _same(_weights(outcome), model.state_dict())


def test_the_probes_change_no_weight(tmp_path: Path) -> None:
    assert _same(_weights(_run(tmp_path, "bare")), _weights(_run(tmp_path, "watched", callbacks=PROBES)))


@pytest.mark.parametrize(("at", "micro_batch_size"), [(1, 4), (7, 4), (6, 2), (15, 2)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, micro_batch_size: int
) -> None:
    changes = {"train__micro_batch_size": micro_batch_size, "callbacks": PROBES}
    whole = _run(tmp_path, "whole", **changes)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, at)
        with pytest.raises(_Stop):
            _run(tmp_path, "cut", **changes)
    resumed = _run(tmp_path, "cut", resume="auto", **changes)
    assert resumed.step == 12
    assert _same(_weights(whole), _weights(resumed))
    keys = [(r.step, r.layer, r.site, r.bucket) for r in records.read_spectral(resumed.run_folder).records]
    assert len(keys) == len(set(keys))
    assert set(keys) == {(r.step, r.layer, r.site, r.bucket) for r in records.read_spectral(whole.run_folder).records}


@pytest.mark.parametrize(("before", "after", "at"), [(4, 2, 7), (2, 4, 15), (2, 1, 6), (1, 4, 29)])
def test_a_run_goes_on_in_mid_epoch_with_another_micro_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int, at: int
) -> None:
    changes = {"callbacks": PROBES, **CONSTANT}
    whole = _run(tmp_path, "whole", **changes)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, at)
        with pytest.raises(_Stop):
            _run(tmp_path, "cut", train__micro_batch_size=before, **changes)
    resumed = _run(tmp_path, "cut", resume="auto", train__micro_batch_size=after, **changes)
    assert (resumed.step, resumed.tokens) == (12, whole.tokens)
    weights = _weights(resumed)
    for name, value in _weights(whole).items():
        # fp32 sums in another order; a step too many or too few, or other blocks, move weights by 1e-2
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    found = [records.read_spectral(run.run_folder).records for run in (whole, resumed)]
    keys = [[(r.step, r.layer, r.bucket, r.num_tokens, r.tokens_seen) for r in one] for one in found]
    assert sorted(keys[0]) == sorted(keys[1])


def test_a_run_killed_in_its_last_validation_still_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {**PROBES[1], "init_args": {**PROBES[1]["init_args"], "on": ["validation"]}}
    whole = _run(tmp_path, "whole", callbacks=[probe])
    validation_step = LitGPT.validation_step

    def stop(self: LitGPT, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 12:
            raise _Stop
        validation_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitGPT, "validation_step", stop)
        with pytest.raises(_Stop):
            _run(tmp_path, "cut", callbacks=[probe])
    resumed = _run(tmp_path, "cut", resume="auto", callbacks=[probe])
    assert resumed.val_loss == whole.val_loss
    steps = [(r.stage, r.step, r.bucket, r.hard_rank) for r in records.read_spectral(whole.run_folder).records]
    assert steps[-1][:2] == ("validation", 12)
    assert steps == [
        (r.stage, r.step, r.bucket, r.hard_rank) for r in records.read_spectral(resumed.run_folder).records
    ]


def test_an_interruption_saves_the_last_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_at(monkeypatch, 12)  # the 2nd of 2 micro-batches of the 6th step
    with pytest.raises(_Stop):
        _run(tmp_path, train__micro_batch_size=2)
    assert checkpoints.newest_whole(tmp_path / "run") == checkpoints.checkpoint_path(tmp_path / "run", 5)


def test_a_disk_that_cannot_hold_the_run_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000})  # the weights alone are 4 * 17,000 bytes
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RecipeError, match=r"has 0\.0 MiB free; .* take 0\.1: free some"):
        _run(tmp_path)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    usage.free = 400_000
    with pytest.warns(UserWarning, match="has 0.4 MiB free; checkpoints and final weights take up to"):
        assert _run(tmp_path).step == 12


@pytest.mark.filterwarnings("ignore:could not save a checkpoint")
def test_a_checkpoint_that_cannot_be_written_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after the failure, nor, of a process that died while it saved, once the run goes on."""
    save = pl.Trainer.save_checkpoint

    def full(trainer: pl.Trainer, path: Path, *args: Any, **options: Any) -> None:
        save(trainer, path, *args, **options)
        if trainer.global_step == 8:
            raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space"):
            _run(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004.ckpt"]
    (folder / "step-00000006.partial").write_bytes(bytes(1_000))
    assert _run(tmp_path, resume="auto").step == 12
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008.ckpt", "step-00000012.ckpt"]
    (folder / "step-00000006.partial").write_bytes(bytes(1_000))
    assert _run(tmp_path, resume=False).step == 12  # the earlier run is moved to `previous/`, its part is not
    assert not list(tmp_path.rglob("*.partial"))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = _run(tmp_path)
    newest = checkpoints.checkpoint_path(whole.run_folder, 12)
    newest.write_bytes(newest.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=r"step-00000012.ckpt` is incomplete or corrupted and is passed over"):
        resumed = _run(tmp_path, resume="auto")
    assert resumed.step == 12
    assert not resumed.already_done
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    with pytest.raises(
        RecipeError, match=r"`resume` names a checkpoint that cannot be used: `.*torn.ckpt` cannot be read"
    ):
        _run(tmp_path, resume=str(tmp_path / "torn.ckpt"))


def test_a_finished_run_is_left_as_it_is_and_can_be_prolonged(tmp_path: Path) -> None:
    recipe = {"lr_schedule__kind": "constant_linear_decay"}
    first = _run(tmp_path, **recipe)
    before = (first.run_folder / "final" / "lit_model.pth").stat().st_mtime_ns
    assert _run(tmp_path, resume="auto", **recipe).already_done
    assert (first.run_folder / "final" / "lit_model.pth").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"another recipe \(train.max_steps: 12 -> 15\): give it another `out_dir`"):
        _run(tmp_path, resume="auto", **recipe, train__max_steps=15)
    longer = _run(tmp_path, resume="auto", accept_changes=True, **recipe, train__max_steps=15)
    assert (longer.step, longer.already_done) == (15, False)


def test_an_interrupted_run_does_not_go_on_under_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 9)
        with pytest.raises(_Stop):
            _run(tmp_path, callbacks=PROBES)
    assert records.read_run(tmp_path / "run").finished is None
    kept = (tmp_path / "run" / "hyperparameters.yaml").read_bytes()
    with pytest.raises(
        RecipeError,
        match=r"optimizer.init_args.lr: .* -> 0.1.*seed: 7 -> 8|seed: 7 -> 8.*optimizer.init_args.lr: .* -> 0.1",
    ):
        _run(tmp_path, resume="auto", callbacks=PROBES, seed=8, optimizer__init_args__lr=0.1)
    assert (tmp_path / "run" / "hyperparameters.yaml").read_bytes() == kept
    with monkeypatch.context() as patch:
        patch.setattr("lightning_spectral.training.same_recipe.package_versions", lambda: {"lightning-spectral": "9"})
        with pytest.raises(RecipeError, match=r"lightning-spectral itself: \S+ -> 9\)"):
            _run(tmp_path, resume="auto", callbacks=PROBES)
    whole = _run(tmp_path, resume="auto", callbacks=PROBES, train__max_time=1e6)  # does not change what is computed
    info = records.read_run(whole.run_folder)
    assert (info.finished, info.last_step) == (True, 12)


def test_resume_true_and_a_path(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`resume: true`, but `.*checkpoints` holds no whole checkpoint"):
        _run(tmp_path, resume=True)
    whole = _run(tmp_path)
    path = checkpoints.checkpoint_path(whole.run_folder, 8)
    assert _same(_weights(whole), _weights(_run(tmp_path, "other", resume=str(path))))
    with pytest.raises(RecipeError, match=r"`resume` names `.*nowhere.ckpt`, which does not exist"):
        _run(tmp_path, resume=str(tmp_path / "nowhere.ckpt"))


def test_a_fresh_run_in_a_used_folder_keeps_the_old_one(tmp_path: Path) -> None:
    first = _run(tmp_path, callbacks=PROBES)
    run_id = records.read_run(first.run_folder).run_id
    old = (first.run_folder / "spectral.jsonl").read_bytes()
    _run(tmp_path, callbacks=PROBES, seed=8)
    assert (first.run_folder / "previous" / run_id / "spectral.jsonl").read_bytes() == old
    assert (first.run_folder / "previous" / run_id / "final" / "lit_model.pth").is_file()
    assert len({r.run_id for r in records.read_spectral(first.run_folder).records}) == 1


def test_micro_batches_do_not_matter(tmp_path: Path) -> None:
    one, two = _run(tmp_path, "one", **CONSTANT), _run(tmp_path, "two", train__micro_batch_size=1, **CONSTANT)
    for name, value in _weights(one).items():
        # fp32 sums of 64 tokens in another order, over 12 steps
        torch.testing.assert_close(value, _weights(two)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train__max_steps": None, "train__max_tokens": 5 * 64 + 63}, 5),
        ({"train__max_steps": 3, "train__max_tokens": 10_000}, 3),
    ],
)
def test_the_end_of_a_run(tmp_path: Path, changes: dict[str, Any], steps: int) -> None:
    assert _run(tmp_path, **changes).step == steps


def test_epochs(tmp_path: Path) -> None:
    from lightning_spectral.data.modules import TextFiles

    init_args = tiny_tree(tmp_path)["data"]["init_args"]
    data = TextFiles(init_args["path"], vocab_size=300, cache_dir=Path(init_args["cache_dir"]))
    data.connect(max_seq_length=16)
    outcome = _run(tmp_path, train__max_steps=None, train__epochs=1, train__global_batch_size=32)
    assert outcome.step == data.num_train_blocks // 4 * 4 // 32


def test_litgpts_initial_checkpoint(tmp_path: Path) -> None:
    first = _run(tmp_path)
    again = _run(
        tmp_path,
        "second",
        initial_checkpoint_dir=str(first.run_folder / "final"),
        optimizer__init_args__lr=0.0,
        train__min_lr=0.0,
        optimizer__init_args__weight_decay=0.0,
    )
    assert _same(_weights(first), _weights(again))


def test_another_data_module_in_litgpts_form(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["data"] = {"class_path": "tests.training.foreign_data.RandomTokens", "init_args": {"vocab_size": 40}}
    tree["model_config"]["padded_vocab_size"] = 40
    tree["train"].update(max_steps=10, save_interval=5)
    recipe = load(write_recipe(tmp_path, tree))
    outcome = pretrain(recipe, progress_bar=False)
    assert (outcome.step, outcome.unigram_entropy) == (10, None)


def test_our_optimizer_trains(tmp_path: Path) -> None:
    muon = {"class_path": "lightning_spectral.optim.Muon", "init_args": {"lr": 0.02}}
    before, after = _run(tmp_path, "none", train__max_steps=1), _run(tmp_path, "muon", optimizer=muon)
    assert after.val_loss is not None
    assert before.val_loss is not None
    assert after.val_loss < before.val_loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__global_batch_size": 6}, r"`train.global_batch_size` 6 is no multiple of 1 device\(s\) \* .* 4 = 4"),
        ({"train__max_seq_length": 64}, r"`train.max_seq_length` is 64, the model's `block_size` is 32"),
        ({"train__max_steps": None, "train__max_tokens": 63}, r"the run has no whole optimizer step"),
        (
            {"model_config__padded_vocab_size": 200},
            r"the tokenizer has 300 ids, the model's `padded_vocab_size` is 200",
        ),
        ({"model_config__n_head": 3}, r"litgpt refuses the `model_config`: n_embd must be a multiple of n_head"),
        (
            {"model_config__intermediate_size": 40, "architecture__ffn_multiplier": 2},
            r"two FFN widths: `model_config.intermediate_size` is 40, `architecture.ffn_multiplier` gives 32",
        ),
        ({"data": "nowhere.txt"}, r"no text at `nowhere.txt`"),
        ({"tokenizer_dir": "nowhere"}, r"`tokenizer_dir` names `nowhere`, which does not exist"),
        ({"strategy": "dpp"}, r"dpp"),
        ({"accelerator": "abacus"}, r"abacus"),
        (
            {"callbacks": [{"class_path": "SpectralRankCallback", "init_args": {"every_n_steps": 0}}]},
            r"^`callbacks`: SpectralRankCallback: `every_n_steps` must be an integer >= 1, got 0\.$",
        ),
        (
            {"callbacks": [{"class_path": "SpectralRankCallback", "init_args": {"modules": ["*.nothing"]}}]},
            r"\*\.nothing",
        ),
        (
            {"callbacks": [{"class_path": "TailTokenProbe", "init_args": {"counts": "nowhere.npy"}}]},
            r"^`callbacks`: TailTokenProbe: `counts`: no file `nowhere.npy`",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        _run(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"strategy": "dpp"}, {"accelerator": "abacus"}, {"model_config__n_head": 3}])
def test_a_refused_run_leaves_the_earlier_one_in_its_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = _run(tmp_path, callbacks=PROBES)
    with pytest.raises(RecipeError):
        _run(tmp_path, **changes)
    assert (first.run_folder / "spectral.jsonl").is_file()
    assert not (first.run_folder / "previous").exists()


def test_an_error_after_the_first_step_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_at(monkeypatch, 3, ValueError)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the point is that it is not a RecipeError)
        _run(tmp_path)
    assert not isinstance(caught.value, RecipeError)


def test_initial_and_final_validation(tmp_path: Path) -> None:
    validated: list[int] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            validated.append(trainer.global_step)

    with pytest.MonkeyPatch.context() as patch:
        original = pl.Trainer.__init__

        def watched(self: pl.Trainer, *args: Any, **settings: Any) -> None:
            settings["callbacks"] = [*settings["callbacks"], Watch()]
            original(self, *args, **settings)

        patch.setattr(pl.Trainer, "__init__", watched)
        _run(tmp_path, eval__initial_validation=True, eval__interval=5)
    assert validated == [0, 5, 10, 12]


def _command(recipe: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "lightning_spectral", "pretrain", "--config", str(recipe), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_run_that_continues(tmp_path: Path, how: signal.Signals) -> None:
    tree = tiny_tree(tmp_path)
    tree["train"].update(max_steps=400, save_interval=10)
    tree["callbacks"] = PROBES
    recipe = write_recipe(tmp_path, tree)
    process = _command(recipe)
    while not list((tmp_path / "run" / "checkpoints").glob("*.ckpt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    output = process.communicate()[0].decode()
    assert process.returncode in ((-9,) if how is signal.SIGKILL else (143,)), output
    reached = checkpoints.newest_whole(tmp_path / "run")
    assert reached is not None
    assert 0 < (checkpoints.step_of(reached) or 0) < 400
    resumed = _command(recipe, "--resume", "auto")
    output = resumed.communicate()[0].decode()
    assert resumed.returncode == 0, output
    whole = pretrain(load(recipe, {"out_dir": str(tmp_path / "whole")}), progress_bar=False)
    assert _same(_weights(whole), torch.load(tmp_path / "run" / "final" / "lit_model.pth", weights_only=True))
    keys = [r.key for r in records.read_spectral(tmp_path / "run").records]
    assert keys == list(dict.fromkeys(keys))
    assert set(keys) == {r.key for r in records.read_spectral(tmp_path / "whole").records}


def test_a_foreign_checkpoint_given_to_resume_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": {}, "callbacks": Trap()}, tmp_path / "foreign.ckpt")
    with pytest.raises(RecipeError, match=r"foreign.ckpt` holds objects of `\S+`, and reading them could execute"):
        _run(tmp_path, resume=str(tmp_path / "foreign.ckpt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("resume", ["auto", False])
def test_a_live_run_in_the_folder_is_not_disturbed(tmp_path: Path, resume: Any) -> None:
    (tmp_path / "run").mkdir()
    (ready, said), (go, end) = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.write(said, b"1" if RunLock(tmp_path / "run", TRAINING_LOCK).acquire() else b"0")
        os.close(end)
        os.read(go, 1)  # until the parent is done
        os._exit(0)
    assert os.read(ready, 1) == b"1"
    try:
        with pytest.raises(RecipeError, match="another process is training in"):
            _run(tmp_path, resume=resume)
    finally:
        os.close(end)
        os.waitpid(pid, 0)
    assert _run(tmp_path, resume=resume).step == 12  # the lock of a dead process
    assert not (tmp_path / "run" / TRAINING_LOCK).exists()
