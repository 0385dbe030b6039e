"""Tiny audio encoders: transformers on waves, and on spectrograms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .entry import AUDIO, ENCODER_DECODER, InputBuilder, Part, TinyModel

__all__ = ["AUDIO_MODELS"]

SAMPLES = 400  # of a wave
FRAMES = 24  # of a spectrogram
FREQUENCIES = 16

WAVE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    # SpecAugment draws from NumPy's global generator, so trainings could not be compared by a seed of torch.
    "apply_spec_augment": False,
}


def lengths(batch_size: int, longest: int) -> Tensor:
    """Lengths [batch] from half of the longest to the longest; the first row is a full one."""
    return torch.tensor([longest - (row * longest // 8) % (longest // 2 + 1) for row in range(batch_size)])


def waves(_config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Waves and attention mask [batch, time], padded with zeros on the right."""
    mask = torch.arange(SAMPLES) < lengths(batch_size, SAMPLES).unsqueeze(1)
    wave = torch.randn(batch_size, SAMPLES, generator=generator)
    return {"input_values": wave * mask, "attention_mask": mask.long()}


def frames(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, time, frequency], padded with zeros on the right, and attention mask [batch, time]."""
    mask = torch.arange(FRAMES) < lengths(batch_size, FRAMES).unsqueeze(1)
    spectrogram = torch.randn(batch_size, FRAMES, config.feature_projection_input_dim, generator=generator)
    return {"input_features": spectrogram * mask.unsqueeze(2), "attention_mask": mask.long()}


def whole_frames(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, time, frequency] of one length."""
    return {"input_values": torch.randn(batch_size, config.max_length, config.num_mel_bins, generator=generator)}


def whisper_frames(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, frequency, time] of the one length that Whisper takes."""
    shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator)}


def audio_model(
    key: str, options: dict[str, Any], build_inputs: InputBuilder = waves, *, part: Part = "", note: str = ""
) -> TinyModel:
    """An architecture that transformers has a classifier of audio for."""
    return TinyModel(key, "audio", options, build_inputs, AUDIO, part=part, note=note)


GROUP_NOTE = "GroupNorm over time in the first convolution: padding reaches all frames"

AUDIO_MODELS: tuple[TinyModel, ...] = (
    audio_model("wav2vec2", WAVE, note=GROUP_NOTE),
    audio_model(
        "wav2vec2-conformer", {**WAVE, "conv_depthwise_kernel_size": 3}, note=f"{GROUP_NOTE}; BatchNorm inside"
    ),
    audio_model(
        "wav2vec2-bert",
        {
            **{name: WAVE[name] for name in WAVE if not name.startswith(("conv_", "num_conv_"))},
            "feature_projection_input_dim": FREQUENCIES,
            "conv_depthwise_kernel_size": 3,
        },
        frames,
    ),
    audio_model("hubert", WAVE, note=GROUP_NOTE),
    audio_model("wavlm", WAVE, note=GROUP_NOTE),
    audio_model("unispeech", WAVE, note=GROUP_NOTE),
    audio_model("unispeech-sat", WAVE, note=GROUP_NOTE),
    audio_model("sew", {**WAVE, "initializer_range": 0.1}, note=GROUP_NOTE),
    audio_model(
        "sew-d",
        {**WAVE, "max_position_embeddings": 64, "position_buckets": 8, "initializer_range": 0.1},
        note=GROUP_NOTE,
    ),
    audio_model("data2vec-audio", {**WAVE, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}),
    audio_model(
        "audio-spectrogram-transformer",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": FRAMES,
            "num_mel_bins": FREQUENCIES,
        },
        whole_frames,
        note="two special tokens; the classifier reads their mean, after a LayerNorm of its own",
    ),
    audio_model(
        "whisper",
        {
            "vocab_size": 64,
            "num_mel_bins": FREQUENCIES,
            **ENCODER_DECODER,
            "max_source_positions": 12,
            "max_target_positions": 16,
            "classifier_proj_size": 16,
            "init_std": 0.1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
        whisper_frames,
        part="encoder",
        note="one length of spectrograms; a projection of each frame, then their mean",
    ),
)
