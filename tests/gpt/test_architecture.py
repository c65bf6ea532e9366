"""litgpt's GPT unless asked otherwise; each change does what it says and keeps the names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT, CausalSelfAttention
from litgpt.pretrain import initialize_weights
from torch import Tensor, nn

from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt


def _config(**changes: Any) -> Config:
    fields = {
        "block_size": 16,
        "n_layer": 4,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 64,
        "padded_vocab_size": 64,
        "norm_class_name": "RMSNorm",
        "parallel_residual": False,
        "rotary_percentage": 1.0,
        "bias": False,
    }
    return Config(**{**fields, **changes})


def _build(architecture: Architecture, **changes: Any) -> GPT:
    return build_gpt(adapt_config(_config(**changes), architecture), architecture, seed=1)


def _ids() -> Tensor:
    return torch.arange(12).reshape(1, 12)


def test_without_changes_it_is_litgpts_own_with_litgpts_weights() -> None:
    torch.manual_seed(1)
    expected = GPT(_config())
    initialize_weights(SimpleNamespace(strategy=None), expected, n_layer=4, n_embd=16)
    built = _build(Architecture())
    assert type(built) is GPT
    assert str(built).replace("CpuAttention", "CausalSelfAttention") == str(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name


def test_weights_depend_on_the_seed_and_leave_the_global_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = _build(Architecture())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = _build(Architecture())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("activation", ["relu2", "relu", "silu", "gelu"])
def test_activation(activation: str) -> None:
    mlp = _build(Architecture(activation=activation)).transformer.h[0].mlp  # type: ignore[arg-type]
    assert [name for name, _ in mlp.named_children()] == ["fc", "proj"]
    oracle = {
        "relu2": lambda z: z.clamp(min=0) ** 2,
        "relu": lambda z: z.clamp(min=0),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    }[activation]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(x), oracle(x @ mlp.fc.weight.mT) @ mlp.proj.weight.mT, rtol=1e-4, atol=1e-6)  # fp32


def test_parameter_free_norms() -> None:
    model = _build(Architecture(norm="parameter_free", qk_norm=True))
    assert all(value.dim() == 2 for value in model.parameters())  # matrices only
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * 7
    normed = model.transformer.h[0].norm_1(x)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2), rtol=1e-4, atol=0)  # eps 1e-5 beside 49


def test_paper_init() -> None:
    model = _build(Architecture(init="paper", ffn_multiplier=8), n_embd=128, n_head=4, padded_vocab_size=512, bias=True)
    block = model.transformer.h[0]
    expected = {
        model.transformer.wte.weight: 1.0,
        model.lm_head.weight: 128**-0.5,
        block.mlp.fc.weight: 128**-0.5,
        block.mlp.proj.weight: 1024**-0.5 * (128 / 1024) ** 0.5,
        block.attn.proj.weight: 128**-0.5,
    }
    for weight, std in expected.items():
        # the estimated std of n >= 16,384 normal draws is within 5 / sqrt(2 n) = 2.8 % (5 sigma)
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.028)
    assert not block.mlp.fc.bias.detach().any()


def test_config_fields_that_litgpt_has() -> None:
    config = adapt_config(_config(), Architecture(qk_norm=True, ffn_multiplier=3, positions="nope"))
    assert (config.norm_qk, config.intermediate_size, config.rope_n_elem) == (True, 48, 0)


def test_nope_knows_no_order_and_rope_does() -> None:
    shuffled = torch.tensor([[1, 2, 3, 4, 9], [4, 3, 2, 1, 9]])
    one_layer = {"n_layer": 1}
    nope = _build(Architecture(positions="nope"), **one_layer)(shuffled)[:, -1]
    rope = _build(Architecture(positions="rope"), **one_layer)(shuffled)[:, -1]
    assert torch.allclose(nope[0], nope[1], atol=1e-5)  # fp32 sums in another order
    assert not torch.allclose(rope[0], rope[1], atol=1e-5)


@pytest.mark.parametrize(("fraction", "num_post"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_post_norm_from_the_first_layer_on(fraction: float, num_post: int) -> None:
    model = _build(Architecture(post_norm_fraction=fraction))
    outputs: list[Tensor] = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    model(_ids())
    # RMSNorm's gain is 1 at the start: after it the mean square is 1 (eps 1e-5 beside activations near 0.03)
    is_normed = [torch.allclose(out.square().mean(-1), torch.ones(1, 12), atol=2e-2) for out in outputs]
    assert is_normed == [True] * num_post + [False] * (4 - num_post)


def test_post_norm_is_norm_after_the_sum() -> None:
    model = _build(Architecture(post_norm_fraction=1.0))
    block = model.transformer.h[0]
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = model.cos[:12].unsqueeze(0), model.sin[:12].unsqueeze(0)
    middle = block.norm_1(x + block.attn(x, cos, sin))
    torch.testing.assert_close(block(x, cos, sin), block.norm_2(middle + block.mlp(middle)))


def test_contradictions_are_named() -> None:
    with pytest.raises(ValueError, match=r"`architecture.activation` must be one of gelu, relu2, .*, got 'tanh'"):
        Architecture(activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`architecture.post_norm_fraction` must be in \[0, 1\], got 2"):
        Architecture(post_norm_fraction=2)
    with pytest.raises(ValueError, match=r"`architecture.ffn_multiplier` must be > 0, got -1"):
        Architecture(ffn_multiplier=-1)
    with pytest.raises(
        ValueError, match=r"relu2` needs `mlp_class_name: GptNeoxMLP`, `this model_config` has LLaMAMLP"
    ):
        _build(Architecture(activation="relu2"), mlp_class_name="LLaMAMLP", intermediate_size=32)
    with pytest.raises(ValueError, match=r"needs `model_config.parallel_residual: false`"):
        _build(Architecture(post_norm_fraction=0.5), parallel_residual=True)


def test_plain_means_that_litgpt_can_load_it() -> None:
    assert Architecture(qk_norm=True, positions="nope", init="paper", ffn_multiplier=2).is_plain()
    assert not Architecture(activation="relu2").is_plain()
    assert Architecture(activation="relu2").changes() == {"activation": "relu2"}
    assert isinstance(_build(Architecture()).lm_head, nn.Linear)


@pytest.mark.parametrize("with_mask", [False, True])
def test_bf16_attention_on_a_cpu_is_the_fp32_one(with_mask: bool) -> None:
    config = Config(
        block_size=16, n_layer=1, n_head=2, n_embd=16, padded_vocab_size=32, norm_class_name="RMSNorm", bias=False
    )
    attention = build_gpt(config, Architecture(), seed=0).transformer.h[0].attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 8, generator=generator).bfloat16() for _ in range(3))
    mask = torch.zeros(16, 16, dtype=torch.bfloat16).masked_fill_(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    attended = attention.scaled_dot_product_attention(q, k, v, mask if with_mask else None)
    exact = CausalSelfAttention.scaled_dot_product_attention(attention, q.float(), k.float(), v.float())
    assert attended.dtype == torch.bfloat16
    assert torch.equal(attended, exact.bfloat16())
    in_fp32 = attention.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(in_fp32, exact)
