"""The encoders of the recipes on emotions: a small one with new weights, or any of the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel

from ..data.texts.tokens import trained_tokenizer
from ..runtime.errors import DataError, need

__all__ = ["SMALL", "EncoderTasks", "small_encoder", "tokenizer_of"]

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


def tokenizer_of(encoder: str, texts: Sequence[str], vocabulary: int) -> Any:
    """That of the encoder; for :data:`SMALL` one that is learned from the training texts.

    Raises:
        DataError: there is none, or it could not be loaded.
    """
    if encoder == SMALL:
        return trained_tokenizer(tuple(texts), vocabulary)
    try:
        return need("transformers").AutoTokenizer.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"the tokenizer of {encoder!r} could not be loaded ({reason}). Pass a folder that save_pretrained() has "
            "written, or the id of an encoder on the hub."
        ) from error


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
