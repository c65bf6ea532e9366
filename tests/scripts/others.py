"""Scripts of further kinds: towers, tokens in other arrangements, models without tokens, what surrounds a fit."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.models import MASK, batches, encoded
from tests.scripts.toys import Lit, cross_entropy


class TwoStacks(Lit):
    """An encoder and a decoder of torch."""

    def make(self) -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(toys.V, 16), "head": nn.Linear(16, toys.V)})
        model["transformer"] = nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True)
        return model

    def loss(self, ids: Tensor) -> Tensor:
        source, target = self.net["embed"](ids[:, :8]), self.net["embed"](ids[:, 8:-1])
        return cross_entropy(self.net["head"](self.net["transformer"](source, target)), ids[:, 9:])


class Averages(Lit):
    """A moving average of the weights inside the module, run beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for mine, own in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(own, 0.1)
            self.average(batch[:, :-1])
        return self.loss(batch)


class Seq2Seq(Lit):
    """Labels make the decoder's input."""

    def make(self) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.T5Config(
            vocab_size=toys.V, d_model=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, d_kv=8,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    def loss(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids[:, :8], labels=ids[:, 8:]).loss


class Packed(Lit):
    """One sequence of all tokens, positions start again."""

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.net(ids[:, :-1].flatten()), ids[:, 1:].flatten())


class Unpadded(Lit):
    """Padding is taken out before the blocks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mask = batch["input_ids"], batch["attention_mask"].bool()
        hidden = self.net.model.embed_tokens(x)[mask]
        for layer in self.net.model.layers:
            hidden = layer(hidden)
        return cross_entropy(self.net.lm_head(hidden)[:-1], x[mask][1:])


class Choices(Lit):
    """(B, choices, T), as multiple-choice heads take it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        ids = batch[:, :-1].view(4, 2, toys.T)
        return cross_entropy(self.net(ids), batch[:, 1:])


class Registers(Lit):
    """Learned tokens before those of the text."""

    def watched(self) -> None:
        """Its rows are more than the text's: the harness's count is another question."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(2, toys.D))

    def loss(self, ids: Tensor) -> Tensor:
        hidden = torch.cat([self.registers.expand(len(ids), -1, -1), self.net.model.embed_tokens(ids[:, :-1])], 1)
        for layer in self.net.model.layers:
            hidden = layer(hidden)
        return cross_entropy(self.net.lm_head(hidden[:, 2:]), ids[:, 1:])


class BiasBeside(nn.Linear):
    """Returns (output, bias), as Megatron's layers do."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), self.bias


class Megatron(Lit):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.model.layers:
            down = BiasBeside(toys.WIDTH, toys.D)
            layer.mlp.down_proj = down
            layer.mlp.forward = lambda x, mlp=layer.mlp: sum(mlp.down_proj(F.silu(mlp.gate_proj(x))))


class LowRank(nn.Module):
    """LoRA by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Lora(Lit):
    def watched(self) -> None:
        """The down projection is inside a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.net.model.layers:
            layer.mlp.down_proj = LowRank(layer.mlp.down_proj)


class Patches(Lit):
    """A vision transformer: no token ids."""

    def make(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = nn.ModuleDict({"patch": nn.Linear(4, 16), "head": nn.Linear(16, 3)})
        model["encoder"] = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net["head"](self.net["encoder"](self.net["patch"](x)).mean(1)), y)


class ManualAccumulation(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Compiles(Lit):
    """Compiled functions that ran before the fit."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.run = torch.compile(self.net.forward, backend="eager")
        self.run(toys.ids(2)[:, :-1])

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.run(ids[:, :-1]), ids[:, 1:])


class Predicts(pl.Callback):
    """Another Trainer's prediction amid training."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            pl_module.eval()
            with torch.no_grad():
                pl_module.net(batch[:2, :-1])
            pl_module.train()


def patches() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 9, 4, generator=generator), torch.randint(3, (64,), generator=generator)
    return (DataLoader(list(zip(x, y, strict=True)), batch_size=8),)  # type: ignore[arg-type]


class OfMask(Lit):
    """(ids, mask, labels)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _, labels = batch
        return F.cross_entropy(self.net(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def watched(self) -> None:
        """Rows of padding do not count."""


BERT = {
    "vocab_size": toys.V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ALBERT = {**BERT, "embedding_size": 8}

SCRIPTS = {
    "encoder and decoder": Script(TwoStacks, exact=False, losses=False),
    "moving average in the module": Script(Averages, exact=False),
    "T5": Script(Seq2Seq, exact=False),
    "BERT": Script(encoded("BertForMaskedLM", "BertConfig", **BERT), exact=False),
    "ALBERT": Script(encoded("AlbertForMaskedLM", "AlbertConfig", **ALBERT), exact=False),
    "packed": Script(Packed),
    "unpadded": Script(Unpadded, batches(lambda x, m: {"input_ids": x, "attention_mask": m.long()}), losses=False),
    "choices": Script(Choices),
    "registers": Script(Registers),
    "(output, bias)": Script(Megatron),
    "LoRA": Script(Lora),
    "vision transformer": Script(Patches, patches, losses=False),
    "(ids, mask, labels)": Script(
        OfMask, batches(lambda x, m: (x, m.long(), torch.where(MASK[: len(x)], x, -100))), exact=False
    ),
    "accumulates by hand": Script(ManualAccumulation, options={"max_steps": 3}, losses=False),
    "compiled before the fit": Script(Compiles, exact=False),
    "forward between steps": Script(Lit, callbacks=lambda: [Predicts()]),
    "overfits two batches": Script(Lit, options={"overfit_batches": 2}),
    "detects anomalies": Script(Lit, options={"detect_anomaly": True}),
    "profiled": Script(Lit, options={"profiler": "simple"}),
    "reloads its loader": Script(
        Lit,
        options={"max_epochs": 3, "max_steps": -1, "limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
    ),
}
