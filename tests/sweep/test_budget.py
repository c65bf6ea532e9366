"""Estimates against the models, states and files that they are about."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_spectral.cli import main
from lightning_spectral.sweep.budget import PEAK_FLOPS, duration, hours, run_cost
from lightning_spectral.text import CommandError
from lightning_spectral.training import document


def content_of(name: str, **overrides: object) -> dict[str, object]:
    return document.overridden(document.read_tree(document.find(name)), overrides)


@pytest.mark.parametrize("name", ["quickstart", "pocket_study", "paper/160m", "paper/350m"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    from litgpt.config import Config

    from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt

    content = content_of(name)
    architecture = Architecture(**content["architecture"])  # type: ignore[arg-type]
    given = {"vocab_size": 2048, "padded_vocab_size": 2048, **content["model_config"]}  # type: ignore[dict-item]
    if architecture.ffn_multiplier:
        given["intermediate_size"] = round(architecture.ffn_multiplier * given["n_embd"])
    with torch.device("meta"):
        model = build_gpt(adapt_config(Config(**given), architecture), architecture, seed=0)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert run_cost("one", content).parameters == pytest.approx(counted, rel=0.01)  # norms are not counted


def test_the_state_of_a_window_is_the_probes_own() -> None:
    """Twice 41 GiB: LLaMA-3.1-8B, 32 layers of width 14,336, three buckets in two groups of sequences."""
    content = content_of("paper/160m")
    content |= {"model_name": "Llama-3.1-8B", "model_config": None, "architecture": {}}
    assert run_cost("one", content).measure_bytes / 2**30 == pytest.approx(2 * 41.3, rel=0.02)


def test_tokens_windows_and_operations_of_the_papers_run() -> None:
    cost = run_cost("one", content_of("paper/160m"))
    assert (cost.tokens, cost.steps, cost.windows) == (6_000 * 1_024 * 512, 6_000, 31)
    matrices = 12 * (4 * 768**2 + 8 * 768**2) + 50_304 * 768
    assert cost.train_flops == cost.tokens * (6 * matrices + 12 * 12 * 768 * 512)
    assert cost.state_bytes == 16 * cost.parameters  # weights, gradients, two moments, fp32


def test_muon_keeps_one_number_per_hidden_weight() -> None:
    adamw = run_cost("a", content_of("paper/160m"))
    muon = run_cost("m", content_of("paper/160m", **{"optimizer.class_path": "lightning_spectral.optim.Muon"}))
    assert adamw.state_bytes - muon.state_bytes == 4 * 12 * 12 * 768**2


def test_hours() -> None:
    assert hours(PEAK_FLOPS["h100"] * 3600 * 8 * 0.5, "H100", 0.5, 8) == pytest.approx(1.0)
    with pytest.raises(CommandError, match=r"unknown GPU `h10`; did you mean `h100`"):
        hours(1.0, "h10", 0.4, 1)


def test_plan_prints_the_whole_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper/160m", "--num-gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "runs         40" in out
    assert "125,829,120,000" in out
    assert "small steps" not in out


def test_plan_says_when_launches_take_longer_than_products(capsys: pytest.CaptureFixture[str]) -> None:
    """36 runs of 800 steps: 28,800 steps of 20 ms are 576 s, where the products alone would take 11 s."""
    assert main(["plan", "pocket_tokens"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"time +\d+ seconds on 1 x h100 at 40% of its peak, all runs", out)
    assert "small steps  rather 9.6 minutes one after another: launching a step takes some 20 ms" in out


def test_durations_in_the_unit_that_tells() -> None:
    assert [duration(h) for h in (0.001, 0.02, 0.5, 1.2, 30.0, 4000.0)] == [
        "4 seconds", "72 seconds", "30.0 minutes", "72.0 minutes", "30.0 hours", "4,000.0 hours"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paper/160m", "--mfu", "2"], "`--mfu` must be in (0, 1], got 2"),
        (
            ["paper/160m", "--gpu", "a10"],
            "l40s, rtx4090, mi300x, got a10; did you mean `a100`?",
        ),
        (["paper/16m"], "paper/160m"),
        (["debug", "--train.max_steps", "null"], "no `train.max_steps` and no `train.max_tokens`"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
