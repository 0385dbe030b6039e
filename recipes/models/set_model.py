"""Tokenizer and model for several sets of texts, checked against their texts before a training begins."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel

from ..data.task_kinds import TaskKind
from ..data.texts.text_sets import Rows, TextSet
from ..data.texts.tokens import trained_tokenizer, unknown_share
from ..runtime.errors import OptionError, need
from .text_encoders import SMALL, small_encoder

__all__ = ["build_model", "check_inputs", "encode", "fitting_tokenizer"]


def fitting_tokenizer(name: str, sets: Sequence[TextSet], vocabulary: int) -> Any:
    """A WordPiece tokenizer learned from all training texts for :data:`SMALL`, otherwise one of the hub or of a folder.

    Raises:
        OptionError: it could not be loaded, or cannot pad.
    """
    if name == SMALL:
        training = [own.splits["train"] for own in sets]
        texts = [text for rows in training for text in (*rows.texts, *(rows.pairs or ()))]
        learned = trained_tokenizer(tuple(texts), vocabulary)
        # A copy, because the learned one is shared with whoever learns from the same texts.
        backend = copy.deepcopy(learned.backend_tokenizer)
        backend.post_processor = need("tokenizers").processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, learned.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")],
        )
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        return need("transformers").PreTrainedTokenizerFast(
            tokenizer_object=backend, model_input_names=inputs, **learned.special_tokens_map
        )
    try:
        tokenizer = need("transformers").AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of the network, the hub, files, or missing packages: many kinds
        raise OptionError(
            f"no tokenizer could be loaded from {name} ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Use "
            "--tokenizer with the id or folder of the encoder's tokenizer."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OptionError(f"the tokenizer of {name} has no token for padding. Pass another --tokenizer.")
        tokenizer.pad_token = tokenizer.eos_token  # never read: it is masked
    return tokenizer


def encode(tokenizer: Any, rows: Rows, max_length: int) -> list[dict[str, list[int]]]:
    """Inputs of each row; pairs become one sequence."""
    pairs = None if rows.pairs is None else list(rows.pairs)
    found = tokenizer(list(rows.texts), pairs, truncation=True, max_length=max_length)
    return [dict(zip(found.keys(), values)) for values in zip(*found.values())]


def build_model(
    encoder: str,
    sets: Sequence[TextSet],
    tokenizer: Any,
    *,
    head_width: int,
    width: int,
    layers: int,
    max_length: int,
    seed: int,
) -> Any:
    """A :class:`MultiTaskModel` with a head for each set, whose new weights come from the seed.

    Raises:
        PretrainedWeightsError: the encoder could not be loaded.
        SaliencyRegError: it cannot be the encoder of such a model.
    """
    hidden = (head_width,) if head_width else ()
    heads = {own.name: _head(own.kind, own.classes, hidden) for own in sets}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if encoder == SMALL:
            own = small_encoder(len(tokenizer), width=width, layers=layers, max_length=max_length)
            return MultiTaskModel.from_encoder(own, heads)
        return MultiTaskModel.from_encoder(encoder, heads)


def _head(kind: TaskKind, classes: tuple[str, ...], hidden: tuple[int, ...]) -> Any:
    if kind.name == "number":
        return HeadConfig(1, problem="regression", hidden=hidden)
    return HeadConfig(kind.classes, problem="single_label", hidden=hidden, labels=classes)


def check_inputs(model: Any, tokenizer: Any, encodings: Sequence[Mapping[str, Any]], collate: Any) -> None:
    """Run the longest text and the one with the largest token id, so that what does not fit is said before the training.

    Raises:
        OptionError: texts that are longer than the encoder reads, or that the tokenizer does not know.
        TokenizerMismatchError: tokens that the encoder does not know.
    """
    longest = max(encodings, key=lambda own: len(own["input_ids"]))
    largest = max(encodings, key=lambda own: max(own["input_ids"], default=0))
    if not longest["input_ids"]:
        raise OptionError(f"{type(tokenizer).__name__} makes no tokens of these texts. Pass another --tokenizer.")
    unknown = unknown_share(tokenizer, (own["input_ids"] for own in encodings))
    if unknown > 0.5:
        raise OptionError(
            f"{100 * unknown:.0f} % of the tokens of these texts are unknown to {type(tokenizer).__name__}, which has "
            f"{len(tokenizer)} tokens. Use --tokenizer with the id or folder of the encoder's tokenizer."
        )
    batch = collate([longest, largest])
    training = model.training
    model.eval()
    try:
        _forward(model, batch)
    except (IndexError, RuntimeError) as error:
        try:
            _forward(model, {name: value[:, :2] for name, value in batch.items()})
        except (IndexError, RuntimeError):
            raise error from None  # it is not the length
        raise OptionError(
            f"{type(model.encoder).__name__} cannot read a text of {len(longest['input_ids'])} tokens "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Pass a smaller --max-length."
        ) from error
    finally:
        model.train(training)


@torch.no_grad()
def _forward(model: Any, batch: Mapping[str, Any]) -> None:
    model(**{name: value.to(model.device) for name, value in batch.items()})
