"""SpectralAlarm: when it is raised, once for how long, and what it then does."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_spectral import SpectralAlarm, SpectralRankCallback, TailTokenProbe
from lightning_spectral.records import AlarmRecord, SpectralRecord, read_alarms, read_spectral
from tests.callbacks import tiny
from tests.records_factory import spectral


class Trainer:
    """What an alarm needs of one."""

    def __init__(self) -> None:
        self.callbacks, self.loggers = [], []
        self.should_stop, self.is_global_zero = False, True


def window(step: int, *ranks: float | None, **changes) -> list[SpectralRecord]:
    """One record a layer."""
    return [spectral(step=step, layer=layer, hard_rank=rank, **changes) for layer, rank in enumerate(ranks)]


def judged(alarm: SpectralAlarm, *windows: list[SpectralRecord]) -> list[AlarmRecord]:
    found: list[AlarmRecord] = []
    alarm.on_alarm = found.append
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for records in windows:
            alarm.on_spectral_window(Trainer(), records)
    return found


def test_a_share_of_the_untrained_network() -> None:
    alarm = SpectralAlarm(below=0.5)
    found = judged(alarm, window(0, 10, 20, 90), window(10, 9, 10, 11), window(20, 1, 9.9, 50), window(30, 1, 1, 1))
    assert [(a.step, a.value, a.reference) for a in found] == [(20, 9.9, 20)]  # 10 is not below; 30 is the same alarm
    assert "9.9 at step 20: 0.49 of the untrained network's (20), below the 0.5 allowed" in found[0].message


def test_it_is_raised_again_after_the_rank_came_back() -> None:
    windows = [window(step, rank) for step, rank in enumerate([20, 5, 5, 15, 5])]
    assert [alarm.step for alarm in judged(SpectralAlarm(below=0.5), *windows)] == [1, 4]


def test_patience_counts_windows_in_a_row() -> None:
    windows = [window(step, rank) for step, rank in enumerate([20, 5, 15, 5, 5, 5])]
    assert [alarm.step for alarm in judged(SpectralAlarm(below=0.5, patience=3), *windows)] == [5]


def test_a_share_of_the_width_and_of_the_past() -> None:
    by_width = SpectralAlarm(below=0.1, relative_to="width")
    assert [a.reference for a in judged(by_width, window(7, 6.3, width=64), window(8, 6.5, width=64))] == [64]
    by_past = SpectralAlarm(below=0.5, relative_to="past")
    found = judged(by_past, *[window(5 + k, rank) for k, rank in enumerate([4, 20, 12, 9])])
    assert [(a.step, a.reference) for a in found] == [(8, 20)]


def test_above() -> None:
    found = judged(SpectralAlarm(above=2, relative_to="past"), window(1, 10), window(2, 4), window(3, 8.1))
    assert [(a.step, a.reference) for a in found] == [(3, 4)]
    assert "above the 2 allowed" in found[0].message


def test_only_its_own_records_count() -> None:
    alarm = SpectralAlarm(below=0.5)
    others = [window(10, 1, bucket="head"), window(10, 1, site="pre"), window(10, 1, stage="validation")]
    assert judged(alarm, window(0, 20), *others) == []
    assert len(judged(alarm, window(10, 1))) == 1


def test_what_cannot_be_judged_is_said_once_and_is_no_alarm() -> None:
    alarm = SpectralAlarm(below=0.5)
    windows = [window(0, 20), *(window(step, None, status="empty") for step in (1, 2, 3))]
    for records in windows[:2]:
        alarm.on_spectral_window(Trainer(), records)
    with pytest.warns(UserWarning, match="2 windows in a row have no hard_rank of bucket tail to judge .status"):
        alarm.on_spectral_window(Trainer(), windows[2])
    alarm.on_spectral_window(Trainer(), windows[3])  # a second warning would be an error
    with pytest.warns(UserWarning, match="no window at step 0 was measured"):
        SpectralAlarm(below=0.5).on_spectral_window(Trainer(), window(100, 20))


def test_a_resumed_run_knows_its_reference_and_its_patience() -> None:
    alarm = SpectralAlarm(below=0.5, patience=2)
    judged(alarm, window(0, 20), window(1, 5))
    again = SpectralAlarm(below=0.5, patience=2)
    again.load_state_dict(alarm.state_dict())
    assert [a.step for a in judged(again, window(2, 5))] == [2]
    assert alarm.state_key == again.state_key != SpectralAlarm(below=0.4, patience=2).state_key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of `below` and `above`"),
        ({"below": 0.5, "above": 2}, "give one of `below` and `above`"),
        ({"below": -1}, "`below` must be a share > 0, got -1"),
        ({"above": "much"}, "`above` must be a number, got 'much'"),
        ({"below": 0.5, "relative_to": "widht"}, "`relative_to` must be one of .*got 'widht'; did you mean `width`"),
        ({"below": 0.5, "patience": 0}, "`patience` must be an integer >= 1, got 0"),
        ({"below": 0.5, "metric": "hard_rnk"}, "unknown `metric` 'hard_rnk': did you mean `hard_rank`"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralAlarm(**arguments)


def test_a_bucket_that_nothing_measures_is_refused_before_step_1(tmp_path) -> None:
    trainer = tiny.trainer(tmp_path, [SpectralRankCallback(1), SpectralAlarm(below=0.5)])
    with pytest.raises(MisconfigurationException, match="bucket `tail`, which nothing .* add a TailTokenProbe"):
        trainer.fit(tiny.Module(), tiny.loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("background", [False, True])
def test_in_a_trainer(tmp_path, background) -> None:
    """A threshold that any rank is below: one warning, one line in the run folder, a call, and the end of training."""
    found: list[AlarmRecord] = []
    probe = TailTokenProbe(1, counts=tiny.counts(), background=background)
    alarm = SpectralAlarm(below=1.0, bucket="pooled", relative_to="width", patience=2, on_alarm=found.append, stop=True)
    trainer = tiny.trainer(tmp_path, [probe, alarm], max_steps=8)
    with pytest.warns(UserWarning, match="SpectralAlarm: hard_rank of bucket pooled is .* training stops"):
        trainer.fit(tiny.Module(), tiny.loader(512, 64))
    assert 2 <= trainer.global_step < 8
    (written,) = read_alarms(tmp_path).records
    assert found == [written]
    records = [r for r in read_spectral(tmp_path).records if (r.step, r.bucket) == (1, "pooled")]
    assert written.step == 1
    assert min(r.hard_rank for r in records) <= written.value <= max(r.hard_rank for r in records)
    assert written.run_id == records[0].run_id
    assert replace(written, message="") == replace(found[0], message="")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_holds_the_window_that_is_being_solved(tmp_path, background) -> None:
    found: list[AlarmRecord] = []

    def fit(max_steps: int, ckpt_path: str | None = None) -> None:
        probe = SpectralRankCallback(1, background=background, dirpath=str(tmp_path / "run"))
        alarm = SpectralAlarm(below=1.0, bucket="pooled", relative_to="width", patience=4, on_alarm=found.append)
        trainer = tiny.trainer(tmp_path, [alarm, probe], max_steps=max_steps)
        trainer.fit(tiny.Module(), tiny.loader(512, 64), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(2)
    with pytest.warns(UserWarning, match="for 4 windows"):
        fit(5, str(tmp_path / "x.ckpt"))
    assert [alarm.step for alarm in found] == [3]


@pytest.mark.parametrize(
    ("callback", "changes", "message"),
    [
        (TailTokenProbe(1, group_by="position"), {"bucket": "position_4"}, "bucket `position_4`: did you mean"),
        (SpectralRankCallback(1), {"bucket": "pooled", "site": "pre"}, r"`sites=\['post', 'pre'\]` measures it"),
        (SpectralRankCallback(1), {"bucket": "pooled", "stage": "test"}, r"`on=\['train', 'test'\]` measures it"),
    ],
)
def test_what_would_never_be_heard_is_refused_before_step_1(tmp_path, callback, changes, message) -> None:
    trainer = tiny.trainer(tmp_path, [callback, SpectralAlarm(below=0.5, **changes)])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(tiny.Module(), tiny.loader())
