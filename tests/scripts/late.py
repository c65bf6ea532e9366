"""Scripts whose model is late, bare, moved about or a program, and runs of no step."""

from __future__ import annotations

import contextlib

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.inputs import labelled
from tests.scripts.libraries import LLAMA
from tests.scripts.models import batches
from tests.scripts.toys import Lit, Tokens, cross_entropy


class LateModel(Tokens):
    """Layers are made in configure_model."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = toys.LM()

    def watched(self):
        return self.net.model.layers[0].mlp.down_proj


class SetUpModel(LateModel):
    def configure_model(self):
        pass

    def setup(self, stage):
        if self.net is None:
            torch.manual_seed(0)
            self.net = toys.LM()


class FirstBatchModel(LateModel):
    """Layers are made in the first training step; the optimizer gets them then."""

    def __init__(self):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()))

    def configure_model(self):
        pass

    def training_step(self, batch, batch_idx):
        if self.net is None:
            torch.manual_seed(0)
            self.net = toys.LM()
            self.optimizers().add_param_group({"params": list(self.net.parameters())})
        return self.loss(batch) + self.dummy

    def watched(self):
        return None


class LazyWidths(Tokens):
    """LazyLinear."""

    def make(self):
        model = toys.LM()
        for layer in model.model.layers:
            layer.mlp.gate_proj = nn.LazyLinear(toys.WIDTH)
            layer.mlp.down_proj = nn.LazyLinear(toys.D)
        model(toys.ids(2)[:, :-1])
        return model


class OneByOne(Tokens):
    """Batches of one sequence."""


class SingleToken(Lit):
    """(B, 1): one token a sequence."""

    def training_step(self, batch, batch_idx):
        self.row_ids = batch[:, :1]
        return cross_entropy(self.net(batch[:, :1]), batch[:, 1:2])


class Autocast(Tokens):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            return self.loss(batch)


class BareMatrices(Tokens):
    """Speedrun style: parameters, F.linear, casts."""

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = nn.Parameter(0.2 * torch.randn(32, 16)), nn.Parameter(0.2 * torch.randn(16, 32))

        def forward(self, x):
            return F.linear(F.linear(x, self.c_fc.type_as(x)).relu().square(), self.c_proj.type_as(x))

    def make(self):
        model = toys.LM()
        for layer in model.model.layers:
            layer.mlp, layer.mix = self.MLP(), nn.Linear(16, 16)
        return model

    def watched(self):
        return None


class BareCheckpointed(BareMatrices):
    def __init__(self):
        super().__init__()

        for block in self.net.model.layers:
            inner = block.forward
            block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)


class BareCompiled(BareMatrices):
    def __init__(self):
        super().__init__()
        torch._dynamo.reset()
        self.net.compile(backend="aot_eager", fullgraph=True)


class BareRaises(BareMatrices):
    """The network itself raises, and the batch is skipped."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            with contextlib.suppress(RuntimeError):
                self.net.model.layers[1].mlp(torch.zeros(2, 3, 7))
        return self.loss(batch)


class CheckpointingLlama(LLAMA):
    def __init__(self):
        super().__init__()
        self.net.gradient_checkpointing_enable({"use_reentrant": False})


class Resets(Tokens):
    """Weights go back to the start each epoch, and the module is moved between types."""

    def on_train_epoch_start(self):
        self.net.double().float()
        for p in self.net.parameters():
            p.data = p.data.clone()


class Scripted(Tokens):
    def make(self):
        return torch.jit.script(toys.LM())

    def watched(self):
        return None


class ForgottenMode(Tokens):
    """Leaves a function mode and a saved-tensors hook on around its forward."""

    def training_step(self, batch, batch_idx):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), torch.device("cpu"):
            return self.loss(batch)


class FreshList(Tokens):
    """The list of layers is a new one every step (layer shuffling)."""

    def training_step(self, batch, batch_idx):
        self.net.model.layers = nn.ModuleList(list(self.net.model.layers))
        return self.loss(batch)


class StateDictSwap(Tokens):
    """Evaluates other weights in the middle of a step, then puts its own back."""

    def training_step(self, batch, batch_idx):
        own = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict({k: v * 0.5 for k, v in own.items()})
        with torch.no_grad():
            self.net(batch[:, :-1])
        self.net.load_state_dict(own)
        return self.loss(batch)


class Tuple3(Lit):
    """(ids, types, mask) of BERT-like code; positional arguments of the model."""

    class Model(toys.LM):
        def __init__(self):
            super().__init__()
            self.types = nn.Embedding(2, toys.D)

        def forward(self, tokens, token_types, mask):
            x = self.model.embed_tokens(tokens) + self.types(token_types)
            for layer in self.model.layers:
                x = layer(x)
            return self.lm_head(x)

    def make(self):
        return self.Model()

    def training_step(self, batch, batch_idx):
        ids, types, mask = batch
        self.mask = mask
        self.row_ids = ids[mask]
        logits = self.net(ids, types, mask)
        return F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])

    def counted(self, rows):
        return rows[self.mask]


def unoptimised(trainer, module, *data, **_):
    """torch.jit's own optimiser gives other last digits in the first run of a process."""
    with torch.jit.optimized_execution(False):
        trainer.fit(module, *data)


SCRIPTS = {
    "configure_model": Script(LateModel),
    "made in setup": Script(SetUpModel),
    "made in the first step": Script(FirstBatchModel, refuses=True, exact=False),
    "lazy widths": Script(LazyWidths),
    "batches of one": Script(OneByOne, lambda: (toys.loader(64, 1),)),
    "single tokens": Script(SingleToken),
    "autocast in the step": Script(Autocast, losses=False),
    "bare matrices": Script(BareMatrices),
    "bare matrices, checkpointed": Script(BareCheckpointed),
    "bare matrices, compiled": Script(BareCompiled, losses=False),
    "bare matrices that raise": Script(BareRaises),
    "LLaMA checkpointed": Script(CheckpointingLlama, labelled(False)),
    "moves its weights": Script(Resets, options={"max_epochs": 2, "limit_train_batches": 3}),
    "scripted whole": Script(Scripted, refuses=True, exact=False, run=unoptimised),
    "saved-tensor hooks": Script(ForgottenMode),
    "new list of layers": Script(FreshList),
    "other weights in the step": Script(StateDictSwap),
    "no batches": Script(Tokens, options={"limit_train_batches": 0, "max_epochs": 1, "max_steps": -1}, exact=False),
    "no steps": Script(Tokens, options={"max_steps": 0}, exact=False),
    "no time": Script(Tokens, options={"max_time": {"seconds": 0}}, exact=False),
    "ids, types, mask": Script(Tuple3, batches(lambda x, m: (x, (x % 2), m)), exact=False),
    "barebones": Script(Tokens, options={"barebones": True, "max_steps": 4}),
    "LLaMA, one sequence": Script(
        LLAMA,
        lambda: (
            DataLoader(
                [
                    {"input_ids": x[None], "attention_mask": torch.ones(1, 16, dtype=torch.long), "labels": x[None]}
                    for x in toys.ids(64)[:, :16]
                ],
                batch_size=None,
            ),
        ),
    ),
}
