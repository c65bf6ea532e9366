from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.analysis.matched import Curve, compare_matched, falling, match, matched_pairs, matched_table
from lightning_spectral.analysis.reading import load_runs
from tests.analysis.synthetic import write_one, write_study


def curve(loss: list[float], ranks: list[float]) -> Curve:
    steps = np.arange(len(loss), dtype=float) * 10
    return Curve(steps, steps * 1024, np.array(loss), np.array(ranks))


FAST, SLOW = curve([5.0, 4.0, 3.0], [10.0, 40.0, 160.0]), curve([5.0, 4.5, 3.5], [10.0, 20.0, 30.0])


def test_equal_loss_is_read_off_between_windows() -> None:
    # half way in loss is half way in ln rank: sqrt(40 * 160) = 80
    assert match(FAST, SLOW) == pytest.approx((3.5, 3.5, 3.5, 80.0, 30.0))


def test_equal_step_and_tokens_leave_the_loss_gap() -> None:
    assert match(FAST, SLOW, "step") == pytest.approx((20.0, 3.0, 3.5, 160.0, 30.0))
    assert match(FAST, SLOW, "tokens") == pytest.approx((20.0 * 1024, 3.0, 3.5, 160.0, 30.0))
    blind = Curve(FAST.steps, np.full(3, np.nan), FAST.loss, FAST.ranks)
    assert match(blind, SLOW, "tokens") is None


def test_tolerance() -> None:
    late = curve([3.49, 3.2, 3.1], [50.0, 60.0, 70.0])  # its first window is already below the other's best
    assert match(late, SLOW, tolerance=0.005) is None
    assert match(late, SLOW, tolerance=0.02) == pytest.approx((3.5, 3.49, 3.5, 50.0, 30.0))


def test_study_of_matched_runs(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.4}, widths=(128, 256, 512), seeds=(0, 1), noise=0.0)
    runs = load_runs([tmp_path])
    pairs, unmatched = matched_pairs(runs, metrics=["hard_rank"])
    assert unmatched == 0
    assert len(pairs) == 3 * 2 * 4  # width x seed x bucket
    assert all(abs(pair.loss_a - pair.loss_b) < 1e-12 for pair in pairs)
    found = compare_matched(pairs)
    slope = next(c for c in found if c.kind == "matched_loss_slope" and c.where["bucket"] == "tail")
    assert {slope.a, slope.b} == {"adamw", "muon"}
    assert abs(slope.estimate) == pytest.approx(0.5, abs=0.05)  # at equal loss muon is a little less far in training
    assert slope.method == "mixed_of_ln_ratio"
    assert slope.p_holm == slope.p  # one pair
    assert len([c for c in found if c.kind == "matched_loss"]) == 3 * 4
    header, rows = matched_table(pairs)
    assert {len(row) for row in rows} == {len(header)}


def test_runs_without_losses_are_counted(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 128)
    silent = write_one(tmp_path, "adamw", 0.4, 128)
    (silent / "losses.jsonl").unlink()
    assert matched_pairs(load_runs([tmp_path]), metrics=["hard_rank"]) == ([], 4)


def test_two_widths_have_no_slope(tmp_path: Path) -> None:
    write_study(tmp_path, {"muon": 0.9, "adamw": 0.4}, widths=(128, 256))
    pairs, _ = matched_pairs(load_runs([tmp_path]), metrics=["hard_rank"])
    assert {c.status for c in compare_matched(pairs) if c.kind == "matched_loss_slope"} == {
        "refused:fewer_than_3_widths"
    }
    assert all(math.isnan(c.p) for c in compare_matched(pairs))


def test_bad_options(tmp_path: Path) -> None:
    write_one(tmp_path, "muon", 0.9, 128)
    runs = load_runs([tmp_path])
    with pytest.raises(ValueError, match="unknown axis `time`"):
        matched_pairs(runs, axis="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nats"):
        matched_pairs(runs, tolerance=-1.0)


def test_the_falling_curve_is_the_nearest_one() -> None:
    np.testing.assert_allclose(falling(np.array([5.0, 3.0, 4.0, 1.0])), [5.0, 3.5, 3.5, 1.0])


def test_a_noisy_loss_does_not_reach_a_target_early() -> None:
    """Equal ranks at equal true loss, one of the two losses noisy (.05 nats, 200 windows): ln(a/b) should be 0.

    The lowest loss so far has a bias of .072 here; the falling curve's is .024 with a standard error of .005.
    """
    rng, t, gaps = np.random.default_rng(2), np.linspace(0, 1, 200), []
    for _ in range(100):
        pair = []
        for speed, noise in ((4, 0.0), (3, 0.05)):
            loss = 3.8 + 3 * np.exp(-speed * t)
            ranks = 60 * np.exp(-0.8 * (loss - 3.8)) * np.exp(rng.normal(0, 0.02, 200))
            pair.append(Curve(t * 1000, t * 1e6, loss + rng.normal(0, noise, 200), ranks))
        found = match(*pair)
        assert found is not None
        gaps.append(math.log(found[3] / found[4]))
    assert abs(float(np.mean(gaps))) < 0.04


def test_training_losses_are_not_matched_on(tmp_path: Path) -> None:
    for name in ("muon", "adamw"):
        file = write_one(tmp_path, name, 0.5, 128) / "losses.jsonl"
        file.write_text(file.read_text().replace("validation", "train"))
    pairs, unmatched = matched_pairs(load_runs([tmp_path]), metrics=["hard_rank"])
    assert not pairs
    assert unmatched == 4
