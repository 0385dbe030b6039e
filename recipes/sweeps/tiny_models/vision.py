"""Tiny vision encoders: transformers, windowed and pyramid ones, and convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .entry import IMAGE, InputBuilder, Part, TinyModel

__all__ = ["VISION_MODELS"]

SIZE = 32

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
CONVOLUTIONS: dict[str, Any] = {"depths": [1, 2], "hidden_sizes": [16, 32]}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
TEXT_HALF: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


# Some options draw larger weights than usual: with fresh running statistics, BatchNorm does not keep the logits of
# evaluation from vanishing otherwise.


def draw_images(batch_size: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pixels [batch, channel, height, width]."""
    return {"pixel_values": torch.randn(batch_size, 3, size, size, generator=generator)}


def images(_config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pixels [batch, channel, height, width] of the usual size."""
    return draw_images(batch_size, SIZE, generator)


def large_images(_config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pixels [batch, channel, height, width] of twice the usual size."""
    return draw_images(batch_size, 2 * SIZE, generator)


def patches(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Flattened patches [batch, patch, pixel] of images with different heights, padded, with their mask and grids."""
    vision = getattr(config, "vision_config", config)
    width = 4
    heights = torch.tensor([vision.num_patches // width - row % 2 for row in range(batch_size)])
    mask = torch.arange(vision.num_patches) < (heights * width).unsqueeze(1)
    pixels = torch.randn(batch_size, vision.num_patches, 3 * vision.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels * mask.unsqueeze(2),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": torch.stack([heights, torch.full_like(heights, width)], dim=1),
    }


def vision_model(
    key: str,
    options: dict[str, Any],
    build_inputs: InputBuilder = images,
    *,
    part: Part = "",
    note: str = "",
) -> TinyModel:
    """An architecture that transformers has a classifier of images for."""
    return TinyModel(key, "vision", options, build_inputs, IMAGE, part=part, note=note)


def bare_vision_model(
    key: str, options: dict[str, Any], build_inputs: InputBuilder = images, *, reason: str, note: str = ""
) -> TinyModel:
    """An architecture that transformers has no classifier for."""
    return TinyModel(key, "vision", options, build_inputs, None, no_classifier=reason, note=note)


BATCH_NORM_NOTE = "BatchNorm inside: samples of a batch see each other in training"
HALF = "transformers has the classifier for the config of both halves only"

VISION_MODELS: tuple[TinyModel, ...] = (
    vision_model("vit", VIT),
    vision_model(
        "deit",
        {**VIT, "architectures": ["DeiTForImageClassification"]},
        note="two special tokens: classification and distillation",
    ),
    vision_model("beit", {**VIT, "use_relative_position_bias": True}),
    vision_model("data2vec-vision", VIT),
    vision_model("vit_msn", VIT),
    vision_model("ijepa", VIT, note="no classification token: the classifier takes the mean of the patches"),
    vision_model("dinov2", VIT, note="the classifier reads classification token and mean of the patches"),
    vision_model(
        "dinov2_with_registers",
        {**VIT, "num_register_tokens": 2},
        note="the classifier reads classification token and mean of the patches, no register",
    ),
    bare_vision_model(
        "dinov3_vit",
        {**VIT, "num_register_tokens": 2},
        reason="transformers has DINOv3 as a backbone only",
        note="one random factor on the positions of the whole batch in training",
    ),
    vision_model("swin", SWIN),
    vision_model("swinv2", SWIN),
    vision_model("donut-swin", SWIN),
    vision_model(
        "hiera",
        {
            "image_size": [SIZE, SIZE],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
    ),
    vision_model(
        "focalnet",
        {
            "image_size": SIZE,
            "patch_size": 4,
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    vision_model("segformer", PYRAMID, note="last_hidden_state is a map [batch, channel, height, width]"),
    vision_model(
        "pvt",
        {
            "image_size": SIZE,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    vision_model("pvt_v2", {**PYRAMID, "image_size": SIZE}, note="last_hidden_state is a map"),
    vision_model(
        "poolformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        note="GroupNorm of one group; last_hidden_state is a map",
    ),
    vision_model(
        "cvt",
        {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        note=f"{BATCH_NORM_NOTE}; last_hidden_state is a map, but the classifier reads the classification token alone, "
        "which the output holds apart: no logit depends on last_hidden_state",
    ),
    vision_model(
        "levit",
        {
            "architectures": ["LevitForImageClassification"],
            "image_size": 2 * SIZE,
            "hidden_sizes": [16, 32, 32],
            "num_attention_heads": [1, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "initializer_range": 0.2,
        },
        large_images,
        note=f"{BATCH_NORM_NOTE}, and one between the mean of the tokens and the Linear of the classifier",
    ),
    vision_model(
        "mobilevit",
        {
            "image_size": SIZE,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "initializer_range": 0.3,
            "num_attention_heads": 2,
        },
        large_images,
        note=BATCH_NORM_NOTE,
    ),
    vision_model(
        "mobilevitv2",
        {
            "image_size": SIZE,
            "base_attn_unit_dims": [16, 24, 32],
            "n_attn_blocks": [1, 1, 1],
            "width_multiplier": 0.25,
            "initializer_range": 0.3,
        },
        large_images,
        note=BATCH_NORM_NOTE,
    ),
    vision_model(
        "swiftformer",
        {"image_size": SIZE, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "layer_scale_init_value": 1.0},
        large_images,
        note=f"{BATCH_NORM_NOTE}, and between last_hidden_state and the classifier; "
        "two Linears with an output for each label, the logits are their mean",
    ),
    vision_model("convnext", {**CONVOLUTIONS, "num_stages": 2}, note="last_hidden_state is a map"),
    vision_model("convnextv2", {**CONVOLUTIONS, "num_stages": 2}, note="last_hidden_state is a map"),
    vision_model("resnet", {**CONVOLUTIONS, "embedding_size": 16, "layer_type": "basic"}, note=BATCH_NORM_NOTE),
    vision_model("regnet", {**CONVOLUTIONS, "embedding_size": 16, "groups_width": 8}, note=BATCH_NORM_NOTE),
    vision_model("bit", {**CONVOLUTIONS, "embedding_size": 16, "num_groups": 4}, note="GroupNorm"),
    vision_model(
        "mobilenet_v1",
        {"image_size": SIZE, "depth_multiplier": 0.25, "initializer_range": 0.3, "classifier_dropout_prob": 0.2},
        large_images,
        note=f"{BATCH_NORM_NOTE}; the dropout of the classifier is 0.999 unless set",
    ),
    vision_model(
        "mobilenet_v2",
        {"image_size": SIZE, "depth_multiplier": 0.25, "initializer_range": 0.3, "classifier_dropout_prob": 0.2},
        large_images,
        note=f"{BATCH_NORM_NOTE}; the dropout of the classifier is 0.8 unless set",
    ),
    vision_model(
        "efficientnet",
        {
            "image_size": SIZE,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 3],
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "hidden_dim": 320,
            "initializer_range": 0.6,
        },
        note=BATCH_NORM_NOTE,
    ),
    vision_model(
        "textnet",
        {
            "image_size": [SIZE, SIZE],
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16, 16, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
            "conv_layer_strides": [[2], [2], [1], [1]],
            "initializer_range": 0.1,
        },
        note=BATCH_NORM_NOTE,
    ),
    vision_model(
        "clip", {"text_config": TEXT_HALF, "vision_config": VIT}, part="vision_model", note="the vision half alone"
    ),
    bare_vision_model("clip_vision_model", VIT, reason=HALF),
    vision_model(
        "siglip", {"text_config": TEXT_HALF, "vision_config": VIT}, part="vision_model", note="the vision half alone"
    ),
    bare_vision_model(
        "siglip_vision_model", VIT, reason=HALF, note="attention pools the tokens, each sample's by themselves"
    ),
    vision_model(
        "siglip2",
        {
            "text_config": TEXT_HALF,
            "vision_config": {name: VIT[name] for name in VIT if name != "image_size"} | {"num_patches": 16},
        },
        patches,
        part="vision_model",
        note="the vision half alone; patches with a mask in place of images",
    ),
)
