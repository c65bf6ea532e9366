"""The same litgpt training under every strategy, as functions for ``harness.run_ranks``.

Every rank sees the same batch (``run``), so that what differs is the optimizer, or its own part of it
(``run_on_parts``), as in real training. Where matrices are bf16 the gradients are given, not computed
(``WITH_GIVEN_GRADIENTS``): fused AdamW rounds the last entries of a shard of a norm otherwise than the same entries of
the whole, and a bf16 forward amplifies that last bit to 5e-3 of the update in 20 steps, whatever updates the matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from litgpt import GPT, Config
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon

# Width 34 is cut unevenly by 4 and its flat shards end inside rows. No biases: the key's has a zero gradient in exact
# arithmetic, and AdamW turns its rounding noise into full steps.
CONFIG = Config(
    n_layer=2,
    n_embd=34,
    n_head=2,
    vocab_size=50,
    padded_vocab_size=64,
    block_size=16,
    intermediate_size=102,
    bias=False,
)
KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "muon": lambda params: Muon(params, lr=1e-2, precision="fp32"),
    "normuon": lambda params: NorMuon(params, lr=1e-2, precision="fp32"),
    "dion": lambda params: Dion(params, lr=1e-2, rank_fraction=0.5),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "normuon, no decay": lambda params: NorMuon(params, lr=1e-2, precision="fp32", weight_decay=0.0),
}
Weights = dict[str, torch.Tensor]


def fresh_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(CONFIG)


def partly_frozen_model() -> GPT:
    """A frozen matrix, a frozen vector, and a matrix and a vector that never get a gradient."""
    model = fresh_model()
    model.transformer.h[0].attn.qkv.weight.requires_grad_(False)
    model.transformer.h[1].norm_1.weight.requires_grad_(False)
    model.transformer.h[1].unused = nn.Linear(34, 17)
    return model


def two_dtypes_model() -> GPT:
    """Matrices of the blocks in bf16; norms, embedding and head in fp32."""
    model = fresh_model()
    for layer in model.transformer.h.modules():
        if isinstance(layer, nn.Linear):
            layer.to(torch.bfloat16).register_forward_pre_hook(lambda own, given: (given[0].to(own.weight.dtype),))
    return model


MODELS: dict[str, Callable[[], GPT]] = {
    "gpt": fresh_model,
    "partly frozen": partly_frozen_model,
    "two dtypes": two_dtypes_model,
}


WITH_GIVEN_GRADIENTS = ("two dtypes",)


def given_gradients(model: str, step: int) -> Weights:
    """Whole gradients that no earlier rounding can reach: noise of full rank, by name, in the parameter's dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in MODELS[model]().named_parameters()
    }


def one_dtype_each(model: GPT) -> list[nn.Module]:
    """Both FSDPs want one dtype in each module they cut: the norms come before their block, where they differ."""
    blocks = list(model.transformer.h)
    if len({p.dtype for p in blocks[0].parameters()}) == 1:
        return blocks
    return [module for module in model.transformer.h.modules() if isinstance(module, model.config.norm_class)] + blocks


def train(trained: Single, steps: int, first: int = 0, part: tuple[int, int] = (0, 1)) -> None:
    """Train on the same batches everywhere, or on ``part = (rank, ranks)`` of each."""
    for step in range(first, first + steps):
        ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(step)).chunk(part[1])[part[0]]
        loss = nn.functional.cross_entropy(trained.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        trained.optimizer.zero_grad()
        loss.backward()
        if trained.kind_of_model in WITH_GIVEN_GRADIENTS:
            trained.replace_gradients(given_gradients(trained.kind_of_model, step))
        trained.optimizer.step()


class Single:
    """One process; also the interface that the others share."""

    def __init__(self, kind: str, model: str = "gpt") -> None:
        self.kind_of_model = model
        self.model: nn.Module = self.wrap(MODELS[model]())
        self.optimizer = KINDS[kind](self.model.parameters())

    def wrap(self, model: GPT) -> nn.Module:
        return model

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def replace_gradients(self, grads: Weights) -> None:
        """Overwrite what the backward pass left."""
        for name, p in self.model.named_parameters():
            p.grad.copy_(grads[name.removeprefix("module.")])

    def save(self) -> dict[str, Any]:
        """Full optimizer state by parameter name, the same on every rank."""
        options = StateDictOptions(full_state_dict=True)
        return copy.deepcopy(
            get_optimizer_state_dict(self.model, self.optimizer, options=options)
        )  # not the live buffers

    def load(self, weights: Weights, state: dict[str, Any]) -> None:
        self.load_weights(weights)
        options = StateDictOptions(full_state_dict=True)
        # torch optimizers keep the tensors they are given
        set_optimizer_state_dict(self.model, self.optimizer, copy.deepcopy(state), options=options)

    def load_weights(self, weights: Weights) -> None:
        self.model.load_state_dict(weights)


class DDP(Single):
    def wrap(self, model: GPT) -> nn.Module:
        return DistributedDataParallel(model, find_unused_parameters=hasattr(model.transformer.h[1], "unused"))

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.model.module.named_parameters()}

    def load_weights(self, weights: Weights) -> None:
        self.model.module.load_state_dict(weights)


class FSDP2(Single):
    def wrap(self, model: GPT) -> nn.Module:
        for module in one_dtype_each(model):
            fully_shard(module)
        return fully_shard(model)

    def weights(self) -> Weights:
        return {name: p.full_tensor().detach().clone() for name, p in self.model.named_parameters()}

    def cut(self, whole: Weights) -> Weights:
        from torch.distributed.tensor import distribute_tensor

        return {
            name: distribute_tensor(whole[name], p.device_mesh, p.placements)
            for name, p in self.model.named_parameters()
        }

    def replace_gradients(self, grads: Weights) -> None:
        super().replace_gradients(self.cut(grads))

    def load_weights(self, weights: Weights) -> None:
        self.model.load_state_dict(self.cut(weights), strict=False)


class FSDP1(Single):
    def wrap(self, model: GPT) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(module) for module in one_dtype_each(model)}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )

    def weights(self) -> Weights:
        with FullyShardedDataParallel.summon_full_params(self.model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in self.model.named_parameters()
            }

    def replace_gradients(self, grads: Weights) -> None:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            for name, p in self.model.named_parameters():
                p.grad.copy_(grads[name.replace("_fsdp_wrapped_module.", "")])

    def load_weights(self, weights: Weights) -> None:
        with FullyShardedDataParallel.summon_full_params(self.model), torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name.replace("_fsdp_wrapped_module.", "")])


STRATEGIES: dict[str, type[Single]] = {"single": Single, "ddp": DDP, "fsdp1": FSDP1, "fsdp2": FSDP2}


def run(rank: int, world_size: int, strategy: str, kind: str, steps: int, model: str = "gpt") -> Weights:
    """Train from scratch."""
    trained = STRATEGIES[strategy](kind, model)
    train(trained, steps)
    return trained.weights()


def run_on_parts(rank: int, world_size: int, strategy: str, kind: str, steps: int) -> Weights:
    """Train from scratch, every rank on its own part of each batch."""
    trained = STRATEGIES[strategy](kind)
    train(trained, steps, part=(rank, world_size))
    return trained.weights()


def save_midway(
    rank: int, world_size: int, strategy: str, kind: str, model: str = "gpt"
) -> tuple[Weights, dict[str, Any], Weights, Weights]:
    """Three steps, save, three more; and the same resumed in a new model: (weights, state, straight, resumed)."""
    straight = STRATEGIES[strategy](kind, model)
    train(straight, 3)
    weights, state = straight.weights(), straight.save()
    train(straight, 3, first=3)
    return weights, state, straight.weights(), resume(rank, world_size, strategy, kind, weights, state, model)


def resume(
    rank: int, world_size: int, strategy: str, kind: str, weights: Weights, state: dict[str, Any], model: str = "gpt"
) -> Weights:
    """Three more steps from a checkpoint."""
    other = STRATEGIES[strategy](kind, model)
    other.load(weights, state)
    train(other, 3, first=3)
    return other.weights()


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """Largest error of a parameter over the length of its path from ``start``; infinite if it should have stayed."""
    assert found.keys() == expected.keys()
    errors = [0.0]
    for name in expected:
        path = (expected[name].double() - start[name].double()).norm()
        error = (found[name].double() - expected[name].double()).norm()
        errors.append(0.0 if error == path == 0 else float(error / path))
    return max(errors)
