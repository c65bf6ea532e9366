"""`tokens_seen` is what the model was given, whatever the script makes of a batch; where that is unknown it is null."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_spectral import SpectralRankCallback, read_spectral
from lightning_spectral.probe.token_counts import TokenCounter
from tests.callbacks import tiny

BATCH, STEPS = 8, 5


def whole(module, batch, batch_idx):
    return module.loss(batch)


def pieces(module, batch, batch_idx):
    return sum(module.loss(piece) for piece in batch.chunk(4))


def two_lengths(module, batch, batch_idx):
    return module.loss(batch[:, :9]) + module.loss(batch[:, 8:])


def two_ahead(module, batch, batch_idx):
    logits = module.gpt(batch[:, :-2])
    return sum(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, k : tiny.LENGTH - 1 + k].flatten())
        for k in (1, 2)
    )


def twice(module, batch, batch_idx):
    return module.loss(batch) + module.loss(batch.flip(0))


def masked(module, batch, batch_idx):
    ids = batch.clone()
    ids[:, ::3] = 1
    logits = module.gpt(ids)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())


def short_at_first(module, batch, batch_idx):
    return module.loss(batch[:, : 5 + 2 * batch_idx])


def some_sequences(module, batch, batch_idx):
    return module.loss(batch[:3])


def none_in_some_steps(module, batch, batch_idx):
    return None if batch_idx % 3 == 1 else module.loss(batch)


def by_step(path, training_step, data, **options) -> dict[int, int | None]:
    class Script(tiny.Module):
        def training_step(self, batch, batch_idx):
            return training_step(self, batch, batch_idx)

    loader = DataLoader(data, batch_size=BATCH)
    tiny.trainer(path, [SpectralRankCallback(2)], max_steps=STEPS, **options).fit(Script(), loader)
    return {record.step: record.tokens_seen for record in read_spectral(path).records}


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("training_step", "a_step"),
    [
        (whole, BATCH * tiny.LENGTH),
        (pieces, BATCH * tiny.LENGTH),
        (two_lengths, BATCH * tiny.LENGTH),
        (two_ahead, BATCH * (tiny.LENGTH - 1)),
        (twice, BATCH * tiny.LENGTH),
        (masked, BATCH * (tiny.LENGTH + 1)),
        (none_in_some_steps, BATCH * tiny.LENGTH),
    ],
)
def test_all_of_the_batch(tmp_path, training_step, a_step):
    assert by_step(tmp_path, training_step, tiny.data()) == {step: step * a_step for step in (0, 2, 4)}


@pytest.mark.parametrize(("training_step", "given"), [(short_at_first, BATCH * 4), (some_sequences, 3 * tiny.LENGTH)])
def test_a_part_of_the_batch_is_said_and_not_counted(tmp_path, training_step, given):
    with pytest.warns(UserWarning, match=f"given {given} token ids of a batch that holds 1[23][68]: .*tokens_seen"):
        assert by_step(tmp_path, training_step, tiny.data()) == {0: 0, 2: None, 4: None}


def test_ids_that_the_model_is_not_given_are_not_counted(tmp_path):
    rows = [{"prompt_input_ids": ids[:5], "input_ids": ids} for ids in tiny.data()]

    def training_step(module, batch, batch_idx):
        return module.loss(batch["input_ids"])

    expected = {step: step * BATCH * tiny.LENGTH for step in (0, 2, 4)}
    assert by_step(tmp_path, training_step, rows) == expected


def test_a_step_by_hand_within_the_batch(tmp_path):
    """The second half of each batch belongs to the next step, and is watched in no window."""

    class Script(tiny.Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for half in batch.chunk(2):
                self.optimizers().zero_grad()
                self.manual_backward(self.loss(half))
                self.optimizers().step()

    tiny.trainer(tmp_path, [SpectralRankCallback(2)], max_steps=6).fit(Script(), tiny.loader())
    found = {record.step: record.tokens_seen for record in read_spectral(tmp_path).records}
    assert found == {step: step * BATCH // 2 * tiny.LENGTH for step in (0, 2, 4)}


@pytest.mark.parametrize(("num_replicas", "expected"), [(1, 32), (2, None)])
def test_ranks_that_share_a_batch_are_each_given_a_part(monkeypatch, num_replicas, expected):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    batch, counter = torch.zeros(4, 8, dtype=torch.long), TokenCounter()
    counter._num_given = batch.numel() // 2
    counter.add(batch, num_replicas)
    assert counter.seen == expected


def test_what_the_model_is_given_is_in_the_checkpoint():
    batch = {"prompt_ids": torch.zeros(4, 3, dtype=torch.long), "input_ids": torch.ones(4, 8, dtype=torch.long)}
    counter, resumed = TokenCounter(), TokenCounter()
    counter._used = [False, True]
    resumed.load_state_dict(counter.state_dict())
    assert resumed.add(batch, 1) == ""
    assert resumed.seen == 4 * 8
