"""A series of checkpoints: steps are known or null, one run folder a model, what is done is not done again."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lightning_spectral import cli, read_spectral
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.records import read_losses
from lightning_spectral.training import measure_series as series
from lightning_spectral.training.checkpoint_names import (
    Progress,
    find_checkpoints,
    folders_of,
    progress_of,
    why_no_curve,
)
from lightning_spectral.training.pretrain import run
from lightning_spectral.training.recipe import load
from tests.tiny import LIGHTNING_WARNINGS, tiny_text, tiny_tree, write_recipe

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step1000", 1000, None),
        ("step-00000008", 8, None),
        ("epoch=0-step=100.ckpt", 100, None),
        ("checkpoint-500", 500, None),
        ("global_step12", 12, None),
        ("iter-000100-ckpt.ckpt", 100, None),
        ("stage1-step10000-tokens42B", 10_000, 42 * 10**9),
        ("step5k", 5_000, None),
        ("tokens1.5M", None, 1_500_000),
        ("final", None, None),
        ("pythia-160m", None, None),
        ("main", None, None),
        ("footstep9", None, None),
        ("ckpt_1.5k", 1_500, None),
        ("step100.0", 100, None),
        ("step12-tokens0.1234B", 12, 123_400_000),
        ("checkpoint_500_2024", 500, None),
        ("checkpoint-1_000", None, None),  # one number, or two
        ("step-1,000", None, None),
        ("step1.5", None, None),
        ("step-1.2.3", None, None),
        ("step1e3", None, None),
        ("iteration_300", 300, None),
        ("iterations-300", 300, None),
        ("updates7", 7, None),
        ("revision-step1000", 1000, None),
        ("revision-1000", None, None),  # a version
        ("1000", None, None),  # a width, a seed
        ("steps/1000", 1000, None),
        ("global_step/0000012", 12, None),
        ("iters/final", None, None),
        ("checkpoints/64", None, None),
        ("step3b", None, None),  # no step, or one of another unit: not guessed
    ],
)
def test_the_step_in_a_name(name: str, step: int | None, tokens: int | None) -> None:
    assert progress_of(Path("/nowhere") / name) == Progress(step, tokens)


def test_a_trainers_own_state_comes_before_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 512, "num_input_tokens_seen": 4096}))
    assert progress_of(folder) == Progress(512, 4096)
    (folder / "trainer_state.json").write_text("{")
    assert progress_of(folder) == Progress(500, None)


def test_models_at_several_steps_share_a_folder(tmp_path: Path) -> None:
    names = ["small/step0", "small/step10", "large/step0", "large/step10", "other/main", "other/best"]
    for name in names:
        (tmp_path / "hub" / name).mkdir(parents=True)
        (tmp_path / "hub" / name / "config.json").write_text("{}")
        (tmp_path / "hub" / name / "model.safetensors").write_bytes(b"")
    found = find_checkpoints([str(tmp_path / "hub" / "*" / "step*")])
    assert [str(path.relative_to(tmp_path / "hub")) for path in found] == ["large/step0", "large/step10", *names[:2]]
    every = find_checkpoints([str(tmp_path / "hub")])
    assert len(every) == len(names)
    folders = folders_of(every, Path("out"))
    assert {str(folder): [m.name for m in members] for folder, members in folders.items()} == {
        "out/large": ["step0", "step10"],
        "out/small": ["step0", "step10"],
        "out/other/best": ["best"],
        "out/other/main": ["main"],
    }
    with pytest.raises(FileNotFoundError, match="no checkpoint at `.*/none\\*`: give a litgpt folder"):
        find_checkpoints([str(tmp_path / "none*")])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["revision-1000", "revision-2000", "revision-3000"], "the name `revision-1000` says no step"),
        (["10", "20"], "`ln -s 10 step-1000`"),
        (["step1", "step2", "main"], "the 3 checkpoints in `.*hub` are no curve .* the name `main` says no step"),
        (["a-step1", "b-step1"], "two of them are of the same step.*give each a folder"),
        (["step1", "step2", "step3"], None),
        (["small", "large", "huge"], None),  # models
        (["1000"], None),
    ],
)
def test_what_looks_like_steps_and_is_not_joined_is_said(names: list[str], said: str | None) -> None:
    checkpoints = [Path("/nowhere/hub") / name for name in names]
    sentences = why_no_curve([*checkpoints, Path("/nowhere/other/final")])
    assert len(sentences) == (said is not None)
    assert said is None or re.search(said, sentences[0])
    assert (len(folders_of(checkpoints, Path("out"))) < len(names)) == (names == ["step1", "step2", "step3"])


def test_the_verb_says_so_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("revision-1", "revision-2", "revision-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    (tmp_path / "text.txt").write_text("no more than this")
    words = ["measure", str(tmp_path), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2  # they hold no weights
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"note: the 3 checkpoints in `{tmp_path}` are no curve over steps")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three sizes at three steps each, in Hugging Face's form, and a text."""
    import transformers

    root = tmp_path_factory.mktemp("family")
    trained = run(load(write_recipe(root, tiny_tree(root))), progress_bar=False)
    for size in (16, 32, 48):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=size, intermediate_size=3 * size, num_attention_heads=2, vocab_size=300,
            max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        for step in (0, 100, 1000):
            folder = root / "hub" / f"m{size}" / f"step{step}"
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(trained / "final" / name, folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    (root / "text.txt").write_text(tiny_text(seed=5))
    return root / "hub", root / "text.txt"


def words(hub: Path, text: Path, out: Path) -> list[str]:
    size = ["--tokens", "320", "--seq_length", "16"]
    return ["measure", str(hub / "*" / "step*"), "--data", str(text), "--out", str(out), *size]


def test_one_call_measures_all_and_a_second_one_what_is_new(family, tmp_path, capsys, monkeypatch):
    hub, text = family
    some = tmp_path / "hub"
    shutil.copytree(hub, some)
    shutil.move(some / "m16" / "step1000", tmp_path / "later")
    out = tmp_path / "out"
    assert cli.main(words(some, text, out)) == 0
    assert {r.step for r in read_spectral(out / "m16").records} == {0, 100}
    assert {(r.step, r.stage) for r in read_spectral(out / "m32").records} == {(s, "measure") for s in (0, 100, 1000)}
    assert "m32" in capsys.readouterr().out
    shutil.move(tmp_path / "later", some / "m16" / "step1000")
    calls = []
    measure = series.measure_checkpoint
    monkeypatch.setattr(
        series, "measure_checkpoint", lambda c, *a, **k: (calls.append(Path(c).name), measure(c, *a, **k))
    )
    assert cli.main(words(some, text, out)) == 0
    assert calls == ["step1000"]
    for folder in ("m16", "m32"):
        records = read_spectral(out / folder).records
        assert len({r.key for r in records}) == len(records) == 3 * 2 * 4  # steps, layers, buckets
        assert len({r.run_id for r in records}) == 1
        assert {r.step for r in read_losses(out / folder).records} == {0, 100, 1000}
    assert cli.main([*words(some, text, out)[:-1], "8"]) == 2  # another length of sequences
    assert "give another `--out`" in capsys.readouterr().err


def test_the_laws_of_a_family_come_out_of_its_folders(family, tmp_path, capsys):
    hub, text = family
    out = tmp_path / "out"
    assert cli.main(words(hub, text, out)) == 0
    capsys.readouterr()
    assert cli.main(["fit", *(str(out / f"m{size}") for size in (16, 32, 48)), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["site"], row["bucket"]) for row in rows} >= {("post", "pooled"), ("post", "tail")}


def test_sizes_that_begin_at_other_steps_are_one_family(family, tmp_path, capsys):
    """The run of each size had been told apart by the name of its first checkpoint."""
    hub, text = family
    some, out = tmp_path / "hub", tmp_path / "out"
    shutil.copytree(hub, some)
    shutil.rmtree(some / "m16" / "step0")
    assert cli.main(words(some, text, out)) == 0
    capsys.readouterr()
    assert cli.main(["fit", *(str(out / f"m{size}") for size in (16, 32, 48)), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8  # buckets, metrics
    assert {(row["n"], row["status"].startswith("refused")) for row in rows} == {(3, False)}


def test_a_folder_of_another_model_of_the_same_name_is_refused(family, tmp_path, capsys):
    """Its steps had been taken for measured, and the table showed the numbers of the other."""
    hub, text = family
    for name, size in (("one", "m16"), ("two", "m32")):
        shutil.copytree(hub / size, tmp_path / name / "ckpts")
    words_of = [words(tmp_path / name, text, tmp_path / "out") for name in ("one", "two")]
    assert cli.main(words_of[0]) == 0
    assert cli.main(words_of[0]) == 0
    capsys.readouterr()
    assert cli.main(words_of[1]) == 2
    said = capsys.readouterr().err
    assert f"holds records of `{tmp_path / 'one' / 'ckpts'}`, not of `{tmp_path / 'two' / 'ckpts'}`" in said
    assert "give another `--out`" in said


def test_a_checkpoint_that_cannot_be_read_does_not_keep_the_others(family, tmp_path, capsys):
    hub, text = family
    some = tmp_path / "hub"
    shutil.copytree(hub, some)
    weights = some / "m16" / "step100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert cli.main(words(some, text, tmp_path / "out")) == 2
    assert "step100: " in capsys.readouterr().out
    assert {r.step for r in read_spectral(tmp_path / "out" / "m16").records} == {0, 1000}


class PretendRay(ModuleType):
    """Tasks made when they are waited for, through a pickle; those of a model in ``dies`` kill their worker."""

    def __init__(self, dies=()):
        super().__init__("ray")
        self.dies, self.running, self.most, self.settings = list(dies), 0, 0, None

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **settings):
        self.settings = settings

        def of(function):
            return SimpleNamespace(remote=lambda *arguments: self._start(function, arguments))

        return of

    def _start(self, function, arguments):
        self.running += 1
        self.most = max(self.most, self.running)
        return pickle.dumps((function, arguments))

    def wait(self, handles):
        return handles[:1], handles[1:]

    def get(self, handle):
        self.running -= 1
        function, (folder, call) = pickle.loads(handle)
        if call.args[0].name in self.dies:
            raise RuntimeError("the node died")
        return function(folder, call)


def test_a_series_on_ray_measures_the_same(family, tmp_path, monkeypatch, capsys):
    hub, text = family
    monkeypatch.setitem(sys.modules, "ray", PretendRay())
    assert cli.main(words(hub, text, tmp_path / "here")) == 0
    assert cli.main([*words(hub, text, tmp_path / "ray"), "--launcher", "ray"]) == 0
    ray = sys.modules["ray"]
    assert ray.most == 2  # of three models: what the cluster takes
    assert ray.settings == {"max_retries": 2, "num_cpus": 1}
    for folder in ("m16", "m32", "m48"):
        here, there = (
            {r.key: r.hard_rank for r in read_spectral(tmp_path / out / folder).records} for out in ("here", "ray")
        )
        assert here == there


def test_a_worker_of_ray_that_dies_loses_its_model_for_now(family, tmp_path, monkeypatch, capsys):
    hub, text = family
    (tmp_path / "out" / "m16").mkdir(parents=True)
    (tmp_path / "out" / "m16" / "run.lock").write_text("")  # all that it left: it died before its first record
    monkeypatch.setitem(sys.modules, "ray", PretendRay(dies=["m16"]))
    assert cli.main([*words(hub, text, tmp_path / "out"), "--launcher", "ray", "--workers", "1"]) == 2
    assert "m16: its worker died (the node died): call again." in capsys.readouterr().out
    assert sys.modules["ray"].most == 1
    assert {r.step for r in read_spectral(tmp_path / "out" / "m32").records} == {0, 100, 1000}
    assert cli.main(words(hub, text, tmp_path / "out")) == 0
    assert {r.step for r in read_spectral(tmp_path / "out" / "m16").records} == {0, 100, 1000}


def test_a_call_that_is_made_again_keeps_what_its_worker_had_measured(family, tmp_path, monkeypatch):
    hub, text = family
    found = [path for path in find_checkpoints([str(hub)]) if path.parent.name == "m16"]
    out, corpus, options = tmp_path / "m16", Corpus((text,)), {"num_tokens": 320, "seq_length": 16}
    series.measure_checkpoint(found[0], corpus, out, resume=True, **options)
    calls, measure = [], series.measure_checkpoint
    monkeypatch.setattr(series, "measure_checkpoint", lambda c, *a, **k: (calls.append(c), measure(c, *a, **k)))
    again = series._measure_members(out, found, corpus=corpus, options=options)
    assert (calls, again) == (found[1:], [(path, "") for path in found])


def kill_holders(folder: Path, times: int, killed: list[int], ended: threading.Event) -> None:
    """SIGKILL to processes that measure into a folder: so many of them, each while it holds the folder."""
    while len(killed) < times and not ended.wait(0.002):
        try:
            holder = int(json.loads((folder / "run.lock").read_text())["pid"])
        except (OSError, ValueError):  # nobody is there, or is just coming
            continue
        if holder not in killed:
            os.kill(holder, signal.SIGKILL)
            killed.append(holder)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.parametrize("times", [1, 3])
def test_a_series_on_a_real_ray_whose_worker_is_killed(family, tmp_path, capsys, times):
    ray = pytest.importorskip("ray", reason="an optional extra: pip install 'lightning-spectral[ray]'")
    hub, text = family
    assert cli.main(words(hub, text, tmp_path / "here")) == 0
    killed, ended = [], threading.Event()
    killer = threading.Thread(target=kill_holders, args=(tmp_path / "ray" / "m32", times, killed, ended))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killer.start()
    capsys.readouterr()
    try:
        code = cli.main([*words(hub, text, tmp_path / "ray"), "--launcher", "ray"])
    finally:
        ended.set()
        killer.join()
        ray.shutdown()
    assert len(set(killed)) == times
    assert os.getpid() not in killed
    said = capsys.readouterr().out
    if times == 1:  # taken up again
        assert (code, "not measured" in said) == (0, False), said
    else:  # twice at most; the other models are measured, and this one by the next call
        assert code == 2, said
        assert said.count("not measured: ") == 1
        assert "m32: its worker died (" in said
        assert cli.main(words(hub, text, tmp_path / "ray")) == 0
    for folder in ("m16", "m32", "m48"):
        here, there = (read_spectral(tmp_path / out / folder).records for out in ("here", "ray"))
        assert len(there) == len({record.key for record in there})
        assert {r.key: r.hard_rank for r in there} == pytest.approx({r.key: r.hard_rank for r in here}, rel=1e-5)
        assert {r.step for r in read_losses(tmp_path / "ray" / folder).records} == {0, 100, 1000}


def test_ray_is_for_a_series_and_must_be_there(family, tmp_path, monkeypatch, capsys):
    hub, text = family
    one = [str(next(iter(find_checkpoints([str(hub)]))))]
    assert cli.main(["measure", *one, "--data", str(text), "--launcher", "ray"]) == 2
    assert "`--launcher ray` is for a series of three checkpoints or more" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main([*words(hub, text, tmp_path / "out"), "--launcher", "ray"]) == 2
    assert "`--launcher ray` needs Ray: pip install 'lightning-spectral[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_measure_the_same(family, tmp_path):
    hub, text = family
    found = find_checkpoints([str(hub)])
    results = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        series.measure_series(found, Corpus((text,)), out, workers=workers, num_tokens=320, seq_length=16)
        results[workers] = {
            (folder, r.key): (r.hard_rank, r.soft_rank)
            for folder in ("m16", "m32")
            for r in read_spectral(out / folder).records
        }
    assert results[1].keys() == results[2].keys()
    for key, values in results[1].items():
        assert values == pytest.approx(results[2][key], rel=1e-5)
