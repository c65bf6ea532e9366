"""Modules that run again: on what came out of them (a further depth), or on something else (a call of its own)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral import observe, read_spectral
from lightning_spectral.models.passes import Outputs
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.stacks import find_stacks

D, FFN, VOCAB, B, T = 16, 32, 50, 8, 16
COUNTS = torch.arange(VOCAB, 0, -1)
LAST_HEAD = 8  # the ids that hold a third of COUNTS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, FFN), nn.Linear(FFN, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Around(nn.Module):
    """A core inside a core's module, as in ALBERT's groups."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Core()

    def forward(self, *, hidden: Tensor) -> tuple[Tensor, None]:
        return self.inner(hidden), None


class Model(nn.Module):
    def __init__(self, run: Callable[[Model, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.embed, self.core, self.around, self.head = nn.Embedding(VOCAB, D), Core(), None, nn.Linear(D, VOCAB)
        if run is grouped:
            self.core, self.around = None, Around()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(self.run(self, first, second))


def looped(model, first, second):
    x = model.embed(first)
    for _ in range(3):
        x = model.core(x)
    return x


def with_input(model, first, second):
    x = start = model.embed(first)
    for _ in range(3):
        x = model.core(torch.tanh(x) * 0.5 + start)
    return x


def grouped(model, first, second):
    x = model.embed(first)
    for _ in range(3):
        x = model.around(hidden=x)[0]
    return x


def two_inputs(model, first, second):
    return model.core(model.embed(first)) + model.core(model.embed(second))


def embedded_first(model, first, second):
    one, other = model.embed(first), model.embed(second)
    return model.core(one) + model.core(other)


def with_memory(model, first, second):
    """The second half of a text, with what the first one left added to it."""
    memory = model.core(model.embed(first)).mean(1, keepdim=True)
    return model.core(model.embed(second) + memory)


def segments(model, first, second):
    """One table look-up, then one half of the positions after the other, in one forward."""
    parts = []
    for x in model.embed(torch.cat([first, second], 1)).chunk(2, 1):
        for layer in model.core.layers:
            x = layer(x)
        parts.append(x)
    return torch.cat(parts, 1)


def blocks_in_turn(model, first, second):
    x = start = model.embed(first)
    for _ in range(3):
        for layer in model.core.layers:
            x = layer(x)
        x = torch.nn.functional.layer_norm(x, (D,)) + start
    return x


def same_twice(model, first, second):
    x = model.embed(first)
    return model.core(x) + model.core(x)


def in_head(*ids: Tensor) -> int:
    return sum(int((one <= LAST_HEAD).sum()) for one in ids)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("run", "depths", "inputs"),
    [
        (looped, 6, 1), (with_input, 6, 1), (grouped, 6, 1), (two_inputs, 2, 2), (embedded_first, 2, 2),
        (with_memory, 2, 2), (same_twice, 2, 2), (segments, 2, 2), (blocks_in_turn, 6, 1),
    ],
)  # fmt: skip
def test_rows_of_each_depth(tmp_path, run, depths, inputs, micro_batches):
    torch.manual_seed(0)
    model = Model(run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = {}
    with observe(model, 1, out=tmp_path, optimizer=optimizer, counts=COUNTS, background=False):
        for step in range(2):
            expected[step] = 0
            for _ in range(micro_batches):
                first, second = torch.randint(0, 12, (B, T)), torch.randint(20, VOCAB, (B, T))
                model(first, second).square().mean().backward()
                one_input = run not in (two_inputs, embedded_first, with_memory, segments)
                expected[step] += in_head(first) * inputs if one_input else in_head(first, second)
            optimizer.step()
            optimizer.zero_grad()
    records = read_spectral(tmp_path).records
    for step in (0, 1):
        found = {r.layer: (r.num_tokens, r.num_sequences) for r in records if (r.step, r.bucket) == (step, "pooled")}
        texts = 1 if run in (same_twice, segments) else inputs  # copies and parts of a text are one sequence
        assert found == dict.fromkeys(range(depths), (micro_batches * inputs * B * T, micro_batches * texts * B))
        head = {r.layer: r.num_tokens for r in records if (r.step, r.bucket) == (step, "head")}
        assert head == dict.fromkeys(range(depths), expected[step])


def test_without_gradients_only_the_output_itself_is_sure():
    outputs, linear, x = Outputs(), nn.Linear(2, 2), torch.ones(1, 2)
    with torch.no_grad():
        out = linear(x)
        outputs.leave("core", out)
        assert outputs.lead_to("core", out)
        assert outputs.lead_to("core", out + 1) is None
    assert not outputs.lead_to("other", out)
    assert not outputs.lead_to("core", None)
    outputs.clear()
    assert not outputs.lead_to("core", out)


def rows_by_depth(run, *, compiled: bool = False, training: bool = True) -> dict[int, tuple[int, int]]:
    """Rows and sequences of each depth of one forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(run)
    recorder = Recorder(model, find_stacks(model))
    called = torch.compile(model, backend="aot_eager") if compiled else model
    recorder.start(training=training)
    with torch.set_grad_enabled(training):
        called(torch.randint(0, 12, (B, T)), torch.randint(20, VOCAB, (B, T)))
    calls = recorder.collect()
    recorder.remove()
    layer_of = {site.key: site.layer for site in recorder.sites}
    found: dict[int, tuple[int, int]] = {}
    for call in calls:
        assert call.ids is not None
        for key, rows in call.rows.items():
            before = found.get(layer_of[key], (0, 0))
            found[layer_of[key]] = before[0] + len(rows), before[1] + call.num_sequences
    return found


KINDS = (looped, with_input, grouped, two_inputs, embedded_first, with_memory, blocks_in_turn)


@pytest.mark.parametrize("run", KINDS)
def test_a_compiled_region_has_the_passes_of_eager_code(run):
    assert rows_by_depth(run, compiled=True) == rows_by_depth(run)


@pytest.mark.parametrize("run", [*KINDS, same_twice])
def test_without_gradients_content_tells(run):
    assert rows_by_depth(run, training=False) == rows_by_depth(run)
