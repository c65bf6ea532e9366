"""Scripts with other models, heads, losses, batches, loaders and evaluations."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.toys import Lit, cross_entropy

MASK = torch.arange(toys.T) < torch.arange(4, 12).repeat(8).unsqueeze(1)  # (64, T), right padding
Pair = namedtuple("Pair", ["input_ids", "attention_mask"])


class KeywordDown(Lit):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.model.layers:
            layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(input=F.silu(mlp.gate_proj(x)))


class KeywordEmbedding(Lit):
    def __init__(self) -> None:
        super().__init__()
        model = self.net.model
        model.forward = lambda ids: model.layers[1](model.layers[0](model.embed_tokens(input=ids)))


class LastOnly(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.net.lm_head(self.net.model(ids[:, :-1])[:, -1]), ids[:, -1])


class Masked(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        x = ids[:, :-1]
        chosen = torch.zeros_like(x, dtype=torch.bool)
        chosen[:, ::4] = True
        return F.cross_entropy(self.net.lm_head(self.net.model(x)[chosen]), x[chosen])


class Chunked(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        hidden, targets = self.net.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(hidden.chunk(4), targets.chunk(4), strict=True)
        return sum(F.cross_entropy(self.net.lm_head(h), t, reduction="sum") for h, t in parts) / len(targets)


class Tied(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(F.linear(self.net.model(ids[:, :-1]), self.net.model.embed_tokens.weight), ids[:, 1:])


class ShiftedInside(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        ids = ids[:, : toys.T]
        return cross_entropy(self.net(ids)[:, :-1], ids[:, 1:])


class TwoAhead(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-2]), ids[:, 2:])


class Smoothed(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-1]), ids[:, 1:], label_smoothing=0.1)


class LogSoftmax(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(self.net(ids[:, :-1]).flatten(0, 1), -1), ids[:, 1:].flatten())


class ByHand(Lit):
    """No function of torch computes its loss."""

    def loss(self, ids: Tensor) -> Tensor:
        return -F.log_softmax(self.net(ids[:, :-1]), -1).gather(-1, ids[:, 1:, None]).mean()


class Unreduced(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-1]), ids[:, 1:], reduction="none").mean()


class Ignored(Lit):
    def loss(self, ids: Tensor) -> Tensor:
        targets = torch.where(torch.arange(toys.T) % 3 == 0, -100, ids[:, 1:])
        return cross_entropy(self.net(ids[:, :-1]), targets)


class ClassesFirst(Lit):
    """(B, V, T) logits, as image people write it."""

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.net(ids[:, :-1]).transpose(1, 2), ids[:, 1:])


class LossModule(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, ids: Tensor) -> Tensor:
        return self.criterion(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class OfIds(Lit):
    """Batches of any kind; subclasses and arguments say where the ids are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.ids_of(batch)
        return cross_entropy(self.net(x)[:, :-1], x[:, 1:])

    def ids_of(self, batch: Any) -> Tensor:
        return batch["input_ids"]


class OfTuple(OfIds):
    def ids_of(self, batch: Any) -> Tensor:
        return batch[0]


class OfNested(OfIds):
    def ids_of(self, batch: Any) -> Tensor:
        return batch["text"]["input_ids"]


class OfDataclass(OfIds):
    def ids_of(self, batch: Any) -> Tensor:
        return batch.input_ids


@dataclass
class Batch:
    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: Any) -> Batch:
        return self


class Both(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["a"]) + self.loss(batch["b"])


class TimeFirst(Lit):
    def make(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        model = nn.ModuleDict({"embedding": nn.Embedding(toys.V, 16), "head": nn.Linear(16, toys.V)})
        model["encoder"] = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.net["encoder"](self.net["embedding"](ids[:, :-1].t()))
        return cross_entropy(self.net["head"](hidden).transpose(0, 1), ids[:, 1:])


class Shared(Lit):
    """One block, run three times."""

    def watched(self) -> None:
        """Rows of several depths, or of places that are no tokens: the harness's count is another question."""

    def __init__(self) -> None:
        super().__init__()
        model = self.net.model
        model.forward = lambda ids: model.layers[0](model.layers[0](model.layers[0](model.embed_tokens(ids))))


class LayerDrop(Lit):
    def __init__(self) -> None:
        super().__init__()
        model = self.net.model

        def forward(ids: Tensor) -> Tensor:
            x = model.layers[0](model.embed_tokens(ids))
            return model.layers[1](x) if torch.rand(()) < 0.5 else x

        model.forward = forward


class SoftPrompt(Lit):
    def watched(self) -> None:
        """Rows of several depths, or of places that are no tokens: the harness's count is another question."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(4, toys.D))

    def loss(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompt.expand(len(ids), -1, -1), self.net.model.embed_tokens(ids[:, :-1])], 1)
        for layer in self.net.model.layers:
            x = layer(x)
        return cross_entropy(self.net.lm_head(x[:, 4:]), ids[:, 1:])


class Images(Lit):
    """No tokens and no transformer."""

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Generating(Lit):
    """Validation that generates, as every chat evaluation does."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        text = batch[:, :4]
        for _ in range(4):
            text = torch.cat([text, self.net(text)[:, -1:].argmax(-1)], 1)


class OnlyLogs(Lit):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("x", 1.0, add_dataloader_idx=False)


class OwnGenerator(Dataset[Tensor]):
    def __init__(self) -> None:
        self.generator, self.data = torch.Generator().manual_seed(7), toys.ids(64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return self.data[int(torch.randint(64, (1,), generator=self.generator))]


class GoesOn(IterableDataset[Tensor]):
    """An iterator that goes on where it stopped."""

    def __init__(self) -> None:
        self.iterator = iter(toys.ids(128))

    def __iter__(self) -> Iterator[Tensor]:
        return self.iterator


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from toys.ids(64)


def batches(make: Any) -> Any:
    """A loader of eight ready batches."""
    ids = toys.ids(64)[:, : toys.T]
    ready = [make(x, mask) for x, mask in zip(ids.split(8), MASK.split(8), strict=True)]
    return lambda: (DataLoader(ready, batch_size=None),)  # type: ignore[arg-type]


def images() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, 4, generator=generator), torch.randint(3, (64,), generator=generator)
    return (DataLoader(list(zip(x, y, strict=True)), batch_size=8),)  # type: ignore[arg-type]


def encoded(build: str, config: str, **extra: Any) -> Any:
    """A tiny model of transformers whose own forward computes the loss."""

    class HuggingFace(Lit):
        def make(self) -> nn.Module:
            import transformers

            transformers.logging.set_verbosity_error()
            sizes = {
                "vocab_size": toys.V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 64,
            }  # fmt: skip
            return getattr(transformers, build)(getattr(transformers, config)(**(extra or sizes)))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(input_ids=batch, labels=batch).loss

    return HuggingFace


GPT2 = {"vocab_size": toys.V, "n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
EVALUATED = {"on": ("train", "validation"), "options": {"val_check_interval": 2, "max_steps": 4}}
with_validation: Any = lambda: (toys.loader(), toys.loader(16))  # noqa: E731

SCRIPTS = {
    "down projection by keyword": Script(KeywordDown, exact=False),
    "embedding by keyword": Script(KeywordEmbedding, exact=False),
    "head on the last position": Script(LastOnly),
    "head on masked positions": Script(Masked),
    "chunked cross-entropy": Script(Chunked),
    "tied head": Script(Tied),
    "shifted inside": Script(ShiftedInside),
    "two ahead": Script(TwoAhead),
    "label smoothing": Script(Smoothed),
    "nll_loss": Script(LogSoftmax),
    "loss by hand": Script(ByHand),
    "unreduced": Script(Unreduced),
    "ignored targets": Script(Ignored),
    "classes first": Script(ClassesFirst),
    "loss as a module": Script(LossModule),
    "dict": Script(OfIds, batches(lambda x, m: {"input_ids": x})),
    "tuple of one": Script(OfTuple, batches(lambda x, m: (x,))),
    "list with lengths": Script(OfTuple, batches(lambda x, m: [x, m.sum(1)])),
    "nested": Script(OfNested, batches(lambda x, m: {"text": {"input_ids": x}, "id": 3})),
    "named tuple": Script(OfDataclass, batches(lambda x, m: Pair(x, torch.ones_like(x)))),
    "dataclass": Script(OfDataclass, batches(lambda x, m: Batch(x, torch.ones_like(x)))),
    "two loaders": Script(Both, lambda: ({"a": toys.loader(), "b": toys.loader(64)},), losses=False),
    "endless": Script(Lit, lambda: (DataLoader(Endless(), batch_size=8),)),
    "goes on where it stopped": Script(Lit, lambda: (DataLoader(GoesOn(), batch_size=8),)),
    "dataset with its own generator": Script(Lit, lambda: (DataLoader(OwnGenerator(), batch_size=8),)),
    "loader with its own generator": Script(
        Lit, lambda: (toys.loader(shuffle=True, generator=torch.Generator().manual_seed(1)),)
    ),
    "shuffled": Script(Lit, lambda: (toys.loader(shuffle=True),)),
    "no length": Script(Lit, lambda: (DataLoader(GoesOn(), batch_size=8),), {"max_steps": -1, "max_epochs": 1}),
    "time first": Script(TimeFirst, exact=False, losses=False),
    "shared block": Script(Shared, exact=False, losses=False),
    "layer drop": Script(LayerDrop, exact=False),
    "soft prompt": Script(SoftPrompt, exact=False, losses=False),
    "images": Script(Images, images, refuses=True, exact=False),
    "GPT-2": Script(encoded("GPT2LMHeadModel", "GPT2Config", **GPT2)),
    "LLaMA": Script(encoded("LlamaForCausalLM", "LlamaConfig")),
    "validation": Script(Lit, with_validation, **EVALUATED),
    "several validation loaders": Script(Lit, lambda: (toys.loader(), [toys.loader(16), toys.loader(8)]), **EVALUATED),
    "generate() in validation": Script(Generating, with_validation, **EVALUATED),
    "validation without a forward": Script(OnlyLogs, with_validation, **EVALUATED),
    "sanity check": Script(Lit, with_validation, {"num_sanity_val_steps": 2, "max_steps": 4}),
    "weight averaging": Script(
        Lit, options={"max_epochs": 2, "max_steps": -1}, callbacks=lambda: [StochasticWeightAveraging(1e-3, 1)]
    ),
    "early stopping on our metric": Script(
        Lit, callbacks=lambda: [EarlyStopping("loss", strict=False, check_on_train_epoch_end=True)]
    ),
}
