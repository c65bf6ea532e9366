"""Windows that take much of a training's time are spoken of, with what would make it little."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lightning_spectral import SpectralRankCallback
from lightning_spectral.probe import cost
from tests.callbacks import tiny


def test_the_interval_that_is_said_makes_windows_a_fiftieth() -> None:
    # 9 s are a fiftieth of what 17,640 steps of 25 ms and a window take
    sentence = cost.said(9.0, 14.0, 200)
    assert "a window took 9.0 s of the 14.0 s since the last one (64%): `every_n_steps=18000` makes it 2%" in sentence
    assert pytest.approx(0.02, abs=0.001) == 9.0 / (9.0 + 18_000 * 5.0 / 200)
    assert cost.said(9.0, 90.0, 200) == ""
    assert cost.said(9.0, 89.0, 200)


def test_the_first_window_small_ones_and_that_of_the_last_step_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 15.0, 16.5, 30.0])
    monkeypatch.setattr(cost, "perf_counter", lambda: next(times))
    own = cost.Cost(100)
    assert own.of_window(0, 9.0) == ""  # nothing to compare with
    assert own.of_window(100, 0.9) == ""  # of 5 s, but short
    assert own.of_window(110, 1.4) == ""  # the last step
    assert own.of_window(210, 8.0).startswith("a window took 8.0 s of the 13.5 s")


def test_a_run_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LEAST_S", 0.0)
    monkeypatch.setattr(cost, "MUCH", 1e-6)
    for background, expected in ((False, 1), (True, 0)):
        callback = SpectralRankCallback(1, dirpath=tmp_path / str(background), background=background)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.trainer(tmp_path, [callback]).fit(tiny.Module(), tiny.loader())
        said = [str(one.message) for one in caught if "a window took" in str(one.message)]
        assert len(said) == expected
        assert all("SpectralRankCallback: step 1: a window took" in message for message in said)
