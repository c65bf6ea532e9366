"""Scripts that change, freeze, wrap, copy or trace parts of their model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint_sequential

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.toys import Lit, Tokens, cross_entropy


class FrozenBelow(Tokens):
    """The lower layer under no_grad."""

    def loss(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.net.model.layers[0](self.net.model.embed_tokens(ids[:, :-1]))
        self.row_ids = ids[:, :-1]
        return cross_entropy(self.net.lm_head(self.net.model.layers[1](hidden)), ids[:, 1:])

    def watched(self) -> nn.Module:
        return self.net.model.layers[1].mlp.down_proj


class LowerInEval(Tokens):
    """The lower layer frozen and in eval mode, as fine-tuning guides have it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.net.model.layers[0].eval().requires_grad_(False)
        return self.loss(batch)

    def watched(self) -> nn.Module:
        return self.net.model.layers[1].mlp.down_proj


class WholeInEval(Tokens):
    """The whole model trains in eval mode, to be without dropout."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.net.eval()
        return self.loss(batch)


class SwaAverages(Tokens):
    """torch's AveragedModel beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.average.update_parameters(self.net)
        with torch.no_grad():
            self.average(batch[:, :-1])
        return self.loss(batch)


class Grows(Tokens):
    """A third layer from step 2 on."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.net.model.layers.append(toys.Block())
        return self.loss(batch)


class Replaced(Tokens):
    """The network is swapped for a fresh one in the middle."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            self.net = toys.LM()
        return self.loss(batch)


class Parametrised(Tokens):
    """weight_norm on one down projection, spectral_norm (whose power iteration has a state) on the other."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.net.model.layers[0].mlp.down_proj)
        parametrizations.spectral_norm(self.net.model.layers[1].mlp.down_proj)


class MuReadout(nn.Linear):
    """muP's head: its input is divided by the width multiplier."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 4)


class ScaledLinear(nn.Linear):
    """A projection with a learned scale, that calls F.linear itself."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class MuP(Tokens):
    def make(self) -> nn.Module:
        model = toys.LM()
        model.lm_head = MuReadout(toys.D, toys.V)
        for layer in model.model.layers:
            layer.mlp.down_proj = ScaledLinear(toys.WIDTH, toys.D)
        return model


class TiedParameter(Tokens):
    """One parameter is embedding and head."""

    def make(self) -> nn.Module:
        model = toys.LM()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model


class Wrapped(nn.Module):
    """What DataParallel and home-made wrappers do: hand everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Wrapping(Tokens):
    def make(self) -> nn.Module:
        return Wrapped(Wrapped(toys.LM()))

    def watched(self) -> nn.Module:
        return self.net.module.module.model.layers[0].mlp.down_proj


class DataParallel(Wrapping):
    def make(self) -> nn.Module:
        return nn.DataParallel(nn.DataParallel(toys.LM()))


class TracedBlock(Tokens):
    """The second block is a traced program, which runs no hooks."""

    def make(self) -> nn.Module:
        model = toys.LM()
        model.model.layers[1] = torch.jit.trace(model.model.layers[1], torch.randn(2, toys.T, toys.D))
        return model


class TracedActivation(Tokens):
    """A traced function between the projections."""

    def make(self) -> nn.Module:
        model = toys.LM()
        silu = torch.jit.trace(F.silu, torch.randn(2, toys.T, toys.WIDTH))
        for layer in model.model.layers:
            layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(silu(mlp.gate_proj(x)))
        return model


class Sequence(Tokens):
    """checkpoint_sequential over the blocks."""

    def loss(self, ids: Tensor) -> Tensor:
        self.row_ids = ids[:, :-1]
        hidden = self.net.model.embed_tokens(ids[:, :-1])
        hidden = checkpoint_sequential(list(self.net.model.layers), 2, hidden, use_reentrant=False)
        return cross_entropy(self.net.lm_head(hidden), ids[:, 1:])


class RaisingHook(Tokens):
    """A hook of the script's own raises in step 2, and the step is done again without it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        def fail(*_: Any) -> None:
            raise ValueError("a hook of the script's")

        if batch_idx == 1:  # outside of a window
            handle = self.net.model.layers[1].register_forward_hook(fail)
            try:
                self.loss(batch)
            except ValueError:
                handle.remove()
        return self.loss(batch)


class ChangingHook(Tokens):
    """A forward pre-hook of the script's, registered late, changes what the down projection gets."""

    def on_fit_start(self) -> None:
        for layer in self.net.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class SelfContained(Lit):
    """Layers are attributes of the LightningModule itself, called by its own forward."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.embed = nn.Embedding(toys.V, toys.D)
        self.layers = nn.ModuleList(toys.Block() for _ in range(2))
        self.head = nn.Linear(toys.D, toys.V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss(self, ids: Tensor) -> Tensor:
        self.row_ids = ids[:, :-1]
        return cross_entropy(self(ids[:, :-1]), ids[:, 1:])

    def watched(self) -> nn.Module:
        return self.layers[0].mlp.down_proj


class SoftIds(Tokens):
    """Gumbel: ids are rows of numbers that multiply the table."""

    def loss(self, ids: Tensor) -> Tensor:
        soft = F.one_hot(ids[:, :-1], toys.V).float() @ self.net.model.embed_tokens.weight
        for layer in self.net.model.layers:
            soft = layer(soft)
        return cross_entropy(self.net.lm_head(soft), ids[:, 1:])


class MemoryTokens(Tokens):
    """Learned tokens in front of the text inside the model's forward, cut off again behind the blocks."""

    class Model(toys.Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Parameter(torch.randn(3, toys.D))

        def forward(self, ids: Tensor) -> Tensor:
            x = torch.cat([self.memory.expand(len(ids), -1, -1), self.embed_tokens(ids)], 1)
            for layer in self.layers:
                x = layer(x)
            return x[:, 3:]

    def make(self) -> nn.Module:
        model = toys.LM()
        model.model = self.Model()
        return model

    def counted(self, rows: Tensor) -> Tensor:
        return rows[:, 3:]


class Routed(Tokens):
    """A mixture of experts by hand: two of four experts for each token, weighed."""

    class Mixture(nn.Module):
        def __init__(self, of_rows: Any) -> None:
            super().__init__()
            self.of_rows = of_rows
            self.gate = nn.Linear(toys.D, 4)
            self.experts = nn.ModuleList(toys.MLP() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, -2)
            weights, chosen = self.gate(flat).softmax(-1).topk(2)
            out = torch.zeros_like(flat)
            for n, expert in enumerate(self.experts):
                rows, place = (chosen == n).nonzero(as_tuple=True)
                self.of_rows(n, rows)
                out = out.index_add(0, rows, weights[rows, place, None] * expert(flat[rows]))
            return out.view(x.shape)

    def make(self) -> nn.Module:
        model = toys.LM()
        for layer in model.model.layers:
            layer.mlp = self.Mixture(
                lambda n, rows, own=layer is model.model.layers[0]: self.sent(own and n == 0, rows)
            )
        return model

    def sent(self, to_watched: bool, rows: Tensor) -> None:
        if to_watched:
            self.row_ids = self.tokens.flatten()[rows]

    def loss(self, ids: Tensor) -> Tensor:
        self.tokens = ids[:, :-1]
        return cross_entropy(self.net(self.tokens), ids[:, 1:])

    def watched(self) -> nn.Module:
        return self.net.model.layers[0].mlp.experts[0].down_proj


SCRIPTS = {
    "frozen below": Script(FrozenBelow),
    "lower layer in eval mode": Script(LowerInEval),
    "whole model in eval mode": Script(WholeInEval, exact=False),
    "AveragedModel": Script(SwaAverages),
    "grows": Script(Grows),
    "replaced": Script(Replaced, exact=False),
    "parametrisations": Script(Parametrised),
    "muP": Script(MuP),
    "tied parameter": Script(TiedParameter),
    "wrapped twice": Script(Wrapping),
    "DataParallel": Script(DataParallel),
    "traced block": Script(TracedBlock),
    "traced activation": Script(TracedActivation),
    "checkpoint_sequential": Script(Sequence),
    "hook raises, done again": Script(RaisingHook),
    "hook changes rows": Script(ChangingHook),
    "layers in the module itself": Script(SelfContained),
    "soft ids": Script(SoftIds, exact=True),
    "memory tokens": Script(MemoryTokens, exact=False),
    "mixture by hand": Script(Routed),
}
