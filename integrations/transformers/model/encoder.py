"""Any encoder of transformers: loading it, building it again, and running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import ShapeError, WrongTypeError
from ....torch_tools import warn_user
from ...shared.libraries import need
from ...shared.looking import first_line, undisturbed
from ..errors import EncoderError, PretrainedWeightsError, TokenizerMismatchError

_MOST_LAYERS = 1000


@dataclass
class Encoded:
    """What the heads read."""

    #: ``[B, L, C]``, the last hidden state, its positions in a row.
    hidden: Tensor
    #: ``[B, L]``, true at real positions, or ``None`` if all are.
    mask: Tensor | None
    #: ``[B, C]``, the encoder's own pooled output, if it has one.
    pooler: Tensor | None
    hidden_states: Any = None
    attentions: Any = None


def load_encoder(name: str, **options: Any) -> Any:
    """Call ``AutoModel.from_pretrained`` with a hub id or a folder."""
    try:
        return need("transformers").AutoModel.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, need("safetensors").SafetensorError) as error:
        is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        reason = f"{type(error).__name__}: {first_line(error)}"
        if is_path and not Path(name).is_dir():
            reason = "there is no such folder"
        raise PretrainedWeightsError(
            f"the encoder {name!r} could not be loaded ({reason.rstrip('.')}). Pass a folder that "
            "save_pretrained() has written, or the id of a model on the hub; for random weights, a configuration: "
            "MultiTaskModel.from_encoder(AutoConfig.for_model('bert'), heads)."
        ) from error


def as_encoder(model: Any) -> tuple[Any, str, str]:
    """Return ``(encoder, name of its class, part)`` of a model: without its classifier, and without a decoder."""
    transformers = need("transformers")
    if not isinstance(model, transformers.PreTrainedModel):
        raise WrongTypeError(
            f"encoder must be a hub id, a folder, a configuration or a model of transformers, found {type(model).__name__}. "
            "For any other backbone use SaliencyRegularizer(model, heads=...)."
        )
    whole = model if _is_base(type(model).__name__) else model.base_model
    name = type(whole).__name__
    if not hasattr(transformers, name):
        raise EncoderError(
            f"{name} cannot be built again from its configuration: transformers does not export it. Pass the whole model "
            "(AutoModel.from_config(config)); the decoder of an encoder-decoder is left out for you."
        )
    if getattr(whole.config, "is_encoder_decoder", False):
        return whole.get_encoder(), name, "encoder"
    return whole, name, "whole"


def check_has_model(config: Any) -> None:
    """Raise :class:`EncoderError` if ``AutoModel`` has no model for this configuration; none is built for that."""
    if type(config) not in need("transformers").models.auto.modeling_auto.MODEL_MAPPING:
        raise EncoderError(
            f"transformers has no encoder for {type(config).__name__}: AutoModel does not know it. Choose another "
            "configuration, such as AutoConfig.from_pretrained(name), or pass a model."
        )


def build_encoder(config: Any, class_name: str | None, part: str) -> Any:
    """Return an encoder with new weights."""
    transformers = need("transformers")
    if class_name is None:
        check_has_model(config)
    _check_layers(config)
    try:
        own: Any = getattr(transformers, class_name, None) if class_name is not None else None
        if own is not None and not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
            raise EncoderError(
                f"encoder_class={class_name!r} is no class of models in transformers. Pass the name of one, such as "
                "'BertModel', or leave it out for that of AutoModel."
            )
        model = transformers.AutoModel.from_config(config) if own is None else own._from_config(config)  # type: ignore[attr-defined]
    except ValueError as error:
        raise EncoderError(
            f"no encoder could be built from this {type(config).__name__} ({first_line(error)}). Choose another "
            "configuration."
        ) from error
    if part == "encoder" or (class_name is None and getattr(config, "is_encoder_decoder", False)):
        return model.get_encoder()
    return model


def _check_layers(config: Any) -> None:
    """Refuse numbers of layers that would be built for hours, in parts of a configuration too."""
    for name, value in vars(config).items():
        if isinstance(value, need("transformers").PretrainedConfig):
            _check_layers(value)
        elif name.endswith(("layer", "layers", "depth", "depths")):
            number = sum(
                one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, int)
            )
            if number > _MOST_LAYERS:
                raise EncoderError(f"{name} must be at most {_MOST_LAYERS}, found {number}. Pass the number of layers.")


def _is_base(name: str) -> bool:
    """Whether ``AutoModel`` builds models of this class: they have no classifier."""
    names = need("transformers").models.auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    return any(name in own if isinstance(own, (list, tuple)) else name == own for own in names)


def is_decoder_only(config: Any) -> bool:
    """Whether each position sees those before it alone, so that only the last one has seen all."""
    auto = need("transformers").models.auto.modeling_auto
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False) or "Encoder" in str(auto.MODEL_MAPPING_NAMES.get(kind)):
        return False
    masked = {**auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in masked


def hidden_width_of(encoder: Any) -> int:
    """Return the channels of the last hidden state: by the configuration, or else, for images, by a blank one."""
    config = encoder.config
    for name in ("hidden_sizes", "hidden_size", "d_model", "hidden_dim", "embed_dim"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    towers = [name for name in ("text_config", "vision_config", "audio_config") if hasattr(config, name)]
    if len(towers) > 1:
        raise EncoderError(
            f"{type(encoder).__name__} has several towers ({', '.join(towers)}), and its configuration does not tell how "
            "many channels a last hidden state of all has. Take one tower, such as CLIPVisionModel or CLIPTextModel; if "
            "there is such a state, pass hidden_width= with its channels."
        )
    if getattr(encoder, "main_input_name", None) == "pixel_values":
        return _width_of_map(encoder)
    raise EncoderError(
        f"{type(config).__name__} does not tell how many channels the last hidden state has. Pass hidden_width= with it."
    )


def _width_of_map(encoder: Any) -> int:
    """Run encoders of images that return a map ``[B, C, H, W]``, and whose stages the configuration does not count."""
    like = next(p for p in encoder.parameters() if p.is_floating_point())
    reason = ""
    for size in (getattr(encoder.config, "image_size", 224), 64, 224):
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        images = like.new_zeros(1, getattr(encoder.config, "num_channels", 3), height, width)
        try:
            with undisturbed(encoder), torch.no_grad():
                hidden = encoder(images, return_dict=True).last_hidden_state
        except (RuntimeError, ValueError, AttributeError) as error:  # too small for it, or no hidden state
            reason = first_line(error)
        else:
            return int(hidden.shape[1] if hidden.ndim == 4 else hidden.shape[-1])
    raise EncoderError(
        f"{type(encoder).__name__} could not be run on a blank image ({reason}), and its configuration does not tell how "
        "many channels its last hidden state has. Pass hidden_width= with it."
    )


def encoded(encoder: Any, inputs: dict[str, Any], width: int) -> Encoded:
    """Run an encoder whose last hidden state has ``width`` channels."""
    _check_token_ids(encoder, inputs.get("input_ids"))
    output = encoder(**inputs, return_dict=True)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        names = ", ".join(output.keys()) if hasattr(output, "keys") else type(output).__name__
        raise EncoderError(
            f"{type(encoder).__name__} returns {names}, and no last_hidden_state. Choose an encoder; of a model with two "
            "towers take one, such as CLIPVisionModel or CLIPTextModel."
        )
    pooler = getattr(output, "pooler_output", None)
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.shape[1] == width else hidden.flatten(1, 2)
    if hidden.ndim == 2:
        hidden = hidden.unsqueeze(1)
    if hidden.ndim != 3 or hidden.shape[-1] != width:
        raise ShapeError(
            f"the last hidden state of {type(encoder).__name__} has shape {list(hidden.shape)}, but the heads were built "
            f"for {width} channels. Pass hidden_width={hidden.shape[-1]}."
        )
    if pooler is not None and pooler.ndim != 2:
        pooler = pooler.flatten(1)
    return Encoded(
        hidden,
        mask_of_positions(encoder, inputs.get("attention_mask"), hidden),
        pooler,
        getattr(output, "hidden_states", None),
        getattr(output, "attentions", None),
    )


def mask_of_positions(encoder: Any, attention_mask: Any, hidden: Tensor) -> Tensor | None:
    """Return ``[B, L]``, true at positions of ``hidden [B, L, C]`` that are not padding; ``None`` if nothing tells."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or hidden.ndim != 3:
        return None
    length = hidden.shape[1]
    if attention_mask.shape[1] == length:
        return attention_mask.bool()
    subsampled = getattr(encoder, "_get_feature_vector_attention_mask", None)
    if callable(subsampled) and attention_mask.shape[1] > length:  # a recording, whose samples become frames
        found: Tensor = subsampled(length, attention_mask)
        return found.bool()
    if attention_mask.shape[1] < length:  # tokens of an image behind those of the text
        more = attention_mask.new_ones(len(attention_mask), length - attention_mask.shape[1])
        return torch.cat([attention_mask, more], dim=1).bool()
    warn_user(
        f"the attention mask has {attention_mask.shape[1]} positions, the hidden state of {type(encoder).__name__} "
        f"{length}: padding cannot be told, and all positions count."
    )
    return None


def _check_token_ids(encoder: Any, ids: Any) -> None:
    """Check on a CPU only: elsewhere it would wait for the device."""
    if not isinstance(ids, Tensor) or ids.device.type != "cpu" or not ids.numel():
        return
    vocabulary = getattr(encoder.config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return
    if ids.is_floating_point():
        raise TokenizerMismatchError(
            f"input_ids must be whole numbers, found {ids.dtype}. Pass what a tokenizer returns."
        )
    low, high = int(ids.min()), int(ids.max())
    embeddings = encoder.get_input_embeddings()
    vocabulary = max(vocabulary, getattr(embeddings, "num_embeddings", 0))
    if low < 0 or high >= vocabulary:
        raise TokenizerMismatchError(
            f"input_ids go from {low} to {high}, but {type(encoder).__name__} has embeddings for 0 to {vocabulary - 1}. Use "
            "the tokenizer of this encoder, AutoTokenizer.from_pretrained(the same name), or after adding tokens "
            "model.resize_token_embeddings(len(tokenizer))."
        )
