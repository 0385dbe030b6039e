"""Encoder architectures of transformers, each built tiny, to check the integration on all of them.

Nothing is downloaded: every model is built from a config, with random weights. The options of the configs are in text.json,
vision.json and audio.json: those of a base that a model is ``like``, ``without`` some, and ``options`` of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import need
from . import inputs as builders

LABELS = 3  # outputs of every classifier


@dataclass(frozen=True)
class TinyModel:
    """One architecture: what it is built from, what it is fed with and which classifier transformers has for it."""

    key: str  # the model_type of transformers
    modality: str  # text, vision or audio
    options: Mapping[str, Any]  # of the config class
    auto_class: str  # that builds the classifier
    build_inputs: str  # name of the function in inputs.py
    input_options: Mapping[str, Any] = field(default_factory=dict)  # of that function
    no_classifier: str = ""  # why there is none
    part: str = ""  # of the model that AutoModel builds, where that is no encoder
    note: str = field(default="", compare=False)

    def config(self, **more: Any) -> Any:
        """A new tiny config, without labels unless more options bring them."""
        return need("transformers").AutoConfig.for_model(self.key, **self.options, **more)

    def classifier_config(self) -> Any:
        """A new tiny config with three labels, of which a sample can have several."""
        return self.config(num_labels=LABELS, problem_type="multi_label_classification")

    def inputs(self, batch_size: int, seed: int) -> dict[str, Tensor]:
        """Keyword arguments of the forward, with the samples along the first axis of each tensor."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        build: Any = getattr(builders, self.build_inputs)
        inputs: dict[str, Tensor] = build(
            self.config(), batch_size, torch.Generator().manual_seed(seed), **self.input_options
        )
        return inputs


def classifier_model(entry: TinyModel) -> Any:
    """The unmodified classifier of transformers, logits [batch, label], with random weights.

    Raises:
        ValueError: transformers has no classifier for the architecture.
    """
    if entry.no_classifier:
        raise ValueError(f"there is no classifier for {entry.key}: {entry.no_classifier}")
    return getattr(need("transformers"), entry.auto_class).from_config(entry.classifier_config())


def _read(modality: str) -> Iterator[TinyModel]:
    text = resources.files(__package__).joinpath(f"{modality}.json").read_text(encoding="utf-8")
    table = json.loads(text)
    for key, entry in table["models"].items():
        base, without = table["bases"].get(entry.pop("like", None), {}), entry.pop("without", ())
        options = {name: value for name, value in base.items() if name not in without}
        options.update(entry.pop("options", {}))
        yield TinyModel(key, modality, options, table["auto_class"], entry.pop("inputs", table["inputs"]), **entry)


TINY_MODELS = {entry.key: entry for modality in ("text", "vision", "audio") for entry in _read(modality)}
