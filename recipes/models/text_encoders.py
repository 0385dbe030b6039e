"""Models on texts: a small encoder with new weights, or any of the hub, with its tokenizer and a head for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel

from ..data.texts.text_sets import TextSet
from ..data.texts.tokens import check_known, trained_tokenizer
from ..runtime.errors import OptionError, need

SMALL = "small"


def small_encoder(vocabulary: int, *, width: int = 128, layers: int = 2, max_length: int = 64) -> Any:
    """The configuration of a BERT that two cores can train from random weights."""
    return need("transformers").BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=2 * width,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=0,
    )


def tokenizer_of(encoder: str, texts: Sequence[str], vocabulary: int, *, pairs: bool = False) -> Any:
    """Load the tokenizer of an encoder, which can pad; for :data:`SMALL` learn one from the training texts.

    Args:
        encoder: hub id or folder, of the encoder or of a tokenizer alone, or :data:`SMALL`.
        texts: of the training split.
        vocabulary: number of the tokens that are learned.
        pairs: as in :func:`~recipes.data.texts.tokens.trained_tokenizer`.

    Raises:
        OptionError: there is none, it could not be loaded, or it cannot pad.
    """
    if encoder == SMALL:
        return trained_tokenizer(tuple(texts), vocabulary, pairs=pairs)
    try:
        tokenizer = need("transformers").AutoTokenizer.from_pretrained(encoder)
    except Exception as error:  # of the network, the hub, files, or missing packages: many kinds
        raise OptionError(
            f"no tokenizer could be loaded from {encoder} ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Pass a folder that save_pretrained() of the tokenizer has written to, or an id on the hub."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OptionError(f"the tokenizer of {encoder} has no token for padding. Choose another one.")
        tokenizer.pad_token = tokenizer.eos_token  # never read: it is masked
    return tokenizer


class EncoderTasks(nn.Module):
    """A :class:`MultiTaskModel` that takes a batch of tokens as one argument and returns logits by task.

    Args:
        encoder: hub id, folder, or configuration.
        tasks: of the heads.
        hidden: widths of the heads' hidden layers.
        activation: in the heads.
    """

    def __init__(self, encoder: Any, tasks: Sequence[str], hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        head = HeadConfig(hidden=hidden, activation=activation)
        self.model = MultiTaskModel.from_encoder(encoder, list(tasks), head=head)

    @property
    def backbone(self) -> nn.Module:
        """The encoder."""
        encoder: nn.Module = self.model.encoder
        return encoder

    def forward(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{task: [b]}``."""
        logits: dict[str, Tensor] = self.model(**tokens).logits
        return logits


def model_on_sets(encoder: Any, sets: Sequence[TextSet], hidden: tuple[int, ...], seed: int) -> Any:
    """A :class:`MultiTaskModel` with a head for each set, whose new weights come from the seed.

    Args:
        encoder: hub id, folder, or configuration.
        sets: of texts.
        hidden: widths of the heads' hidden layers.
        seed: of the weights.

    Raises:
        PretrainedWeightsError: the encoder could not be loaded.
        SaliencyRegError: it cannot be the encoder of such a model.
    """
    heads = {
        own.name: HeadConfig(1, problem="regression", hidden=hidden)
        if own.kind.name == "number"
        else HeadConfig(own.kind.classes, problem="single_label", hidden=hidden, labels=own.classes)
        for own in sets
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MultiTaskModel.from_encoder(encoder, heads)


def check_inputs(model: Any, tokenizer: Any, encodings: Sequence[Mapping[str, Any]], collate: Any) -> None:
    """Run the longest text and the one with the largest token id, so that what does not fit is said before the training.

    Args:
        model: a :class:`MultiTaskModel`.
        tokenizer: of its encoder.
        encodings: inputs of all texts.
        collate: makes a batch of some of them.

    Raises:
        OptionError: texts without tokens, or that are longer than the encoder reads.
        DataError: texts that the tokenizer does not know.
        TokenizerMismatchError: tokens that the encoder does not know.
    """
    longest = max(encodings, key=lambda own: len(own["input_ids"]))
    largest = max(encodings, key=lambda own: max(own["input_ids"], default=0))
    if not longest["input_ids"]:
        raise OptionError(f"{type(tokenizer).__name__} makes no tokens of these texts. Pass another --tokenizer.")
    check_known(tokenizer, (own["input_ids"] for own in encodings))
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
