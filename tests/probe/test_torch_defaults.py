"""What a process has set as torch's defaults changes no record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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


def test_a_default_dtype_of_fp64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = toys.LM().double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = records_of(tmp_path / "fp32", model)
    model.load_state_dict(state)
    torch.set_default_dtype(torch.float64)
    try:
        found = records_of(tmp_path / "fp64", model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {record.status for record in expected} == {"few_tokens"}
    assert found == expected
