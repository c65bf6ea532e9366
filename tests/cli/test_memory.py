import json

import numpy as np
import pytest

from lightning_spectral.cli import main
from lightning_spectral.memory import fit as memory_fit
from lightning_spectral.memory import reproduce as memory_reproduce
from lightning_spectral.memory.figures import draw_all
from lightning_spectral.memory.options import parse_budget
from lightning_spectral.theory.rules import steps_for_capacity

SMALL = ["--n-items", "400", "--seeds", "2", "--device", "cpu"]


def run(verb, *arguments, out):
    assert main(["memory", verb, *arguments, "--out", str(out)]) == 0
    return memory_fit.read_results(out)


def test_one_step_writes_every_input_and_output(tmp_path, capsys):
    rows = run("one-step", "--d", "16", "32", "--rules", "sgd", "muon", "ns5", *SMALL, out=tmp_path)
    assert len(rows) == 2 * 2 * 3
    row = next(row for row in rows if row["rule"] == "muon" and row["d"] == 32)
    inputs = {
        "d",
        "n_items",
        "alpha",
        "batch_size",
        "seed",
        "anisotropy",
        "dtype",
        "rule",
        "settings",
        "device",
        "chunk_size",
    }
    outputs = {
        "count",
        "prefix",
        "head_recall",
        "tail_recall",
        "mass",
        "curve_rank",
        "curve_recall",
        "distinct",
        "censored",
    }
    theory = {
        "predicted_count",
        "predicted_prefix",
        "predicted_curve_recall",
        "asymptotic_exponent",
        "prediction_trusted",
    }
    assert inputs | outputs | theory <= set(row)
    assert row["predicted_count"] == pytest.approx(row["count"], rel=0.5)
    assert next(row for row in rows if row["rule"] == "ns5")["predicted_count"] > 5
    assert (tmp_path / "count_vs_d.png").stat().st_size > 10_000
    assert "muon" in capsys.readouterr().out


def test_results_do_not_depend_on_chunks_or_cache(tmp_path):
    counts = []
    for name, extra in (("a", []), ("b", ["--chunk-size", "100", "--cache-gib", "0"])):
        rows = run("one-step", "--d", "32", "--rules", "muon", *SMALL, "--no-figures", *extra, out=tmp_path / name)
        counts.append([row["count"] for row in rows])
    assert counts[0] == counts[1]


def test_options_reach_the_run(tmp_path):
    rules = ["--rules", "muon", "ns", "newton", "--lam-scale", "0.2", "--ridge", "0.01"]
    iteration = ["--coefficients", "polar_express", "--ns-steps", "auto"]
    problem = ["--d", "24", "--anisotropy", "0.5", "--alpha", "1.3", "--batch-size", "64", "--dtype", "float64"]
    arguments = [*rules, *iteration, *problem, "--first-seed", "5", *SMALL, "--no-figures"]
    rows = run("one-step", *arguments, out=tmp_path)
    assert {row["seed"] for row in rows} == {5, 6}
    settings = {row["rule"]: row["settings"] for row in rows}
    assert settings["muon"]["lam"] > 0
    assert settings["ns"]["ns_steps"] == steps_for_capacity(24, 1.3 + 0.25, "polar_express")
    assert settings["ns"]["coefficients"] == "polar_express"
    assert settings["newton"] == {"ridge": 0.01}
    assert {(row["anisotropy"], row["batch_size"], row["dtype"]) for row in rows} == {(0.5, 64, "float64")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--alpha", "1"], "alpha"),
        (["--d", "1"], "d"),
        (["--n-items", "1"], "n_items"),
        (["--batch-size", "0"], "batch_size"),
        (["--seeds", "0"], "seeds"),
        (["--first-seed", "-1"], "first_seed"),
        (["--rules", "adam"], "rules"),
        (["--lam", "-1"], "lam"),
        (["--ridge", "nan"], "ridge"),
        (["--ns-steps", "0"], "ns_steps"),
        (["--coefficients", "best"], "coefficients"),
        (["--dtype", "float16"], "dtype"),
        (["--device", "abacus"], "--device"),
        (["--chunk-size", "0"], "chunk_size"),
        (["--anisotropy", "-1"], "anisotropy"),
        (["--anisotropy", "60"], "anisotropy"),
        (["--rules", "newton", "--batch-size", "4"], "ridge"),
        (["--config", "/nowhere.yaml"], "--config"),
        (["--d", "16", "16"], "--d"),
        (["--alpha", "1.5", "1.50"], "--alpha"),
        (["--batch-size", "population", "population"], "--batch-size"),
        (["--rules", "ns5", "ns"], "--rules"),
        (["--rules", "power", "--power", "1"], "power"),
        (["--d-out", "1"], "d_out"),
    ],
)
def test_bad_values_are_one_sentence_and_exit_code_2(arguments, named, tmp_path, capsys):
    assert main(["memory", "one-step", "--d", "16", "--n-items", "100", "--out", str(tmp_path), *arguments]) == 2
    message = capsys.readouterr().err
    assert f"`--{named.removeprefix('--').replace('_', '-')}`" in message  # as it was typed
    assert "Traceback" not in message


def test_too_few_items_warn_and_still_run(tmp_path, capsys):
    run("one-step", "--d", "64", "--n-items", "60", "--seeds", "1", "--rules", "muon", "--no-figures", out=tmp_path)
    assert "censored" in capsys.readouterr().out


def test_batch_steps_theory_and_newton_schulz(tmp_path):
    batch = run("batch", "--d", "16", "--batch-size", "8", "64", "population", *SMALL, out=tmp_path / "batch")
    assert {row["batch_size"] for row in batch} == {8, 64, None}
    assert all(row["expected_distinct"] > 1 for row in batch if row["batch_size"])
    assert all(row["predicted_critical_batch"] > 1 for row in batch if row["batch_size"] is None)
    deflation = run("steps", "--d", "16", "24", "--steps", "2", *SMALL, out=tmp_path / "deflation")
    assert {row["step"] for row in deflation} == {1, 2}
    assert all(row["predicted_count"] for row in deflation)
    exact = run("steps", "--mode", "exact", "--d", "16", "--steps", "2", *SMALL, out=tmp_path / "exact")
    assert all(0 < row["loss"] < 20 for row in exact)
    theory = run("theory", "--d", "128", "--n-items", "2000", "--steps", "2", out=tmp_path / "theory")
    assert len(theory) == 3
    assert all(len(row["predicted_d_t"]) == 2 for row in theory)
    study = run(
        "newton-schulz", "--d", "32", "--ns-steps", "2", "9", "--ns-dtype", "float32", "--coefficients", "muon",
        *SMALL, out=tmp_path / "ns",
    )  # fmt: skip
    shares = {row["settings"]["ns_steps"]: row["capacity_share"] for row in study}
    assert shares[9] > shares[2]
    assert (tmp_path / "ns" / "newton_schulz.png").exists()


@pytest.mark.parametrize(
    ("line", "named"), [("on: 3", "--on"), ("1: 2", "--1"), ("yes: [4]", "--yes"), ("day: 2020-99-99", "mine.yaml")]
)
def test_a_recipe_is_read_as_every_yaml_file_is(line, named, tmp_path, capsys):
    """A word such as `on` is a key and no truth value; a number as a key or a date that is none is one sentence."""
    (tmp_path / "mine.yaml").write_text(f"command: one-step\n{line}\n")
    assert main(["memory", "one-step", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


def test_recipes_run_with_the_command_line_on_top(tmp_path):
    rows = run(
        "steps",
        "--config",
        "recipes/memory/steps.yaml",
        "--d",
        "16",
        "--steps",
        "1",
        *SMALL,
        "--no-figures",
        out=tmp_path,
    )
    assert {row["d"] for row in rows} == {16}
    assert {row["rule"] for row in rows} == {"sgd", "muon"}


def test_budget_is_read_and_refused():
    assert [parse_budget(text) for text in ("90s", "3m", "1.5h", "20")] == [90, 180, 5400, 20]
    assert main(["memory", "reproduce", "--budget", "soon"]) == 2


def clock_of(monkeypatch, plan):
    """Run ``reproduce_rows`` on a clock that each row advances by its own cost."""
    now = [100.0]
    said = []
    monkeypatch.setattr(memory_reproduce.time, "perf_counter", lambda: now[0])

    def size(name, cost, rows):
        def made():
            for _ in range(rows):
                now[0] += cost / rows
                yield {"part": name, "cost": cost}

        return made

    parts = [memory_reproduce.Part(n, share, growth, [size(n, *r) for r in sizes]) for n, share, growth, sizes in plan]
    monkeypatch.setattr(memory_reproduce, "plan", lambda *_: parts)

    def run(budget):
        start = now[0]
        rows = list(memory_reproduce.reproduce_rows(budget, 300, 0, {}, start, said.append))
        return rows, now[0] - start, said

    return run


LADDERS = [("a", 0.7, 4.0, [(c, 4) for c in (1, 4, 16, 64, 256)]), ("b", 0.3, 4.0, [(c, 4) for c in (1, 4, 16, 64)])]


@pytest.mark.parametrize("budget", [14, 32, 60, 180, 600])
def test_reproduce_keeps_its_budget_and_uses_it(budget, monkeypatch):
    rows, spent, _ = clock_of(monkeypatch, LADDERS)(budget)
    # nothing begins past the budget less its reserve: one row of the size that was cut may run over
    assert spent <= budget - max(0.1 * budget, 10) + max(row["cost"] for row in rows) / 4
    assert spent > 0.3 * budget  # each size costs four times the last, so a good part may stay unused
    if budget >= 30:
        assert {name: sum(row["part"] == name for row in rows) >= 8 for name in "ab"} == {"a": True, "b": True}


def test_reproduce_names_what_it_had_no_time_for(monkeypatch):
    _, _, said = clock_of(monkeypatch, LADDERS)(14)
    assert "a (size 2)" in said[0]
    assert "b (size 2)" in said[0]


def test_the_plan_of_reproduce_is_a_whole():
    parts = memory_reproduce.plan(30000, 0, {"device": "cpu", "chunk_size": 4096, "cache_bytes": 2**30})
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(len(part.sizes) > 2 for part in parts)


def test_fit_exponent_is_exact_on_a_power_law_and_covers():
    fitted = memory_fit.fit_exponent([1, 2, 4], [[3.0], [6.0], [12.0]])
    assert fitted.slope == pytest.approx(1, abs=1e-12)
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        counts = [[100 * x * (1 + 0.05 * rng.standard_normal())] for x in (1, 2, 4, 8)]
        made = memory_fit.fit_exponent([1, 2, 4, 8], counts, [5 * x for x in (1, 2, 4, 8)], seed=trial)
        hits += made.low <= 1 <= made.high
    assert 180 <= hits <= 200  # binomial(200, 0.95) has sd 3.1: 3 sd below, with slack for ln
    for xs, counts in (([1], [[2.0]]), ([1, 1], [[2.0], [2.0]])):
        with pytest.raises(ValueError, match="`xs`"):
            memory_fit.fit_exponent(xs, counts)
    with pytest.raises(ValueError, match="logarithm"):
        memory_fit.fit_exponent([1, 2], [[0.0], [1.0]])


def test_broken_lines_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"kind": "one-step"}) + '\n{"kind": "one\n')
    with pytest.warns(UserWarning, match="line 2"):
        assert len(memory_fit.read_results(tmp_path)) == 1
    with pytest.raises(FileNotFoundError):
        memory_fit.read_results(tmp_path / "nowhere")


def test_figures_of_nothing_are_nothing(tmp_path):
    assert draw_all([], tmp_path) == []


VERBS = ("one-step", "batch", "steps", "theory", "newton-schulz", "reproduce", "claims", "advise", "recall", "report")


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_a_screen_and_help_all_has_the_rest(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["memory", verb, word])
        shown.append(capsys.readouterr().out)
    assert len(shown[0].splitlines()) <= 36
    assert "Example: lightning-spectral memory" in shown[0]
    assert len(shown[1]) >= len(shown[0]) - 100
    if verb in ("one-step", "batch", "steps", "theory"):
        assert "--ridge" not in shown[0]
        assert "--ridge" in shown[1]


@pytest.mark.parametrize("style", ["json", "csv", "markdown", "latex"])
def test_tables_come_in_every_format_and_sentences_elsewhere(style, tmp_path, capsys):
    arguments = ["--d", "128", "--n-items", "300", "--rules", "muon", "sign", "--out", str(tmp_path)]
    assert main(["memory", "theory", *arguments, "--format", style]) == 0
    captured = capsys.readouterr()
    assert "written to" in captured.err
    assert "written to" not in captured.out
    if style == "json":
        rows = json.loads(captured.out)
        assert [row["rule_label"] for row in rows] == ["muon", "sign"]
        assert rows[0]["predicted"] > 100
        assert rows[1]["predicted"] is None
    elif style == "csv":
        assert captured.out.splitlines()[0] == "rule_label,d,predicted,asymptotic,crit. batch"
    else:
        assert "muon" in captured.out


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("steps", ["--steps", "0"], "`--steps` must be >= 1, got 0"),
        ("theory", ["--seeds", "0"], "`--seeds` must be >= 1, got 0"),
        ("theory", ["--anisotropy", "40", "--d", "512"], "`--anisotropy` must be at most 22.1 at d=512, got 40"),
    ],
)
def test_what_a_verb_cannot_do_is_said(verb, arguments, said, tmp_path, capsys):
    assert main(["memory", verb, *arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
