"""Scripts whose batches, loaders and ids are of further kinds; the harness makes the buckets from ``row_ids``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.models import batches
from tests.scripts.toys import Lit, Tokens, cross_entropy


@dataclass
class Inputs:
    """A batch with a nested part."""

    text: dict[str, Tensor]
    labels: Tensor
    name: str = "x"


class Nested(Lit):
    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        self.row_ids = batch.text["input_ids"][batch.text["attention_mask"].bool()]
        self.mask = batch.text["attention_mask"].bool()
        return cross_entropy(self.net(batch.text["input_ids"])[:, :-1], batch.labels[:, 1:])

    def counted(self, rows: Tensor) -> Tensor:
        return rows[self.mask]


class KeywordsOnly(Lit):
    """``model(**batch)``, the loss from a model that returns none without labels."""

    class Model(toys.LM):
        def forward(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
            logits = super().forward(input_ids)
            loss = None if labels is None else cross_entropy(logits[:, :-1], labels[:, 1:])
            return {"loss": loss, "logits": logits}

    def make(self) -> nn.Module:
        return self.Model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.mask = batch["attention_mask"].bool()
        self.row_ids = batch["input_ids"][self.mask]
        labels = batch.pop("labels")
        out = self.net(**batch)
        assert out["loss"] is None
        return cross_entropy(out["logits"][:, :-1], labels[:, 1:])

    def counted(self, rows: Tensor) -> Tensor:
        return rows[self.mask]


class LeftPadded(KeywordsOnly):
    """Padding in front, labels of the prompt left out."""


class Ragged(IterableDataset[Tensor]):
    """Endless, sequences of every length."""

    def __iter__(self) -> Iterator[Tensor]:
        n = 0
        while True:
            for row in toys.ids(64):
                yield row[: 6 + n % 11]
                n += 1


def ragged() -> tuple[Any, ...]:
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    return (DataLoader(Ragged(), batch_size=5, collate_fn=collate),)


class PackedWithPositions(Lit):
    """Sequences one behind another, (1, N), with position_ids that start again."""

    class Model(toys.LM):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(toys.T, toys.D)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.model.embed_tokens(input_ids) + self.positions(position_ids)
            for layer in self.model.layers:
                x = layer(x)
            return self.lm_head(x)

    def make(self) -> nn.Module:
        return self.Model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.row_ids = batch[:, :-1]
        positions = torch.arange(toys.T).repeat(len(batch))[None]
        return cross_entropy(
            self.net(batch[:, :-1].reshape(1, -1), position_ids=positions), batch[:, 1:].reshape(1, -1)
        )


class Curriculum(Tokens):
    """Longer sequences step by step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch[:, : 4 + 2 * batch_idx])


class NoIndex(Tokens):
    def training_step(self, batch: Tensor) -> Tensor:  # type: ignore[override]
        return self.loss(batch)


class ItsOwnIterator(Tokens):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class NoBatch(Tokens):
    """Makes its own data."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(toys.ids(8, seed=batch_idx))


class OfTexts(Tokens):
    """Strings, tokenised in the step."""

    def training_step(self, batch: list[str], batch_idx: int) -> Tensor:
        return self.loss(torch.tensor([[ord(letter) - 48 for letter in text] for text in batch]))


def texts() -> tuple[Any, ...]:
    return (DataLoader(["".join(chr(48 + n) for n in row) for row in toys.ids().tolist()], batch_size=8),)  # type: ignore[arg-type]


class TwoLoaders(Lit):
    """A dict of loaders, a forward for each."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = []
        for name in ("labelled", "other"):
            self.row_ids = batch[name][:, :-1]
            losses.append(cross_entropy(self.net(batch[name][:, :-1]), batch[name][:, 1:]))
        return sum(losses) / 2


class SameToken(Tokens):
    """A batch of one token only: no variance."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(torch.zeros_like(batch) if batch_idx == 2 else batch)


class SmallIds(Tokens):
    """int32 ids, as memory-mapped files give them."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.row_ids = batch[:, :-1]
        return cross_entropy(self.net(batch[:, :-1].int()), batch[:, 1:])


class Classifies(Tokens):
    """A class for each sequence, from its last token."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.row_ids = batch[:, :-1]
        return F.cross_entropy(self.net.model(batch[:, :-1])[:, -1, :3], batch[:, -1] % 3)


class MaskedLanguage(Lit):
    """A random share of the tokens is masked, drawn from the global generator."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch[:, :-1].clone()
        labels = x.clone()
        chosen = torch.rand(x.shape) < 0.3
        labels[~chosen] = -100
        x[chosen & (torch.rand(x.shape) < 0.8)] = 1
        self.row_ids = x
        return cross_entropy(self.net(x), labels)


class RewardPairs(Lit):
    """Chosen and rejected answers in one batch of twice the size."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        both = torch.cat([batch["chosen"], batch["rejected"]])
        self.row_ids = both
        score = self.net.lm_head(self.net.model(both))[:, -1, 0]
        better, worse = score.chunk(2)
        return -F.logsigmoid(better - worse).mean()


def labelled(left: bool) -> Any:
    """(input_ids, attention_mask, labels) with padding; the first five tokens are the prompt's."""

    def make(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        mask = mask.flip(1) if left else mask
        prompt = mask.cumsum(1) <= 3
        return {
            "input_ids": x.masked_fill(~mask, 0),
            "attention_mask": mask.long(),
            "labels": x.masked_fill(~mask | prompt, -100),
        }

    return batches(make)


def nested() -> Any:
    return batches(lambda x, mask: Inputs({"input_ids": x, "attention_mask": mask.long()}, x.masked_fill(~mask, -100)))


SCRIPTS = {
    "nested dataclass": Script(Nested, nested()),
    "keywords only": Script(KeywordsOnly, labelled(False)),
    "left padding": Script(LeftPadded, labelled(True)),
    "endless and ragged": Script(KeywordsOnly, ragged),
    "packed with positions": Script(PackedWithPositions),
    "curriculum": Script(Curriculum),
    "no batch_idx": Script(NoIndex),
    "dataloader_iter": Script(ItsOwnIterator),
    "makes its own data": Script(NoBatch, lambda: (range(8),)),
    "texts": Script(OfTexts, texts),
    "a dict of two loaders": Script(
        TwoLoaders, lambda: ({"labelled": toys.loader(), "other": toys.loader(64, 4)},), losses=False
    ),
    "one token only": Script(SameToken),
    "int32 ids": Script(SmallIds),
    "classifies": Script(Classifies, losses=False),
    "masked language": Script(MaskedLanguage),
    "reward pairs": Script(RewardPairs, batches(lambda x, m: {"chosen": x, "rejected": x.flip(0)}), losses=False),
}
