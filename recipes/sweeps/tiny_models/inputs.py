"""Random inputs of tiny encoders: texts and recordings have rows of different lengths, padded on the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

FIRST_WORD, LAST_WORD = 8, 61  # of a vocabulary of 64: the ids below and above are left to special tokens
TOKENS = 16
SAMPLES = 400  # of a wave
FRAMES = 24  # of a spectrogram


def words(
    config: Any, batch_size: int, generator: Generator, tokens: int = TOKENS, end: bool = False, mask: bool = True
) -> dict[str, Tensor]:
    """Token ids and mask [batch, token], from a third of the tokens to all of them in the first row.

    With ``end``, each row ends with its only end-of-sequence token. Without the mask, padding takes part like any word.
    """
    input_ids = torch.randint(FIRST_WORD, LAST_WORD + 1, (batch_size, tokens), generator=generator)
    span = max(1, 2 * tokens // 3)
    lengths = torch.tensor([tokens - (3 * row) % span for row in range(batch_size)])
    is_word = _first(lengths, tokens)
    input_ids = input_ids.masked_fill(~is_word, config.pad_token_id)
    if end:
        input_ids = input_ids.scatter(1, lengths.unsqueeze(1) - 1, config.eos_token_id)
    return {"input_ids": input_ids, **({"attention_mask": is_word.long()} if mask else {})}


def words_in_boxes(
    config: Any, batch_size: int, generator: Generator, parts: int = 1, picture: bool = False
) -> dict[str, Tensor]:
    """Words, boxes [batch, token, (left, top, right, bottom)] in thousandths of a page over ``parts``, and its picture."""
    inputs = words(config, batch_size, generator)
    corner = torch.randint(0, 500, (batch_size, TOKENS, 2), generator=generator)
    size = torch.randint(1, 500, (batch_size, TOKENS, 2), generator=generator)
    boxes = torch.cat([corner, corner + size], dim=2) * inputs["attention_mask"].unsqueeze(2)
    inputs["bbox"] = boxes / parts if parts > 1 else boxes
    if picture:
        inputs.update(images(config, batch_size, generator, config.input_size))
    return inputs


def words_in_tags(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Words and the tags and subscripts [batch, token, depth] of their paths in a page."""
    inputs = words(config, batch_size, generator)
    shape = (batch_size, TOKENS, config.max_depth)
    for name, last in (("xpath_tags_seq", config.max_xpath_tag_unit_embeddings), ("xpath_subs_seq", 8)):
        inputs[name] = torch.randint(0, last, shape, generator=generator)
    return inputs


def words_with_shapes(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Words with the ids [batch, token] of how each is written and pronounced."""
    inputs = words(config, batch_size, generator)
    for name in ("input_shape_ids", "input_pronunciation_ids"):
        inputs[name] = words(config, batch_size, generator)["input_ids"]
    return inputs


def words_with_entities(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Words and two entities of each row, with the positions [batch, entity, mention] of their words."""
    inputs = words(config, batch_size, generator)
    inputs["entity_ids"] = torch.randint(3, config.entity_vocab_size, (batch_size, 2), generator=generator)
    inputs["entity_attention_mask"] = torch.ones_like(inputs["entity_ids"])
    inputs["entity_position_ids"] = torch.tensor([[0, 1, -1], [2, -1, -1]]).repeat(batch_size, 1, 1)
    return inputs


def images(_config: Any, batch_size: int, generator: Generator, size: int = 32) -> dict[str, Tensor]:
    """Pixels [batch, channel, height, width]."""
    return {"pixel_values": torch.randn(batch_size, 3, size, size, generator=generator)}


def patches(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Flattened patches [batch, patch, pixel] of images with different heights, padded, with their mask and grids."""
    vision = getattr(config, "vision_config", config)
    width = 4
    heights = torch.tensor([vision.num_patches // width - row % 2 for row in range(batch_size)])
    mask = _first(heights * width, vision.num_patches)
    pixels = torch.randn(batch_size, vision.num_patches, 3 * vision.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels * mask.unsqueeze(2),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": torch.stack([heights, torch.full_like(heights, width)], dim=1),
    }


def waves(_config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Waves and attention mask [batch, time]."""
    mask = _first(_recording_lengths(batch_size, SAMPLES), SAMPLES)
    wave = torch.randn(batch_size, SAMPLES, generator=generator)
    return {"input_values": wave * mask, "attention_mask": mask.long()}


def frames(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, time, frequency] and attention mask [batch, time]."""
    mask = _first(_recording_lengths(batch_size, FRAMES), FRAMES)
    spectrogram = torch.randn(batch_size, FRAMES, config.feature_projection_input_dim, generator=generator)
    return {"input_features": spectrogram * mask.unsqueeze(2), "attention_mask": mask.long()}


def whole_frames(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, time, frequency] of one length."""
    return {"input_values": torch.randn(batch_size, config.max_length, config.num_mel_bins, generator=generator)}


def whisper_frames(config: Any, batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Spectrograms [batch, frequency, time] of the one length that Whisper takes."""
    shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator)}


def _first(lengths: Tensor, longest: int) -> Tensor:
    """Mask [batch, position] of as many first positions as each row has."""
    return torch.arange(longest) < lengths.unsqueeze(1)


def _recording_lengths(batch_size: int, longest: int) -> Tensor:
    """From half of the longest to the longest in the first row."""
    return torch.tensor([longest - (row * longest // 8) % (longest // 2 + 1) for row in range(batch_size)])
