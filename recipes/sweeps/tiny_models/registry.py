"""A table of encoder architectures of transformers, each built tiny, to check the integration on all of them.

Nothing is downloaded: every model is built from a config, with random weights.
"""

from __future__ import annotations

from .audio import AUDIO_MODELS
from .entry import LABELS, TinyModel, base_model, classifier_model
from .text import TEXT_MODELS
from .vision import VISION_MODELS

__all__ = ["LABELS", "REPRESENTATIVES", "TINY_MODELS", "TinyModel", "base_model", "classifier_model"]

TINY_MODELS: dict[str, TinyModel] = {entry.key: entry for entry in (*TEXT_MODELS, *VISION_MODELS, *AUDIO_MODELS)}

# Quick to build and as different as possible.
REPRESENTATIVES: tuple[str, ...] = (
    "bert",
    "distilbert",
    "electra",
    "deberta-v2",
    "modernbert",
    "t5",
    "gpt2",
    "vit",
    "swin",
    "convnext",
    "wav2vec2",
    "whisper",
)
