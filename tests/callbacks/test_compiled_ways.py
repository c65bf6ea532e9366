"""Every way to compile a model, before and after the callback attaches: the records are those of eager code."""

from __future__ import annotations

import pytest
import torch

from lightning_spectral import SpectralRankCallback
from tests.callbacks import tiny
from tests.callbacks.test_measuring import by_key, fit

# Dynamo looks at `.grad` of every tensor that it meets, and silences torch's remark only where it is not an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def model_in_place(module):
    module.gpt.compile(backend="eager")


def model_wrapped(module):
    module.gpt = torch.compile(module.gpt, backend="eager")


def blocks_in_place(module):
    for block in module.gpt.transformer.h:
        block.compile(backend="eager")


def blocks_wrapped(module):
    blocks = module.gpt.transformer.h
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")


def networks_in_place(module):
    for block in module.gpt.transformer.h:
        block.mlp.compile(backend="eager")


def function(module):
    compiled = torch.compile(module.gpt.forward, backend="eager")
    module.loss = lambda batch: torch.nn.functional.cross_entropy(
        compiled(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
    )


def step(module):
    module.loss = torch.compile(module.loss, backend="eager")


WAYS = [model_in_place, model_wrapped, blocks_in_place, blocks_wrapped, networks_in_place, function, step]
WAYS_BY_NAME = {way.__name__: way for way in WAYS}


class Compiled(tiny.Module):
    """Compiled by one of the ways at one of the times."""

    def __init__(self, way, when):
        super().__init__()
        self.way, self.when = way, when
        if when != "after":
            way(self)
        if when == "run before":
            self.loss(tiny.data()[:8]).backward()
            self.zero_grad()

    def on_train_start(self):
        if self.when == "after":
            self.way(self)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return by_key(fit(tmp_path_factory.mktemp("eager"), SpectralRankCallback(2, sites=["post", "pre"])))


@pytest.mark.parametrize("when", ["run before", "before", "after"])
@pytest.mark.parametrize("way", WAYS_BY_NAME)
def test_records_are_those_of_eager_code(tmp_path, eager, way, when):
    torch._dynamo.reset()
    found = by_key(fit(tmp_path, SpectralRankCallback(2, sites=["post", "pre"]), Compiled(WAYS_BY_NAME[way], when)))
    assert found.keys() == eager.keys()
    for key, record in found.items():
        assert (record.num_tokens, record.status) == (eager[key].num_tokens, eager[key].status)
        # fp32 in another order of operations, two AdamW steps apart
        assert record.hard_rank == pytest.approx(eager[key].hard_rank, rel=1e-4)
