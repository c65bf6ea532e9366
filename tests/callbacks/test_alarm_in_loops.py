"""SpectralAlarm outside of a Lightning Trainer: plain loop, Fabric, Hugging Face, and where the environment adds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from lightning_spectral import FabricSpectralProbe, SpectralAlarm, SpectralRankCallback, TailTokenProbe, observe
from lightning_spectral.callbacks.injected import measurements
from lightning_spectral.callbacks.probe_file import load_callbacks
from lightning_spectral.records import AlarmRecord, read_alarms, read_run, read_spectral
from tests.scripts import toys
from tests.scripts.test_shells import STEPS, Model, by_key, optimizer_of

SIZE = 1024 // toys.T + 1  # a spectrum of fewer tokens is not judged
FOUND: dict[str, Any] = {"bucket": "pooled", "below": 1.0, "relative_to": "width", "patience": 2}  # always so


def batches() -> list[Any]:
    return list(toys.ids(SIZE * STEPS, toys.T).split(SIZE))


def any_rank(heard: list[AlarmRecord], **changes: Any) -> SpectralAlarm:
    return SpectralAlarm(**{**FOUND, "on_alarm": heard.append, **changes})


def plain(path: Path, alarms: list[SpectralAlarm]) -> int:
    model = Model()
    optimizer = optimizer_of(model)
    with observe(model, 1, out=path, counts=toys.counts(), alarms=alarms, background=False) as probe:
        for batch in batches():
            model(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()
            if probe.should_stop:
                break
    return probe.num_steps


def fabric(path: Path, alarms: list[SpectralAlarm]) -> int:
    probe = FabricSpectralProbe(TailTokenProbe(1, counts=toys.counts(), dirpath=str(path)), alarms=alarms)
    runner = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    model = Model()
    wrapped, optimizer = runner.setup(model, optimizer_of(model))
    for batch in batches():
        runner.backward(wrapped(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if probe.should_stop:
            break
    probe.remove()
    return probe.step


def hf_trainer(path: Path, probe: Any, **changes: Any) -> Any:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader([{"input_ids": row} for row in toys.ids(SIZE * STEPS, toys.T)], batch_size=SIZE)  # type: ignore[arg-type]

    given = {"max_steps": STEPS, "per_device_train_batch_size": SIZE, "use_cpu": True, "report_to": [], "seed": 0}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    arguments = transformers.TrainingArguments(**{"output_dir": str(path), **given, **quiet, **changes})
    model = Model()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(model, arguments, callbacks=[probe], optimizers=(optimizer, schedule))


def hugging_face(path: Path, alarms: list[SpectralAlarm]) -> int:
    from lightning_spectral import HuggingFaceProbe

    probe = HuggingFaceProbe(1, counts=toys.counts(), dirpath=str(path), alarms=alarms, background=False)
    trainer = hf_trainer(path / "out", probe)
    trainer.train()
    return int(trainer.state.global_step)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("loop", [plain, fabric, hugging_face])
def test_an_alarm_is_written_told_and_stops_the_loop(tmp_path: Path, loop: Any) -> None:
    heard: list[AlarmRecord] = []
    said = "training stops" if loop is hugging_face else "`should_stop` is set"
    with pytest.warns(UserWarning, match=f"SpectralAlarm: hard_rank of bucket pooled is .* for 2 windows; {said}"):
        num_steps = loop(tmp_path, [any_rank(heard, stop=True)])
    assert num_steps == 2
    (written,) = read_alarms(tmp_path).records
    assert heard == [written]
    assert written.step == 1
    ranks = [r.hard_rank or 0.0 for r in read_spectral(tmp_path).records if (r.step, r.bucket) == (1, "pooled")]
    assert min(ranks) <= written.value <= max(ranks)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("loop", [plain, fabric, hugging_face])
def test_without_stop_the_loop_goes_on(tmp_path: Path, loop: Any) -> None:
    heard: list[AlarmRecord] = []
    assert loop(tmp_path, [any_rank(heard, patience=1), any_rank(heard, bucket="tail", patience=6)]) == 5
    assert [alarm.step for alarm in heard] == [0]


@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_loop_knows_its_patience(tmp_path: Path, background: bool) -> None:
    heard: list[AlarmRecord] = []
    model = Model()

    def steps(first: int, last: int, state: dict[str, Any] | None) -> dict[str, Any]:
        alarms, resume = [any_rank(heard, patience=3)], state is not None
        with observe(model, 1, out=tmp_path, background=background, resume=resume, alarms=alarms) as probe:
            if state is not None:
                probe.load_state_dict(state)
            for batch in batches()[first:last]:
                model(batch)["loss"].backward()
                probe.step()
            return probe.state_dict()

    state = steps(0, 2, None)
    with pytest.warns(UserWarning, match="for 3 windows"):
        steps(2, 5, state)
    assert [alarm.step for alarm in heard] == [2]


@pytest.mark.parametrize(
    ("alarm", "message"),
    [
        (SpectralAlarm(below=0.5), "bucket `tail`, which nothing here measures: give `counts=`"),
        (SpectralAlarm(below=0.5, bucket="poled"), "bucket `poled`: did you mean `pooled`"),
        (SpectralAlarm(below=0.5, bucket="pooled", site="pre"), r"site `pre`.*`sites=\['post', 'pre'\]` measures it"),
        (SpectralAlarm(below=0.5, stage="validation"), "stage `validation`: in this loop only `train` is measured"),
        ("tail", r"`alarms` must be a list of SpectralAlarm, got \['tail'\]"),
    ],
)
def test_what_would_never_be_heard_is_refused(tmp_path: Path, alarm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observe(Model(), 1, out=tmp_path, alarms=[alarm])
    assert not (tmp_path / "run.json").exists()


def test_a_single_alarm_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`alarms` must be a list of SpectralAlarm"):
        observe(Model(), 1, out=tmp_path, alarms=SpectralAlarm(below=0.5))  # type: ignore[arg-type]


def test_fabric_is_told_to_give_a_tail_token_probe() -> None:
    with pytest.raises(ValueError, match="bucket `tail`, which nothing here measures: give it a TailTokenProbe"):
        FabricSpectralProbe(SpectralRankCallback(1), alarms=[SpectralAlarm(below=0.5)])


YAML = """
callbacks:
  - class_path: SpectralRankCallback
  - class_path: TailTokenProbe
    init_args: {group_by: position}
  - class_path: SpectralAlarm
    init_args: {bucket: BUCKET, below: 0.5}
"""


def probe_file(folder: Path, bucket: str) -> Path:
    (folder / "probe.yaml").write_text(YAML.replace("BUCKET", bucket))
    return folder / "probe.yaml"


def test_an_alarm_of_a_probe_file_is_given_to_what_measures_its_bucket(tmp_path: Path) -> None:
    found = measurements(probe_file(tmp_path, "position_03"))
    assert [[alarm.bucket for alarm in alarms] for _, alarms in found] == [["position_03"]]
    with pytest.warns(UserWarning, match="bucket `tail`, which nothing here measures.* It is left out"):
        assert [alarms for _, alarms in measurements(probe_file(tmp_path, "tail"))] == [[]]


def test_an_alarm_of_a_probe_file_runs_in_a_trainer(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning_spectral.callbacks import VARIABLE
    from tests.callbacks import tiny

    monkeypatch.setenv(VARIABLE, str(probe_file(tmp_path, "position_03")))
    assert len(load_callbacks(tmp_path / "probe.yaml")) == 3
    trainer = tiny.trainer(tmp_path, [], max_steps=2)
    trainer.fit(tiny.Module(), tiny.loader())
    assert trainer.global_step == 2


@pytest.mark.parametrize("counts", ["stream", "array"])
@pytest.mark.filterwarnings("default")
def test_a_resumed_hugging_face_run_has_the_records_of_an_uninterrupted_one(tmp_path: Path, counts: str) -> None:
    from lightning_spectral import HuggingFaceProbe

    def probe(path: Path, **changes: Any) -> Any:
        given: Any = "stream" if counts == "stream" else toys.counts()
        return HuggingFaceProbe(2, counts=given, dirpath=str(path), num_jackknife_groups=2, **changes)

    hf_trainer(tmp_path / "a_out", probe(tmp_path / "a")).train()

    class Preempted(Exception): ...

    class Stopping(HuggingFaceProbe):
        def on_save(self, *args: Any, **objects: Any) -> None:
            super().on_save(*args, **objects)
            raise Preempted

    first: Any = Stopping(2, counts="stream" if counts == "stream" else toys.counts(), dirpath=str(tmp_path / "b"),
                          num_jackknife_groups=2)  # fmt: skip
    with pytest.raises(Preempted):
        hf_trainer(tmp_path / "out", first, save_strategy="steps", save_steps=3).train()
    resumed = hf_trainer(tmp_path / "out", probe(tmp_path / "b"), save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert by_key(tmp_path / "b") == by_key(tmp_path / "a")
    assert len({record.run_id for record in read_spectral(tmp_path / "b").records}) == 1
    assert read_run(tmp_path / "b").finished
    assert all(record.tokens_seen is not None for record in read_spectral(tmp_path / "b").records)
