"""Tiny architectures, and where their down projections are: written by hand from the models' own sources.

A row: how to build it, and one line a stack, ``path number-of-blocks | where width, where width``. ``where`` is
relative to the block; ``0:`` or ``1,3:`` before it names the blocks that have it; none means all. ``- 0,2`` at the end
names blocks that have no feed-forward network.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import nn

V, D, F = 64, 16, 48
HF = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2}
KV = {**HF, "num_key_value_heads": 2, "max_position_embeddings": 64}
BERT = {**HF, "max_position_embeddings": 64}
SQUARE = {**KV, "intermediate_size": D}
VIS = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
VIS |= {"patch_size": 4}
S2S = {
    "vocab_size": V, "d_model": D, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": F, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": F, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
WAV = {**HF, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
WAV |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SERIES = {"prediction_length": 4, "context_length": 8, "d_model": D, "lags_sequence": [1, 2]}
SERIES |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SERIES |= {"encoder_ffn_dim": F, "decoder_ffn_dim": F}

LLAMA = "model.layers 2 | mlp.down_proj 48"
BERT_LAYER = "encoder.layer 2 | output.dense 48"


def release(package: str) -> tuple[int, ...]:
    """The installed release of a package, as numbers."""
    return Version(version(package)).release


def experts(stacked: str, apart: str) -> str:
    """Where four experts are: in one tensor, or, before transformers 5, in a module each."""
    return stacked if release("transformers") >= (5,) else ", ".join(apart.format(expert) for expert in range(4))


def hf(name: str, config: str, **arguments: object) -> Callable[[], nn.Module]:
    """A model of Hugging Face from a configuration."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**arguments))

    return build


def clip() -> nn.Module:
    import transformers

    text, vision = {**BERT, "projection_dim": D}, {**VIS, "projection_dim": D}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=D)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    import transformers

    return transformers.SiglipModel(transformers.SiglipConfig(text_config=BERT, vision_config=VIS))


def llava() -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**{**VIS, "num_hidden_layers": 3}, projection_dim=D)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**KV), image_token_index=5
    )
    return transformers.LlavaForConditionalGeneration(config)


def vision_encoder_decoder() -> nn.Module:
    import transformers

    decoder = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_inner=F, n_layer=2, n_head=2, add_cross_attention=True, is_decoder=True
    )
    encoder = transformers.ViTConfig(**VIS)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


class LoraLinear(nn.Module):
    """A LoRA layer as peft builds it: the linear module it wraps, and two small matrices by adapter name."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})


def lora(*names: str) -> nn.Module:
    model = hf("LlamaForCausalLM", "LlamaConfig", **KV)()
    for parent in list(model.modules()):
        for name in names:
            if isinstance(getattr(parent, name, None), nn.Linear):
                setattr(parent, name, LoraLinear(getattr(parent, name)))
    return model


def litgpt(**changes: object) -> nn.Module:
    from tests.models import tiny

    return tiny.litgpt(**changes)


def litgpt_lora() -> nn.Module:
    from litgpt.lora import GPT, Config

    return GPT(
        Config(
            block_size=32, vocab_size=V, padded_vocab_size=V, n_layer=2, n_head=2, n_embd=D, intermediate_size=F,
            mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, lora_r=2, lora_mlp=True,
        )
    )  # fmt: skip


# hand-written styles; what they compute does not matter here


class Attention(nn.Module):
    """q, k, v and out as four square matrices: like a gated network where ``f = d``."""

    def __init__(self, names: str = "q k v o") -> None:
        super().__init__()
        for name in names.split():
            setattr(self, name, nn.Linear(D, D))


class Fused(nn.Module):
    """One matrix for q, k and v, and one out."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)


def module(**children: nn.Module) -> nn.Module:
    """A module with these children."""
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def stack(path: str, block: Callable[[], nn.Module], depth: int = 2, norm: bool = True) -> nn.Module:
    """A decoder whose blocks lie at a path."""

    def whole() -> nn.Module:
        made = block()
        if norm:
            made.norm = nn.LayerNorm(D)
        return made

    inner: nn.Module = nn.ModuleList(whole() for _ in range(depth))
    for part in reversed(path.split(".")):
        inner = module(**{part: inner})
    inner.embedding, inner.head = nn.Embedding(V, D), nn.Linear(D, V)
    return inner


def linear(num_in: int, num_out: int) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=False)


def gated(up: str, down: str, gate: str, width: int = F) -> nn.Module:
    """Three matrices in the order in which LLaMA's own code defines them."""
    return module(**{up: linear(D, width), down: linear(width, D), gate: linear(D, width)})


class SpeedrunMLP(nn.Module):
    """Two bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Parameter(torch.zeros(F, D)), nn.Parameter(torch.zeros(D, F))


class NormHead(nn.Module):
    """Baichuan 2's head: a bare parameter, whose rows are normalised in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first_flag = nn.Parameter(torch.zeros(V, D)), True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


def baichuan() -> nn.Module:
    def block() -> nn.Module:
        attention = module(W_pack=linear(D, 3 * D), o_proj=linear(D, D))
        return module(self_attn=attention, mlp=gated("up_proj", "down_proj", "gate_proj"))

    model = stack("model.layers", block)
    del model.head
    model.lm_head = NormHead()
    return model


def torchtitan_experts(num_experts: int = 4) -> nn.Module:
    made = nn.Module()
    made.w1 = nn.Parameter(torch.zeros(num_experts, F, D))
    made.w2 = nn.Parameter(torch.zeros(num_experts, D, F))
    made.w3 = nn.Parameter(torch.zeros(num_experts, F, D))
    return made


class GatedFeedForward(nn.Module):
    """x-transformers: a GLU, dropout, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Sequential(module(proj=nn.Linear(D, 2 * F)), nn.Identity(), nn.Dropout(0.0), nn.Linear(F, D))


def x_transformers() -> nn.Module:
    layers = []
    for index in range(4):
        inner = Attention("to_q to_k to_v to_out") if index % 2 == 0 else GatedFeedForward()
        layers.append(nn.ModuleList([nn.ModuleList([nn.LayerNorm(D), None, None]), inner, nn.Identity()]))
    made = module(attn_layers=module(layers=nn.ModuleList(layers)))
    made.token_emb = module(emb=nn.Embedding(V, D))
    return made


def mixer() -> nn.Module:
    """Two networks a block: one over positions, one over channels."""

    def block() -> nn.Module:
        tokens = nn.Sequential(nn.Linear(9, 20), nn.GELU(), nn.Linear(20, 9))
        channels = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
        return module(norm1=nn.LayerNorm(D), token_mlp=tokens, norm2=nn.LayerNorm(D), channel_mlp=channels)

    return module(layers=nn.ModuleList(block() for _ in range(2)))


def looped() -> nn.Module:
    shared = module(attn=Fused(), norm=nn.LayerNorm(D), mlp=module(c_fc=linear(D, F), c_proj=linear(F, D)))
    return module(wte=nn.Embedding(V, D), h=nn.ModuleList([shared] * 3))


def conformer() -> nn.Module:
    def half() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, F), nn.SiLU(), nn.Linear(F, D))

    def block() -> nn.Module:
        return module(ff1=half(), self_attn=Attention(), conv=nn.Conv1d(D, D, 3), ff2=half())

    return stack("blocks", block)


def named_blocks() -> nn.Module:
    """No list: ``block1``, ``block2``, ``block3``."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = Fused(), gated("w1", "w2", "w3")

    return module(**{f"block{index}": Block() for index in (1, 2, 3)})


def torch_transformer(width: int = F) -> nn.Module:
    return nn.Transformer(D, 2, 2, 3, width)


def demo() -> nn.Module:
    from lightning.pytorch.demos import Transformer

    return Transformer(vocab_size=V, ninp=D, nhead=2, nhid=F, nlayers=2)


def titan(**feed_forward: nn.Module) -> nn.Module:
    return module(attention=Attention("wq wk wv wo"), **feed_forward)


def titan_moe() -> nn.Module:
    router, shared = module(gate=linear(D, 4)), gated("w1", "w2", "w3", 24)
    return titan(moe=module(experts=torchtitan_experts(), router=router, shared_experts=shared))


def titan_module_dict() -> nn.Module:
    return module(layers=nn.ModuleDict({str(n): titan(feed_forward=gated("w1", "w2", "w3")) for n in (0, 1)}))


def nanogpt_block(width: int = F) -> nn.Module:
    return module(attn=Fused(), mlp=module(c_fc=linear(D, width), c_proj=linear(width, D)))


def nanogpt() -> nn.Module:
    blocks = nn.ModuleList(nanogpt_block(4 * D) for _ in range(3))
    return module(transformer=nn.ModuleDict({"wte": nn.Embedding(V, D), "h": blocks}))


def olmo_block(up: int, width: int) -> nn.Module:
    attention = {"att_proj": linear(D, 3 * D), "attn_out": linear(D, D)}
    return module(**attention, ff_proj=linear(D, up), ff_out=linear(width, D))


def tutorial_block() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
    return module(sa=Attention("key query value proj"), ffwd=module(net=net))


def torchtune_block() -> nn.Module:
    return module(attn=Attention("q_proj k_proj v_proj output_proj"), mlp=gated("w1", "w2", "w3"))


MIXTRAL = {**KV, "num_local_experts": 4}
QWEN_MOE = {**KV, "num_experts": 4, "moe_intermediate_size": 24}
GROUPS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24}

# name -> (builder, stacks)
QUICK: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "LLaMA": (hf("LlamaForCausalLM", "LlamaConfig", **KV), [LLAMA]),
    "LLaMA, f = d": (hf("LlamaForCausalLM", "LlamaConfig", **SQUARE), ["model.layers 2 | mlp.down_proj 16"]),
    "GPT-2": (
        hf("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=D, n_inner=F, n_layer=2, n_head=2),
        ["transformer.h 2 | mlp.c_proj 48"],
    ),
    "GPT-2, f = d": (
        hf("GPT2LMHeadModel", "GPT2Config", vocab_size=D, n_embd=D, n_inner=D, n_layer=2, n_head=2),
        ["transformer.h 2 | mlp.c_proj 16"],
    ),
    "BERT": (hf("BertForMaskedLM", "BertConfig", **BERT), ["bert.encoder.layer 2 | output.dense 48"]),
    "BERT, f = d": (
        hf("BertForMaskedLM", "BertConfig", **{**BERT, "intermediate_size": D}),
        ["bert.encoder.layer 2 | output.dense 16"],
    ),
    "T5": (
        hf("T5ForConditionalGeneration", "T5Config", **T5),
        ["encoder.block 2 | layer.1.DenseReluDense.wo 48", "decoder.block 3 | layer.2.DenseReluDense.wo 48"],
    ),
    "T5, f = d": (
        hf("T5ForConditionalGeneration", "T5Config", **{**T5, "d_ff": D, "feed_forward_proj": "gated-gelu"}),
        ["encoder.block 2 | layer.1.DenseReluDense.wo 16", "decoder.block 3 | layer.2.DenseReluDense.wo 16"],
    ),
    "BART": (
        hf("BartForConditionalGeneration", "BartConfig", **S2S),
        ["model.encoder.layers 2 | fc2 48", "model.decoder.layers 3 | fc2 40"],
    ),
    "ALBERT": (
        hf("AlbertForMaskedLM", "AlbertConfig", **{**BERT, "num_hidden_layers": 3}, embedding_size=D),
        ["albert.encoder.albert_layer_groups.0.albert_layers 1 | ffn_output 48"],
    ),
    "Swin": (
        hf("SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4]),
        ["encoder.layers.0.blocks 2 | output.dense 64", "encoder.layers.1.blocks 3 | output.dense 128"],
    ),
    "Mixtral": (
        hf("MixtralForCausalLM", "MixtralConfig", **MIXTRAL),
        ["model.layers 2 | " + experts("mlp.experts.down_proj 48", "block_sparse_moe.experts.{}.w2 48")],
    ),
    "Mixtral, f = d": (
        hf("MixtralForCausalLM", "MixtralConfig", **{**MIXTRAL, "intermediate_size": D}),
        ["model.layers 2 | " + experts("mlp.experts.down_proj 16", "block_sparse_moe.experts.{}.w2 16")],
    ),
    "DeepSeek-V3, first layer dense": (
        hf("DeepseekV3ForCausalLM", "DeepseekV3Config", **KV, **GROUPS, **MLA, first_k_dense_replace=1),
        [
            "model.layers 2 | 0:mlp.down_proj 48, "
            + experts("1:mlp.experts.down_proj 24", "1:mlp.experts.{}.down_proj 24")
            + ", 1:mlp.shared_experts.down_proj 24"
        ],
    ),
    "CLIP": (clip, ["text_model.encoder.layers 2 | mlp.fc2 48", "vision_model.encoder.layers 2 | mlp.fc2 48"]),
    "LLaMA with LoRA as peft wraps it": (lambda: lora("down_proj", "up_proj", "q_proj"), [LLAMA]),
    "LLaMA with LoRA on attention": (lambda: lora("q_proj", "o_proj"), [LLAMA]),
    "litgpt, GPT-NeoX": (litgpt, ["transformer.h 2 | mlp.proj 64"]),
    "litgpt, LLaMA": (lambda: litgpt(mlp="LLaMAMLP"), ["transformer.h 2 | mlp.proj 48"]),
    "litgpt, MoE": (
        lambda: litgpt(mlp="LLaMAMoE"),
        ["transformer.h 2 | " + ", ".join(f"mlp.experts.{expert}.proj 24" for expert in range(4))],
    ),
    "litgpt, LoRA": (litgpt_lora, ["transformer.h 2 | mlp.proj.linear 48"]),
    "torch TransformerEncoder": (
        lambda: nn.Sequential(nn.Embedding(V, D), nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, F), 2)),
        ["1.layers 2 | linear2 48"],
    ),
    "torch Transformer": (torch_transformer, ["encoder.layers 2 | linear2 48", "decoder.layers 3 | linear2 48"]),
    "torch Transformer, f = d": (
        lambda: torch_transformer(D),
        ["encoder.layers 2 | linear2 16", "decoder.layers 3 | linear2 16"],
    ),
    "torchtitan": (
        lambda: stack("layers", lambda: titan(feed_forward=gated("w1", "w2", "w3"))),
        ["layers 2 | feed_forward.w2 48"],
    ),
    "torchtitan, f = d": (
        lambda: stack("layers", lambda: titan(feed_forward=gated("w1", "w2", "w3", D))),
        ["layers 2 | feed_forward.w2 16"],
    ),
    "torchtitan, ModuleDict": (titan_module_dict, ["layers 2 | feed_forward.w2 48"]),
    "torchtitan, MoE": (
        lambda: stack("layers", titan_moe),
        ["layers 2 | moe.experts.w2 48, moe.shared_experts.w2 24"],
    ),
    "torchtune": (lambda: stack("layers", torchtune_block), ["layers 2 | mlp.w2 48"]),
    "modded-nanogpt, matrices as parameters": (
        lambda: stack("blocks", lambda: module(attn=Fused(), mlp=SpeedrunMLP()), norm=False),
        ["blocks 2 | mlp.c_proj 48"],
    ),
    "Baichuan 2, NormHead": (baichuan, [LLAMA]),
    "modded-nanogpt": (lambda: stack("blocks", nanogpt_block, norm=False), ["blocks 2 | mlp.c_proj 48"]),
    "nanoGPT in a ModuleDict": (nanogpt, ["transformer.h 3 | mlp.c_proj 64"]),
    "OLMo, flat blocks": (
        lambda: stack("transformer.blocks", lambda: olmo_block(2 * F, F)),
        ["transformer.blocks 2 | ff_out 48"],
    ),
    "OLMo, flat blocks, f = d": (
        lambda: stack("transformer.blocks", lambda: olmo_block(D, D)),
        ["transformer.blocks 2 | ff_out 16"],
    ),
    "x-transformers": (x_transformers, ["attn_layers.layers 4 | 1,3:1.ff.3 48 - 0,2"]),
    "tutorial (ffwd.net)": (lambda: stack("blocks", tutorial_block), ["blocks 2 | ffwd.net.2 64"]),
    "MLP-Mixer": (mixer, ["layers 2 | token_mlp.2 20, channel_mlp.2 48"]),
    "one block at three depths": (looped, ["h 3 | 0:mlp.c_proj 48"]),
    "Conformer": (conformer, ["blocks 2 | ff1.3 48, ff2.3 48"]),
    "numbered attributes": (named_blocks, ["block* 3 | mlp.w2 48"]),
    "demo Transformer": (
        demo,
        ["transformer.encoder.layers 2 | linear2 48", "transformer.decoder.layers 2 | linear2 48"],
    ),
}  # fmt: skip

SLOW: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Gemma 2": (hf("Gemma2ForCausalLM", "Gemma2Config", **KV, head_dim=8), [LLAMA]),
    "Gemma 3": (hf("Gemma3ForCausalLM", "Gemma3TextConfig", **KV, head_dim=8), [LLAMA]),
    "Phi-3": (hf("Phi3ForCausalLM", "Phi3Config", **KV, pad_token_id=0), [LLAMA]),
    "Phi": (hf("PhiForCausalLM", "PhiConfig", **KV), ["model.layers 2 | mlp.fc2 48"]),
    "Qwen 3": (hf("Qwen3ForCausalLM", "Qwen3Config", **KV, head_dim=8), [LLAMA]),
    "OLMo 2": (hf("Olmo2ForCausalLM", "Olmo2Config", **KV), [LLAMA]),
    "Cohere": (hf("CohereForCausalLM", "CohereConfig", **KV), [LLAMA]),
    "Granite": (hf("GraniteForCausalLM", "GraniteConfig", **KV), [LLAMA]),
    "StableLM": (hf("StableLmForCausalLM", "StableLmConfig", **KV), [LLAMA]),
    "Nemotron": (hf("NemotronForCausalLM", "NemotronConfig", **KV), [LLAMA]),
    "StarCoder 2": (hf("Starcoder2ForCausalLM", "Starcoder2Config", **KV), ["model.layers 2 | mlp.c_proj 48"]),
    "GPT-J": (
        hf("GPTJForCausalLM", "GPTJConfig", vocab_size=V, n_embd=D, n_inner=F, n_layer=2, n_head=2, rotary_dim=4),
        ["transformer.h 2 | mlp.fc_out 48"],
    ),
    "GPT-Neo": (
        hf("GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=2,
           num_heads=2, attention_types=[[["global", "local"], 1]]),
        ["transformer.h 2 | mlp.c_proj 48"],
    ),
    "GPT-NeoX": (hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT), ["gpt_neox.layers 2 | mlp.dense_4h_to_h 48"]),
    "CodeGen": (
        hf("CodeGenForCausalLM", "CodeGenConfig", vocab_size=V, n_embd=D, n_inner=F, n_layer=2, n_head=4, rotary_dim=2),
        ["transformer.h 2 | mlp.fc_out 48"],
    ),
    "OPT": (
        hf("OPTForCausalLM", "OPTConfig", vocab_size=V, hidden_size=D, ffn_dim=F, num_hidden_layers=2,
           num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=D),
        ["model.decoder.layers 2 | fc2 48"],
    ),
    "BLOOM": (
        hf("BloomForCausalLM", "BloomConfig", vocab_size=V, hidden_size=D, n_layer=2, n_head=2),
        ["transformer.h 2 | mlp.dense_4h_to_h 64"],
    ),
    "Falcon": (
        hf("FalconForCausalLM", "FalconConfig", **{k: v for k, v in HF.items() if k != "intermediate_size"}),
        ["transformer.h 2 | mlp.dense_4h_to_h 64"],
    ),
    "MPT": (
        hf("MptForCausalLM", "MptConfig", vocab_size=V, d_model=D, n_layers=2, n_heads=2),
        ["transformer.blocks 2 | ffn.down_proj 64"],
    ),
    "BioGPT": (hf("BioGptForCausalLM", "BioGptConfig", **BERT), ["biogpt.layers 2 | fc2 48"]),
    "XGLM": (
        hf("XGLMForCausalLM", "XGLMConfig", vocab_size=V, d_model=D, ffn_dim=F, num_layers=2, attention_heads=2),
        ["model.layers 2 | fc2 48"],
    ),
    "CTRL": (
        hf("CTRLLMHeadModel", "CTRLConfig", vocab_size=V, n_embd=D, dff=F, n_layer=2, n_head=2),
        ["transformer.h 2 | ffn.2 48"],
    ),
    "XLNet": (
        hf("XLNetLMHeadModel", "XLNetConfig", vocab_size=V, d_model=D, d_inner=F, n_layer=2, n_head=2),
        ["transformer.layer 2 | ff.layer_2 48"],
    ),
    "RWKV": (
        hf("RwkvForCausalLM", "RwkvConfig", vocab_size=V, hidden_size=D, attention_hidden_size=D, intermediate_size=F,
           num_hidden_layers=2),
        ["rwkv.blocks 2 | feed_forward.value 48"],
    ),
    "Jamba": (
        hf("JambaForCausalLM", "JambaConfig", **{**KV, "num_hidden_layers": 4}, num_experts=4, attn_layer_period=4,
           attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
        ["model.layers 4 | 0,2:feed_forward.down_proj 48, 1,3:feed_forward.experts.down_proj 48"],
    ),
    "RoBERTa": (hf("RobertaForMaskedLM", "RobertaConfig", **BERT), ["roberta." + BERT_LAYER]),
    "DistilBERT": (
        hf("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=V, dim=D, hidden_dim=F, n_layers=2, n_heads=2),
        ["distilbert.transformer.layer 2 | ffn.lin2 48"],
    ),
    "ModernBERT": (
        hf("ModernBertForMaskedLM", "ModernBertConfig", **BERT, pad_token_id=0),
        ["model.layers 2 | mlp.Wo 48"],
    ),
    "DeBERTa v2": (hf("DebertaV2ForMaskedLM", "DebertaV2Config", **BERT), ["deberta." + BERT_LAYER]),
    "ELECTRA": (hf("ElectraForMaskedLM", "ElectraConfig", **BERT, embedding_size=8), ["electra." + BERT_LAYER]),
    "Funnel": (
        hf("FunnelForMaskedLM", "FunnelConfig", vocab_size=V, block_sizes=[2, 2], num_decoder_layers=2, d_model=D,
           n_head=2, d_head=8, d_inner=F),
        ["funnel.encoder.blocks.0 2 | ffn.linear_2 48", "funnel.encoder.blocks.1 2 | ffn.linear_2 48",
         "funnel.decoder.layers 2 | ffn.linear_2 48"],
    ),
    "FNet": (hf("FNetForMaskedLM", "FNetConfig", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2),
             ["fnet." + BERT_LAYER]),
    "MobileBERT": (
        hf("MobileBertForMaskedLM", "MobileBertConfig", **HF, embedding_size=D, intra_bottleneck_size=8,
           num_feedforward_networks=3),
        ["mobilebert.encoder.layer 2 | ffn.0.output.dense 48, ffn.1.output.dense 48, output.dense 48"],
    ),
    "ESM": (hf("EsmForMaskedLM", "EsmConfig", **BERT, pad_token_id=0), ["esm." + BERT_LAYER]),
    "mT5, gated": (
        hf("MT5ForConditionalGeneration", "MT5Config", **T5),
        ["encoder.block 2 | layer.1.DenseReluDense.wo 48", "decoder.block 3 | layer.2.DenseReluDense.wo 48"],
    ),
    "Marian": (
        hf("MarianMTModel", "MarianConfig", **S2S, decoder_start_token_id=0),
        ["model.encoder.layers 2 | fc2 48", "model.decoder.layers 3 | fc2 40"],
    ),
    "Pegasus": (
        hf("PegasusForConditionalGeneration", "PegasusConfig", **S2S),
        ["model.encoder.layers 2 | fc2 48", "model.decoder.layers 3 | fc2 40"],
    ),
    "Whisper": (
        hf("WhisperForConditionalGeneration", "WhisperConfig", num_mel_bins=8,
           **{k: v for k, v in S2S.items() if k != "max_position_embeddings"}),
        ["model.encoder.layers 2 | fc2 48", "model.decoder.layers 3 | fc2 40"],
    ),
    "Wav2Vec 2": (hf("Wav2Vec2Model", "Wav2Vec2Config", **WAV), ["encoder.layers 2 | feed_forward.output_dense 48"]),
    "HuBERT": (hf("HubertModel", "HubertConfig", **WAV), ["encoder.layers 2 | feed_forward.output_dense 48"]),
    "Wav2Vec 2 Conformer": (
        hf("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **WAV),
        ["encoder.layers 2 | ffn1.output_dense 48, ffn2.output_dense 48"],
    ),
    "AST": (
        hf("ASTModel", "ASTConfig", **{k: v for k, v in VIS.items() if k != "image_size"}, num_mel_bins=16,
           max_length=32),
        [BERT_LAYER],
    ),
    "ViT": (hf("ViTForImageClassification", "ViTConfig", **VIS), ["vit." + BERT_LAYER]),
    "DeiT": (hf("DeiTModel", "DeiTConfig", **VIS), [BERT_LAYER]),
    "BEiT": (hf("BeitModel", "BeitConfig", **VIS), [BERT_LAYER]),
    "DINOv2": (hf("Dinov2Model", "Dinov2Config", **{**VIS, "mlp_ratio": 3}), ["encoder.layer 2 | mlp.fc2 48"]),
    "ViT-MAE": (
        hf("ViTMAEForPreTraining", "ViTMAEConfig", **VIS, decoder_num_hidden_layers=2, decoder_hidden_size=8,
           decoder_intermediate_size=24, decoder_num_attention_heads=2),
        ["vit." + BERT_LAYER, "decoder.decoder_layers 2 | output.dense 24"],
    ),
    "VideoMAE": (
        hf("VideoMAEModel", "VideoMAEConfig", **VIS, num_frames=4),
        [BERT_LAYER],
    ),
    "ConvNeXt": (
        hf("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[2, 3], num_stages=2),
        ["encoder.stages.0.layers 2 | pwconv2 32", "encoder.stages.1.layers 3 | pwconv2 64"],
    ),
    "SegFormer": (
        hf("SegformerModel", "SegformerConfig", depths=[2, 2], num_encoder_blocks=2, hidden_sizes=[8, 16],
           num_attention_heads=[1, 2], mlp_ratios=[4, 3], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2]),
        ["encoder.block.0 2 | mlp.dense2 32", "encoder.block.1 2 | mlp.dense2 48"],
    ),
    "SigLIP": (siglip, ["text_model.encoder.layers 2 | mlp.fc2 48", "vision_model.encoder.layers 2 | mlp.fc2 48"]),
    "LLaVA": (
        llava,
        ["model.vision_tower.vision_model.encoder.layers 3 | mlp.fc2 48",
         "model.language_model.layers 2 | mlp.down_proj 48"],
    ),
    "ViT with a GPT-2 decoder": (
        vision_encoder_decoder,
        ["encoder." + BERT_LAYER, "decoder.transformer.h 2 | mlp.c_proj 48"],
    ),
    "Qwen2-MoE": (
        hf("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **QWEN_MOE, shared_expert_intermediate_size=40),
        ["model.layers 2 | mlp.experts.down_proj 24, mlp.shared_expert.down_proj 40"],
    ),
    "Qwen3-MoE, every second layer dense": (
        hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **{**QWEN_MOE, "num_hidden_layers": 4}, decoder_sparse_step=2,
           head_dim=8),
        ["model.layers 4 | 0,2:mlp.down_proj 48, 1,3:mlp.experts.down_proj 24"],
    ),
    "OLMoE": (
        hf("OlmoeForCausalLM", "OlmoeConfig", **KV, num_experts=4),
        ["model.layers 2 | mlp.experts.down_proj 48"],
    ),
    "GPT-OSS": (
        hf("GptOssForCausalLM", "GptOssConfig", **KV, num_local_experts=4, head_dim=8),
        ["model.layers 2 | mlp.experts.down_proj 48"],
    ),
    "GLM-4-MoE": (
        hf("Glm4MoeForCausalLM", "Glm4MoeConfig", **KV, **{**GROUPS, "n_group": 1}, first_k_dense_replace=1,
           head_dim=8),
        [
            "model.layers 2 | 0:mlp.down_proj 48, "
            + experts("1:mlp.experts.down_proj 24", "1:mlp.experts.{}.down_proj 24")
            + ", 1:mlp.shared_experts.down_proj 24"
        ],
    ),
    "Llama 4, every second layer MoE": (
        hf("Llama4ForCausalLM", "Llama4TextConfig", **KV, intermediate_size_mlp=40, num_local_experts=4,
           interleave_moe_layer_step=2, head_dim=8),
        ["model.layers 2 | 0:feed_forward.down_proj 40, 1:feed_forward.experts.down_proj 48, "
         "1:feed_forward.shared_expert.down_proj 48"],
    ),
    "Granite MoE": (
        hf("GraniteMoeForCausalLM", "GraniteMoeConfig", **KV, num_local_experts=4),
        ["model.layers 2 | block_sparse_moe.output_linear 48"],
    ),
    "Time series transformer": (
        hf("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", **SERIES),
        ["encoder.layers 2 | fc2 48", "decoder.layers 2 | fc2 48"],
    ),
    "PatchTST": (
        hf("PatchTSTModel", "PatchTSTConfig", num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
           num_hidden_layers=2, d_model=D, num_attention_heads=2, ffn_dim=F),
        ["encoder.layers 2 | ff.3 48"],
    ),
    "Decision transformer": (
        hf("DecisionTransformerModel", "DecisionTransformerConfig", state_dim=3, act_dim=2, hidden_size=D, n_layer=2,
           n_head=2, n_inner=F),
        ["encoder.h 2 | mlp.c_proj 48"],
    ),
    "Mamba": (
        hf("MambaForCausalLM", "MambaConfig", vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=4),
        [],
    ),
}  # fmt: skip
