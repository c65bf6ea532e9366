"""Which folders below a logdir are runs, and what they are called."""

from __future__ import annotations

from pathlib import Path

from lightning_spectral.tensorboard.folders import FoundRuns, find_runs, prefix_of, roots_of
from tests.analysis.synthetic import write_one


def test_runs_at_any_depth_without_earlier_ones(tmp_path: Path) -> None:
    write_one(tmp_path / "sweep" / "a", "muon", 0.9, 128)
    write_one(tmp_path, "adamw", 0.3, 128)
    write_one(tmp_path / "adamw_128_0" / "previous", "sgd", 0.3, 128)
    write_one(tmp_path / "adamw_128_0" / "checkpoints", "sgd", 0.3, 128)
    assert find_runs({"": tmp_path}) == {
        "adamw_128_0": tmp_path / "adamw_128_0",
        "sweep/a/muon_128_0": tmp_path / "sweep/a/muon_128_0",
    }


def test_numbers_in_names_are_ordered_by_their_value(tmp_path: Path) -> None:
    for width in (128, 64, 1024):
        write_one(tmp_path, "muon", 0.9, width)
    assert list(find_runs({"": tmp_path})) == ["muon_64_0", "muon_128_0", "muon_1024_0"]


def test_the_logs_of_a_run_lead_to_it(tmp_path: Path) -> None:
    run = write_one(tmp_path, "muon", 0.9, 128)
    logs = run / "logs" / "tensorboard" / "version_0"
    logs.mkdir(parents=True)
    for below in (run, run / "logs", logs):
        assert find_runs({"": below}) == {"muon_128_0": run}, below


def test_a_folder_that_only_lies_far_below_a_run_does_not(tmp_path: Path) -> None:
    run = write_one(tmp_path, "muon", 0.9, 128)
    deep = run / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    assert find_runs({"": deep}) == {}


def test_roots_of_the_flags(tmp_path: Path) -> None:
    assert roots_of("out") == {"": Path("out")}
    assert roots_of("", "mine:/a,/b") == {"mine": Path("/a"), "/b": Path("/b")}
    assert roots_of("gs://bucket/logs") == {}
    assert roots_of("", "x:gs://bucket,y:/b") == {"y": Path("/b")}
    assert roots_of("") == {}
    write_one(tmp_path, "muon", 0.9, 128)
    assert list(find_runs(roots_of("", f"mine:{tmp_path}"))) == ["mine/muon_128_0"]


def test_new_runs_are_found_while_tensorboard_runs(tmp_path: Path, monkeypatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr("lightning_spectral.tensorboard.folders.time.monotonic", lambda: next(clock))
    runs = FoundRuns({"": tmp_path})
    assert dict(runs()) == {}
    write_one(tmp_path, "muon", 0.9, 128)
    assert dict(runs()) == {}  # looked a second ago
    assert list(runs()) == ["muon_128_0"]


def test_a_logdir_that_does_not_exist_yet_has_no_runs(tmp_path: Path) -> None:
    assert find_runs({"": tmp_path / "later"}) == {}


def test_tensorboards_own_names_of_a_run(tmp_path: Path) -> None:
    """As TensorBoard's multiplexer makes them: the path below the logdir, behind the name of ``--logdir_spec``."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    run = write_one(tmp_path, "muon", 0.9, 128)
    EventFileWriter(str(run / "logs" / "tensorboard")).close()
    for logdir, spec in ((tmp_path, ""), (run, ""), (run / "logs", ""), ("", f"mine:{tmp_path}"), ("", f"mine:{run}")):
        roots = roots_of(str(logdir), spec)
        theirs = EventMultiplexer()
        for name, root in roots.items():
            theirs.AddRunsFromDirectory(str(root), name or None)
        (own,) = theirs.Runs()
        ((name, folder),) = find_runs(roots).items()
        prefix = prefix_of(roots, name, folder)
        assert own == prefix or own.startswith(f"{prefix}/" if prefix else ""), (own, prefix)
        assert (prefix == "") is (logdir in (run, run / "logs")), (own, prefix)
