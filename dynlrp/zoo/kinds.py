"""What kind of data a transformers configuration is for, by the names of its fields: nothing is built."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FIELDS = {
    "time series": {"prediction_length", "horizon_length"},
    "vision": {"image_size", "patch_size", "num_channels", "in_channels", "in_chans", "backbone_config"},
    "audio": {
        "num_mel_bins", "sampling_rate", "sample_rate", "n_mels", "feat_extract_norm", "hop_length", "audio_channels",
        "input_feat_per_channel", "feature_projection_input_dim",
    },
    "actions": {"act_dim", "max_action_dim"},
    "text": {"vocab_size", "text_vocab_size"},
}  # fmt: skip
"""Fields that tell."""


def modality(model_type: str) -> str:
    """``text``, ``vision``, ``audio``, ``time series``, ``actions`` or ``multimodal``; empty where no field tells."""
    found, parts = _kinds(CONFIG_MAPPING[model_type]())
    for kind in ("time series", "actions"):
        if kind in found:
            return kind
    if found == {"audio", "text"} and not parts:  # the vocabulary of what is heard
        return "audio"
    return "multimodal" if len(found) > 1 else "".join(found)


def _kinds(config: PretrainedConfig) -> tuple[set[str], bool]:
    """The kinds here and in nested configurations, and whether a nested one is for text."""
    fields = vars(config).keys()
    found = {kind for kind, names in FIELDS.items() if fields & names}
    nested = [_kinds(value)[0] for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return found.union(*nested), any("text" in kinds for kinds in nested)
