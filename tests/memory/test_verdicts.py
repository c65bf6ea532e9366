"""Verdicts: right laws agree, wrong ones differ, little data decides nothing, many rows give no false alarm."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_spectral.memory.critical_batch import critical_batches, measured_critical_batch
from lightning_spectral.memory.fit import cases
from lightning_spectral.memory.verdicts import (
    LAWS,
    Verdict,
    judge,
    untested,
    verdict_note,
    verdict_table,
    verdicts,
)
from lightning_spectral.text.tables import render

SAME = {"kind": "one-step", "alpha": 1.5, "n_items": 30000, "anisotropy": 0.0, "batch_size": None, "censored": False}


def rows_of_a_law(exponent, seeds=4, noise=0.005, rule="muon", rng=None, **fields):
    rng = rng or np.random.default_rng(0)
    return [
        {
            **SAME,
            "d": d,
            "seed": seed,
            "rule_label": rule,
            "count": d**exponent * (1 + noise * rng.standard_normal()),
            "predicted_count": d**1.4,
            "predicted_spread": noise * d**1.4,
            "asymptotic_exponent": 4 / 3,
            **fields,
        }
        for d in (128, 256, 512)
        for seed in range(seeds)
    ]


def test_verdicts_tell_right_from_wrong():
    right = {verdict.law: verdict for verdict in verdicts(rows_of_a_law(1.4))}
    slope = right["count ~ d^e, one step"]
    assert slope.verdict == "agrees"
    assert slope.low < slope.measured < slope.high
    assert slope.asymptote == pytest.approx(4 / 3)
    assert {verdict.verdict for verdict in verdicts(rows_of_a_law(1.2))} == {"differs"}


def test_two_seeds_decide_nothing():
    made = verdicts(rows_of_a_law(1.4, seeds=2))
    assert made
    assert all(verdict.verdict.startswith("not decided (2 seeds") for verdict in made)


def test_an_interval_that_could_not_have_noticed_is_no_agreement():
    loose = next(v for v in verdicts(rows_of_a_law(1.4, noise=0.5)) if v.kind == "exponent")
    assert loose.verdict.startswith("not decided (+-")


def test_a_table_of_true_laws_has_no_false_alarm():
    # 30 true laws a table: at 95 % each four of five tables would have a false "differs", together one in twenty has
    alarms = 0
    for table in range(25):
        rng = np.random.default_rng(table)
        rows = [
            row
            for number in range(15)
            for row in rows_of_a_law(1.4, noise=0.05, rng=rng, anisotropy=number / 100, predicted_count=None)
        ]
        for row in rows:
            row["predicted_count"] = row["d"] ** 1.4
        alarms += any(verdict.verdict == "differs" for verdict in verdicts(rows))
    assert alarms <= 5  # binomial(25, 0.05): 1.25 expected, more than 5 in one of 600


def test_three_seeds_that_know_no_spread_of_their_own_cannot_contradict():
    # two sizes of three seeds that happen to agree: four degrees of freedom, and no word of the theory on the spread
    known = Verdict("law", "muon", 1.0, 0.9, 1.1, 1.25, None, "", "", error=0.05, seeds=3)
    assert judge(known, 10) == "differs"
    assert judge(replace(known, freedom=4), 10).startswith("not decided (+-")
    assert judge(replace(known, freedom=4, error=0.01), 10) == "differs"


def test_true_laws_of_three_seeds_without_predicted_spread_give_no_false_alarm():
    alarms = 0
    for table in range(25):
        rng = np.random.default_rng(100 + table)
        rows = [row for number in range(10)
                for row in rows_of_a_law(1.4, seeds=3, noise=0.08, rng=rng, anisotropy=number / 100,
                                         predicted_spread=None)]  # fmt: skip
        for row in rows:
            row |= {"kind": "steps", "mode": "deflation", "step": 1, "predicted_count": row["d"] ** 1.4}
        alarms += any(verdict.verdict == "differs" for verdict in verdicts(rows))
    assert alarms <= 5  # binomial(25, 0.05)


def test_what_is_not_trusted_cannot_be_contradicted():
    rows = rows_of_a_law(1.2, prediction_note="d below 128")
    found = [verdict for verdict in verdicts(rows) if verdict.kind == "exponent"]
    assert found[0].verdict.startswith("not decided (off by 0.2; d below 128")


def test_judging_more_rows_together_widens_the_interval():
    one = Verdict("law", "muon", 1.0, 0.9, 1.1, 1.12, None, "", "", error=0.05, seeds=5)
    assert judge(one, 1) == "differs"
    assert judge(one, 30) == "agrees"
    assert judge(Verdict("law", "muon", 1.0, 0.9, 1.1, None, None, "", "", 0.05, 5)) == "no prediction"


def test_laws_without_rows_are_listed_as_not_tested():
    table = verdicts(rows_of_a_law(1.4))
    missing = untested(table)
    assert {(v.law, v.case) for v in missing} == {
        law for law in LAWS if law not in {("count ~ d^e, one step", "muon"), ("count / predicted count", "muon")}
    }
    assert render(verdict_table([*table, *missing])).count("not tested") == len(missing)
    assert "2 judged rows" in verdict_note([*table, *missing])


def test_different_experiments_are_never_one_verdict():
    rows = [*rows_of_a_law(1.4), *rows_of_a_law(1.2, anisotropy=1.0), *rows_of_a_law(1.4, n_items=1000)]
    assert len([v for v in verdicts(rows) if v.kind == "exponent"]) == 3


@pytest.mark.parametrize(
    "field", ["alpha", "n_items", "anisotropy", "batch_size", "dtype", "d_out", "mode", "steps", "step_scale"]
)
def test_cases_split_by_every_input(field):
    values = {"batch_size": (None, 16), "dtype": ("float32", "float64"), "mode": ("exact", "deflation")}
    first, second = values.get(field, (64, 128))
    rows = [{**SAME, "d": 32, field: value, "count": 1} for value in (first, second, first)]
    assert sorted(len(members) for members in cases(rows, "d").values()) == [1, 2]


def test_square_maps_of_any_size_are_one_case():
    assert len(cases([{**SAME, "d": d, "d_out": d} for d in (32, 64)], "d")) == 1
    assert len(cases([{**SAME, "d": 32}, {**SAME, "d": 32, "d_out": 32}], "d")) == 1  # rows of the first versions


def batch_rows(counts, d=64, rule="sgd"):
    return [
        {**SAME, "kind": "batch", "d": d, "batch_size": size, "count": count + wobble, "rule_label": rule,
         "predicted_count": min(count, 9.0), "predicted_critical_batch": 5.0,
         "asymptotic_critical_batch_exponent": 0.5}
        for size, count in counts.items()
        for wobble in (-0.1, 0.0, 0.1)
    ]  # fmt: skip


def test_the_critical_batch_of_sgd_is_found_among_small_batches():
    rows = batch_rows({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 10.0, None: 10.0})
    assert measured_critical_batch(rows) == pytest.approx(8 * 2 ** (np.log(9 / 8) / np.log(10 / 8)))
    point = critical_batches(rows)[0]
    assert point.seeds == 3
    assert 0 < point.log_error < 0.1
    assert point.predicted == pytest.approx(8 * 2 ** (np.log(8.1 / 8) / np.log(9 / 8)))  # of 9 in the whole population
    assert measured_critical_batch(batch_rows({16: 10.0, None: 10.0})) is None  # already there at the smallest
