"""Nothing in a file that is not code runs code, and no class is built in a key that it does not belong into.

Each malicious input would make a marker file; ``SECURITY.md`` names the inputs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_spectral.analysis.tidy import csv_text
from lightning_spectral.callbacks.probe_file import load_callbacks
from lightning_spectral.data.corpus import Corpus
from lightning_spectral.data.tokens import prepare_tokens
from lightning_spectral.gpt.export import load_final
from lightning_spectral.memory.fit import read_results
from lightning_spectral.records import read_alarms, read_losses, read_run, read_spectral, read_weights
from lightning_spectral.text.tables import Column, Table, render
from lightning_spectral.training.checkpoints import newest_whole
from lightning_spectral.training.load_checkpoint import load_checkpoint
from lightning_spectral.training.pretrain import pretrain
from lightning_spectral.training.recipe import load
from tests.records_factory import spectral
from tests.tiny import LIGHTNING_WARNINGS, tiny_tree, write_recipe, write_text

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def torch_file(path: Path, marker: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "epoch": Malice(marker)}, path)


def raw_pickle(path: Path, marker: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Malice(marker)))


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a checkpoint in the run folder": (
        "run/checkpoints/step-00000002.ckpt",
        lambda folder: newest_whole(folder / "run"),
    ),
    "resume by its path": (
        "evil.ckpt",
        lambda folder: pretrain(
            load(write_recipe(folder), {"out_dir": str(folder / "run"), "resume": str(folder / "evil.ckpt")}),
            progress_bar=False,
        ),
    ),
    "measure, a Lightning file": ("evil.ckpt", lambda folder: load_checkpoint(folder / "evil.ckpt")),
    "measure, a litgpt folder": ("final/lit_model.pth", lambda folder: load_final(folder / "final")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [torch_file, raw_pickle])
@pytest.mark.parametrize("place", READERS)
def test_a_foreign_pickle_is_refused_and_not_executed(place: str, write: Any, tmp_path: Path) -> None:
    name, read = READERS[place]
    marker = tmp_path / "executed"
    write(tmp_path / name, marker)
    (tmp_path / "final").mkdir(exist_ok=True)
    (tmp_path / "final" / "model_config.yaml").write_text(
        yaml.safe_dump({"name": "tiny", **tiny_tree(tmp_path)["model_config"]})
    )
    if place == "a checkpoint in the run folder":
        assert read(tmp_path) is None  # passed over, with a warning
    else:
        with pytest.raises(ValueError, match=r"could execute code|cannot be read"):
            read(tmp_path)
    assert not marker.exists()


def sharded(folder: Path) -> Path:
    """As Lightning's FSDP writes it: tensors, plain values, and what is beside them in ``meta.pt``."""
    import torch.distributed.checkpoint as dcp

    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "half": torch.ones(2).bfloat16()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1}, folder / "meta.pt")
    return folder


def evil_metadata(folder: Path, marker: Path) -> None:
    raw_pickle(folder / ".metadata", marker)


def evil_entry(folder: Path, marker: Path) -> None:
    content = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in content.storage_data if index.fqn.endswith("betas"))
    torch.save(Malice(marker), folder / "__9_0.distcp")
    place = content.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, (folder / "__9_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def entry_elsewhere(folder: Path, marker: Path) -> None:
    evil_entry(folder, marker)
    (folder / "__9_0.distcp").rename(folder.parent / "elsewhere")
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content.replace(b"__9_0.distcp", b"../elsewhere"))


def cut_part(folder: Path, marker: Path) -> None:
    (part,) = folder.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [None, evil_metadata, evil_entry, entry_elsewhere, cut_part])
def test_a_foreign_sharded_checkpoint_is_refused_and_not_executed(change: Any, tmp_path: Path) -> None:
    """torch unpickles its metadata and every entry that is no tensor without a check."""
    marker = tmp_path / "executed"
    folder = sharded(tmp_path / "run" / "checkpoints" / "step-00000002.ckpt")
    if change is None:
        assert newest_whole(tmp_path / "run") == folder
        return
    change(folder, marker)
    assert newest_whole(tmp_path / "run") is None
    tree = {"out_dir": str(tmp_path / "other"), "resume": str(folder)}
    with pytest.raises(ValueError, match=r"could execute code|__9_0|elsewhere|is cut"):
        pretrain(load(write_recipe(tmp_path), tree), progress_bar=False)
    assert not marker.exists()


def test_counts_that_hold_objects_are_refused(tmp_path: Path) -> None:
    from lightning_spectral import TailTokenProbe

    marker = tmp_path / "executed"
    np.save(tmp_path / "counts.npy", np.array([Malice(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="counts"):
        TailTokenProbe(2, counts=str(tmp_path / "counts.npy")).measurement.grouping(None)
    assert not marker.exists()


def test_a_token_cache_that_holds_objects_is_built_again(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    corpus = Corpus((write_text(tmp_path),))
    cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
    whole = np.array(cache.train)
    for name in ("train", "validation", "counts"):
        np.save(cache.folder / f"{name}.npy", np.array([Malice(marker)], dtype=object), allow_pickle=True)
        with pytest.warns(UserWarning, match=f"`{name}.npy` is not what was written"):
            cache = prepare_tokens(corpus, vocab_size=300, cache_dir=tmp_path / "cache")
        assert np.array_equal(cache.train, whole)
    assert not marker.exists()


def test_a_cache_folder_is_private(tmp_path: Path) -> None:
    cache = prepare_tokens(Corpus((write_text(tmp_path),)), vocab_size=300, cache_dir=tmp_path / "cache")
    assert stat.S_IMODE(cache.folder.parent.stat().st_mode) == 0o700


KEYS: dict[str, Callable[[Any], Any]] = {
    "strategy": lambda spec: spec,
    "optimizer": lambda spec: spec,
    "data": lambda spec: spec,
    "callbacks": lambda spec: [spec],
}


@pytest.mark.parametrize("spelling", ["class", "function"])
@pytest.mark.parametrize("key", KEYS)
def test_a_class_that_does_not_belong_into_its_key_is_not_built(key: str, spelling: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    specs = {
        "class": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}},
        "function": {"class_path": "os.mkdir", "init_args": {"path": str(marker)}},
    }
    tree = {**tiny_tree(tmp_path), key: KEYS[key](specs[spelling])}
    with pytest.raises(ValueError, match=r"Popen|mkdir|\w+"):
        pretrain(load(write_recipe(tmp_path, tree)), progress_bar=False)
    assert not marker.exists()


USERS_PARTS = """
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from lightning.pytorch.callbacks import Callback
from lightning_spectral.data import TextFiles

@dataclass
class Box:
    inside: Any = None

class Open(Callback):
    def __init__(self, bare=None, anything: Any = None, thing: object = None, many: list[Any] | None = None,
                 table: dict | None = None, named: dict[str, Any] | None = None, box: Box | None = None):
        super().__init__()

class Text(TextFiles):
    def __init__(self, path: str, bare=None, vocab_size: int = 300, cache_dir: Path | None = None):
        super().__init__(path, vocab_size=vocab_size, cache_dir=cache_dir)
"""
OPEN: dict[str, Callable[[Any], Any]] = {
    "bare": lambda evil: evil,
    "anything": lambda evil: evil,
    "thing": lambda evil: evil,
    "many": lambda evil: [evil],
    "table": lambda evil: {"a": evil},
    "named": lambda evil: {"a": [evil]},
    "box": lambda evil: {"inside": evil},
}


@pytest.mark.parametrize("argument", [*OPEN, "counts of ours", "data"])
def test_a_class_inside_an_argument_that_takes_anything_is_not_built(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    evil = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    (tmp_path / "users_parts.py").write_text(USERS_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    tree = tiny_tree(tmp_path)
    if argument == "data":
        own = {key: tree["data"]["init_args"][key] for key in ("path", "cache_dir")}
        tree["data"] = {"class_path": "users_parts.Text", "init_args": {**own, "bare": evil}}
    elif argument == "counts of ours":
        tree["callbacks"] = [{"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"counts": evil}}]
    else:
        tree["callbacks"] = [{"class_path": "users_parts.Open", "init_args": {argument: OPEN[argument](evil)}}]
    with pytest.raises(ValueError, match="names a class, and .* takes anything there"):
        pretrain(load(write_recipe(tmp_path, tree)), progress_bar=False)
    assert not marker.exists()


def test_a_class_of_the_type_that_an_argument_names_is_built(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

    from lightning_spectral.training.schema import _says_which

    assert _says_which(RichProgressBarTheme)
    assert _says_which(dict[str, int] | None)
    assert not _says_which(dict[str, int] | Any)


@pytest.mark.parametrize("path", ["subprocess.Popen", "os.mkdir"])
def test_a_probe_yaml_builds_callbacks_only(path: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    arguments = {"args": ["touch", str(marker)]} if path == "subprocess.Popen" else {"path": str(marker)}
    file = tmp_path / "probe.yaml"
    file.write_text(yaml.safe_dump({"callbacks": [{"class_path": path, "init_args": arguments}]}))
    with pytest.raises(Exception, match="is no Lightning callback"):
        load_callbacks(file)
    assert not marker.exists()


@pytest.mark.parametrize("read", [lambda file: load(file), load_callbacks])
def test_yaml_tags_are_errors(read: Any, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    file = tmp_path / "evil.yaml"
    file.write_text(f"callbacks: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(Exception, match="YAML|could not determine a constructor"):
        read(file)
    assert not marker.exists()


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("read", [read_spectral, read_losses, read_weights, read_alarms])
def test_deeply_nested_lines_are_left_out(read: Any, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(DEEP + b'\n{"schema_version": ' + DEEP + b"}\n")
    with pytest.warns(UserWarning, match="2 of 2 lines left out"):
        assert not read(file).records


def test_deeply_nested_descriptions_and_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(DEEP)
    with pytest.raises(ValueError, match="is not a run description"):
        read_run(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(DEEP + b"\n" + json.dumps({"kind": "batch"}).encode() + b"\n\xff\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert read_results(tmp_path) == [{"kind": "batch"}]
    assert "2 broken lines left out" in str(told[0].message)


@pytest.mark.parametrize("label", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
def test_a_label_is_no_formula_in_a_spreadsheet(label: str) -> None:
    table = Table((Column("run", key="run"), "x"), [(label, 1.5)])
    for text in (csv_text(["run", "x"], [(label, 1.5)]), render(table, "csv")):
        (_, row) = csv.reader(io.StringIO(text, newline=""))
        assert row == [f"'{label}".replace("\r", " "), "1.5"]


def test_numbers_and_plain_texts_stay(tmp_path: Path) -> None:
    assert csv_text(["a", "b", "c"], [(-1.5, "-", "a=b")]).splitlines()[1] == "-1.5,-,a=b"


RUN_IDS: list[Any] = [
    "../../escape",
    "/tmp/escape",
    "a/b",
    "",
    "x" * 300,
    "..",
    ".",
    "a\0b",
    "a\nb",
    "a\n",
    "-rf",
    3,
    b"a",
]
TAKE_RUN_IDS = (
    "SpectralRankCallback",
    "TailTokenProbe",
    "WeightSpectrumCallback",
    "UpdateAudience",
    "HuggingFaceProbe",
)


@pytest.mark.parametrize("run_id", RUN_IDS)
@pytest.mark.parametrize("kind", TAKE_RUN_IDS)
def test_a_run_id_is_a_name(kind: str, run_id: Any) -> None:
    import lightning_spectral

    with pytest.raises(ValueError, match="`run_id` must be (a plain name|text, got)"):
        getattr(lightning_spectral, kind)(2, run_id=run_id)


def test_a_foreign_run_folder_moves_nothing_out_of_itself(tmp_path: Path) -> None:
    """The run id of an earlier run, read from a file that anybody may have written, becomes a folder's name."""
    from lightning_spectral.probe.run_folder import move_earlier_run
    from lightning_spectral.records import RunInfo, append_records, write_run

    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    write_run(folder, RunInfo("../../../escape", "2026-01-01T00:00:00+00:00", "AdamW"))
    append_records(folder / "spectral.jsonl", [spectral()])
    target = move_earlier_run(folder, ["run.json", "spectral.jsonl"])
    assert target is not None
    assert target.resolve().is_relative_to(folder.resolve() / "previous")
    assert not (tmp_path / "escape").exists()


def foreign_folder(folder: Path, marker: Path, **config: Any) -> Path:
    """A Hugging Face folder whose configuration names a file beside it."""
    from tests.models import tiny

    tiny.hugging_face("llama").save_pretrained(folder)
    code = f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    (folder / "evil.py").write_text(code)
    content = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**content, "auto_map": auto_map, **config}))
    return folder


@pytest.mark.parametrize("config", [{}, {"model_type": "unheard_of"}, {"architectures": ["Trainer", "pipeline"]}])
@pytest.mark.parametrize("verb", ["measure", "measure in pieces", "inspect"])
def test_the_code_of_a_hugging_face_folder_is_not_run(
    verb: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_spectral.cli.model_source import model_of

    marker = tmp_path / "executed"
    folder = foreign_folder(tmp_path / "model", marker, **config)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether it may run code"))
    read = model_of if verb == "inspect" else load_checkpoint
    settings = {} if verb == "inspect" else {"stream_weights": verb != "measure"}
    if "model_type" not in config:
        assert read(folder, **settings) if read is load_checkpoint else read(str(folder), settings).model
    elif verb == "inspect":
        assert "its weights" in model_of(str(folder), {}).note
    else:  # without its code it is no model
        with pytest.raises(ValueError, match="cannot be read"):
            load_checkpoint(folder, **settings)
    assert not marker.exists()


def test_a_checkpoint_names_a_class_and_nothing_happens(tmp_path: Path) -> None:
    from lightning_spectral.cli.model_source import model_of

    marker = tmp_path / "executed"
    hparams = {"_class_path": "subprocess.Popen", "args": ["touch", str(marker)]}
    weights = {f"h.{n}.{name}.weight": torch.zeros(8, 8) for n in range(2) for name in ("up", "down")}
    torch.save({"state_dict": weights, "hyper_parameters": hparams}, tmp_path / "a.ckpt")
    assert "not run" in model_of(str(tmp_path / "a.ckpt"), {}).note
    assert not marker.exists()


CONFIGS = {
    "nested without end": "[" * 20_000,
    "a list": "[1]",
    "empty": "",
    "a number as name": "1: 2",
    "no field of litgpt's": "zz: 1",
    "a word for a number": "{name: x, n_layer: many}",
    "no architecture": "{name: x, architecture: [1]}",
    "larger than any memory": "{name: x, n_layer: 1, n_head: 1, n_embd: 100000000000, vocab_size: 100}",
    "no date": "a: 2026-99-99",
    "no text": "\0",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_foreign_folder_is_refused_in_a_sentence(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_spectral import cli

    (tmp_path / "model_config.yaml").write_bytes(CONFIGS[config].encode(errors="surrogateescape"))
    torch.save({}, tmp_path / "lit_model.pth")
    with pytest.raises(ValueError, match=r"model_config.yaml"):
        load_checkpoint(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("lightning-spectral inspect: ")


def hparams(**changes: Any) -> dict[str, Any]:
    """Of a checkpoint of ours, as far as it is read."""
    config = {"n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 8, "vocab_size": 16}
    train = {"global_batch_size": 2, "max_seq_length": 8}
    return {
        "model_config": config, "model_name": None, "architecture": {}, "optimizer": "AdamW", "train": train, **changes
    }  # fmt: skip


HEAD = {"model.lm_head.weight": torch.zeros(16, 8)}
CONTENTS: dict[str, Any] = {
    "a list": [1],
    "weights in a list": {"state_dict": [1, 2]},
    "numbers as names": {"state_dict": {0: torch.zeros(4, 4)}},
    "a number as recipe": {"state_dict": HEAD, "hyper_parameters": 3},
    "a number as optimizer's path": {"state_dict": HEAD, "hyper_parameters": hparams(optimizer={})},
    "a list as train": {"state_dict": HEAD, "hyper_parameters": hparams(train=[])},
    "a word as batch": {"state_dict": HEAD, "hyper_parameters": hparams(train={"global_batch_size": "x"})},
    "a word as step": {"state_dict": HEAD, "hyper_parameters": hparams(), "global_step": "x"},
    "no head": {"state_dict": {"model.lm_head.weight": torch.tensor(1.0)}, "hyper_parameters": hparams()},
    "no heads": {"state_dict": HEAD, "hyper_parameters": hparams(model_config={"n_layer": 1, "n_head": 0})},
    "a list as model": {"state_dict": HEAD, "hyper_parameters": hparams(model_config=[1])},
    "no such model": {"state_dict": HEAD, "hyper_parameters": hparams(model_config=None, model_name="zz")},
    "other weights": {"state_dict": HEAD, "hyper_parameters": hparams()},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_foreign_checkpoint_is_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    from lightning_spectral import cli

    torch.save(CONTENTS[content], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt|zz"):
        load_checkpoint(tmp_path / "a.ckpt")
    assert cli.main(["inspect", str(tmp_path / "a.ckpt")]) in (0, 2)  # its shapes alone may be enough


NAMES = ["../../escape", "..", "/escape", "a/../../b", "x" * 300, "\u00fc" * 200, ".hidden", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_an_imported_log_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    from lightning_spectral.cli.import_runs import main

    log, out = tmp_path / "in" / "log.csv", tmp_path / "a" / "out"
    log.parent.mkdir()
    with log.open("w", newline="") as file:
        csv.writer(file).writerows([["Step", f"{name} - spectral/hard_rank.tail"], [1, 3.5], [2, 3.5]])
    main([str(log), "--out", str(out), "--width", "64"])
    (folder,) = out.iterdir()
    assert (folder / "run.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("name", NAMES[:4])
def test_names_in_records_lead_no_output_out_of_its_folder(name: str, tmp_path: Path) -> None:
    """Ids, labels and buckets of a run that anybody may have written, in every verb that writes files."""
    from dataclasses import replace

    from lightning_spectral import cli
    from lightning_spectral.records import RunInfo, append_records, write_run

    for width in (64, 128, 256):
        folder = tmp_path / "in" / str(width)
        info = RunInfo(f"{name}{width}", "2026-01-01T00:00:00+00:00", name, labels={"optimizer": name})
        folder.mkdir(parents=True)
        write_run(folder, info)
        records = [
            replace(spectral(step=step, bucket=bucket), run_id=info.run_id, width=width, stack=name)
            for step in range(3)
            for bucket in ("pooled", name)
        ]
        append_records(folder / "spectral.jsonl", records)
    out = tmp_path / "a" / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in (
            ["report", "IN", "--out", "OUT/r"],
            ["fit", "IN", "--out", "OUT/f"],
            ["compare", "IN", "--out", "OUT/c"],
        ):
            given = [word.replace("IN", str(tmp_path / "in")).replace("OUT", str(out)) for word in words]
            assert cli.main(given) == 0
    assert list((out / "r").glob("*.html"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["128", "256", "64"]


def hostile_runs(folder: Path, text: str) -> Path:
    """Four run folders whose every text is what somebody chose."""
    from dataclasses import replace

    from lightning_spectral.records import RunInfo, append_records, write_run

    for width in (64, 128, 256, 512):
        run = folder / str(width)
        run.mkdir(parents=True)
        facts = {text: text}
        labels = {"optimizer": text, **facts}
        info = RunInfo(f"{width}{text}", text, text, hparams=facts, versions=facts, labels=labels, conventions=facts)
        write_run(run, info)
        words = {"module": text, "stack": text, "reason": text, "dtype": text, "site": "post", "conventions": facts}
        orders = {"renyi": {text: 1.0, "2": 3.0}, "reinjection": {text: 1.0, "2": 3.0}, "extra": {text: 1.0}}
        append_records(
            run / "spectral.jsonl",
            [
                replace(spectral(step=step, bucket=bucket), run_id=info.run_id, width=width, **words, **orders)
                for step in range(3)
                for bucket in ("pooled", text or "tail")
            ],
        )
    return folder


TEXTS = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b2J",
    "a\0b",
    "\u202e",
    "$\\frac$",
    "<script>x</script>",
    "'\"><img src=x>",
    "",
    "{}",
    "%s",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_a_foreign_run_are_shown_and_not_obeyed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a terminal, a browser or matplotlib's formulas; a label may move no cursor and set no title."""
    from lightning_spectral import cli

    runs = str(hostile_runs(tmp_path / "in", text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in (["fit", runs], ["fit", runs, "--format", "latex"], ["compare", runs], ["records", runs]):
            assert cli.main(words) == 0
        assert cli.main(["report", runs, "--out", str(tmp_path / "out")]) == 0
    said = "".join(capsys.readouterr())
    pages = [path.read_text() for path in (tmp_path / "out").rglob("*.html")]
    assert pages
    for shown in (said, *pages):
        assert not any(sign in shown for sign in "\x1b\x07\x9b\0\u202e")
    for page in pages:
        assert "<script>x" not in page
        assert "<img src=x" not in page


@pytest.mark.parametrize("name", ["spectral.jsonl", "run.json", "losses.jsonl", "sweep_progress.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_is_no_file_in_a_foreign_run_is_not_read(name: str, kind: str, tmp_path: Path) -> None:
    """An archive may hold pipes, and links to devices: reading them does not end."""
    from lightning_spectral.analysis.reading import read_run_folder
    from lightning_spectral.tensorboard.reader import RunReader

    run = hostile_runs(tmp_path, "AdamW") / "64"
    (run / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    found, problems = read_run_folder(run)
    if name == "sweep_progress.json":
        assert found is not None
        return
    assert found is None
    assert "a device or a pipe" in problems[-1].message
    if name != "run.json":
        reader = RunReader(run)
        reader.refresh()


@pytest.mark.parametrize("where", ["label", "record", "file name", "no such file"])
def test_half_a_character_ends_no_verb(where: str, tmp_path: Path, capsysbinary: Any) -> None:
    """JSON can spell what UTF-8 cannot, and a file's name may be any bytes."""
    from lightning_spectral import cli

    runs = hostile_runs(tmp_path / ("\udcff" if where == "file name" else "in"), "AdamW")
    changed = {"label": "run.json", "record": "spectral.jsonl"}.get(where)
    if changed:
        path = runs / "64" / changed
        path.write_text(path.read_text().replace('"AdamW"', '"\\ud800"'))
    given = str(tmp_path / "\udcfe") if where == "no such file" else str(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["fit", given]) == (2 if where == "no such file" else 0)
        if where != "no such file":
            assert cli.main(["report", given, "--out", str(tmp_path / "out")]) == 0
            words = ["records", given, "--format", "csv", "--out", str(tmp_path / "records.csv")]
            assert cli.main(words) == (2 if where == "label" else 0)  # a run without its description
    assert b"".join(capsysbinary.readouterr()).decode()


# what may appear where: a new reader of files is to go through one of these
ONE_WAY = {
    r"torch\.load\(": {"models/checkpoint_file.py"},
    r"pickle\.loads?\(": {"probe/collectives.py", "training/schema.py"},
    r"Unpickler\b": {"models/checkpoint_folder.py"},
    r"yaml\.(load|unsafe_load|full_load)\(": {"text/__init__.py"},
    r"(?<!parse_)\bjson\.loads?\(": {  # what this process or another rank has written itself, or a regex has vetted
        "text/__init__.py", "text/tables.py", "probe/agreement.py", "optim/members.py", "analysis/scan.py",
        "analysis/runs.py",
    },
    r"allow_pickle=True|trust_remote_code=True|weights_only=False|shell=True|\bos\.system\(": set(),
    r"(?<![.\w])(eval|exec)\(": set(),
}  # fmt: skip


@pytest.mark.parametrize("pattern", ONE_WAY)
def test_files_are_read_in_one_way(pattern: str) -> None:
    import re

    import lightning_spectral

    root = Path(lightning_spectral.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if re.search(pattern, path.read_text())}
    assert found == ONE_WAY[pattern]
