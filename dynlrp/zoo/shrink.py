"""Any transformers configuration with small numbers, by the names of its fields: no code per architecture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

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
    projection_size projector_hidden_size text_hidden_size thinker_hidden_size
    vector_quantization_hidden_dimension vision_hidden_size vision_output_dim word_embed_proj_dim
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
    conf_num_hidden_layers decoder_depth decoder_layers decoder_num_hidden_layers decoder_num_layers depth
    encoder_layers encoder_num_hidden_layers l_layers layers memory_attention_num_layers memory_fuser_num_layers
    n_codes_given n_layer n_layers num_blocks num_codebooks num_decoder_layers num_encoder_layers num_hidden_groups
    num_hidden_layers num_layers num_lstm_layers num_quantizers num_self_attends_per_block
    pred_num_hidden_layers r_layers speech_decoder_postnet_layers speech_encoder_layers t2u_decoder_layers
    t2u_encoder_layers x_layers
    """
)
HEAD_COUNTS = words(
    """
    attention_heads conf_num_attention_heads decoder_attention_heads decoder_num_attention_heads decoder_num_heads
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
    "linear_head_dim": 16,
    "linear_num_heads": 4,
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
    "num_filters": 8,
    "lang_embed_dim": 16,
    "spkr_embed_dim": 16,
    "unit_hifi_gan_vocab_size": 50,
    "num_groups": 8,
    "mm_tokens_per_image": 4,
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
    image_start image_end video_start video_end audio_start audio_end
    """
)


def special(name: str) -> int:
    """A number of its own for every kind of special token."""
    known = [start for start in SPECIAL if name.startswith(start)]
    return SPECIAL.index(max(known, key=len)) if known else len(SPECIAL) + sum(map(ord, name)) % 20


def scaled(sizes: Any) -> list[int]:
    """Sizes of stages, the largest no more than twice the width."""
    factor = max(1, 2 ** math.ceil(math.log2(max(sizes) / (2 * WIDTH))))
    return [max(1, v // factor) if v > 16 else v for v in sizes]


def quarter(sizes: Any) -> list[int]:
    return [v // 4 if v > 16 else v for v in sizes]


LISTS: dict[str, Callable[[Any], Any]] = {
    "deepstack_visual_indexes": lambda v: [0, 1],
    "vision_feature_layer": lambda v: [1 - i % 2 for i, _ in enumerate(v)],
    "image_grid_pinpoints": lambda v: [[IMAGE, IMAGE]],
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
        fields = set(inspect.signature(type(config)).parameters)
    except ValueError:
        fields = set()
    found = {
        k: v
        for k, v in own.items()
        if not isinstance(v, PretrainedConfig) and k in fields and (k not in usual or usual[k] != v)
    }
    if vars(config).get("_out_features"):
        found["out_features"] = list(config.out_features)
    return found
