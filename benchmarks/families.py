"""Small random-weight models of every architecture in transformers, and what an explanation of each gives.

``python -m benchmarks.families`` explains them one by one; ``--only mamba t5`` some of them. A model is made from its
own configuration class, shrunk by names of fields: there is no code per architecture, only a table of exceptions.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dynlrp import DynLRPError, UnknownOperationError, explain

WIDTH, HEADS, KEYS, VOCABULARY, LENGTH, IMAGE = 64, 4, 2, 128, 12, 64


def words(text: str) -> list[str]:
    return text.split()


# What becomes of a number in a configuration, by the name of its field.

WIDTHS = words(
    """
    adapter_out_dim attention_hidden_size audio_embed_dim audio_hidden_size backbone_hidden_size
    classifier_proj_size codebook_dim conv_channels cross_attention_hidden_size cross_hidden_size d_model
    decoder_dim decoder_hidden_size descriptor_dim dim emb_dim embed_dim embedding_dim embedding_size enc_dim
    encoder_hidden_dim encoder_hidden_size entity_emb_size feature_size fpn_hidden_size fusion_hidden_size
    head_hidden_size hidden_dim hidden_size hidden_size_global hidden_size_per_layer_input iou_head_hidden_dim
    lru_width mask_downsampler_embed_dim mask_feature_size memory_attention_hidden_size
    memory_encoder_hidden_size memory_encoder_output_channels memory_fuser_embed_dim n_embd out_hidden_size
    output_channels output_dim output_hidden_size patch_embed_hidden_size pred_hidden_size projection_dim
    projection_size projector_hidden_size text_hidden_size thinker_hidden_size vision_hidden_size
    vision_output_dim word_embed_proj_dim
    """
)
FEED_FORWARD = words(
    """
    d_ff decoder_ffn_dim decoder_intermediate_size decoder_linear_units dense_intermediate_size dim_feedforward
    dim_ff encoder_feedforward_dim encoder_ffn_dim encoder_linear_units expert_ffn_hidden_size feed_forward_size
    ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp memory_attention_feed_forward_hidden_size
    memory_fuser_intermediate_dim mlp_dim moe_intermediate_size moe_shared_expert_intermediate_size n_inner
    prefix_dense_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    """
)
DEPTHS = words(
    """
    decoder_depth decoder_layers decoder_num_hidden_layers decoder_num_layers depth encoder_layers
    encoder_num_hidden_layers l_layers layers memory_attention_num_layers memory_fuser_num_layers n_codes_given
    n_layer n_layers num_blocks num_codebooks num_decoder_layers num_encoder_layers num_hidden_groups
    num_hidden_layers num_layers num_lstm_layers num_quantizers num_self_attends_per_block
    pred_num_hidden_layers r_layers speech_decoder_postnet_layers speech_encoder_layers t2u_decoder_layers
    t2u_encoder_layers x_layers
    """
)
HEAD_COUNTS = words(
    """
    attention_heads decoder_attention_heads decoder_num_attention_heads decoder_num_heads
    encoder_attention_heads encoder_num_attention_heads n_head n_heads num_attention_heads
    num_decoder_attention_heads num_encoder_attention_heads num_heads pred_num_attention_heads resampler_n_heads
    speech_encoder_attention_heads swa_num_attention_heads
    """
)
HEAD_SIZES = words(
    """
    attention_head_dim attention_head_size d_head d_kv dim_head head_dim kv_channels resampler_head_dim
    swa_head_dim v_head_dim
    """
)
FIXED = {
    "vocab_size": VOCABULARY,
    "num_key_value_heads": KEYS,
    "encoder_num_key_value_heads": KEYS,
    "decoder_num_key_value_heads": KEYS,
    "swa_num_key_value_heads": KEYS,
    "num_kv_heads": KEYS,
    "decoder_vocab_size": VOCABULARY,
    "text_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "input_vocab_size": VOCABULARY,
    "output_vocab_size": VOCABULARY,
    "codebook_size": VOCABULARY,
    "audio_vocab_size": VOCABULARY,
    "entity_vocab_size": 50,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_2d_position_embeddings": 64,
    "image_size": IMAGE,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "mamba_d_state": 8,
    "state_size": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "time_step_rank": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_queries": 10,
    "sliding_window": 6,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "num_mel_bins": 16,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "first_k_dense_replace": 1,
    "prediction_length": 4,
    "upsample_groups": WIDTH,
    "base_channels": 32,
    "num_pos_feats": 32,
    "num_embeddings": 64,
    "upsample_initial_channel": 64,
    "unit_embed_dim": 16,
    "lang_embed_dim": 16,
    "spkr_embed_dim": 16,
    "unit_hifi_gan_vocab_size": 50,
    "num_groups": 8,
}
RANGES = {name: size for names, size in (
    (WIDTHS, WIDTH), (FEED_FORWARD, 2 * WIDTH), (DEPTHS, 2), (HEAD_COUNTS, HEADS), (HEAD_SIZES, WIDTH // HEADS),
) for name in names}  # fmt: skip
RANGES.update(FIXED)


def shrunk(config: PretrainedConfig, exceptions: dict[str, Any] | None = None) -> PretrainedConfig:
    """The same configuration with small numbers."""
    own = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    given = changed(config, own)
    exceptions = exceptions or {}
    layers = chosen_layers(own)
    for name, value in own.items():
        if isinstance(value, PretrainedConfig):
            nested = {k.split(".", 1)[1]: v for k, v in exceptions.items() if k.startswith(name + ".")}
            given[name] = shrunk(value, nested)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            given[name] = VOCABULARY - 1 - special(name)
        elif name in DEPTHS and name == depth_name(own) and layers:
            given[name] = len(layers)
        elif is_per_layer(own, name):
            given[name] = type(value)([value[i] for i in layers])
            if name in RANGES:
                given[name] = type(value)([min(v, RANGES[name]) for v in given[name]])
        elif name in RANGES and isinstance(value, int) and not isinstance(value, bool):
            given[name] = min(value, RANGES[name]) if value > 0 else value
        elif name in RANGES and isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            if name in WIDTHS or name in FEED_FORWARD:
                given[name] = type(value)(scaled(value))
            elif name == "image_size":
                given[name] = type(value)(min(v, IMAGE) for v in value)
        elif name in LISTS and isinstance(value, list | tuple):
            given[name] = type(value)(LISTS[name](value))
        elif name == "per_layer_config" and isinstance(value, dict) and layers:
            fields_of = {int(key): fields for key, fields in value.items()}
            given[name] = {
                str(n): {k: min(v, 2 * RANGES.get(k, v)) if isinstance(v, int) else v for k, v in fields_of[i].items()}
                for n, i in enumerate(layers)
                if i in fields_of
            }
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            given[name] = {k: sections(v) if k == "mrope_section" else v for k, v in value.items()}
    heads = own.get("num_attention_heads")
    if "num_key_value_heads" in given and heads is not None and heads == own["num_key_value_heads"]:
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(own.get(name), list | tuple):
            for width in ("embed_dim", "hidden_size"):
                if isinstance(own.get(width), int) and len(own[name]) > 1:
                    given[width] = own[name][0] * 8
    given.update({k: v for k, v in exceptions.items() if "." not in k})
    fields = inspect.signature(type(config)).parameters
    given = {k: v for k, v in given.items() if v is not DROP and (k in fields or k in exceptions or k in KEPT)}
    try:
        return type(config)(**given)
    except ValueError as error:
        if "out_features" not in str(error) or "out_features" in exceptions:
            raise
    given.pop("out_features")  # stages that are no more
    return type(config)(**given)


KEPT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "per_layer_config", "out_features")
DROP = object()
"""As an exception: leave the field to the class."""


def depth_name(own: dict[str, Any]) -> str:
    return next((n for n in ("num_hidden_layers", "num_layers", "n_layer") if isinstance(own.get(n), int)), "")


PER_LAYER = words(
    """
    activation_sparsity_pattern attention_layers attn_layers block_types indexer_types intermediate_size
    layer_types layers_block_type mlp_layer_types no_rope_layers
    """
)


def is_per_layer(own: dict[str, Any], name: str) -> bool:
    value = own.get(name)
    depth = own.get(depth_name(own))
    return name in PER_LAYER and isinstance(value, list | tuple) and len(value) == depth


def chosen_layers(own: dict[str, Any]) -> list[int]:
    """One layer of each kind, no less than two."""
    depth = own.get(depth_name(own))
    if depth is None or depth < 2:
        return []
    kinds = [tuple(str(own[name][i]) for name in PER_LAYER if is_per_layer(own, name)) for i in range(depth)]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:4]
    return chosen if len(chosen) > 1 else [0, 1]


def sections(value: list[int]) -> list[int]:
    """Rotary sections for a head of the usual size."""
    total = WIDTH // HEADS // 2
    small = [v * total // sum(value) for v in value[:-1]]
    return [*small, total - sum(small)]


SPECIAL = words(
    """
    image video audio vision_start vision_end user boi eoi boa eoa start end mask bos eos pad sep cls
    """
)


def special(name: str) -> int:
    """A number of its own for every kind of special token."""
    for number, start in enumerate(SPECIAL):
        if name.startswith(start):
            return number
    return len(SPECIAL) + sum(map(ord, name)) % 20


def scaled(sizes: Any) -> list[int]:
    """Sizes of stages, the largest no more than twice the width."""
    factor = max(1, 2 ** math.ceil(math.log2(max(sizes) / (2 * WIDTH))))
    return [max(1, v // factor) if v > 16 else v for v in sizes]


def quarter(sizes: Any) -> list[int]:
    return [v // 4 if v > 16 else v for v in sizes]


LISTS: dict[str, Callable[[Any], Any]] = {
    "depths": lambda v: [min(d, 2 - min(i, 1)) for i, d in enumerate(v)],
    "hidden_sizes": scaled,
    "encoder_hidden_sizes": scaled,
    "neck_hidden_sizes": scaled,
    "num_block_repeats": lambda v: [1 for _ in v],
    "conv_dim": lambda v: [32 for _ in v],
    "tdnn_dim": lambda v: [32 for _ in v],
    "embed_dims": scaled,
    "embed_dim_per_stage": scaled,
    "blocks_per_stage": lambda v: [1 for _ in v],
    "stage_in_channels": quarter,
    "stage_mid_channels": quarter,
    "stage_out_channels": quarter,
    "stem_channels": quarter,
    "stage_num_blocks": lambda v: [1 for _ in v],
}


def changed(config: PretrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What a nested configuration has other than its class's defaults."""
    try:
        usual = vars(type(config)())
    except Exception:
        usual = {}
    try:
        fields = inspect.signature(type(config)).parameters
    except ValueError:
        fields = {}
    found = {
        k: v
        for k, v in own.items()
        if not isinstance(v, PretrainedConfig) and k in fields and (k not in usual or usual[k] != v)
    }
    if vars(config).get("_out_features"):
        found["out_features"] = list(config.out_features)
    return found


RESNET = {
    "backbone_config": transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ), "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def mrope(*parts: int) -> dict[str, Any]:
    """Rotary positions in three directions."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(parts)}


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
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "lfm2_moe": {"num_dense_layers": 1},
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
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    **{n: {"window_size": 4, "image_size": 128} for n in ("swin", "donut-swin", "maskformer-swin")},
    "mask2former": {"backbone_config.window_size": 4, "backbone_config.image_size": 128},
    "maskformer": {"backbone_config.window_size": 4, "backbone_config.image_size": 128},
    "swinv2": {"window_size": 4},
    "sam2_hiera_det_model": {"hidden_size": 12},
    "sam2_vision_model": {"backbone_config.hidden_size": 12, "backbone_channel_list": [96, 48, 24, 12]},
    "sam2": {"vision_config.backbone_config.hidden_size": 12, "vision_config.backbone_channel_list": [96, 48, 24, 12]},
    "granite_speech5_encoder": {"context_size": 8},
    "granite_speech5_ctc": {"encoder_config.context_size": 8},
    "glm5_next_text": {"index_topk": 16},
    "glm5_next": {"text_config.index_topk": 16},
    "muse_spark": {"audio_config.num_hidden_layers": DROP},
    "muse_spark_audio": {"num_hidden_layers": DROP},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
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
        for n in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    "lw_detr": {"backbone_config.out_features": ["stage1", "stage2"], "projector_scale_factors": [1.0]},
    "rf_detr": {"backbone_config.out_features": ["stage1", "stage2"]},
    "hunyuan_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
    },
    "align": {
        "vision_config.width_coefficient": 0.5,
        "vision_config.depth_coefficient": 0.3,
        "vision_config.hidden_dim": 640,
        "projection_dim": 640,
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
    "oneformer": {},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "timesfm": {"patch_length": 8, "horizon_length": 8, "context_length": 32},
}
RANDOM = ("informer", "reformer", "univnet", "vilt", "vit_mae", "vits")
"""Types that draw random numbers in their forward pass."""
INPUTS: dict[str, dict[str, Callable[[PretrainedConfig], Any]]] = {
    "speecht5": {
        "input_values": lambda c: torch.randn(2, LENGTH, WIDTH),
        "decoder_input_values": lambda c: torch.randn(2, 7, WIDTH),
    },
    "xcodec": {"input_values": lambda c: torch.randn(2, 1, 3200)},
}
"""Inputs that no candidate fits."""


def field(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these fields, here or in a nested configuration."""
    stack = [config]
    while stack:
        current = stack.pop(0)
        for name in names:
            value = getattr(current, name, None)
            if value is not None:
                return value
        stack += [v for v in vars(current).values() if isinstance(v, PretrainedConfig)]
    return default


def first(value: Any, default: int) -> int:
    return value if isinstance(value, int) else value[0] if isinstance(value, list | tuple) and value else default


def _ids(config: PretrainedConfig, length: int = LENGTH, batch: int = 2) -> Tensor:
    size = min(VOCABULARY, first(field(config, "vocab_size", "text_vocab_size", "n_vocab", default=VOCABULARY), 100))
    return torch.randint(5, max(6, min(size, VOCABULARY - 45)), (batch, length))


def _image(config: PretrainedConfig, size: int | None = None) -> Tensor:
    height = width = size or IMAGE
    if size is None:
        found = field(config, "image_size", "img_size", "input_size", default=IMAGE)
        if isinstance(found, dict):
            found = [found.get("height", IMAGE), found.get("width", IMAGE)]
        height = first(found, IMAGE)
        width = found[1] if isinstance(found, list | tuple) and len(found) > 1 else height
    channels = field(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    return torch.randn(2, channels, height, width)


def _video(config: PretrainedConfig) -> Tensor:
    image = _image(config)
    frames = field(config, "num_frames", "frames_per_clip", default=2)
    return torch.randn(2, first(frames, 2), *image.shape[1:])


def _mels(config: PretrainedConfig) -> int:
    return first(field(config, "num_mel_bins", "n_mels", "feature_projection_input_dim", "input_dim",
                       "input_feat_per_channel", "num_mels", default=16), 16)  # fmt: skip


def _patches(config: PretrainedConfig) -> Tensor:
    """Flattened patches, as vision towers of Qwen2-VL take them."""
    patch = first(field(config, "patch_size", default=14), 14)
    channels = first(field(config, "in_channels", "in_chans", "num_channels", default=3), 3)
    times = first(field(config, "temporal_patch_size", "patch_temporal", default=1), 1)
    return torch.randn(2 * 16, channels * times * patch * patch)


CANDIDATES: dict[str, list[Callable[[PretrainedConfig], Any]]] = {
    "input_ids": [_ids, lambda c: _ids(c, 32), lambda c: _ids(c, 64), lambda c: _ids(c, 6, 1)],
    "decoder_input_ids": [lambda c: _ids(c, 7)],
    "attention_mask": [lambda c: torch.ones(2, LENGTH, dtype=torch.long)],
    "bbox": [lambda c: _boxes()],
    "pixel_values": [
        _image,
        lambda c: _image(c, 32),
        lambda c: _image(c, 224),
        _video,
        lambda c: _video(c).transpose(1, 2),
        lambda c: _image(c, 64).unsqueeze(1),
        _patches,
        lambda c: _image(c)[:, :1],
        lambda c: torch.randn(32, 3, *[first(field(c, "patch_size", default=14), 14)] * 2),
        lambda c: torch.randn(2, 16, 3 * first(field(c, "patch_size", default=16), 16) ** 2),
    ],
    "pixel_values_videos": [_video, _patches],
    "video": [_video],
    "input_values": [
        lambda c: torch.randn(2, 2000),
        lambda c: torch.randn(2, 1, 2000),
        lambda c: torch.randn(2, 32, _mels(c)),
        lambda c: torch.randn(2, first(field(c, "max_length", default=32), 32), _mels(c)),
    ],
    "input_features": [
        lambda c: torch.randn(2, _mels(c), 2 * first(field(c, "max_source_positions", default=32), 32)),
        lambda c: torch.randn(2, 64, _mels(c)),
        lambda c: torch.randn(2, _mels(c), 64),
        lambda c: torch.randn(2, 1, 64, _mels(c)),
        lambda c: torch.randn(2, _mels(c), 32),
        lambda c: torch.randn(2, 1, field(c, "spec_size", default=64), field(c, "spec_size", default=64)),
    ],
    "grid_thw": [lambda c: torch.tensor([[1, 4, 4], [1, 4, 4]])],
    "image_grid_thw": [lambda c: torch.tensor([[1, 4, 4], [1, 4, 4]])],
    "spectrogram": [lambda c: torch.randn(2, 16, _mels(c))],
    "past_values": [
        lambda c: torch.randn(2, first(field(c, "context_length", default=32), 32), _channels(c)),
        lambda c: torch.randn(2, _past(c)),
        lambda c: torch.randn(2, _past(c), field(c, "input_size", default=1)),
    ],
    "past_time_features": [lambda c: torch.randn(2, _past(c), field(c, "num_time_features", default=0))],
    "past_observed_mask": [lambda c: torch.ones(2, _past(c))],
    "future_values": [lambda c: torch.randn(2, field(c, "prediction_length", default=4))],
    "future_time_features": [
        lambda c: torch.randn(2, field(c, "prediction_length", default=4), field(c, "num_time_features", default=0))
    ],
    "freq": [lambda c: torch.zeros(2, 1, dtype=torch.long)],
    "audio_codes": [lambda c: torch.randint(0, 64, (2, 2, 8))],
    "hidden_states": [_patches, lambda c: torch.randn(2, LENGTH, field(c, "hidden_size", "d_model", default=WIDTH))],
    "inputs_embeds": [lambda c: torch.randn(2, LENGTH, field(c, "hidden_size", "d_model", default=WIDTH))],
    "visual_feats": [lambda c: torch.randn(2, 5, field(c, "visual_feat_dim", default=64))],
    "visual_pos": [lambda c: torch.rand(2, 5, 4)],
    "image": [_image],
    "states": [lambda c: torch.randn(2, 4, c.state_dim)],
    "actions": [lambda c: torch.randn(2, 4, c.act_dim)],
    "rewards": [lambda c: torch.randn(2, 4, 1)],
    "returns_to_go": [lambda c: torch.randn(2, 4, 1)],
    "timesteps": [lambda c: torch.arange(4).expand(2, 4).contiguous()],
    "prompt_pixel_values": [_image],
    "prompt_masks": [_image],
    "qformer_input_ids": [_ids],
    "input_points": [lambda c: torch.rand(2, 1, 2, 2) * IMAGE],
    "input_labels": [lambda c: torch.ones(2, 1, 2, dtype=torch.long)],
    "task_inputs": [lambda c: _ids(c, 77)],
    "speech_input_features": [lambda c: torch.randn(2, 64, _mels(c))],
    "visual_attention_mask": [lambda c: torch.ones(2, 5)],
    "past_values_padding": [lambda c: torch.zeros(2, 32, dtype=torch.long)],
    "input_features_mask": [lambda c: torch.ones(2, 64, dtype=torch.long)],
    "pixel_attention_mask": [lambda c: torch.ones(2, 16, dtype=torch.long)],
    "spatial_shapes": [lambda c: torch.tensor([[4, 4], [4, 4]])],
    "merge_sizes": [lambda c: torch.tensor([1, 1])],
    "inputs": [lambda c: torch.randn(2, LENGTH, field(c, "d_model", default=WIDTH))],
    "query_embeds": [lambda c: torch.randn(2, 6, field(c, "hidden_size", default=WIDTH))],
    "latents": [lambda c: torch.randn(2, 8, WIDTH), lambda c: torch.randn(2, WIDTH, 8)],
}  # fmt: skip


def _channels(config: PretrainedConfig) -> int:
    channels: int = field(config, "num_input_channels", default=1)
    return channels


def _past(config: PretrainedConfig) -> int:
    return first(field(config, "context_length", default=16), 16) + max(field(config, "lags_sequence", default=[0]))


def _boxes() -> Tensor:
    corner = torch.randint(0, 30, (2, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 30, (2, LENGTH, 2))], -1)


EXTRAS = words(
    """
    input_ids decoder_input_ids bbox pixel_values input_values input_features visual_feats visual_pos qformer_input_ids
    pixel_attention_mask spatial_shapes
    """
)
"""Inputs that a model may want although its signature does not say so."""


def candidates(model: nn.Module, config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Example inputs that may fit, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    own = INPUTS.get(config.model_type, {})
    main = getattr(model, "main_input_name", None) or "input_ids"
    needed = [
        n for n, p in parameters.items()
        if n in own or (p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    ]  # fmt: skip
    if main in parameters and main not in needed:
        needed.insert(0, main)
    both = list(needed)
    for extra in EXTRAS:
        if extra in parameters and extra not in both:
            both.append(extra)
    plain = [n for n in both if n in needed or n in ("decoder_input_ids", "bbox")]
    every = [*both, "attention_mask"] if "attention_mask" in parameters else both
    for names in dict.fromkeys(map(tuple, (needed, plain, both, every))):
        options = [[own[n]] if n in own else CANDIDATES.get(n, [lambda c: None]) for n in names]
        for makers in itertools.islice(itertools.product(*options), 24):
            made = {n: make(config) for n, make in zip(names, makers, strict=True)}
            yield {n: v for n, v in made.items() if v is not None}


class Family(nn.Module):
    """A model reduced to its first floating point output that has a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.runs = 0

    def forward(self, **inputs: Any) -> Tensor:
        self.runs += 1
        result = self.model(**inputs)
        preferred = [result[k] for k in ("last_hidden_state", "logits") if isinstance(result, dict) and k in result]
        stack: list[Any] = [result, *preferred[:1]]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                if item.is_floating_point() and item.requires_grad and item.ndim:
                    return item
            elif isinstance(item, dict):
                stack.extend(reversed([v for k, v in item.items() if "loss" not in k]))
            elif isinstance(item, tuple | list):
                stack.extend(reversed(item))
        raise TypeError("no floating point output with a graph")


HEADS_OF = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TO_IMAGE_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING,
    modeling_auto.MODEL_FOR_KEYPOINT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_CTC_MAPPING,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_XVECTOR_MAPPING,
    modeling_auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING,
    modeling_auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING,
    modeling_auto.MODEL_FOR_BACKBONE_MAPPING,
)
"""Where models with heads are listed."""


def heads() -> Iterator[tuple[str, str]]:
    """Every model type that has a head, with the name of the class."""
    for mapping in HEADS_OF:
        for config, name in mapping._model_mapping.items():
            for kind in name if isinstance(name, tuple | list) else [name]:
                yield config, kind


def build(name: str, attention: str = "default", head: str = "", seed: int = 0) -> tuple[Family, dict[str, Any]]:
    """A small model of this type and inputs that it takes."""
    torch.manual_seed(seed)
    config = shrunk(CONFIG_MAPPING[name](), EXCEPTIONS.get(name))
    kind = getattr(transformers, head) if head else MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with torch.device("meta"):
        big = kind(config)
    size = sum(p.numel() for p in big.parameters())
    if size > 30e6:
        largest = sorted(((p.numel(), n, tuple(p.shape)) for n, p in big.named_parameters()), reverse=True)[:3]
        raise ValueError(f"too large: {size / 1e6:.0f}M {largest}")
    del big
    model = kind(config)
    if attention != "default":
        model.set_attn_implementation(attention)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    family = Family(model).eval()
    errors: list[str] = []
    for inputs in candidates(model, config):
        try:
            family(**copied(inputs))
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            shapes = {k: tuple(v.shape) for k, v in inputs.items()}
            place = f"{trace.filename.rsplit('/', 1)[-1]}:{trace.lineno}"
            errors.append(f"{shapes}: {type(error).__name__}: {str(error)[:200]} ({place})")
            if isinstance(error, TimeoutError):
                raise
            continue
        family.runs = 0
        return family, inputs
    raise ValueError("no inputs fit:\n    " + "\n    ".join(dict.fromkeys(errors)))


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def target(y: Tensor) -> Tensor:
    """A sum with fixed random weights, one number per sample."""
    flat = y.reshape(y.shape[0], -1)
    weights = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return (flat * weights).sum(1)


def examine(
    name: str,
    attention: str = "default",
    composite: str = "attnlrp",
    dtype: torch.dtype = torch.float32,
    head: str = "",
) -> dict[str, Any]:
    """What an explanation of this type gives."""
    record: dict[str, Any] = {"name": head or name, "attention": attention, "composite": composite}
    try:
        family, inputs = build(name, attention, head)
    except Exception as error:
        return {**record, "status": "not built", "error": f"{type(error).__name__}: {error}"[:3000]}
    if dtype is torch.float64:
        family.double()
        inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    record["inputs"] = {k: list(v.shape) for k, v in inputs.items()}
    try:
        before = family(**copied(inputs)).detach()
        torch.manual_seed(0)
        start = time.perf_counter()
        before = family(**copied(inputs)).detach()
        record["forward"] = time.perf_counter() - start
        record["output"] = list(before.shape)
        family.runs = 0
        torch.manual_seed(0)
        start = time.perf_counter()
        explanation = explain(family, inputs, target, composite=composite, allow_training=name in RANDOM)
        record["seconds"] = time.perf_counter() - start
        record["runs"] = family.runs
        record["same"] = bool(torch.equal(explanation.value, target(before).detach()))
        ledger = explanation.ledger
        record["error_of_ledger"] = ledger.error
        record["unresolved"] = sorted({n for n, _ in ledger.unresolved})
        record["accounts"] = {"output": ledger.output, **ledger.accounts}
        record["finite"] = all(bool(torch.isfinite(t).all()) for t in explanation.tensors())
        record["status"] = "closes" if ledger.error < 1e-4 else "open"
    except UnknownOperationError as error:
        record["status"] = "unknown operation"
        record["error"] = sorted({n for n, _ in error.operations})
        record["places"] = [f"{n} in {p}" for n, p in error.operations][:6]
        record["reasons"] = error.reasons
    except DynLRPError as error:
        record["status"] = type(error).__name__
        record["error"] = str(error)[:1500]
    except Exception as error:
        record["status"] = "crash"
        last = "".join(traceback.format_tb(error.__traceback__)[-4:])
        record["error"] = f"{type(error).__name__}: {error}"[:600] + "\n" + last
    return record


def _late(signum: int, frame: Any) -> None:
    raise TimeoutError("more than the time limit")


def main() -> None:
    """Examine every type, writing one line of JSON each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", default="out/families.jsonl")
    parser.add_argument("--attention", default="default")
    parser.add_argument("--composite", default="attnlrp")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--heads", action="store_true", help="models with heads")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    names = options.only or [c.model_type for c in MODEL_MAPPING]
    tasks = [(name, "") for name in names] if not options.heads else sorted(set(heads()))
    for name, head in tasks:
        signal.alarm(options.limit)
        try:
            dtype = torch.float64 if options.double else torch.float32
            record = examine(name, options.attention, options.composite, dtype, head)
        except TimeoutError:
            record = {"name": head or name, "attention": options.attention, "status": "timeout"}
        finally:
            signal.alarm(0)
        with open(options.out, "a") as file:
            file.write(json.dumps(record, default=str) + "\n")
        short = {k: v for k, v in record.items() if k in ("status", "error_of_ledger", "runs", "unresolved", "same")}
        print(head or name, short, flush=True)
        if options.v or len(tasks) <= 3:
            print(json.dumps(record, indent=1, default=str)[:4000].replace("\\n", "\n"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
