"""Random inputs of tiny text encoders: rows of different lengths, padded on the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "VOCABULARY",
    "long_words",
    "words",
    "words_in_boxes",
    "words_in_boxes_on_picture",
    "words_in_small_boxes",
    "words_in_tags",
    "words_with_end",
    "words_with_entities",
    "words_with_shapes",
    "words_without_mask",
]

VOCABULARY = 64
FIRST_WORD = 8  # the ids below are left to special tokens
LAST_WORD = 61  # and so are the ids above
TOKENS = 16


def row_lengths(batch_size: int, tokens: int) -> Tensor:
    """Lengths [batch] from about a third of the tokens to all of them; the first row is a full one."""
    span = max(1, 2 * tokens // 3)
    return torch.tensor([tokens - (3 * row) % span for row in range(batch_size)])


def words(config: Any, batch_size: int, generator: torch.Generator, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Token ids and attention mask [batch, token], padded on the right."""
    input_ids = torch.randint(FIRST_WORD, LAST_WORD + 1, (batch_size, tokens), generator=generator)
    mask = torch.arange(tokens) < row_lengths(batch_size, tokens).unsqueeze(1)
    return {"input_ids": input_ids.masked_fill(~mask, config.pad_token_id), "attention_mask": mask.long()}


def words_with_end(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids and attention mask [batch, token], with exactly one end-of-sequence token, as the last of each row."""
    inputs = words(config, batch_size, generator)
    last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
    inputs["input_ids"] = inputs["input_ids"].scatter(1, last, config.eos_token_id)
    return inputs


def long_words(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids and attention mask [batch, token] of four times the usual length."""
    return words(config, batch_size, generator, tokens=4 * TOKENS)


def words_without_mask(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids [batch, token] alone: padding takes part like any word."""
    return {"input_ids": words(config, batch_size, generator)["input_ids"]}


def words_in_boxes(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words and their boxes [batch, token, (left, top, right, bottom)] in thousandths of a page."""
    inputs = words(config, batch_size, generator)
    corner = torch.randint(0, 500, (batch_size, TOKENS, 2), generator=generator)
    size = torch.randint(1, 500, (batch_size, TOKENS, 2), generator=generator)
    inputs["bbox"] = torch.cat([corner, corner + size], dim=2) * inputs["attention_mask"].unsqueeze(2)
    return inputs


def words_in_small_boxes(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words and their boxes [batch, token, (left, top, right, bottom)] in parts of a page."""
    inputs = words_in_boxes(config, batch_size, generator)
    return {**inputs, "bbox": inputs["bbox"] / 1000}


def words_in_boxes_on_picture(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words in boxes and the picture [batch, channel, height, width] of their page."""
    inputs = words_in_boxes(config, batch_size, generator)
    shape = (batch_size, config.num_channels, config.input_size, config.input_size)
    return {**inputs, "pixel_values": torch.randn(shape, generator=generator)}


def words_in_tags(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words and the tags and subscripts [batch, token, depth] of their paths in a page."""
    inputs = words(config, batch_size, generator)
    shape = (batch_size, TOKENS, config.max_depth)
    for name, last in (("xpath_tags_seq", config.max_xpath_tag_unit_embeddings), ("xpath_subs_seq", 8)):
        inputs[name] = torch.randint(0, last, shape, generator=generator)
    return inputs


def words_with_shapes(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words with the ids [batch, token] of how each is written and pronounced."""
    inputs = words(config, batch_size, generator)
    for name in ("input_shape_ids", "input_pronunciation_ids"):
        inputs[name] = words(config, batch_size, generator)["input_ids"]
    return inputs


def words_with_entities(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words and two entities of each row, with the positions [batch, entity, mention] of their words."""
    inputs = words(config, batch_size, generator)
    entity_ids = torch.randint(3, config.entity_vocab_size, (batch_size, 2), generator=generator)
    positions = torch.tensor([[0, 1, -1], [2, -1, -1]]).repeat(batch_size, 1, 1)
    return {
        **inputs,
        "entity_ids": entity_ids,
        "entity_attention_mask": torch.ones_like(entity_ids),
        "entity_position_ids": positions,
    }
