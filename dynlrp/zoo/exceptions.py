"""What the shrinker cannot know: fields that only fit together, by model type."""

from __future__ import annotations

from typing import Any

import transformers

from dynlrp.zoo.shrink import DROP

RESNET = {
    "backbone_config": transformers.ResNetConfig(  # type: ignore[call-arg]
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ), "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def mrope(*parts: int) -> dict[str, Any]:
    """Rotary positions in three directions."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(parts)}


PPLCNET = {
    "backbone_config.stem_channels": [3, 8, 16],
    "backbone_config.block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 32, 2, False]],
        [[3, 32, 64, 2, True]],
        [[3, 64, 64, 2, False]],
    ],
    "backbone_config.out_features": [f"stage{number}" for number in range(1, 5)],
}
DOTS3 = {
    f"swa_{name}": value
    for name, value in {
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "head_dim": 24,
        "qk_nope_head_dim": 16, "v_head_dim": 16,
    }.items()
}  # fmt: skip
SMALL_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64}
"""Of models of timm, where it is installed."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), SERIES),
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "num_hashes": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba2": {
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "hybrid_layer_ids": DROP,
        "num_query_groups": DROP,
        "kv_channels": DROP,
    },
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "token_dropout": False},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"num_key_value_heads": 2},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "rwkv": {"use_cache": False},
    "deformable_detr": RESNET,
    "detr": RESNET,
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "table-transformer": RESNET,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "ministral": {"head_dim": 16},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    **{
        n: {
            p + "layer_types": ["sliding_attention", "full_attention"],
            p + "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
        }
        for n, p in (("cohere_compass_text", ""), ("cohere_compass", "text_config."))
    },
    **{n: {"window_size": 4, "image_size": 128} for n in ("swin", "donut-swin", "maskformer-swin")},
    "mask2former": {"backbone_config.window_size": 4, "backbone_config.image_size": 128},
    "maskformer": {"backbone_config.window_size": 4, "backbone_config.image_size": 128},
    "swinv2": {"window_size": 4},
    "sam2_hiera_det_model": {"hidden_size": 12},
    "sam2_vision_model": {"backbone_config.hidden_size": 12, "backbone_channel_list": [96, 48, 24, 12]},
    **{
        n: {
            "vision_config.backbone_config.hidden_size": 12,
            "vision_config.backbone_channel_list": [96, 48, 24, 12],
            "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        }
        for n in ("sam2", "sam2_video", "edgetam_video")
    },
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "granite_speech5_encoder": {"context_size": 8},
    "granite_speech5_ctc": {"encoder_config.context_size": 8},
    "glm5_next_text": {"index_topk": 16},
    "glm5_next": {"text_config.index_topk": 16},
    "muse_spark": {"audio_config.num_hidden_layers": DROP},
    "muse_spark_audio": {"num_hidden_layers": DROP},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lilt": {"hidden_size": 96},
    "seggpt": {"image_size": [128, 64]},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config.model_in_dim": 16},
    **{n: {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [64] * 3} for n in ("rt_detr", "rt_detr_v2")},
    **{
        n: {
            "backbone_config.hidden_sizes": [32, 128, 256, 512],
            "encoder_in_channels": [128, 256, 512],
            "decoder_in_channels": [64] * 3,
        }
        for n in ("d_fine", "deimv2", "pp_doclayout_v4")
    },
    "pp_doclayout_v3": {
        "backbone_config.hidden_sizes": [32, 128, 256, 512],
        "encoder_in_channels": [128, 256, 512],
        "decoder_in_channels": [64] * 3,
        "x4_feat_dim": 32,
    },
    "lw_detr": {"backbone_config.out_features": ["stage1", "stage2"], "projector_scale_factors": [1.0]},
    "rf_detr": {"backbone_config.out_features": ["stage1", "stage2"]},
    **{
        n: {
            p + "head_dim": 16,
            p + "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
        }
        for n, p in (("hunyuan_vl_text", ""), ("hunyuan_vl", "text_config."))
    },
    "align": {
        "vision_config.width_coefficient": 0.5,
        "vision_config.depth_coefficient": 0.3,
        "vision_config.hidden_dim": 640,
        "projection_dim": 160,
    },
    "longformer": {"attention_window": [8, 8]},
    "led": {"attention_window": [8, 8]},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16},
    "xlstm": {"qk_dim_factor": 1.0, "use_cache": False},
    **{
        n: {p + "rope_parameters": mrope(2, 3, 3)}
        for n, p in (
            ("qwen2_vl_text", ""),
            ("qwen2_5_vl_text", ""),
            ("qwen2_vl", "text_config."),
            ("qwen2_5_vl", "text_config."),
            ("paddleocr_vl", "text_config."),
            ("qwen2_5_omni_thinker", "text_config."),
            ("glm46v", "text_config."),
            ("glm4v", "text_config."),
            ("glm4v_text", ""),
            ("glm_image", "text_config."),
            ("glm_image_text", ""),
            ("glm_ocr", "text_config."),
            ("glm_ocr_text", ""),
            ("glmga", "text_config."),
        )
    },
    **{
        n: {p + "rope_parameters": {**mrope(1, 1, 2), "partial_rotary_factor": 0.5}}
        for n, p in (
            ("glm4v_moe", "text_config."),
            ("glm4v_moe_text", ""),
        )
    },
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "aria": {
        "image_token_index": 127,
        "projector_patch_to_query_dict": {4: 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    **{n: {"image_token_index": 127, "num_query_tokens": 4} for n in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": 127, "num_query_tokens": 4},
    "clap": {
        "audio_config.spec_size": 64,
        "audio_config.num_mel_bins": 64,
        "audio_config.window_size": 2,
        "audio_config.patch_embeds_hidden_size": 16,
        "audio_config.hidden_size": 128,
        "audio_config.depths": [1, 1, 1, 1],
        "audio_config.num_attention_heads": [1, 2, 4, 8],
    },
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_end_index": 1},
    "kosmos-2": {"latent_query_num": 4},
    "llama4": {
        "vision_config.intermediate_size": 256,
        "vision_config.projector_input_dim": 64,
        "vision_config.projector_output_dim": 64,
    },
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 192,
    },
    "clvp": {f"{part}_config.num_attention_heads": 2 for part in ("text", "speech", "decoder")},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "dory": {"use_cache": False},
    "blt": {"encoder_hash_byte_group_vocab": 100, "use_cache": False},
    "hy_v4_vl_text": {"rope_parameters": mrope(2, 1, 1)},
    "hy_v4_vl": {"text_config.rope_parameters": mrope(2, 1, 1)},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
    },
    "efficientloftr": {"hidden_size": 64, "out_features": [16, 16, 32, 64], "num_attention_heads": 8},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "pocket_tts": {"flow_head_config.condition_dim": 64},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 64},
    "voxtral": {"audio_token_id": 127},
    **{n: {"image_token_id": 127} for n in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "xclip": {"vision_config.mit_hidden_size": 64, "vision_config.mit_intermediate_size": 128},
    "step3p7": {"text_config.sliding_window": 6},
    "timesfm": {"patch_length": 8, "horizon_length": 8, "context_length": 32},
    "apertus1p5": {
        "text_config.vocab_size": 512,
        "image_token_offset": 128,
        "vision_config.codebook_size": 128,
        "audio_token_offset": 256,
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "depth_pro": {
        "patch_size": 64,
        "image_model_config.patch_size": 8,
        "patch_model_config.patch_size": 8,
        "fov_model_config.patch_size": 8,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [32, 32],
        "scaled_images_feature_dims": [64, 64, 32],
        "merge_padding_value": 1,
    },
    "dots3_note": {
        "vision_config.adapter_in_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.downsample_hidden_size": 16,
        **{f"text_config.{name}": value for name, value in DOTS3.items()},
    },
    "dots3_note_text": DOTS3,
    "ernie4_5_vl_moe": {"text_config.rope_parameters": mrope(3, 3, 2), "text_config.moe_k": 2},
    "gemma3n": {
        "text_config.num_kv_shared_layers": 0,
        "vision_config.model_args": {"channel_multiplier": 0.125},
    },
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.125}},
    "granite4_vision": {
        "vision_config.patch_size": 8,
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
        "qformer_config.encoder_hidden_size": 64,
        "image_token_index": 127,
    },
    "inkling_mm_model": {"vision_config.num_hidden_layers": 2},
    **{n: {"encoder_hidden_size": 4, "quantization_dim": 128} for n in ("neucodec", "xcodec2")},
    "xcodec": {"codebook_dim": 128},
    "pp_ocrv6_medium_det": {
        **PPLCNET,
        "neck_out_channels": 64,
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "intraclass_block_config": {
            "reduce_channel": [1, 1, 0],
            "return_channel": [1, 1, 0],
            **{
                f"{name}_{ratio}ratio": [[high or size, wide or size], 1, [(high or size) // 2, (wide or size) // 2]]
                for name, high, wide in (
                    ("vertical_long_to_small_conv", 0, 1),
                    ("horizontal_small_to_long_conv", 1, 0),
                    ("symmetric_conv_long", 0, 0),
                )
                for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
            },
        },
    },
    "pi0": {"vlm_config.text_config.num_image_tokens": 16},
    **{n: {"backbone_config.stem_channels": DROP} for n in ("pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec")},
    "pp_ocrv6_small_det": {**PPLCNET, "layer_list_out_channels": [16, 32, 64, 64]},
    **{
        n: {
            p + name: value
            for name, value in {
                "indexer_n_heads": 4,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 4,
                "ngram_vocab_size_base": 100,
                "hc_lowrank": 16,
            }.items()
        }
        for n, p in (("qwen4_exp_text", ""), ("qwen4_exp", "text_config."))
    },
    "uvdoc": {"backbone_config.out_features": [f"stage{number}" for number in range(1, 7)]},
    "fast_vlm": {"vision_config.architecture": "fastvit_mci0", "vision_config.hidden_size": 1024},
    "perception_lm": {
        "vision_config.architecture": "vit_tiny_patch16_224",
        "vision_config.model_args": {**SMALL_VIT, "global_pool": ""},
    },
    **{
        n: {p + "architecture": "vit_pe_core_tiny_patch16_384", p + "model_args": SMALL_VIT}
        for n, p in (
            ("pe_video_encoder", "vision_config."),
            ("pe_video", "video_config.vision_config."),
            ("pe_audio_video_encoder", "video_config.vision_config."),
            ("pe_audio_video", "audio_video_config.video_config.vision_config."),
        )
    },
    "timm_backbone": {"backbone": "resnet10t"},
    "omdet-turbo": {
        "backbone_config.backbone": "resnet10t",
        "backbone_config.out_indices": [2, 3, 4],
        "apply_layernorm_after_vision_backbone": False,
        "text_projection_in_dim": 64,
        "text_projection_out_dim": 64,
        "class_embed_dim": 64,
        "encoder_in_channels": [128, 256, 512],
    },
    **{
        n: {
            p + "backbone_config.architecture": "resnet10t",
            p + "backbone_channel_list": [256, 128, 64, 64],
            p + "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        }
        for n, p in (("edgetam", "vision_config."), ("edgetam_vision_model", ""))
    },
    "evolla": {"protein_encoder_config.max_position_embeddings": 64, "aligner_num_add_layers": 1},
}
CLASSES = {
    "evolla": "EvollaModel",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Types whose class without a head is made from another configuration than their own."""
PARTS = {
    "bark": "semantic",
    "edgetam_video": "vision_encoder",
    "encodec": "encoder",
    "llama4": "language_model",
    "mimi": "encoder",
    "pe_audio_video": "audio_video_encoder",
    "sam2_video": "vision_encoder",
    "sam3_tracker_video": "vision_encoder",
    "sam3_video": "detector_model",
    "wavtokenizer": "encoder_model.encoder",
    "wavtokenizer_encoder": "encoder",
    "xcodec": "acoustic_encoder",
}
"""Types that do not run on tensors alone or cut the graph, and the module that is explained in place of the whole: what
stands before a choice of the nearest code, which has no derivative; what a tracker sees each frame with, as the tracker
itself takes a session; one of several models that a class without a working ``forward`` holds together."""
RANDOM = (
    "diffusion_gemma", "informer", "musicgen", "musicgen_melody", "reformer", "univnet", "vibevoice_acoustic_tokenizer",
    "vilt", "vit_mae", "vits",
)  # fmt: skip
"""Types that draw random numbers in their forward pass."""
