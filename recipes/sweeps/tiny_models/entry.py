"""One encoder architecture of transformers, built tiny, with inputs that its forward takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...runtime.errors import need

__all__ = [
    "AUDIO",
    "ENCODER_DECODER",
    "IMAGE",
    "LABELS",
    "TEXT",
    "AutoClass",
    "InputBuilder",
    "Modality",
    "TinyModel",
    "base_model",
    "classifier_model",
]

LABELS = 3  # outputs of every classifier

Modality = Literal["text", "vision", "audio"]
AutoClass = Literal[
    "AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModelForAudioClassification"
]
Part = Literal["", "encoder", "vision_model"]
InputBuilder = Callable[[Any, int, torch.Generator], dict[str, Tensor]]

TEXT: AutoClass = "AutoModelForSequenceClassification"
IMAGE: AutoClass = "AutoModelForImageClassification"
AUDIO: AutoClass = "AutoModelForAudioClassification"


#: Of BART and what is built like it.
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


@dataclass(frozen=True)
class TinyModel:
    """One architecture: what it is built from, what it is fed with and which classifier transformers has for it."""

    key: str  # the model_type of transformers
    modality: Modality
    options: Mapping[str, Any]  # of the config class
    build_inputs: InputBuilder  # (config, batch size, generator) -> keyword arguments of the forward
    auto_class: AutoClass | None  # that builds the classifier
    no_classifier: str = ""  # why there is none
    has_token_classifier: bool = False  # AutoModelForTokenClassification knows the architecture
    decoder_only: bool = False  # causal attention: only the last token of a row has seen the whole row
    part: Part = ""  # of the model that AutoModel builds: the encoder that a classifier stands on
    note: str = field(default="", compare=False)

    def config(self) -> Any:
        """A new tiny config, without labels."""
        return need("transformers").AutoConfig.for_model(self.key, **self.options)

    def classifier_config(self) -> Any:
        """A new tiny config with three labels, of which a sample can have several."""
        options = {**self.options, "num_labels": LABELS, "problem_type": "multi_label_classification"}
        return need("transformers").AutoConfig.for_model(self.key, **options)

    def inputs(self, batch_size: int, seed: int) -> dict[str, Tensor]:
        """Keyword arguments of the forward, with the samples along the first axis of each tensor.

        Raises:
            ValueError: the batch has no sample.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        return self.build_inputs(self.config(), batch_size, torch.Generator().manual_seed(seed))


def base_model(entry: TinyModel) -> Any:
    """The encoder without a head, with random weights drawn from torch's global generator."""
    model = need("transformers").AutoModel.from_config(entry.config())
    if entry.part == "encoder":
        return model.get_encoder()
    if entry.part == "vision_model":
        return model.vision_model
    return model


def classifier_model(entry: TinyModel) -> Any:
    """The unmodified classifier of transformers, logits [batch, label], with random weights.

    Raises:
        ValueError: transformers has no classifier for the architecture.
    """
    if entry.auto_class is None:
        raise ValueError(f"there is no classifier for {entry.key}: {entry.no_classifier}")
    return getattr(need("transformers"), entry.auto_class).from_config(entry.classifier_config())
