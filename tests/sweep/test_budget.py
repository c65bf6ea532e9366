"""Estimates against the models, states and files that they are about."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_spectral import optim
from lightning_spectral.cli import main
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.sweep.budget import PEAK_FLOPS, duration, hours, run_cost
from lightning_spectral.text import CommandError
from lightning_spectral.training import document

OPTIMIZERS = [name for name in optim.__all__ if name != "SpectralOptimizer"]


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
    assert run_cost("one", content).parameters == counted


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
        (["debug", "--train.max_steps", "null", "--train.max_tokens", "100"], "no whole optimizer step: one takes 8"),
        (
            ["paper/160m", "--axis", "architecture.ffn_multiplier=0,1"],
            "`architecture.ffn_multiplier` must be > 0, got 0",
        ),
        (["paper/160m", "--train.max_seq_length", "513"], "is 513, the model's `block_size` is 512: lower the first"),
        (["paper/160m", "--model_config.n_head", "7"], "litgpt refuses the `model_config`: n_embd must be a multiple"),
        (["debug", "--train.max_steps", "null"], "no `train.max_steps` and no `train.max_tokens`"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


BASE = {"train": {"max_steps": 10, "global_batch_size": 8, "max_seq_length": 64}}
SHAPES: dict[str, dict[str, object]] = {
    "queries share keys": {"n_head": 6, "n_query_groups": 2},
    "one key for all, one layer": {"n_head": 6, "n_query_groups": 1, "n_layer": 1},
    "heads of another size": {"n_head": 6, "head_size": 32},
    "biases": {"bias": True, "lm_head_bias": True},
    "padded by litgpt": {"padded_vocab_size": None, "padding_multiple": 128},
    "norms of queries and keys": {"norm_qk": True, "norm_qk_type": "olmo2", "norm_class_name": "RMSNorm"},
    "norms before and after": {"post_attention_norm": True, "post_mlp_norm": True, "norm_class_name": "RMSNorm"},
    "one norm": {"parallel_residual": True, "shared_attention_norm": True},
    "gated": {"mlp_class_name": "GemmaMLP", "intermediate_size": 250},
    "experts": {
        "mlp_class_name": "LLaMAMoE",
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_expert": 8,
        "n_expert_per_token": 2,
        "n_shared_expert": 1,
        "first_k_dense_replace": 1,
    },
    "latent attention": {
        "latent_attention": {
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
    },
}


def shape_content(changes: dict[str, object]) -> dict[str, object]:
    plain = {"block_size": 64, "n_layer": 3, "n_head": 6, "n_embd": 96, "vocab_size": 499, "padded_vocab_size": 500}
    return {**BASE, "model_config": {**plain, "bias": False, "parallel_residual": False, **changes}}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_parameters_of_every_shape_are_those_of_the_model(changes: dict[str, object]) -> None:
    from litgpt.config import Config
    from litgpt.model import GPT

    content = shape_content(changes)
    with torch.device("meta"):
        model = GPT(Config(**content["model_config"]))  # type: ignore[arg-type]
    assert run_cost("one", content).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Mixtral-8x7B-v0.1", "Qwen3-0.6B", "Gemma-2-9b", "OLMo-1B-hf"])
def test_parameters_of_named_models(name: str) -> None:
    from litgpt.config import Config
    from litgpt.model import GPT

    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert run_cost(name, {**BASE, "model_name": name}).parameters == counted


def test_a_matrix_that_is_used_twice_is_stored_once() -> None:
    content = shape_content({})
    tied = {**content, "train": {**BASE["train"], "tie_embeddings": True}}
    apart, together = run_cost("apart", content), run_cost("tied", tied)
    assert apart.parameters - together.parameters == 500 * 96
    assert apart.train_flops == together.train_flops


def test_a_token_goes_through_its_experts_only() -> None:
    """Of 8 experts 2, one that all share, and one dense layer; attention looks 64 tokens back."""
    cost = run_cost("one", shape_content(SHAPES["experts"]))
    attention, expert, router = 4 * 96 * 96, 3 * 96 * 64, 8 * 96
    matrices = 3 * attention + 3 * 96 * 256 + 2 * (3 * expert + router) + 500 * 96
    assert cost.train_flops == cost.tokens * 6 * (matrices + 3 * 2 * 96 * 64)


def test_attention_looks_back_as_far_as_its_window() -> None:
    whole = run_cost("whole", shape_content({}))
    sliding = run_cost("sliding", shape_content({"sliding_window_size": 16, "sliding_window_indices": [1, 0, 1]}))
    assert whole.train_flops - sliding.train_flops == whole.tokens * 6 * 2 * (2 * 96) * (64 - 16)


def test_experts_are_measured_on_their_share_of_the_rows() -> None:
    probe = {"callbacks": ["lightning_spectral.callbacks.SpectralRankCallback"]}
    cost = run_cost("one", {**shape_content(SHAPES["experts"]), **probe})
    widths = 256**2 + 2 * (8 * 64**2 + 64**2)
    assert cost.measure_bytes == 4 * 2 * 0.5625 * widths
    assert cost.measure_flops == 2 * 8 * 64 * (256**2 + 2 * (8 * 0.25 * 64**2 + 64**2))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_state_is_that_of_the_optimizer(name: str) -> None:
    """Scalars per tensor (steps, units) are left out."""
    from litgpt.config import Config
    from litgpt.model import GPT

    content = shape_content(SHAPES["experts"])
    model = GPT(Config(**content["model_config"]))  # type: ignore[arg-type]
    optimizer = getattr(optim, name)(model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = sum(tensor.numel() for tensor in tensors if tensor.numel() > 1)
    content["optimizer"] = {"class_path": f"lightning_spectral.optim.{name}"}
    cost = run_cost("one", content)
    assert cost.state_bytes == 4 * (2 * cost.parameters + kept)


def test_lion_keeps_one_number() -> None:
    content = shape_content({})
    specs = [
        {"class_path": "lightning_spectral.optim.Muon", "init_args": {"fallback": rule}} for rule in ("adamw", "lion")
    ]
    adamw, lion = (run_cost("one", {**content, "optimizer": spec}) for spec in specs)
    hidden = 3 * (4 * 96**2 + 8 * 96**2)
    assert adamw.state_bytes - lion.state_bytes == 4 * (adamw.parameters - hidden)


@pytest.mark.parametrize(("steps", "every", "windows"), [(10, 4, 4), (12, 4, 4), (100, 200, 2), (1, 200, 1), (9, 4, 3)])
def test_windows_are_those_of_the_schedule(steps: int, every: int, windows: int) -> None:
    schedule = Schedule(every, last_step=steps - 1)
    assert sum(schedule.is_due(step) for step in range(steps)) == windows
    spec = {"class_path": "lightning_spectral.callbacks.SpectralRankCallback", "init_args": {"every_n_steps": every}}
    content = {**shape_content({}), "callbacks": [spec], "train": {**BASE["train"], "max_steps": steps}}
    assert run_cost("one", content).windows == windows


def test_plan_says_where_rows_are_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["paper/160m", "--axis", "seed=0", "--model_config.n_layer", "60"]
    assert main(["plan", *words, "--gpu", "rtx4090"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"28\.48 GiB on each rank, 31 windows in a run; more than the 6\.00 GiB .* a sample of rows", out)
