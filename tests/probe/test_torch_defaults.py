"""What a process has set as torch's defaults changes no record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_spectral import observe
from lightning_spectral.records import SpectralRecord, read_spectral
from tests.scripts import toys

COUNTS = toys.counts()
BATCHES = toys.ids(16).split(8)


def records_of(path: Path, model: toys.LM, **settings: Any) -> list[SpectralRecord]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, 1, out=path, optimizer=optimizer, counts=COUNTS, num_jackknife_groups=2, **settings):
        for batch in BATCHES:
            toys.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [replace(record, run_id="", window_s=None) for record in read_spectral(path).records]


SETTINGS: dict[str, dict[str, Any]] = {
    "all rows": {},
    "half of them": {"token_fraction": 0.5},
    "in turns": {"memory_limit_mib": 0.02},
}


def dtype_of_fp64() -> None:
    torch.set_default_dtype(torch.float64)


def device_of_no_numbers() -> None:  # for an accelerator: what is made there fails to meet what is on the CPU
    torch.set_default_device("meta")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("default", [dtype_of_fp64, device_of_no_numbers])
def test_records_are_the_same(tmp_path: Path, default: Callable[[], None], settings: str) -> None:
    torch.manual_seed(0)
    model = toys.LM().double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = records_of(tmp_path / "before", model, **SETTINGS[settings])
    model.load_state_dict(state)
    default()
    try:
        found = records_of(tmp_path / "after", model, **SETTINGS[settings])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {record.status for record in expected} <= {"few_tokens", "not_in_turn"}
    assert found == expected
