from __future__ import annotations

import copy
import re
import time

import pytest
import torch
from torch import nn

from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks
from tests.models.architectures import QUICK, SLOW, D, Fused, linear, module
from tests.models.more_architectures import MORE

QUIET = pytest.mark.filterwarnings("ignore")  # what third-party models warn about while they are built


def lines_of(model: nn.Module) -> list[str]:
    """What was found, written as the table writes it."""
    try:
        stacks = find_stacks(model).stacks
    except ValueError:
        return []
    return [line_of(stack) for stack in stacks]


def line_of(stack) -> str:
    layers = {layer for layer, _ in stack.blocks}
    where: dict[str, set[int]] = {}
    for site in stack.sites:
        prefix = stack.name.removesuffix("*")
        relative = re.sub(r"^\.?\d+\.", "", site.name[len(prefix) :])
        where.setdefault(f"{relative} {site.width}", set()).add(site.layer)
    parts = []
    for name, at in where.items():
        parts.append(
            name if at == layers and stack.num_blocks == len(layers) else f"{','.join(map(str, sorted(at)))}:{name}"
        )
    uncovered = sorted(int(re.search(r"\d+$", path)[0]) for path in stack.uncovered)
    end = f" - {','.join(map(str, uncovered))}" if uncovered else ""
    return f"{stack.name} {stack.num_blocks} | {', '.join(parts)}{end}"


def check(table, name):
    build, expected = table[name]
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):  # computes with its weights while it is built
        model = build()
    assert lines_of(model) == expected


@QUIET
@pytest.mark.parametrize("name", QUICK)
def test_stacks_and_down_projections(name):
    check(QUICK, name)


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW | MORE)
def test_stacks_and_down_projections_of_every_family(name):
    check(SLOW | MORE, name)


@pytest.mark.slow
def test_a_model_of_12_000_experts_is_searched_and_hooked_in_two_seconds():
    expert = module(w1=linear(D, 8), w2=linear(8, D), w3=linear(D, 8))
    experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(200))
    block = module(attn=Fused(), norm=nn.LayerNorm(D), mlp=module(gate=linear(D, 200), experts=experts))
    model = module(embedding=nn.Embedding(64, D), layers=nn.ModuleList(copy.deepcopy(block) for _ in range(60)))
    began = time.process_time()
    found = find_stacks(model)
    recorder = Recorder(model, found)
    assert time.process_time() - began < 2
    assert len(found.sites) == 12_000
    assert {site.expert for site in found.sites} == set(range(200))
    recorder.remove()


def test_the_table_is_large_enough():
    assert len({**QUICK, **SLOW, **MORE}) >= 120
