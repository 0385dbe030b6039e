"""Data sets of texts: GoEmotions."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ....data.task_kinds import BINARY, TaskKind
from ....data.texts.emotions import EMOTIONS, HUB_ID, LabelledTexts, emotion_splits, fingerprint
from ....data.texts.tokens import TokenisedTexts
from ....models.architectures.blueprint import Blueprint
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


def encoder_blueprint(
    values: Mapping[str, Any], texts: Sequence[str], kinds: Mapping[str, TaskKind]
) -> tuple[Any, Blueprint]:
    """A tokenizer, and an encoder with its pooling as the backbone: one with new weights, or a pretrained one by name.

    Args:
        values: ``encoder``, ``head_width``, ``activation``; of a small one with new weights also ``vocabulary``, ``width``,
            ``layers`` and ``max_length``.
        texts: of the training split, from which the small one learns its vocabulary.
        kinds: of the tasks.
    """
    # Not above: only what has texts needs transformers, which takes seconds to import.
    from ....models.pooled_encoder import PooledEncoder
    from ....models.text_encoders import small_encoder, tokenizer_of

    tokenizer = tokenizer_of(values["encoder"], texts, values["vocabulary"])
    encoder: Any = values["encoder"]
    if encoder == SMALL:
        sizes = {name: values[name] for name in ("width", "layers", "max_length")}
        encoder = small_encoder(len(tokenizer), **sizes)
    with torch.random.fork_rng(devices=[]):
        width = PooledEncoder(encoder).width
    make = functools.partial(PooledEncoder, encoder)
    return tokenizer, blueprint_of(kinds, make, width, values["head_width"], values["activation"])


def _go_emotions(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    sizes = {name: values[name] for name in ("train_texts", "validation_texts", "labelled")}
    splits = emotion_splits(folder_of(place, "go_emotions"), seed=seed, **sizes)
    emotions = BY_FREQUENCY[: values["emotions"]]
    columns = [EMOTIONS.index(name) for name in emotions]
    kinds = dict.fromkeys(emotions, BINARY)
    tokenizer, blueprint = encoder_blueprint(values, splits.train.texts, kinds)

    def tokenised(own: LabelledTexts) -> TokenisedTexts:
        return TokenisedTexts(tokenizer, own.texts, own.labels[:, columns], values["max_length"])

    test = splits.test
    if values["test_texts"] is not None and values["test_texts"] < len(test):
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        test = test.rows(order[: values["test_texts"]])
    return Problem(kinds, tokenised(splits.train), tokenised(splits.validation), tokenised(test), blueprint)


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
