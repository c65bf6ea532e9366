"""What a window may take, and what is chosen: by accounting, on models without a byte of weights."""

from __future__ import annotations

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT

from lightning_spectral.probe.grouping import by_frequency
from lightning_spectral.probe.memory_plan import MAX_ROWS, MIN_ROWS, MemoryPlan, choose, plan_of, row_widths, sample_mib
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import SpectralProbe


def probe_of(name: str, dtype: torch.dtype = torch.bfloat16) -> SpectralProbe:
    config = Config.from_name(name)
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    counts = torch.arange(config.padded_vocab_size, 0, -1)
    grouping = by_frequency(counts, head_share=0.33, mid_share=0.67, attribute_to="input")
    return SpectralProbe(model, grouping, ProbeOptions(num_jackknife_groups=1))


@pytest.mark.parametrize(
    ("name", "limit_gib", "moments_gib", "rows"), [("Llama-3.1-8B", 2, 41, 3_500), ("Llama-2-70b-hf", 4, 413, 2_500)]
)
def test_public_models_on_eight_ranks(name: str, limit_gib: int, moments_gib: float, rows: int) -> None:
    probe = probe_of(name)
    assert probe.state_mib is not None
    assert probe.state_mib / 1024 == pytest.approx(moments_gib, rel=0.03)  # all rows: on every rank
    plan = plan_of(probe, limit_gib * 1024, 8)
    assert plan is not None
    assert plan.num_rows is not None
    assert plan.needed_mib <= limit_gib * 1024
    assert plan.num_rows >= rows
    widths = row_widths(probe.sites)
    assert plan.limit_bytes == plan.num_rows / 8 * sum(widths) * 2  # bf16
    assert str(plan.num_rows) in str(plan).replace(",", "")


def test_all_rows_where_they_fit_and_a_sample_where_not() -> None:
    widths = [512, 512]
    exact = choose(widths, 100.0, 100.0, world_size=1, item_bytes=4)
    assert exact is not None
    assert exact.num_rows is None
    sampled = choose(widths, 1_000.0, 100.0, world_size=1, item_bytes=4)
    assert sampled is not None
    assert sampled.num_rows == MAX_ROWS
    least = sample_mib(widths, MIN_ROWS, 1, 4)
    smallest = choose(widths, 100.0, least, world_size=1, item_bytes=4)
    assert smallest is not None
    assert smallest.num_rows == MIN_ROWS
    assert choose(widths, 100.0, 0.99 * least, world_size=1, item_bytes=4) is None


@pytest.mark.parametrize(
    ("needed", "limit", "said"),
    [(0.12, 0.5, "all rows, 0.12 of 0.5 MiB"), (9.96, 1234.5, "all rows, 10 of 1,234 MiB"), (0.0, 3.0, "0 of 3 MiB")],
)
def test_small_limits_are_not_zero(needed: float, limit: float, said: str) -> None:
    assert said in str(MemoryPlan(limit, needed))
