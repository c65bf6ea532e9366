"""The eight sentences hold on rows that obey them, fail on rows that do not, and are left open by few rows."""

import zlib

import numpy as np
import pytest
import scipy.stats

from lightning_spectral.cli import main
from lightning_spectral.memory.claims import SENTENCES, claims, claims_tables, decide
from lightning_spectral.memory.claims_runs import BETAS, amplification_rows, gram_rows, plan
from lightning_spectral.memory.estimates import Estimate, joint, lags, mean_of
from lightning_spectral.memory.figures_claims import draw_claims
from lightning_spectral.theory.problem import MemoryProblem

SEEDS = 4


def made(part, rule, count, noise=0.02, **fields):
    rng = np.random.default_rng(zlib.crc32(repr((part, rule, fields)).encode()))
    base = {"kind": "one-step", "alpha": 1.5, "n_items": 30000, "anisotropy": 0.0, "batch_size": None, "status": "ok",
            "asymptotic_exponent": 1.0, "asymptotic_critical_batch_exponent": 1.0, "predicted_critical_batch": 10.0,
            "predicted_spread": noise * count, "information_limit": fields["d"] ** 2 / 20}  # fmt: skip
    return [
        {**base, **fields, "part": part, "rule": rule, "seed": seed, "predicted_count": count,
         "count": count * (1 + noise * rng.standard_normal())}
        for seed in range(SEEDS)
    ]  # fmt: skip


def world(obeys):
    """Rows of a world in which all sentences hold, or in which Muon is but another SGD and the limit out of reach."""
    rows = []
    for d in (256, 512, 1024, 2048, 4096, 8192):
        rows += made("capacity", "muon", d ** (4 / 3 if obeys else 1 / 3), d=d)
        rows += made("capacity", "newton", d ** (4 / 3 if obeys else 0.9), d=d)
        rows += made("capacity", "sgd", 3 * d ** (1 / 3), d=d)
        rows += made("amplification", "muon", d ** (1.0 if obeys else 0.1), d=d, kind="amplification")
    for d in (64, 128, 256):
        for rule, critical in (("muon", (d / 8) ** 2 if obeys else d**0.5), ("sgd", d**0.5)):
            for size in (*(2.0**k for k in range(12)), None):
                rows += made("batch", rule, min(size or 1e9, critical), noise=0.01, d=d, batch_size=size, kind="batch")
    for d in (64, 128):
        for step in range(1, 9):
            muon = 40.0 * step if obeys else 9.0 * 2**step
            sgd = (8.0 if step == 1 else 40.0 * (step - 1)) if obeys else 8.0 + step
            for rule, count in (("muon", muon), ("sgd", sgd)):
                rows += made("deflation", rule, count, noise=0.01, d=d, step=step, kind="steps")
                rows += made("exact", rule, d**2 / (30 if obeys else 200), d=d, step=step, kind="steps")
    for beta in BETAS:
        rows += made("anisotropy", "newton", 100.0, d=128, anisotropy=beta)
        rows += made("anisotropy", "muon", 100.0 * (0.7**beta if obeys else 1.0), d=128, anisotropy=beta)
    return rows


def test_a_world_that_obeys_the_abstract_is_found_to(tmp_path):
    rows = world(obeys=True)
    found = claims(rows)
    assert [claim.verdict for claim in found] == ["holds"] * SENTENCES, [claim.why for claim in found]
    difference = found[0].estimates[0]
    assert difference.value == pytest.approx(1.0, abs=0.03)
    assert difference.predicted == pytest.approx(1.0, abs=1e-9)
    assert difference.asymptote == pytest.approx(1.0)
    assert found[2].estimates[0].value == pytest.approx(1.5, abs=0.1)  # 2 of Muon less 1/2 of SGD
    assert draw_claims(rows, found, tmp_path).stat().st_size > 30_000


def test_a_world_that_does_not_is_found_not_to():
    found = claims(world(obeys=False))
    verdicts = {claim.number: claim.verdict for claim in found}
    assert verdicts[1] == "fails"
    assert verdicts[2] == "fails"
    assert verdicts[3] == "fails"
    assert verdicts[6] == "fails"
    assert verdicts[7] == "fails"
    assert verdicts[8] == "fails"
    assert "holds" not in verdicts.values()


def test_no_rows_decide_nothing(tmp_path):
    found = claims([])
    assert [claim.verdict for claim in found] == ["not decided"] * SENTENCES
    assert [row[3] for row in claims_tables(found)[0].rows] == ["not decided"] * SENTENCES
    assert draw_claims([], found, tmp_path).exists()


def test_an_interval_that_reaches_over_says_what_it_could_tell_apart():
    verdict, why = decide(Estimate("e", 0.6, 0.2), 0.5)
    assert verdict == "not decided"
    assert "tells apart what differs by 1.1" in why  # twice 2.73 standard errors
    assert decide(Estimate("e", 0.6, 0.02), 0.5)[0] == "holds"
    assert decide(Estimate("e", 0.4, 0.02), 0.5)[0] == "fails"
    assert decide(Estimate("e", 0.4, float("inf")), 0.5)[0] == "not decided"


def test_few_seeds_know_their_own_spread_badly():
    two, forty = (mean_of("e", [1.0, 1.2] * half, "") for half in (1, 20))
    assert two.interval[1] - two.value == pytest.approx(scipy.stats.t.ppf(0.975, 1) * 0.1)
    assert decide(two, 0.5)[0] == "not decided"  # six standard errors of one degree of freedom
    assert decide(forty, 0.5)[0] == "holds"
    assert mean_of("e", [1.0], "") is None
    # Welch's freedom of equal parts is the sum of theirs, of one part its own
    assert joint((0.3, 3), (0.3, 3)) == pytest.approx((0.3 * 2**0.5, 6))
    assert joint((0.3, 3), (0.0, 3)) == pytest.approx((0.3, 3))


def test_a_constant_lag_is_measured_as_such():
    rows = made("deflation", "muon", 1.0, d=64, step=1)[:0]
    for step in range(1, 9):
        rows += made("deflation", "muon", 10.0 * 2 ** (step - 1), noise=0, d=64, step=step)
        rows += made("deflation", "sgd", 10.0 * 2 ** (step - 4), noise=0, d=64, step=step)
    assert [lag for _, lag in lags(rows, 64)] == pytest.approx([3.0] * 5)


def test_gram_rows_are_one_step_rows():
    row = next(gram_rows(MemoryProblem(d=256, n_items=2000, alpha=1.5, seed=3)))
    assert (row["kind"], row["method"], row["rule"], row["distinct"]) == ("one-step", "gram", "sgd", 2000)
    assert abs(row["count"] - row["predicted_count"]) < 5 * row["predicted_spread"]
    sampled = next(gram_rows(MemoryProblem(d=256, n_items=2000, alpha=1.5, batch_size=8), "batch"))
    assert sampled["distinct"] <= 8
    assert sampled["expected_distinct"] < 8


def test_the_amplification_is_the_predicted_one():
    rows = [next(amplification_rows(MemoryProblem(d=128, n_items=4000, alpha=1.5, seed=seed))) for seed in range(2)]
    mean = np.mean([row["count"] for row in rows])
    assert mean == pytest.approx(rows[0]["predicted_count"], rel=0.15)  # 250 items of spread 1 over a signal of 2 or 3
    assert mean > 20


def test_every_part_of_the_plan_has_sizes_for_a_line():
    parts = plan(30000, 0, {"device": "cpu", "chunk_size": 4096, "cache_bytes": 2**30})
    assert sum(part.share for part in parts) == pytest.approx(1)
    for part in parts:
        assert len(part.sizes) >= (2 if part.name == "anisotropy" else 4), part.name


def test_the_command_says_what_a_tiny_budget_cannot_decide(tmp_path, capsys):
    arguments = ["--budget", "11s", "--n-items", "1000", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["memory", "claims", *arguments]) == 0
    text = capsys.readouterr().out
    assert "not decided" in text
    assert "Give it more time" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"claims.md", "claims.json", "claims.png", "results.jsonl"}
    assert main(["memory", "report", str(tmp_path)]) == 0
    assert "not decided" in capsys.readouterr().out
