"""Logs of others become records that say what the logs say."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from lightning_spectral.analysis.foreign import loss_records, manifest_rows, read_foreign, row_of, spectral_records
from lightning_spectral.analysis.reading import load_runs
from lightning_spectral.cli import main
from lightning_spectral.records import read_losses, read_run, read_spectral

GLOBAL = """Step 1: SE_pre=5.471, SE_post=4.836, PR_pre=89.41, PR_post=30.14, EEE_pre=0.717, EEE_post=0.762, JS=0.0313
Step 200: SE_pre=1.939, SE_post=nan, PR_pre=4.85, PR_post=1.001e+01, EEE_pre=0.993, EEE_post=0.982, JS=0.0587
"""
BUCKETS = """Step 1:
  HEAD (n=44571): SE_pre=3.163, SE_post=2.859, PR_pre=15.87, PR_post=10.53, EEE_pre=0.974, EEE_post=0.977, JS=0.0142
  TAIL (n=41342): SE_pre=6.098, SE_post=6.292, PR_pre=357.12, PR_post=410.02, EEE_pre=0.564, EEE_post=0.461, JS=0.0151
some line of a scheduler
Step 200:
  TAIL (n=43855): SE_pre=3.699, SE_post=4.869, PR_pre=18.67, PR_post=35.91, EEE_pre=0.948, EEE_post=0.810, JS=0.0627
"""


def paper_logs(root: Path) -> Path:
    folder = root / "main" / "adamw" / "2d" / "eigen_metrics_logs"
    folder.mkdir(parents=True)
    (folder / "layer0_global.txt").write_text(GLOBAL)
    (folder / "layer11_frequency.txt").write_text(BUCKETS)
    return root


def test_the_papers_logs(tmp_path: Path) -> None:
    (run,) = read_foreign(paper_logs(tmp_path))
    records = {(r.step, r.layer, r.site, r.bucket): r for r in spectral_records(run, 1536)}
    assert len(records) == 2 * 2 + 2 * 3
    tail = records[200, 11, "post", "tail"]
    assert (tail.hard_rank, tail.num_tokens, tail.early_enrichment, tail.js_divergence) == (35.91, 43855, 0.81, 0.0627)
    assert tail.soft_rank == pytest.approx(math.exp(4.869))
    assert tail.tokens_per_dim == 43855 / 1536
    late = records[200, 0, "post", "pooled"]
    assert (late.soft_rank, late.hard_rank) == (None, 10.01)  # nan is no number
    assert records[1, 0, "pre", "pooled"].js_divergence is None


def test_a_manifest_names_the_run_by_the_end_of_its_folder(tmp_path: Path) -> None:
    logs = paper_logs(tmp_path / "logs")
    manifest = tmp_path / "runs.csv"
    manifest.write_text(
        "run_id,ffn_hidden_dim,optimizer,optimizer_folder,dion_rank_fraction,seed,log_dir\n"
        "a1,768,Muon,muon,,0,external://x/main/muon/1d/eigen_metrics_logs\n"
        "a2,1536,Dion,dion,1/2,not_recorded,external://x/main/adamw/2d/eigen_metrics_logs\n"
    )
    (run,) = read_foreign(logs)
    row = row_of(run, manifest_rows(manifest))
    assert row is not None
    assert row["run_id"] == "a2"
    assert main(["import", str(logs), "--manifest", str(manifest), "--out", str(tmp_path / "out")]) == 0
    (read,) = load_runs([tmp_path / "out"]).runs
    assert (read.width, read.optimizer, read.seed) == (1536, "Dion", "")
    assert read.info.labels == {"optimizer": "Dion", "dion_rank_fraction": "1/2"}
    # a second time would mix two imports
    assert main(["import", str(logs), "--manifest", str(manifest), "--out", str(tmp_path / "out")]) == 2


def test_event_files(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "d512_run"))
    for step, value in ((100, 12.5), (200, 25.0)):
        tags = {"spectral.hard_rank.post.tail/layer_03": value, "spectral/hard_rank.tail": 1.0, "other": 3.0}
        for tag, own in (tags | {"spectral_loss_validation/loss.tail": 2.0, "train_loss": 3.5}).items():
            writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=own)])))
    writer.close()
    out = tmp_path / "out"
    given = ["import", str(tmp_path), "--width-from", r"d(\d+)_", "--optimizer", "Muon", "--seed", "3"]
    assert main([*given, "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    found = read_spectral(folder / "spectral.jsonl").records
    # the front page's medians are left out where the layers are there
    assert [(r.step, r.layer, r.bucket, r.hard_rank, r.width) for r in found] == [
        (100, 3, "tail", 12.5, 512),
        (200, 3, "tail", 25.0, 512),
    ]
    losses = {(r.stage, r.step, r.bucket): r.loss for r in read_losses(folder / "losses.jsonl").records}
    assert losses == {
        ("validation", 100, "tail"): 2.0,
        ("validation", 200, "tail"): 2.0,
        ("train", 100, "pooled"): 3.5,
        ("train", 200, "pooled"): 3.5,
    }
    info = read_run(folder)
    assert (info.optimizer, info.seed) == ("Muon", 3)


def test_exports_of_wandb(tmp_path: Path) -> None:
    chart = tmp_path / "chart.csv"
    chart.write_text(
        '"Step","wide - spectral/hard_rank.tail","wide - spectral/hard_rank.tail__MIN",'
        '"slim - spectral/hard_rank.tail"\n'
        '"100","40","1","20"\n"200","50","1",""\n'
    )
    runs = {run.name: run for run in read_foreign(chart)}
    assert [(n.step, n.value) for n in runs["wide"].numbers] == [(100, 40.0), (200, 50.0)]
    assert [(n.step, n.value) for n in runs["slim"].numbers] == [(100, 20.0)]
    history = tmp_path / "history.jsonl"
    rows = [{"_step": k, "ranks/hard/7": 3.0 + k, "val/loss": 2.0, "note": "x"} for k in (0, 10)]
    history.write_text("\n".join(map(json.dumps, rows)) + '\n{"_step": 20, "ranks/ha')
    (run,) = read_foreign(history, r"ranks/(?P<metric>hard)/(?P<layer>\d+)")
    (first, last) = spectral_records(run, 64)
    assert (first.layer, last.step, last.extra) == (7, 10, {"hard": 13.0})
    assert [(r.stage, r.step, r.loss) for r in loss_records(run)] == [("validation", 0, 2.0), ("validation", 10, 2.0)]


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("_step,mystery\n1,2\n", ["--width", "64"], "`mystery`: say what they are with --tag"),
        ("_step,spectral/hard_rank.tail\n1,2\n", [], "give --width"),
        ("_step,spectral/hard_rank.tail\n1,2\n", ["--width-from", "d("], "no expression"),
        ("_step,x\n1,2\n", ["--tag", "(x)", "--width", "8"], "(?P<metric>...)"),
        ("_step,loss\n1,2\n", ["--width", "8"], "no rank"),
    ],
)
def test_what_cannot_be_imported_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, given: list[str], words: str
) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert main(["import", str(tmp_path / "a.csv"), *given, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("run.json"))


def ranks_of(path: Path, **given: str) -> dict[str, list[tuple[int, float | None]]]:
    return {run.name: [(r.step, r.hard_rank) for r in spectral_records(run, 64)] for run in read_foreign(path, **given)}


TAIL = "spectral/hard_rank.tail"


@pytest.mark.parametrize("column", ["name", "run_id", "run", "Name"])
def test_rows_of_several_runs_in_one_file_are_several_runs(tmp_path: Path, column: str) -> None:
    rows = [("a", 0, 1.0), ("b", 0, 2.0), ("a", 10, 3.0), ("b", 10, 4.0)]
    wanted = {"a": [(0, 1.0), (10, 3.0)], "b": [(0, 2.0), (10, 4.0)]}
    table = tmp_path / "t.csv"
    table.write_text(f"{column},_step,{TAIL}\n" + "".join(f"{r},{s},{v}\n" for r, s, v in rows))
    assert ranks_of(table) == wanted
    for name, text in (("t.jsonl", "\n".join), ("t.json", lambda lines: f"[{','.join(lines)}]")):
        (tmp_path / name).write_text(text([json.dumps({column: r, "_step": s, TAIL: v}) for r, s, v in rows]))
        assert ranks_of(tmp_path / name) == wanted


def test_steps_that_are_none_and_values_that_are_none_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"_step,{TAIL},mystery\n0,1,1\n10,2,1\n10.5,3,1\n,4,1\n-5,9,1\n20,NaN,1\n30,Infinity,1\n40,,1\n")
    assert ranks_of(table) == {"t": [(0, 1.0), (10, 2.0)]}
    assert main(["import", str(table), "--width", "64", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "3 numbers were left out: of a step that is no whole number" in said
    assert "2 numbers were left out: NaN, infinite" in said
    assert "not known here and left out: `mystery`" in said


def test_what_was_logged_again_after_a_resume_replaces_what_was_there(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [*((s, 10 + s) for s in (0, 10, 20, 30)), *((s, 100 + s) for s in (20, 30, 40))]
    table.write_text("\n".join(json.dumps({"_step": s, TAIL: v}) for s, v in rows))
    assert ranks_of(table)["t"] == [(0, 10.0), (10, 20.0), (20, 120.0), (30, 130.0), (40, 140.0)]


def test_pairs_outside_a_step_are_of_no_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = ["Step 1: PR_post=30.1", "summary: PR_post=6", "best PR_post=7", " Step 3: PR_post=5", "step 4: PR_post=4"]
    (folder / "layer0_global.txt").write_bytes("\r\n".join(lines).encode())
    assert ranks_of(tmp_path) == {"run": [(1, 30.1), (3, 5.0), (4, 4.0)]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings_and_gzip(tmp_path: Path, encoding: str, packed: bool) -> None:
    for name, text in (
        ("t.csv", f"_step,{TAIL}\n0,1.5\n"),
        ("t.jsonl", json.dumps({"_step": 0, TAIL: 1.5})),
        ("t.log", "Step 0: PR_post=1.5\n"),
    ):
        content = text.encode(encoding)
        path = tmp_path / name / (name + ".gz" * packed)
        path.parent.mkdir()
        path.write_bytes(gzip.compress(content) if packed else content)
        assert list(ranks_of(path).values()) == [[(0, 1.5)]]


@pytest.mark.parametrize("name", ["t.log", "t.csv", "t.jsonl"])
def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"caf\xe9\nStep 1: PR_post=30.1\n")
    with pytest.raises(ValueError, match=rf"{name}` is not a text file in UTF-8"):
        read_foreign(tmp_path / name)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"Step 1: PR_post=30.1\n" * 99)[:20])
    with pytest.raises(ValueError, match=rf"{name}.gz` is no whole gzip file"):
        read_foreign(tmp_path / f"{name}.gz")


def test_groups_of_ones_own_keep_their_letters(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("_step,spectral/hard_rank.Code,spectral/hard_rank.code,spectral/hard_rank.TAIL\n0,1,2,3\n")
    (run,) = read_foreign(table)
    assert {r.bucket: r.hard_rank for r in spectral_records(run, 64)} == {"Code": 1.0, "code": 2.0, "tail": 3.0}


RANKS = {0: 20.0, 50: 22.5, 100: 25.0}
TAG = "spectral/hard_rank.tail"


def in_form(form: str, folder: Path) -> Path:
    """Ranks of the run `muon-w512` as others' programs save them."""
    cells = {
        "download": "Wall time,Step,Value\n" + "".join(f"1.7e9,{s},{v}\n" for s, v in RANKS.items()),
        "long": "run,tag,step,value\n" + "".join(f"muon-w512,{TAG},{s},{v}\n" for s, v in RANKS.items()),
        "of directories": "dir_name,step,tag,value\n" + "".join(f"muon-w512,{s},{TAG},{v}\n" for s, v in RANKS.items()),
        "grouped": f"Step,Group: muon-w512 - {TAG},Group: muon-w512 - {TAG}__MIN\n"
        + "".join(f"{s},{v},1\n" for s, v in RANKS.items()),
        "over epochs": f"epoch,muon-w512 - _step,muon-w512 - {TAG},muon-w512 - _step__MAX\n"
        + "".join(f"{k},{s},{v},9\n" for k, (s, v) in enumerate(RANKS.items())),
        "a dash in the name": f"Step,muon-w512 - {TAG}\n" + "".join(f"{s},{v}\n" for s, v in RANKS.items()),
        "trainer state": json.dumps({"epoch": 1, "log_history": [{"step": s, TAG: v} for s, v in RANKS.items()]}),
        "rows of one object": json.dumps([{"_step": s, TAG: v, "_runtime": 3} for s, v in RANKS.items()], indent=1),
    }
    names = {"download": f"run-muon-w512-tag-{TAG.replace('/', '_')}.csv", "trainer state": "muon-w512.json"}
    own = folder / names.get(form, "muon-w512.json" if "object" in form else "any.csv")
    own.write_text(cells[form])
    return own


FORMS = ["download", "long", "of directories", "grouped", "over epochs", "a dash in the name", "trainer state"]


@pytest.mark.parametrize("form", [*FORMS, "rows of one object"])
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    (run,) = read_foreign(in_form(form, tmp_path))
    assert run.name == "muon-w512"
    assert {r.step: r.hard_rank for r in spectral_records(run, 512)} == RANKS
    assert {(r.bucket, r.stage) for r in spectral_records(run, 512)} == {("tail", "train")}
    assert not run.unread


def test_downloads_of_one_run_are_one_run(tmp_path: Path) -> None:
    for layer in (0, 11):
        path = tmp_path / f"run-a-tag-spectral.hard_rank.post.tail_layer_{layer:02d}.csv"
        path.write_text(f"Wall time,Step,Value\n1,5,{10 + layer}\n")
    (tmp_path / "run-a-tag-Loss_validation.csv").write_text("Wall time,Step,Value\n1,5,3.5\n")
    (tmp_path / "train_loss.csv").write_text("Wall time,Step,Value\n1,5,3.25\n")  # of the folder, by its own name
    first, second = sorted(read_foreign(tmp_path), key=lambda run: run.name != "a")
    assert {(r.layer, r.hard_rank) for r in spectral_records(first, 64)} == {(0, 10.0), (11, 21.0)}
    assert [(r.stage, r.loss) for r in loss_records(first)] == [("validation", 3.5)]
    assert second.name == tmp_path.name
    assert [(r.stage, r.loss) for r in loss_records(second)] == [("train", 3.25)]


def test_nothing_is_written_where_one_run_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.csv").write_text(f"Step,a - {TAG},b - train/lm_loss\n1,5,3\n")
    assert main(["import", str(tmp_path / "in"), "--width", "8", "--out", str(tmp_path / "out")]) == 2
    assert "holds losses of `b`, but no rank" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_entropy_without_an_exponential_is_no_rank(tmp_path: Path) -> None:
    (tmp_path / "layer0.txt").write_text("Step 1: SE_post=7e5, PR_post=3\n")
    ((record,),) = (spectral_records(run, 64) for run in read_foreign(tmp_path))
    assert (record.spectral_entropy, record.soft_rank, record.hard_rank) == (7e5, None, 3.0)


def test_steps_and_counts_that_no_run_has_are_none(tmp_path: Path) -> None:
    many = "9" * 400
    (tmp_path / "layer0.txt").write_text(
        f"Step 1: PR_post=3\n  TAIL (n={many}): PR_post=4\nStep {many}: PR_post=5\nStep 2: PR_post=6\n"
    )
    (run,) = read_foreign(tmp_path)
    assert [(r.step, r.bucket, r.hard_rank) for r in spectral_records(run, 64)] == [
        (1, "pooled", 3.0),
        (2, "pooled", 6.0),
    ]
    (tmp_path / "t.csv").write_text(f"_step,{TAG}\n1,2\n1e300,3\n")
    (run,) = read_foreign(tmp_path / "t.csv")
    assert [r.step for r in spectral_records(run, 64)] == [1]
    assert sum(run.left_out.values()) == 1
