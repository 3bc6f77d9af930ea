"""The fifteen models of *Always Keep Your Promises* (arXiv:2512.07010) at their published sizes, without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynlrp.zoo import kinds, nets
from dynlrp.zoo.entry import Entry, Example
from dynlrp.zoo.families import FirstOutput, small
from dynlrp.zoo.shrink import shrunk

TOKENS = 16


def _ids(size: int, length: int = TOKENS) -> Tensor:
    return torch.arange(2 * length).reshape(2, length) % (size - 10) + 5


def _image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(2, 3, size, size)}


def _text(config: PretrainedConfig) -> dict[str, Tensor]:
    return {"input_ids": _ids(config.vocab_size)}


def _net(
    name: str, title: str, published: int, large: Callable[[], nn.Module], little: Callable[[], nn.Module], size: int
) -> Entry:
    def build() -> Example:
        with torch.device("meta"):
            return Example(large().eval(), torch.zeros(2, 3, size, size))

    def reduced() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = little().eval()
            return Example(model, torch.randn(2, 3, 224 if name == "vgg16" else 64, 224 if name == "vgg16" else 64))

    return Entry(f"paper/{name}", build, reduced, _name(large), lambda: "vision", title, published)


def _transformer(
    name: str,
    title: str,
    published: int,
    kind: Any,
    config: Callable[[], PretrainedConfig],
    inputs: Callable[[PretrainedConfig], dict[str, Tensor]],
    **less: Any,
) -> Entry:
    """``less``: fields of the small model that the shrinker cannot know."""

    def build() -> Example:
        made = config()
        with torch.device("meta"):
            model = kind(made)
        return Example(FirstOutput(model).eval(), inputs(made))

    def reduced() -> Example:
        return small(shrunk(config(), less), kind, padded=True)

    def modality() -> str:
        return kinds.modality(config().model_type)

    return Entry(f"paper/{name}", build, reduced, _name(kind), modality, title, published)


def _name(made_by: Any) -> str:
    """A class by its name, a function by its place."""
    return str(made_by.__name__ if isinstance(made_by, type) else f"{made_by.__module__}.{made_by.__name__}")


def _vit() -> PretrainedConfig:
    config = transformers.ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
        patch_size=16,
    )  # fmt: skip
    config.num_labels = 1000
    return config


def _siglip() -> PretrainedConfig:
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 1152},
        vision_config={**sizes, "image_size": 384, "patch_size": 14},
    )


def _wav2vec() -> PretrainedConfig:
    return transformers.Wav2Vec2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", conv_dim=[512] * 7, conv_stride=[5, 2, 2, 2, 2, 2, 2],
        conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_bias=True, num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16, do_stable_layer_norm=True, vocab_size=32,
    )  # fmt: skip


def _whisper() -> PretrainedConfig:
    return transformers.WhisperConfig(
        vocab_size=51865, num_mel_bins=80, d_model=768, encoder_layers=12, decoder_layers=12,
        encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        max_source_positions=1500, max_target_positions=448, use_cache=False,
    )  # fmt: skip


def _gpt2() -> PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, use_cache=False
    )


def _roberta() -> PretrainedConfig:
    return transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip


def _llama() -> PretrainedConfig:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=rope,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def _gemma() -> PretrainedConfig:
    return transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
        layer_types=["sliding_attention" if layer % 6 else "full_attention" for layer in range(1, 19)],
        max_position_embeddings=32768, use_cache=False,
    )  # fmt: skip


def _qwen() -> PretrainedConfig:
    return transformers.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def _t5() -> PretrainedConfig:
    config = transformers.T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    config.scale_decoder_outputs = False
    return config


def _untied_t5(config: transformers.T5Config) -> nn.Module:
    """T5 1.1, whose output layer is no copy of its embedding; transformers 5 ties them whatever it is told."""
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model


def _pix2struct() -> PretrainedConfig:
    return transformers.Pix2StructConfig(
        text_config={
            "vocab_size": 50244, "hidden_size": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
            "use_cache": False,
        },
        vision_config={
            "hidden_size": 768, "patch_embed_hidden_size": 768, "d_ff": 2048, "d_kv": 64, "num_hidden_layers": 12,
            "num_attention_heads": 12, "seq_len": 4096,
        },
    )  # fmt: skip


def _mamba() -> PretrainedConfig:
    return transformers.MambaConfig(
        vocab_size=50280, hidden_size=768, state_size=16, num_hidden_layers=24, expand=2, conv_kernel=4,
        time_step_rank=48, use_cache=False,
    )  # fmt: skip


def _decoded(config: PretrainedConfig) -> dict[str, Tensor]:
    return {"decoder_input_ids": _ids(config.vocab_size, 8)}


def entries() -> list[Entry]:
    """The fifteen, in the paper's order of kinds: pictures, sound, text, several of them, state spaces."""
    return [
        _net("vgg16", "VGG16", 138_357_544, nets.vgg16, lambda: nets.vgg16(8, 10), 224),
        _net("resnet50", "ResNet-50", 25_557_032, nets.resnet50, lambda: nets.resnet50(8, 10), 224),
        _transformer(
            "vit-b16", "ViT-B/16", 86_567_656, transformers.ViTForImageClassification, _vit, lambda c: _image(224)
        ),
        _net(
            "efficientnetv2-m", "EfficientNetV2-M", 54_139_356, nets.efficientnet_v2_m,
            lambda: nets.efficientnet_v2_m([(e, 2, s, max(8, c // 8), q) for e, _, s, c, q in nets.STAGES], 64, 10),
            480,
        ),
        _transformer(
            "siglip2-so400m", "SigLIP 2 So400m/14 384", 1_136_008_498, transformers.SiglipModel, _siglip,
            lambda c: {"input_ids": _ids(256000, 64), **_image(384)},
        ),
        _transformer(
            "wav2vec2-xls-r-300m", "Wav2Vec2 XLS-R 300M", 315_000_000, transformers.Wav2Vec2ForCTC, _wav2vec,
            lambda c: {"input_values": torch.zeros(2, 16000)},
        ),
        _transformer(
            "whisper-small", "Whisper small", 242_000_000, transformers.WhisperForConditionalGeneration, _whisper,
            lambda c: {"input_features": torch.zeros(2, 80, 3000), **_decoded(c)},
        ),
        _transformer("gpt2", "GPT-2", 124_439_808, transformers.GPT2LMHeadModel, _gpt2, _text),
        _transformer(
            "roberta-large", "RoBERTa-large", 355_000_000, transformers.RobertaForSequenceClassification, _roberta,
            _text,
        ),
        _transformer(
            "llama-3.2-1b", "Llama 3.2 1B", 1_235_814_400, transformers.LlamaForCausalLM, _llama, _text
        ),
        _transformer("gemma-3-270m", "Gemma 3 270M", 268_098_176, transformers.Gemma3ForCausalLM, _gemma, _text),
        _transformer("qwen3-0.6b", "Qwen3 0.6B", 596_049_920, transformers.Qwen3ForCausalLM, _qwen, _text),
        _transformer(
            "flan-t5-large", "Flan-T5-large", 783_150_080, _untied_t5, _t5,
            lambda c: {**_text(c), **_decoded(c)},
        ),
        _transformer(
            "deplot", "DePlot (Pix2Struct)", 282_000_000, transformers.Pix2StructForConditionalGeneration, _pix2struct,
            lambda c: {
                "flattened_patches": torch.ones(2, 512, 770),  # row, column and pixels
                "decoder_input_ids": _ids(c.text_config.vocab_size, 8),
            },
        ),
        _transformer("mamba-130m", "Mamba 130M", 129_135_360, transformers.MambaForCausalLM, _mamba, _text),
    ]  # fmt: skip
