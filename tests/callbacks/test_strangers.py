"""Scripts that people have, which the callbacks cannot measure as asked: each is told why, and what to do instead."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralRankCallback, TailTokenProbe, observe, read_spectral
from tests.callbacks import tiny
from tests.distributed.harness import run_ranks
from tests.scripts import toys


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.down(self.up(x_BTD).relu())


class Patches(pl.LightningModule):
    """Blocks over continuous rows, as in a ViT; with ``timesteps``, an embedding that no token of the batch enters."""

    def __init__(self, timesteps: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.time = nn.Embedding(timesteps, 16) if timesteps else None

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (x_BTD,) = batch
        if self.time is not None:
            x_BTD = x_BTD + self.time(torch.arange(len(x_BTD)) % self.time.num_embeddings)[:, None]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def patches() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(64, 8, 16)), batch_size=8)


def test_a_model_without_tokens_is_sent_to_the_callback_that_needs_none(tmp_path):
    trainer = tiny.trainer(tmp_path, [TailTokenProbe(2, counts="stream")])
    with pytest.raises(MisconfigurationException, match=r"no token embedding .* `Patches`.*SpectralRankCallback"):
        trainer.fit(Patches(), patches())
    tiny.trainer(tmp_path, [SpectralRankCallback(2)]).fit(Patches(), patches())  # as it was told
    assert len(read_spectral(tmp_path).records) == 6  # steps 0, 2, 3 and two layers


def test_batches_without_ids_are_not_called_too_few(tmp_path):
    with pytest.warns(UserWarning, match="no token ids were found in the training batches"):
        tiny.trainer(tmp_path, [TailTokenProbe(2, counts="stream")]).fit(Patches(timesteps=4), patches())


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_an_evaluation_that_is_not_measured_says_so(tmp_path, caplog, what):
    stage = {"validate": "validation"}.get(what, what)
    callbacks = [SpectralRankCallback(2), TailTokenProbe(2, counts=tiny.counts())]
    with caplog.at_level(logging.INFO):
        getattr(tiny.trainer(tmp_path, callbacks), what)(tiny.Module(), tiny.loader(8))
    told = [line for line in caplog.messages if "nothing is measured" in line]
    assert len(told) == 1
    assert f"`on=['{stage}']`" in told[0]
    caplog.clear()
    trainer = tiny.trainer(tmp_path, [TailTokenProbe(2, counts=tiny.counts(), on=[stage], background=False)])
    with caplog.at_level(logging.INFO):
        getattr(trainer, what)(tiny.Module(), tiny.loader(8))
    assert not [line for line in caplog.messages if "nothing is measured" in line]
    assert {record.stage for record in read_spectral(tmp_path).records} == {stage}


def test_a_dry_run_does_not_name_a_folder_that_it_will_not_write(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        tiny.trainer(tmp_path, [SpectralRankCallback(2)], fast_dev_run=True, max_steps=-1).fit(
            tiny.Module(), tiny.loader()
        )
    (said,) = [line for line in caplog.messages if "sites" in line]
    assert "nothing is written" in said
    assert str(tmp_path) not in said


@pytest.mark.parametrize(("told", "raises", "says"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_a_loop_that_forgets_to_tell_of_its_steps_hears_so(tmp_path, told, raises, says):
    gpt = tiny.Module().gpt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(KeyError), observe(gpt, 2, out=tmp_path) as probe:
            for _ in range(2):
                gpt(tiny.data(8)[:, :-1]).sum().backward()
                if told:
                    probe.step()
            if raises:
                raise KeyError
        probe.close(finished=True)
    said = [str(one.message) for one in caught if "nothing was recorded" in str(one.message)]
    assert len(said) == says
    assert all("ran 2 time(s)" in one and "`probe.step()` after `optimizer.step()`" in one for one in said)


def _warnings_of(rank: int, world_size: int, path: str) -> list[str]:
    model = tiny.Module()
    batch = torch.full((2, 9), rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with observe(model.gpt, 1, out=path, counts="stream", background=False) as probe:
            model.loss(batch).backward()
            probe.step()
    return [str(one.message) for one in caught if "observe:" in str(one.message)]


@pytest.mark.distributed
def test_in_a_plain_loop_one_rank_warns_for_all(tmp_path):
    first, second = run_ranks(_warnings_of, 2, str(tmp_path))
    assert len(first) == 1
    assert "too few tokens" in first[0]
    assert second == []


class DenseExperts(nn.Module):
    """All experts for every token, in one tensor; ``way`` is how the rows meet them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(16)
        self.up, self.down = (nn.Parameter(torch.randn(3, *shape) / 8) for shape in ((16, 24), (24, 16)))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        flat = self.norm(x_BTD).reshape(-1, 16)
        if self.way == "einsum":
            hidden = torch.einsum("nd,edh->enh", flat, self.up).relu()
        else:
            hidden = torch.bmm(flat.expand(3, -1, -1), self.up).relu()
        return x_BTD + torch.bmm(hidden, self.down).mean(0).view_as(x_BTD)


class DenseMixture(Patches):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DenseExperts(way) for _ in range(2))


def _records(tmp_path: Any, way: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.trainer(tmp_path, [SpectralRankCallback(4, background=False)]).fit(DenseMixture(way), patches())
    return read_spectral(tmp_path).records


def test_experts_that_cannot_be_followed_are_told_a_way_that_can(tmp_path):
    reasons = {record.reason for record in _records(tmp_path / "a", "einsum")}
    assert len(reasons) == 1
    assert "bmm(x.expand(E, ...), up)" in next(iter(reasons))
    measured = _records(tmp_path / "b", "bmm")
    assert {record.num_tokens for record in measured} == {8 * 8 * 3}
    assert all(record.hard_rank > 1 for record in measured)


def test_a_loop_of_functional_gradients_hears_that_it_is_not_measured(tmp_path):
    model = toys.LM()
    batch, parameters = toys.ids(8), {name: tensor.detach() for name, tensor in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(model, parameters, (batch[:, :-1],))
        return toys.cross_entropy(logits, batch[:, 1:])

    with warnings.catch_warnings(record=True) as caught, observe(model, 1, out=tmp_path) as probe:
        warnings.simplefilter("always")
        torch.func.grad(loss)(parameters)
        probe.step()
    told = [str(warning.message) for warning in caught]
    assert any("spectra have status `not_matched`: `LM` ran inside" in text for text in told)
    assert all(text.endswith(".") and not text.endswith("..") for text in told)
