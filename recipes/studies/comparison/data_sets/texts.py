"""Data sets of texts: GoEmotions."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....data.task_kinds import BINARY
from ....data.texts.emotions import EMOTIONS, HUB_ID, LabelledTexts, emotion_splits, fingerprint
from ....data.texts.tokens import TokenisedTexts
from ....runtime.errors import OptionError, need
from ..problem import BINARY_COMPARED, BINARY_METRICS, COMMON_VALUES, DataSet, Problem
from .blueprints import blueprint_of
from .places import folder_of
from .spaces import SHARES_ON_HEADS

#: By how often they are true in the published training split. Of rare ones a sample of texts has next to none.
BY_FREQUENCY = (
    *("neutral", "admiration", "approval", "gratitude", "annoyance", "amusement", "curiosity", "love", "disapproval"),
    *("optimism", "anger", "joy", "confusion", "sadness", "disappointment", "realization", "caring", "surprise"),
    *("excitement", "disgust", "desire", "fear", "remorse", "embarrassment", "nervousness", "relief", "pride", "grief"),
)
#: An encoder with new weights, of the sizes that the values name.
SMALL = "small"


class MeanOfTokens(nn.Module):
    """An encoder and the mean of what it returns for the tokens of each text, padding left out.

    Args:
        encoder: of ``transformers``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """From ``input_ids`` and ``attention_mask`` ``[B, L]`` to ``[B, C]``."""
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(2).to(hidden)
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return mean


def _go_emotions(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    # Not above: only what has texts needs transformers, which takes seconds to import.
    from ....models.text_encoders import tokenizer_of

    sizes = {name: values[name] for name in ("train_texts", "validation_texts", "labelled")}
    splits = emotion_splits(folder_of(place, "go_emotions"), seed=seed, **sizes)
    emotions = BY_FREQUENCY[: values["emotions"]]
    columns = [EMOTIONS.index(name) for name in emotions]
    kinds = dict.fromkeys(emotions, BINARY)
    tokenizer = tokenizer_of(values["encoder"], splits.train.texts, values["vocabulary"])

    def tokenised(own: LabelledTexts) -> TokenisedTexts:
        return TokenisedTexts(tokenizer, own.texts, own.labels[:, columns], values["max_length"])

    test = splits.test
    if values["test_texts"] is not None and values["test_texts"] < len(test):
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        test = test.rows(order[: values["test_texts"]])
    encoder = _new_encoder(values, len(tokenizer))
    blueprint = blueprint_of(
        kinds,
        lambda: MeanOfTokens(encoder()),
        _width_of(values),
        values["head_width"],
        values["activation"],
    )
    return Problem(kinds, tokenised(splits.train), tokenised(splits.validation), tokenised(test), blueprint)


def _new_encoder(values: Mapping[str, Any], vocabulary: int) -> Any:
    """What makes a small encoder with new weights, or a pretrained one."""
    from ....models.text_encoders import small_encoder

    if values["encoder"] == SMALL:
        sizes = {name: values[name] for name in ("width", "layers", "max_length")}
        model = need("transformers").BertModel
        return functools.partial(model, small_encoder(vocabulary, **sizes), add_pooling_layer=False)
    return functools.partial(_pretrained, values["encoder"])


def _pretrained(name: str) -> Any:
    try:
        return need("transformers").AutoModel.from_pretrained(name)
    except Exception as error:  # of the network, the hub, files, or missing packages: many kinds
        raise OptionError(
            f"no encoder could be loaded from {name} ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Pass "
            "--encoder with a folder that save_pretrained() has written to, or an id on the hub."
        ) from error


def _width_of(values: Mapping[str, Any]) -> int:
    if values["encoder"] == SMALL:
        return int(values["width"])
    return int(need("transformers").AutoConfig.from_pretrained(values["encoder"]).hidden_size)


def _fingerprint(place: Any) -> str:
    return fingerprint(folder_of(place, "go_emotions"))


GO_EMOTIONS = DataSet(
    "go_emotions",
    "GoEmotions, {emotions} emotions, {train_texts} training texts",
    {
        **COMMON_VALUES,
        "data": "go_emotions",
        "emotions": 10,
        "train_texts": 1000,
        "validation_texts": 1000,
        "test_texts": 1500,
        "labelled": 1.0,
        "encoder": SMALL,
        "vocabulary": 1000,
        "width": 64,
        "layers": 1,
        "max_length": 24,
        "head_width": 0,
        "epochs": 6,
        "evaluations": 6,
        "batch_size": 50,
        "learning_rate": 2e-3,
    },
    tasks=lambda values: len(BY_FREQUENCY[: values["emotions"]]),
    build=_go_emotions,
    fingerprint=_fingerprint,
    metrics=BINARY_METRICS,
    compared=BINARY_COMPARED,
    spaces={"share": SHARES_ON_HEADS},
    place=HUB_ID,
    parts=("encoder",),
)
