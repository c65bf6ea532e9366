"""How large a litgpt model is, by arithmetic on its config: weights, products per token, what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_spectral.text import CommandError
from lightning_spectral.training.document import config_alone, named_config


@dataclass(frozen=True)
class Linears:
    """Linear layers of one shape.

    Attributes:
        rows: Outputs.
        columns: Inputs.
        has_bias: Whether each output has a bias.
        number: How many there are.
        share: Of the tokens, that go through each of them; below 1 for routed experts.
        is_down: The rows that enter them are measured (post site).
    """

    rows: int
    columns: int
    has_bias: bool = False
    number: int = 1
    share: float = 1.0
    is_down: bool = False

    @property
    def entries(self) -> int:
        """Matrix entries of all of them."""
        return self.number * self.rows * self.columns


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        block_size: Longest sequence.
        parameters: All weights; a matrix that is used twice counts once.
        hidden: Linear layers of the blocks, which matrix optimizers take.
        head: Weights of the output layer.
        attention: Of every layer, heads times (features of a query + features of a value), and how many tokens it looks
            back at most (``None``: all).
    """

    block_size: int
    parameters: int
    hidden: tuple[Linears, ...]
    head: int
    attention: tuple[tuple[int, int | None], ...]

    @property
    def down(self) -> tuple[Linears, ...]:
        """Down projections: ``columns`` is the FFN width."""
        return tuple(linears for linears in self.hidden if linears.is_down)

    def flops_per_token(self, seq: int) -> float:
        """Operations of one training token in a sequence of ``seq``: forward, and twice that backward."""
        products = sum(linears.entries * linears.share for linears in self.hidden) + self.head
        scores = sum(features * min(seq, window or seq) for features, window in self.attention)
        return 6 * (products + scores)


def model_size(content: Mapping[str, Any]) -> ModelSize:
    """Of a recipe's model.

    Args:
        content: A recipe's tree with its overrides.

    Raises:
        CommandError: If litgpt refuses the model's config.
        RecipeError: If litgpt knows no such model.
    """
    architecture = content.get("architecture") or {}
    config = _config(content, architecture)
    hidden = [linears for layer in range(config.n_layer) for linears in (*_attention(config), *_mlp(config, layer))]
    head = config.padded_vocab_size * config.n_embd
    stored = sum(linears.entries + linears.has_bias * linears.number * linears.rows for linears in hidden)
    stored += head if (content.get("train") or {}).get("tie_embeddings") else 2 * head
    stored += config.padded_vocab_size if config.lm_head_bias else 0
    stored += _norms(config, bool(architecture.get("norm") == "parameter_free"))
    return ModelSize(config.block_size, stored, tuple(hidden), head, tuple(_scores(config)))


def _config(content: Mapping[str, Any], architecture: Mapping[str, Any]) -> Any:
    described = content.get("model_config")
    given = dict(named_config(str(content.get("model_name"))) if described is None else described)
    if described is not None and not {"vocab_size", "padded_vocab_size"} & set(given):
        given["padded_vocab_size"] = _data_vocabulary(content)  # the tokenizer's, as `pretrain` does
    if (multiplier := architecture.get("ffn_multiplier")) is not None:
        if multiplier <= 0:
            raise CommandError(f"`architecture.ffn_multiplier` must be > 0, got {multiplier}.")
        given["intermediate_size"] = round(multiplier * given.get("n_embd", config_alone().Config.n_embd))
    if architecture.get("qk_norm") is not None:
        given["norm_qk"] = architecture["qk_norm"]
    try:
        return config_alone().Config(**given)
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error) or "n_embd must be a multiple of n_head, n_head of n_query_groups"
        raise CommandError(f"litgpt refuses the `model_config`: {reason}.") from error


def _data_vocabulary(content: Mapping[str, Any]) -> int:
    data = content.get("data")
    init_args = (data.get("init_args") or {}) if isinstance(data, Mapping) else {}
    return int(init_args.get("vocab_size") or 2048)


def _attention(config: Any) -> Iterator[Linears]:
    width, heads = config.n_embd, config.n_head
    if not config.latent_attention:
        queries = heads * config.head_size
        yield Linears(queries + 2 * config.n_query_groups * config.head_size, width, config.bias or config.attn_bias)
        yield Linears(width, queries, config.bias)
        return
    yield Linears(config.q_lora_rank, width, config.attn_bias)
    yield Linears(heads * config.qk_head_dim, config.q_lora_rank, config.bias)
    yield Linears(config.kv_lora_rank + config.qk_rope_head_dim, width, config.attn_bias)
    yield Linears(
        config.n_query_groups * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, config.bias
    )
    yield Linears(width, heads * config.v_head_dim, config.bias)


def _mlp(config: Any, layer: int) -> Iterator[Linears]:
    is_mixture = config.mlp_class_name == "LLaMAMoE" and layer >= (config.first_k_dense_replace or 0)
    if not is_mixture:
        num_up = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
        yield from _network(config, config.intermediate_size, num_up)
        return
    yield Linears(config.n_expert, config.n_embd)  # the router
    expert = config.moe_intermediate_size or config.intermediate_size
    yield from _network(config, expert, 2, config.n_expert, config.n_expert_per_token / config.n_expert)
    if config.n_shared_expert:
        yield from _network(config, config.moe_intermediate_size * config.n_shared_expert, 2)


def _network(config: Any, ffn: int, num_up: int, number: int = 1, share: float = 1.0) -> Iterator[Linears]:
    yield Linears(ffn, config.n_embd, config.bias, num_up * number, share)
    yield Linears(config.n_embd, ffn, config.bias, number, share, is_down=True)


def _norms(config: Any, parameter_free: bool) -> int:
    """Gains (and shifts) of all norms; OLMo's LayerNorm has none."""
    without = parameter_free or (config.norm_class_name == "LayerNorm" and "OLMo" in config.name)
    each = 0 if without else 2 if config.norm_class_name == "LayerNorm" else 1
    second = config.norm_2 and not config.shared_attention_norm
    of_a_layer = config.n_embd * (config.norm_1 + second + config.post_attention_norm + config.post_mlp_norm)
    if config.norm_qk and not config.latent_attention:
        heads = config.n_head + config.n_query_groups if config.norm_qk_type == "olmo2" else 2
        of_a_layer += heads * config.head_size
    latent = 0
    if config.latent_attention and not parameter_free:
        latent = config.q_lora_rank + config.kv_lora_rank
    return each * (config.n_layer * of_a_layer + config.n_embd) + config.n_layer * latent


def _scores(config: Any) -> Iterator[tuple[int, int | None]]:
    features = 2 * config.head_size
    if config.latent_attention:
        features = config.qk_head_dim + config.v_head_dim
    for layer in range(config.n_layer):
        slides = config.sliding_window_size is not None and config.sliding_window_indices[layer]
        yield config.n_head * features, config.sliding_window_size if slides else None
