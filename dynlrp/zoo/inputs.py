"""Example inputs for a transformers model, from its signature and its configuration."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynlrp.zoo.placeholders import held, mixed
from dynlrp.zoo.shrink import IMAGE, LENGTH, VOCABULARY, WIDTH, words


def _none(config: PretrainedConfig) -> None:
    """The main input is not given."""


INPUTS: dict[str, dict[str, Callable[[PretrainedConfig], Any]]] = {
    "speecht5": {
        "input_values": lambda c: torch.randn(2, LENGTH, WIDTH),
        "decoder_input_values": lambda c: torch.randn(2, 7, WIDTH),
    },
    **{
        name: {"future_values": lambda c: torch.randn(2, 4), "future_time_features": lambda c: torch.randn(2, 4, 1)}
        for name in ("autoformer", "informer", "time_series_transformer")  # else the decoder does not run
    },
    "blip-2": {"input_ids": lambda c: held(_ids(c), c.image_token_index, c.num_query_tokens)},
    "instructblip": {"input_ids": lambda c: held(_ids(c), c.image_token_index, c.num_query_tokens)},
    "instructblipvideo": {
        "input_ids": lambda c: held(_ids(c), c.video_token_index, 2 * c.num_query_tokens),
        "pixel_values": lambda c: _video(c),
    },
    "blip_2_qformer": {
        "query_embeds": lambda c: torch.randn(2, 6, c.hidden_size),
        "encoder_hidden_states": lambda c: torch.randn(2, 5, c.encoder_hidden_size),
    },
    "clap": {
        "input_features": lambda c: torch.randn(2, 1, 64, 64),
        "is_longer": lambda c: torch.zeros(2, 1, dtype=torch.bool),
    },
    "idefics": {
        "pixel_values": lambda c: _image(c).unsqueeze(1),
        "image_attention_mask": lambda c: torch.ones(2, LENGTH, 1, dtype=torch.long),
    },
    "kosmos-2": {
        "image_embeds_position_mask": lambda c: torch.tensor([[0, *[1] * c.latent_query_num, *[0] * 7]] * 2).bool(),
    },
    "mllama": {
        "pixel_values": lambda c: torch.randn(2, 1, 4, 3, 64, 64),
        "aspect_ratio_ids": lambda c: torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": lambda c: torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": lambda c: torch.ones(2, LENGTH, 1, 4, dtype=torch.long),
    },
    **{
        name: {"decoder_input_ids": lambda c: torch.randint(0, 64, (2 * c.decoder.num_codebooks, 7))}
        for name in ("musicgen", "musicgen_melody")
    },
    "gemma4_audio": {"input_features": lambda c: torch.randn(2, 64, 128)},
    **{
        name: {
            "input_features": lambda c: torch.randn(2, 32, 7 * _mels(c)),  # seven frames at once
            "input_features_mask": lambda c: torch.ones(2, 32, dtype=torch.long),
        }
        for name in ("fun_asr_nano", "fun_asr_nano_encoder")
    },
    "musicflamingo": {
        "input_ids": lambda c: held(_ids(c), c.audio_token_id, 16),
        "input_features_mask": lambda c: torch.ones(2, 64, dtype=torch.long),
    },
    "moss_transcribe_diarize": {
        "input_ids": lambda c: held(_ids(c), c.audio_token_id, 8),
        "input_features_mask": lambda c: torch.ones(2, 64, dtype=torch.long),
    },
    "qwen2_audio": {
        "input_ids": lambda c: held(_ids(c), c.audio_token_index, 32),
        "feature_attention_mask": lambda c: torch.ones(2, 128, dtype=torch.long),
    },
    "seggpt": {
        name: lambda c: torch.randn(2, 3, 64, 64) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "muse_spark_audio": {"input_values": lambda c: torch.randn(2, 3840)},
    "canine": {"input_ids": _none, "inputs_embeds": lambda c: torch.randn(2, LENGTH, c.hidden_size)},  # it hashes ids
    "kyutai_speech_to_text": {"input_ids": _none, "inputs_embeds": lambda c: torch.randn(2, LENGTH, c.hidden_size)},
    **{
        name: {"hidden_states": lambda c: torch.randn(2, 1, 6400)}
        for name in ("encodec", "mimi", "vibevoice_acoustic_tokenizer_encoder", "wavtokenizer", "wavtokenizer_encoder")
    },
    **{
        name: {
            "input_values": lambda c: torch.randn(2, 1, 3200),
            "input_features": lambda c: torch.randn(2, 10, _mels(c)),
        }
        for name in ("neucodec", "xcodec2")
    },
    "xcodec": {"hidden_state": lambda c: torch.randn(2, 1, 3200)},
    "vibevoice_acoustic_tokenizer": {"input_values": lambda c: torch.randn(2, 1, 6400)},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": lambda c: torch.randn(2, c.hidden_size, 4)},
    "omdet-turbo": {
        **dict.fromkeys(("classes_input_ids", "tasks_input_ids"), lambda c: _ids(c, 8)),
        **dict.fromkeys(
            ("classes_attention_mask", "tasks_attention_mask"), lambda c: torch.ones(2, 8, dtype=torch.long)
        ),
        "classes_structure": lambda c: torch.tensor([1, 1]),
    },
    **{
        name: {"input_values": lambda c: torch.randn(2, 1, 3840), "pixel_values_videos": lambda c: _video(c)}
        for name in ("pe_audio_video", "pe_audio_video_encoder")
    },
    "gemma4_vision": {
        "pixel_values": lambda c: torch.randn(2, 36, 3 * c.patch_size**2),
        "pixel_position_ids": lambda c: torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, -1, -1),
    },
    "gemma3n_audio": {
        "audio_mel": lambda c: torch.randn(2, 64, c.input_feat_size),
        "audio_mel_mask": lambda c: torch.zeros(2, 64, dtype=torch.bool),
    },
    "inkling2_vision": {
        "pixel_values": lambda c: torch.randn(8, *[c.patch_size * c.spatial_merge_size] * 2, c.num_channels),
        "image_grid_thw": lambda c: torch.tensor([[1, 2, 2], [1, 2, 2]]),
    },
    **{
        name: {"target_sizes": lambda c: torch.tensor([[4, 4], [4, 4]])}
        for name in ("minicpm_ocr_vision", "minicpmv4_7_vision")
    },
    "muse_glimmer_assistant": {
        "noise_embeds": lambda c: torch.randn(2, 4, c.hidden_size),
        "context_hidden_states": lambda c: torch.randn(2, 6, c.hidden_size * len(c.target_layer_ids)),
    },
    "pi0": {
        "action_embeds": lambda c: torch.randn(2, 4, c.dit_config.hidden_size),
        "pixel_values": lambda c: _image(c).unsqueeze(1),
        "pixel_attention_mask": lambda c: torch.ones(2, 1, dtype=torch.bool),
    },
    "tvp": {  # takes one at a time
        "input_ids": lambda c: _ids(c, batch=1),
        "pixel_values": lambda c: torch.randn(1, c.num_frames, 3, c.max_img_size, c.max_img_size),
    },
    "voxtral_realtime": {"input_ids": lambda c: _ids(c, 8)},
    "evolla": {
        "protein_input_ids": lambda c: torch.randint(5, 20, (2, 8)),
        "protein_attention_mask": lambda c: torch.ones(2, 8, dtype=torch.long),
    },
    "depth_pro": {"pixel_values": lambda c: torch.randn(1, 3, 256, 256)},
    "efficientloftr": {"pixel_values": lambda c: torch.randn(1, 2, 1, 64, 64)},
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


def _ids(config: PretrainedConfig, length: int | tuple[int, ...] = LENGTH, batch: int = 2) -> Tensor:
    size = min(VOCABULARY, first(field(config, "vocab_size", "text_vocab_size", "n_vocab", default=VOCABULARY), 100))
    return torch.randint(
        5, max(6, min(size, VOCABULARY - 45)), (batch, *(length if isinstance(length, tuple) else (length,)))
    )


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
                       "input_feat_per_channel", "num_mels", "feature_size", default=16), 16)  # fmt: skip


def _window(config: PretrainedConfig) -> int:
    """Frames of sound that an encoder takes at once."""
    return 2 * first(field(config, "n_window", default=50), 50)


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
    "flattened_patches": [lambda c: _numbered_patches(c)],
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
        lambda c: torch.randn(2, _mels(c), _window(c)),
        lambda c: torch.randn(2, 1, field(c, "spec_size", default=64), field(c, "spec_size", default=64)),
    ],
    "video_grid_thw": [lambda c: torch.tensor([[1, 4, 4], [1, 4, 4]])],
    "image_sizes": [lambda c: torch.tensor([_image(c).shape[2:]] * 2)],
    "high_res_pixel_values": [_image],
    "images_per_sample": [lambda c: torch.tensor([1, 1])],
    "target_sizes": [lambda c: torch.tensor([[4, 4], [4, 4]])],
    "image_merge_sizes": [lambda c: torch.tensor([1, 1])],
    "video_merge_sizes": [lambda c: torch.tensor([1, 1])],
    "feature_attention_mask": [lambda c: torch.ones(2, 64, dtype=torch.long)],
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
    "input_features_mask": [
        lambda c: torch.ones(2, 64, dtype=torch.long), lambda c: torch.ones(2, _window(c), dtype=torch.long)
    ],
    "pixel_attention_mask": [lambda c: torch.ones(2, 16, dtype=torch.long)],
    "spatial_shapes": [lambda c: torch.tensor([[4, 4], [4, 4]])],
    "merge_sizes": [lambda c: torch.tensor([1, 1])],
    "inputs": [lambda c: torch.randn(2, LENGTH, field(c, "d_model", default=WIDTH))],
    "query_embeds": [lambda c: torch.randn(2, 6, field(c, "hidden_size", default=WIDTH))],
    "latents": [lambda c: torch.randn(2, 8, WIDTH), lambda c: torch.randn(2, WIDTH, 8)],
}  # fmt: skip


def _numbered_patches(config: PretrainedConfig) -> Tensor:
    """Flattened patches with their row and column in front, as Pix2Struct takes them."""
    return torch.cat([torch.ones(2, 16, 2), torch.randn(2, 16, field(config, "patch_embed_hidden_size"))], -1)


def _channels(config: PretrainedConfig) -> int:
    channels: int = field(config, "num_input_channels", default=1)
    return channels


def _past(config: PretrainedConfig) -> int:
    lags: list[int] = field(config, "lags_sequence", default=[0])
    return first(field(config, "context_length", default=16), 16) + max(lags)


def _boxes() -> Tensor:
    corner = torch.randint(0, 30, (2, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 30, (2, LENGTH, 2))], -1)


SENSES = words("pixel_values input_values input_features visual_feats pixel_values_videos")
"""Inputs that are no text."""
EXTRAS = words(
    """
    input_ids decoder_input_ids bbox pixel_values input_values input_features visual_feats visual_pos qformer_input_ids
    pixel_attention_mask spatial_shapes input_features_mask actions rewards returns_to_go timesteps
    """
)
"""Inputs that a model may want although its signature does not say so."""


def candidates(
    model: nn.Module, config: PretrainedConfig, shape: tuple[int, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """Example inputs that may fit, the likeliest first. ``shape``: of the main input."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None) or "input_ids"
    main = main if isinstance(main, str) else main[0]
    own = INPUTS.get(config.model_type, {})
    if shape is not None:
        own = {**own, main: lambda c: _ids(c, shape[1:], shape[0]) if main.endswith("_ids") else torch.randn(shape)}
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
    if main == "input_ids":
        ids = own[main](config) if main in own else _ids(config)
        decoded = {"decoder_input_ids": _ids(config, 7)} if "decoder_input_ids" in parameters else {}
        options = {**CANDIDATES, **{name: [make] for name, make in own.items()}}
        for made in mixed(model, config, options, ids):
            yield {**made, **decoded}
    plain = [n for n in both if n in needed or n in ("decoder_input_ids", "bbox")]
    every = [*both, "attention_mask"] if "attention_mask" in parameters else both
    several = any(n in both for n in SENSES) and "input_ids" in both
    for names in dict.fromkeys(map(tuple, (both, every, plain, needed) if several else (needed, plain, both, every))):
        choices = [[own[n]] if n in own else CANDIDATES.get(n, [lambda c: None]) for n in names]
        for makers in itertools.islice(itertools.product(*choices), 24):
            made = {n: make(config) for n, make in zip(names, makers, strict=True)}
            yield {n: v for n, v in made.items() if v is not None}
