"""litgpt's GPT with the few changes that the paper's experiments need; without any of them it is litgpt's own.

Everything that litgpt's ``Config`` can say is said there (QK-norm, no positions, FFN width), so that such a model stays
a plain litgpt model. Only the activation, norms without parameters and PostLN change modules, and they keep litgpt's
names (``fc``, ``proj``, ``norm_1`` ...), so that checkpoints and probes find what they know. Attention computes in fp32
on a CPU, whatever the precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT, Block, CausalSelfAttention, GptNeoxMLP, RMSNorm
from torch import Tensor, nn

Activation = Literal["gelu", "relu2", "relu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Architecture:
    """What to change in litgpt's GPT; every default changes nothing."""

    activation: Activation | None = None
    """Nonlinearity of the feed-forward layer (GptNeoxMLP only). ``None``: the config's own"""
    norm: Literal["learned", "parameter_free"] = "learned"
    """Norms with the config's learned gain, or RMSNorm without parameters everywhere"""
    init: Literal["litgpt", "paper"] = "litgpt"
    """``paper``: std fan_in^-1/2 * min(1, sqrt(fan_out / fan_in)), embedding N(0, 1), biases 0"""
    qk_norm: bool | None = None
    """Normalise queries and keys. ``None``: as the config says"""
    positions: Literal["rope", "nope"] = "rope"
    """``nope`` leaves out the rotary embedding: no positions at all"""
    post_norm_fraction: float = 0.0
    """Share of the layers, from the first on, that normalise after the residual sum instead of before the sublayer"""
    ffn_multiplier: float | None = None
    """FFN width as a multiple of ``n_embd``. ``None``: as the config says"""

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            known = ", ".join(get_args(Activation))
            raise ValueError(f"`architecture.activation` must be one of {known}, got {self.activation!r}.")
        if not 0.0 <= self.post_norm_fraction <= 1.0:
            raise ValueError(f"`architecture.post_norm_fraction` must be in [0, 1], got {self.post_norm_fraction}.")
        if self.ffn_multiplier is not None and self.ffn_multiplier <= 0:
            raise ValueError(f"`architecture.ffn_multiplier` must be > 0, got {self.ffn_multiplier}.")

    def is_plain(self) -> bool:
        """Whether litgpt alone can build and load the model."""
        return self.activation in (None, "gelu") and self.norm == "learned" and self.post_norm_fraction == 0.0

    def changes(self) -> dict[str, object]:
        """The fields that differ from their defaults."""
        plain = asdict(Architecture())
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != plain[f.name]}


class ActivationMLP(GptNeoxMLP):  # type: ignore[misc]
    """litgpt's two-matrix MLP with another nonlinearity."""

    def __init__(self, config: Config, activation: str) -> None:
        super().__init__(config)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> (..., n_embd)."""
        projected: Tensor = self.proj(ACTIVATIONS[self.activation](self.fc(x)))
        return projected


class ParameterFreeRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, computed in fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)


class CpuAttention(CausalSelfAttention):  # type: ignore[misc]
    """litgpt's attention; on a CPU in fp32 even where the rest is bf16.

    torch 2.13's bf16 kernel takes six times as long as its fp32 one backwards (8 x 4 heads, 128 tokens of 32 features,
    Intel with AMX): 43 % of a training step of the pocket study.
    """

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, heads, T, head_size) three times -> (B, T, heads, head_size)."""
        attend = super().scaled_dot_product_attention
        if q.device.type != "cpu" or q.dtype != torch.bfloat16:
            return attend(q, k, v, mask)  # type: ignore[no-any-return]
        with torch.autocast("cpu", enabled=False):
            wide = attend(q.float(), k.float(), v.float(), None if mask is None else _like_scores(mask))
        return wide.to(v.dtype)  # type: ignore[no-any-return]


def _like_scores(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.float()


class PostNormBlock(Block):  # type: ignore[misc]
    """litgpt's block with each norm after the residual sum (PostLN) instead of before the sublayer."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """(B, T, n_embd) -> (B, T, n_embd)."""
        attended = self.post_attention_norm(self.attn(x, cos, sin, mask, input_pos, input_pos_maxp1))
        x = self.norm_1(x + attended)
        normed: Tensor = self.norm_2(x + self.post_mlp_norm(self.mlp(x)))
        return normed


def adapt_config(config: Config, architecture: Architecture) -> Config:
    """Put into litgpt's config what litgpt's config can say.

    Raises:
        ValueError: If config and architecture contradict each other.
    """
    changes: dict[str, object] = {}
    if architecture.ffn_multiplier is not None:
        changes["intermediate_size"] = round(architecture.ffn_multiplier * config.n_embd)
    if architecture.qk_norm is not None:
        changes["norm_qk"] = architecture.qk_norm
    if architecture.positions == "nope":
        if config.latent_attention:
            raise ValueError("`architecture.positions: nope` is not possible with latent attention: use `rope`.")
        changes["rotary_percentage"] = 0.0
    if architecture.activation is not None and config.mlp_class_name != "GptNeoxMLP":
        raise ValueError(
            f"`architecture.activation: {architecture.activation}` needs `mlp_class_name: GptNeoxMLP`, "
            f"`{config.name or 'this model_config'}` has {config.mlp_class_name}."
        )
    if architecture.post_norm_fraction and (config.parallel_residual or config.shared_attention_norm):
        raise ValueError(
            "`architecture.post_norm_fraction` needs `model_config.parallel_residual: false` and no shared norm: "
            "attention and FFN side by side have no place for a norm after each."
        )
    return replace(config, **changes) if changes else config


def build_gpt(config: Config, architecture: Architecture, *, seed: int) -> GPT:
    """A GPT whose initial weights depend on the config, the architecture and the seed, and on nothing else.

    Args:
        config: From :func:`adapt_config`.
        architecture: Changes that litgpt's config cannot say.
        seed: Initial weights; the global random state is left as it was.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = GPT(config)
        if architecture.activation not in (None, "gelu"):  # litgpt's own MLP is gelu
            for block in model.transformer.h:
                block.mlp = ActivationMLP(config, architecture.activation)
        if architecture.norm == "parameter_free":
            _drop_norm_parameters(model, config.norm_eps)
        num_post = round(architecture.post_norm_fraction * config.n_layer)
        # same modules in the same places: only the order of the sums, or the precision, differs
        for block in model.transformer.h[:num_post]:
            block.__class__ = PostNormBlock
        for block in model.transformer.h:
            if type(block.attn) is CausalSelfAttention:
                block.attn.__class__ = CpuAttention
        if not next(model.parameters()).is_meta:  # else there is nothing to fill
            _INITS[architecture.init](model, config)
    return model


def _drop_norm_parameters(model: GPT, eps: float) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.LayerNorm, RMSNorm)):
                setattr(parent, name, ParameterFreeRMSNorm(eps))


def _init_litgpt(model: GPT, config: Config) -> None:
    from litgpt.pretrain import initialize_weights

    # litgpt asks its Fabric only whether it shards; the weights made here are sharded later
    initialize_weights(SimpleNamespace(strategy=None), model, n_layer=config.n_layer, n_embd=config.n_embd)


def _init_paper(model: GPT, config: Config) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            nn.init.normal_(module.weight, std=fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


_INITS: dict[str, Callable[[GPT, Config], None]] = {"litgpt": _init_litgpt, "paper": _init_paper}
