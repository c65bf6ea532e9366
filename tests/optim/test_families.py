"""Roles in transformers' model families, written by hand from their architecture.

Width, feed-forward width, vocabulary, number of positions and of token types are all 32, so that no size tells
anything.
"""

import pytest
import torch

from lightning_spectral.optim.owners import find_owners
from lightning_spectral.optim.routing import route, share_under_rule
from tests.models.architectures import release

transformers = pytest.importorskip("transformers")

SIZE = 32
SIZES = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SIZE,
    "type_vocab_size": SIZE,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
N_SIZES = {"n_embd": SIZE, "n_layer": 2, "n_head": 4, "n_positions": SIZE, "rotary_dim": 4}
MPT_SIZES = {"d_model": SIZE, "n_heads": 4, "n_layers": 2, "max_seq_len": SIZE}
SEQ2SEQ = {
    "d_model": SIZE,
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in {"layers": 2, "attention_heads": 4}.items()
    },
    "encoder_ffn_dim": SIZE,
    "decoder_ffn_dim": SIZE,
    "max_source_positions": SIZE,
    "max_target_positions": SIZE,
    "num_mel_bins": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": SIZE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": SIZE,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "tie_word_embeddings": False,
}
IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": SIZE}
SOUND = {
    "conv_dim": [16, 16],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

QKVO = "q_proj k_proj v_proj o_proj"
GATED = "gate_proj up_proj down_proj"
LLAMA = f"{QKVO} {GATED}"
OUT = "q_proj k_proj v_proj out_proj"
ENCODER = "self.query self.key self.value attention.output.dense intermediate.dense output.dense"
VISION = "attention.query attention.key attention.value attention.output.dense intermediate.dense output.dense"
WTE, TOKENS, BERT = "wte wpe", "embed_tokens", "word_embeddings position_embeddings token_type_embeddings"
STACKED = "experts.gate_up_proj experts.down_proj"
MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
LM = "lm_head"
WAVES = f"{OUT} conv_layers.1.conv feature_projection.projection intermediate_dense output_dense"

# class: (more sizes, matrices, heads, embeddings); everything else is a vector
FAMILIES: dict[str, tuple[dict[str, object], str, str, str]] = {
    **{
        f"{name}ForCausalLM": ({}, LLAMA, LM, TOKENS)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo", "Olmo2", "StableLm", "Granite")
    },
    **{f"{name}ForCausalLM": ({}, LLAMA, "", TOKENS) for name in ("Gemma", "Gemma2", "Cohere")},  # tied
    "PhiForCausalLM": ({}, "q_proj k_proj v_proj dense fc1 fc2", LM, TOKENS),
    "Phi3ForCausalLM": ({}, "qkv_proj o_proj gate_up_proj down_proj", LM, TOKENS),
    "GlmForCausalLM": ({}, f"{QKVO} gate_up_proj down_proj", LM, TOKENS),
    "Starcoder2ForCausalLM": ({}, f"{QKVO} c_fc c_proj", "", TOKENS),
    "GPTNeoXForCausalLM": ({}, NEOX, "embed_out", "embed_in"),
    "GPTNeoForCausalLM": (
        {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4},
        f"{OUT} c_fc c_proj",
        "",
        WTE,
    ),
    "GPT2LMHeadModel": ({**N_SIZES, "n_inner": SIZE}, "c_attn c_proj c_fc", "", WTE),
    "GPTJForCausalLM": (N_SIZES, f"{OUT} fc_in fc_out", LM, "wte"),
    "GPTBigCodeForCausalLM": (N_SIZES, "c_attn c_proj c_fc", "", WTE),
    "CodeGenForCausalLM": (N_SIZES, "qkv_proj out_proj fc_in fc_out", LM, "wte"),
    "OPTForCausalLM": (
        {"ffn_dim": SIZE, "word_embed_proj_dim": 16},
        f"{OUT} fc1 fc2 project_in project_out",
        "",
        "embed_tokens embed_positions",
    ),
    "BloomForCausalLM": ({"n_head": 4, "n_layer": 2}, NEOX, "", "word_embeddings"),
    "PersimmonForCausalLM": ({}, NEOX, LM, TOKENS),
    "MptForCausalLM": (MPT_SIZES, "Wqkv out_proj ffn.up_proj ffn.down_proj", "", "wte"),
    "MambaForCausalLM": ({"state_size": 8}, "in_proj x_proj dt_proj out_proj", "", "embeddings"),
    "RwkvForCausalLM": (
        {"attention_hidden_size": SIZE, "context_length": SIZE},
        "key value receptance attention.output",
        "head",
        "embeddings",
    ),
    "JambaForCausalLM": (
        {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1},
        f"{LLAMA} in_proj x_proj dt_proj out_proj router {STACKED}",
        LM,
        TOKENS,
    ),
    "MixtralForCausalLM": (
        EXPERTS,
        f"{QKVO} {STACKED} mlp.gate" if release("transformers") >= (5,) else f"{QKVO} w1 w2 w3 block_sparse_moe.gate",
        LM,
        TOKENS,
    ),
    "Qwen2MoeForCausalLM": (EXPERTS, f"{LLAMA} {STACKED} mlp.gate", LM, TOKENS),
    "Qwen3MoeForCausalLM": (EXPERTS, f"{QKVO} {STACKED} mlp.gate", LM, TOKENS),
    "OlmoeForCausalLM": (EXPERTS, f"{QKVO} {STACKED} mlp.gate", LM, TOKENS),
    "DeepseekV2ForCausalLM": (EXPERTS, f"{MLA} {GATED} {STACKED} mlp.gate", LM, TOKENS),
    "DeepseekV3ForCausalLM": (EXPERTS, f"{MLA} {GATED} {STACKED} mlp.gate", LM, TOKENS),
    "GptOssForCausalLM": (EXPERTS, f"{QKVO} {STACKED} mlp.router", LM, TOKENS),
    "GraniteMoeForCausalLM": (EXPERTS, f"{QKVO} input_linear output_linear router.layer", LM, TOKENS),
    "Llama4ForCausalLM": (
        {**EXPERTS, "intermediate_size_mlp": SIZE, "interleave_moe_layer_step": 1},
        f"{LLAMA} {STACKED} feed_forward.router",
        LM,
        TOKENS,
    ),
    "BertForMaskedLM": ({}, f"{ENCODER} transform.dense", "", BERT),
    "BertForSequenceClassification": ({}, f"{ENCODER} pooler.dense", "classifier", BERT),
    "BertModel": ({}, f"{ENCODER} pooler.dense", "", BERT),
    "RobertaForMaskedLM": ({}, f"{ENCODER} lm_head.dense", "", BERT),
    "RobertaForSequenceClassification": ({}, f"{ENCODER} classifier.dense", "classifier.out_proj", BERT),
    "XLMRobertaForTokenClassification": ({}, ENCODER, "classifier", BERT),
    "ElectraForMaskedLM": ({"embedding_size": SIZE}, f"{ENCODER} generator_predictions.dense", "", BERT),
    "DistilBertForMaskedLM": (
        {"dim": SIZE, "n_layers": 2, "n_heads": 4, "hidden_dim": SIZE},
        "q_lin k_lin v_lin out_lin lin1 lin2 vocab_transform",
        "",
        "word_embeddings position_embeddings",
    ),
    "ModernBertForMaskedLM": ({}, "Wqkv Wo Wi head.dense", "", "tok_embeddings"),
    "T5ForConditionalGeneration": (
        {"d_model": SIZE, "d_kv": 8, "d_ff": SIZE, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
        "Attention.q Attention.k Attention.v Attention.o wi_0 wi_1 wo",
        "",
        "shared relative_attention_bias",
    ),
    "BartForConditionalGeneration": (SEQ2SEQ, f"{OUT} fc1 fc2", "", "shared embed_positions"),
    "PegasusForConditionalGeneration": (SEQ2SEQ, f"{OUT} fc1 fc2", "", "shared embed_positions"),
    "WhisperForConditionalGeneration": (SEQ2SEQ, f"{OUT} fc1 fc2 conv2", "", "embed_tokens embed_positions"),
    "ViTForImageClassification": (IMAGE, VISION, "classifier", ""),
    "DeiTForImageClassification": (IMAGE, VISION, "classifier", ""),
    "Dinov2ForImageClassification": (
        IMAGE,
        "attention.query attention.key attention.value output.dense mlp.fc1 mlp.fc2",
        "classifier",
        "",
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": SIZE},
        "pwconv1 pwconv2 downsampling_layer.1",
        "classifier",
        "",
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": SIZE},
        "0.convolution 1.convolution shortcut.convolution",
        "classifier.1",
        "",
    ),
    "Wav2Vec2ForCTC": (SOUND, f"{WAVES} parametrizations.weight.original1", LM, ""),
    "HubertForCTC": (SOUND, f"{WAVES} parametrizations.weight.original1", LM, ""),  # positions
    "Data2VecAudioForCTC": (
        {**SOUND, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
        f"{WAVES} pos_conv_embed.layers.0.conv pos_conv_embed.layers.1.conv",
        LM,
        "",
    ),
    "UniSpeechForPreTraining": (
        SOUND,
        f"{WAVES} parametrizations.weight.original1 weight_proj project_q project_hid",
        "ctc_proj",
        "",
    ),
    "MobileNetV2ForImageClassification": (
        {"num_labels": SIZE},
        "reduce_1x1.convolution expand_1x1.convolution conv_1x1.convolution",
        "classifier",
        "",
    ),
    "SegformerForSemanticSegmentation": (
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": SIZE,
            "num_labels": SIZE,
        },
        "self.query self.key self.value self.sr output.dense mlp.dense1 mlp.dense2 linear_fuse "
        "patch_embeddings.1.proj patch_embeddings.2.proj patch_embeddings.3.proj "  # between stages
        "linear_c.0.proj linear_c.1.proj linear_c.2.proj linear_c.3.proj",
        "decode_head.classifier",
        "",
    ),
    "DPTForSemanticSegmentation": (
        {
            **IMAGE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": SIZE,
            "is_hybrid": False,
        },
        f"{VISION} layers.0.projection layers.1.projection layers.2.projection layers.3.projection resize "
        "convs.0 convs.1 convs.2 convs.3 convolution1 convolution2 head.head.0 "
        "readout_projects.0.0 readout_projects.1.0 readout_projects.2.0 readout_projects.3.0",
        "head.head.4",
        "",
    ),
    "YolosForObjectDetection": (
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": SIZE},
        f"{VISION} classifier.layers.0 classifier.layers.1 predictor.layers.0 predictor.layers.1",
        "class_labels_classifier.layers.2 bbox_predictor.layers.2",
        "",
    ),
    "LayoutLMv3ForSequenceClassification": (
        {
            **IMAGE,
            "input_size": 32,
            "rel_pos_bins": SIZE,
            "rel_2d_pos_bins": SIZE,
            "coordinate_size": 6,
            "shape_size": 4,
        },
        f"{ENCODER} classifier.dense",
        "classifier.out_proj",
        f"{BERT} x_position_embeddings y_position_embeddings h_position_embeddings w_position_embeddings",
    ),
    "MusicgenForCausalLM": (
        {"num_codebooks": 2, "ffn_dim": SIZE},
        f"{OUT} fc1 fc2",
        "lm_heads.0 lm_heads.1",
        "embed_tokens.0 embed_tokens.1",
    ),
    "ModernBertDecoderForCausalLM": ({}, "q_proj k_proj v_proj Wo Wi lm_head.dense", "", "tok_embeddings"),
    "DistilBertForSequenceClassification": (
        {"dim": SIZE, "n_layers": 2, "n_heads": 4, "hidden_dim": SIZE, "num_labels": SIZE},
        "q_lin k_lin v_lin out_lin lin1 lin2 pre_classifier",
        "classifier",
        "word_embeddings position_embeddings",
    ),
    "BartForSequenceClassification": (
        {**SEQ2SEQ, "num_labels": SIZE},
        f"{OUT} fc1 fc2 classification_head.dense",
        "classification_head.out_proj",
        "shared embed_positions",
    ),
    "XLMForSequenceClassification": (
        {"emb_dim": SIZE, "n_layers": 2, "n_heads": 4, "n_langs": SIZE, "num_labels": SIZE},
        "q_lin k_lin v_lin out_lin lin1 lin2",
        "sequence_summary.summary",
        "embeddings position_embeddings lang_embeddings",
    ),
    "ReformerForMaskedLM": (
        {
            "axial_pos_embds": True,
            "axial_pos_shape": [4, 8],
            "axial_pos_embds_dim": [16, 16],
            "attention_head_size": 8,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 4,
        },
        "query key value query_key dense.dense output.dense",
        "decoder",
        "word_embeddings",
    ),
    "RecurrentGemmaForCausalLM": (
        {"lru_width": SIZE, "num_hidden_layers": 3},
        f"{LLAMA} linear_x linear_y linear_out input_gate_weight recurrent_gate_weight",
        "",
        TOKENS,
    ),
    "Mamba2ForCausalLM": (
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
        "in_proj out_proj",
        LM,
        "embeddings",
    ),
    "BambaForCausalLM": (
        {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "attn_layer_indices": [1]},
        f"{LLAMA} in_proj out_proj",
        LM,
        TOKENS,
    ),
    "FalconMambaForCausalLM": ({"state_size": 8}, "in_proj x_proj dt_proj out_proj", "", "embeddings"),
    "Lfm2ForCausalLM": ({"layer_types": ["conv", "full_attention"]}, f"in_proj {OUT} w1 w2 w3", "", TOKENS),
    "Qwen3NextForCausalLM": (
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        f"{LLAMA} in_proj_qkvz in_proj_ba out_proj {STACKED} mlp.gate",
        LM,
        TOKENS,
    ),
    "MiniMaxForCausalLM": (EXPERTS, f"{QKVO} qkv_proj out_proj output_gate {STACKED} mlp.gate", LM, TOKENS),
    "Ernie4_5_MoeForCausalLM": (
        {**EXPERTS, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        f"{LLAMA} {STACKED} mlp.gate",
        LM,
        TOKENS,
    ),
    "GraniteMoeHybridForCausalLM": (
        {
            **EXPERTS,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "shared_intermediate_size": SIZE,
        },
        f"{QKVO} in_proj out_proj input_linear output_linear router.layer",
        LM,
        TOKENS,
    ),
    "Gemma3nForCausalLM": (
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": SIZE,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
        },
        f"{LLAMA} correction_coefs prediction_coefs modality_router linear_left linear_right per_layer_input_gate "
        "per_layer_projection per_layer_model_projection "
        + " ".join(f"altup_{un}projections.{i}" for un in ("", "unembed_") for i in range(3)),
        "",
        "embed_tokens embed_tokens_per_layer",
    ),
}


def build(name: str, more: dict[str, object]) -> torch.nn.Module:
    cls = getattr(transformers, name)
    sizes = {**SIZES, **more}
    if name in ("MambaForCausalLM", "RwkvForCausalLM", "WhisperForConditionalGeneration"):
        sizes = {key: value for key, value in sizes.items() if key not in ("head_dim", "num_key_value_heads")}
    with torch.device("meta"):
        return cls(cls.config_class(**sizes))


def matches(name: str, endings: str) -> bool:
    bare = name.removesuffix(".weight")
    return any(
        bare == ending or bare.endswith((f".{ending}", ending if "." in ending else "\n")) for ending in endings.split()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # advice on tiny configurations
@pytest.mark.parametrize("name", FAMILIES)
def test_roles_of_a_family_are_those_of_its_architecture(name):
    more, matrices, heads, embeddings = FAMILIES[name]
    routes = route(find_owners(build(name, more)))
    assert share_under_rule(routes) > 0.85
    for one in routes:
        expected = "vector"
        for role, endings in (("matrix", matrices), ("embedding", embeddings), ("head", heads)):
            if matches(one.named.name, endings) and not one.named.name.endswith("bias"):
                expected = role
        assert (one.named.name, one.role) == (one.named.name, expected)
    for endings in (matrices, heads, embeddings):  # and everything that was named is there
        for ending in endings.split():
            assert any(matches(one.named.name, ending) for one in routes), ending


def test_there_are_forty_families():
    assert len(FAMILIES) >= 40


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "BertForMaskedLM"])
def test_three_of_them_always(name):
    test_roles_of_a_family_are_those_of_its_architecture(name)
