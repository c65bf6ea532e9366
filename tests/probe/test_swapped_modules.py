"""Modules that a script swaps while they are measured: training goes on, and no window is empty without a word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

from lightning_spectral import observe
from lightning_spectral.records import SpectralRecord, read_spectral
from tests.scripts import toys

SWAPPED_AT = 1
COUNTS = toys.counts()


def quantises(model: toys.LM) -> None:
    """Swaps modules, and carries their hooks over without ``with_kwargs``."""
    for block in model.model.layers:
        block.mlp.qconfig = get_default_qat_qconfig("x86")  # type: ignore[union-attr]
    prepare_qat(model, inplace=True)


def carries_the_embeddings_hooks(model: toys.LM) -> None:
    old = model.model.embed_tokens
    new = nn.Embedding(old.num_embeddings, old.embedding_dim)
    new.load_state_dict(old.state_dict())
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    model.model.embed_tokens = new


def replaces_a_block(model: toys.LM) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def train(swap: Callable[[toys.LM], None], path: Path | None) -> list[Tensor]:
    torch.manual_seed(0)
    model = toys.LM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = None if path is None else observe(model, 1, out=path, counts=COUNTS, sites=["post"], background=False)
    for step, batch in enumerate(toys.ids(24).split(8)):
        if step == SWAPPED_AT:
            swap(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        toys.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()
        if probe is not None:
            probe.step()
    if probe is not None:
        probe.close()
    return list(model.state_dict().values())


def trained_alike(swap: Callable[[toys.LM], None], path: Path) -> list[SpectralRecord]:
    expected, found = train(swap, None), train(swap, path)
    assert len(expected) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    return read_spectral(path).records


@pytest.mark.filterwarnings("ignore:.*(torch.ao|quant_min and quant_max)")
@pytest.mark.parametrize("swap", [quantises, carries_the_embeddings_hooks])
def test_hooks_that_are_carried_over_go_on(tmp_path: Path, swap: Callable[[toys.LM], None]) -> None:
    records = trained_alike(swap, tmp_path)
    assert {(r.step, r.num_tokens) for r in records if r.bucket == "pooled"} == {(step, 128) for step in range(3)}
    assert {record.status for record in records} == {"few_tokens"}


def test_a_block_that_was_replaced_says_so(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = trained_alike(replaces_a_block, tmp_path)
    lost = [record for record in records if record.status == "no_forward"]
    assert {(record.step, record.layer) for record in lost} == {(1, 0), (2, 0)}
    assert all("`model.layers.0.mlp.down_proj` was replaced after the measurement began" in r.reason for r in lost)
    assert {record.status for record in records if record not in lost} == {"few_tokens"}
    assert sum("was replaced" in str(warning.message) for warning in caught) == 1
