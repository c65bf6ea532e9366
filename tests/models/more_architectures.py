"""Families that were read and written down after the search was built: their expectations were not tuned on.

Rows as in :mod:`tests.models.architectures`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tests.models.architectures import BERT, BERT_LAYER, HF, KV, S2S, SERIES, T5, VIS, WAV, D, F, V, hf

DEPTHS = {"num_hidden_layers": 2, "num_attention_heads": 2}
SWITCH = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
PROPHET = {"encoder_ffn_dim": F, "num_encoder_layers": 2, "num_encoder_attention_heads": 2, "decoder_ffn_dim": 40}
PROPHET |= {"num_decoder_layers": 3, "num_decoder_attention_heads": 2, "max_position_embeddings": 64}
PERCEIVER = {"num_latents": 4, "d_latents": D, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "self_attention_widening_factor": 3}
REFORMER = {"attn_layers": ["local", "lsh"], "hidden_size": D, "num_attention_heads": 2, "attention_head_size": 8}
REFORMER |= {"feed_forward_size": F, "axial_pos_embds": False, "vocab_size": V, "max_position_embeddings": 64}
BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
PVT = {"depths": [2, 2], "num_encoder_blocks": 2, "hidden_sizes": [8, 16], "sequence_reduction_ratios": [2, 1]}
PVT |= {"patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [4, 3], "image_size": 32}
HIERA = {"embed_dim": 8, "image_size": [64, 64], "depths": [2, 2], "num_heads": [1, 2], "num_query_pool": 1}
MIXER = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8, "num_layers": 2}


def sam() -> nn.Module:
    import transformers

    vision = {"hidden_size": D, **DEPTHS, "image_size": 32, "patch_size": 8, "output_channels": 8, "mlp_dim": F}
    vision |= {"global_attn_indexes": [1], "window_size": 2}
    mask = {"hidden_size": 8, "mlp_dim": 24, **DEPTHS, "iou_head_hidden_dim": 8}
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    config = transformers.SamConfig(vision_config=vision, mask_decoder_config=mask, prompt_encoder_config=prompt)
    return transformers.SamModel(config)


def blip() -> nn.Module:
    import transformers

    text, vision = {**BERT, "encoder_hidden_size": D}, VIS
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=vision))


def qwen2_vl() -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": D, "num_heads": 2, "mlp_ratio": 3, "hidden_size": D, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config={**KV, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def experts(path: str, leaf: str, width: int) -> str:
    return ", ".join(f"{path}.experts.expert_{n}.{leaf} {width}" for n in (0, 1))


NLLB = {**S2S, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}

MORE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Persimmon": (hf("PersimmonForCausalLM", "PersimmonConfig", **KV), ["model.layers 2 | mlp.dense_4h_to_h 48"]),
    "GPT-BigCode": (
        hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", vocab_size=V, n_embd=D, n_inner=F, n_layer=2, n_head=2),
        ["transformer.h 2 | mlp.c_proj 48"],
    ),
    "PhiMoE": (
        hf("PhimoeForCausalLM", "PhimoeConfig", **KV, num_local_experts=4),
        ["model.layers 2 | mlp.experts.down_proj 48"],
    ),
    "Switch Transformers": (
        hf("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
           **{**T5, "num_decoder_layers": 2}, **SWITCH),
        [f"{side}.block 2 | 0:layer.{n}.mlp.wo 48, " + ", ".join(
            f"1:{where}" for where in experts(f"layer.{n}.mlp", "wo", 48).split(", "))
         for side, n in (("encoder", 1), ("decoder", 2))],
    ),
    "NLLB-MoE": (
        hf("NllbMoeForConditionalGeneration", "NllbMoeConfig", **NLLB),
        ["model.encoder.layers 2 | 0:ffn.fc2 48, 1:ffn.experts.expert_0.fc2 48, 1:ffn.experts.expert_1.fc2 48",
         "model.decoder.layers 3 | 0,2:ffn.fc2 40, 1:ffn.experts.expert_0.fc2 40, 1:ffn.experts.expert_1.fc2 40"],
    ),
    "RecurrentGemma": (  # its own width is half of the configured one
        hf("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **{**KV, "num_hidden_layers": 3}, head_dim=8,
           lru_width=D),
        ["model.layers 3 | mlp_block.down_proj 24"],
    ),
    "Longformer": (
        hf("LongformerForMaskedLM", "LongformerConfig", **BERT, attention_window=4),
        ["longformer." + BERT_LAYER],
    ),
    "LED": (
        hf("LEDForConditionalGeneration", "LEDConfig", **S2S),
        ["led.encoder.layers 2 | fc2 48", "led.decoder.layers 3 | fc2 40"],
    ),
    "ProphetNet": (
        hf("ProphetNetForConditionalGeneration", "ProphetNetConfig", vocab_size=V, hidden_size=D, **PROPHET),
        ["prophetnet.encoder.layers 2 | feed_forward.output 48",
         "prophetnet.decoder.layers 3 | feed_forward.output 40"],
    ),
    "LongT5": (
        hf("LongT5ForConditionalGeneration", "LongT5Config", **T5),
        ["encoder.block 2 | layer.1.DenseReluDense.wo 48", "decoder.block 3 | layer.2.DenseReluDense.wo 48"],
    ),
    "CANINE": (
        hf("CanineModel", "CanineConfig", **{k: v for k, v in BERT.items() if k != "vocab_size"}),
        ["initial_char_encoder.layer 1 | output.dense 48", BERT_LAYER, "final_char_encoder.layer 1 | output.dense 48"],
    ),
    "Perceiver": (hf("PerceiverModel", "PerceiverConfig", **PERCEIVER), ["encoder.self_attends 2 | mlp.dense2 48"]),
    "Reformer": (
        hf("ReformerForMaskedLM", "ReformerConfig", **REFORMER),
        ["reformer.encoder.layers 2 | feed_forward.output.dense 48"],
    ),
    "Bamba": (
        hf("BambaForCausalLM", "BambaConfig", **KV, **BAMBA),
        ["model.layers 2 | feed_forward.down_proj 48"],
    ),
    "LFM2": (
        hf("Lfm2ForCausalLM", "Lfm2Config", **KV, layer_types=["conv", "full_attention"],
           block_auto_adjust_ff_dim=False),
        ["model.layers 2 | feed_forward.w2 48"],
    ),
    "DBRX, experts as one flat matrix": (
        hf("DbrxForCausalLM", "DbrxConfig", vocab_size=V, d_model=D, n_heads=2, n_layers=2,
           ffn_config={"ffn_hidden_size": D, "hidden_size": F, "moe_num_experts": 4, "moe_top_k": 2},  # sic, in 5.3
           attn_config={"kv_n_heads": 2, "rope_theta": 1e4}),
        ["transformer.blocks 2 | ffn.experts.mlp.w2 48"],
    ),
    "WavLM": (hf("WavLMModel", "WavLMConfig", **WAV), ["encoder.layers 2 | feed_forward.output_dense 48"]),
    "Speech2Text": (
        hf("Speech2TextForConditionalGeneration", "Speech2TextConfig",
           **{k: v for k, v in S2S.items() if k != "max_position_embeddings"}, conv_channels=8,
           input_feat_per_channel=8),
        ["model.encoder.layers 2 | fc2 48", "model.decoder.layers 3 | fc2 40"],
    ),
    "MusicGen": (
        hf("MusicgenForCausalLM", "MusicgenDecoderConfig", vocab_size=V, hidden_size=D, ffn_dim=F, **DEPTHS,
           max_position_embeddings=64),
        ["model.decoder.layers 2 | fc2 48"],
    ),
    "Swin v2": (
        hf("Swinv2Model", "Swinv2Config", image_size=32, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4]),
        ["encoder.layers.0.blocks 2 | output.dense 64", "encoder.layers.1.blocks 3 | output.dense 128"],
    ),
    "PVT": (
        hf("PvtModel", "PvtConfig", **PVT),
        ["encoder.block.0 2 | mlp.dense2 32", "encoder.block.1 2 | mlp.dense2 48"],
    ),
    "Hiera": (
        hf("HieraModel", "HieraConfig", **HIERA),
        ["encoder.stages.0.layers 2 | mlp.fc2 32", "encoder.stages.1.layers 2 | mlp.fc2 64"],
    ),
    "SAM": (sam, ["vision_encoder.layers 2 | mlp.lin2 48", "mask_decoder.transformer.layers 2 | mlp.lin2 24"]),
    "BLIP": (
        blip,
        ["vision_model.encoder.layers 2 | mlp.fc2 48", "text_decoder.bert.encoder.layer 2 | output.dense 48"],
    ),
    "ViLT": (hf("ViltModel", "ViltConfig", **VIS, vocab_size=V, max_position_embeddings=64), [BERT_LAYER]),
    "Qwen2-VL": (
        qwen2_vl,
        ["model.visual.blocks 2 | mlp.fc2 48", "model.language_model.layers 2 | mlp.down_proj 48"],
    ),
    "Informer": (
        hf("InformerModel", "InformerConfig", **SERIES),
        ["encoder.layers 2 | fc2 48", "decoder.layers 2 | fc2 48"],
    ),
    "PatchTSMixer": (
        hf("PatchTSMixerModel", "PatchTSMixerConfig", **MIXER, expansion_factor=2),
        ["encoder.mlp_mixer_encoder.mixers 2 | patch_mixer.mlp.fc2 8, feature_mixer.mlp.fc2 16"],
    ),
    "Dinov2 with registers": (
        hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **{**VIS, "mlp_ratio": 3}),
        ["encoder.layer 2 | mlp.fc2 48"],
    ),
    "MPNet": (hf("MPNetModel", "MPNetConfig", **HF, max_position_embeddings=64), [BERT_LAYER]),
}  # fmt: skip
