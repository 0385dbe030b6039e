"""Creating a timm model, with errors that say what to use instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ....errors import ConfigurationError, WrongTypeError
from ...shared.libraries import need
from ...shared.looking import first_line
from ..errors import PretrainedWeightsError, UnknownModelError

#: Prefixes of names that are no names of timm's own list.
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


def check_model_name(name: object) -> None:
    """Raise an error with near misses if timm does not know the name, with or without a tag of pretrained weights."""
    timm = need("timm")
    if not isinstance(name, str):
        raise WrongTypeError(f"the name of a timm model must be a str, found {type(name).__name__}. Use 'resnet18'.")
    if name.startswith(_SOURCES):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(map(repr, near))}? " if near else ""
        raise UnknownModelError(
            f"timm {timm.__version__} has no model {architecture!r}. {hint}Use one of timm.list_models(), such as "
            "'resnet18', or 'hf-hub:owner/name' for one of the Hugging Face Hub."
        )
    if tag and not _tag_exists(timm, name):
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise UnknownModelError(
            f"{architecture!r} has no pretrained weights with the tag {tag!r}. "
            + (f"Use {architecture + '.' + tags[0]!r} (tags: {', '.join(tags)})." if tags else f"Use {architecture!r}.")
        )


def _tag_exists(timm: Any, name: str) -> bool:
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False) is not None
    except RuntimeError:
        return False


def create_timm_model(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """Call ``timm.create_model(name, pretrained, **options)``; errors tell weights that are missing from refused options."""
    timm = need("timm")
    if pretrained and not name.startswith(_SOURCES):
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if config is None or not config.has_weights:
            raise PretrainedWeightsError(
                f"timm {timm.__version__} has no pretrained weights for {name!r}. Pass pretrained=False, or "
                "checkpoint_path='weights.safetensors' for a file of your own."
            )
    try:
        return timm.create_model(name, pretrained=pretrained, **options)  # type: ignore[no-any-return]
    except Exception as error:  # whatever a constructor or a download raises
        refused = _refusal(timm, name, options) if pretrained else error
        if refused is None:
            raise PretrainedWeightsError(
                f"the pretrained weights of {name!r} could not be loaded ({type(error).__name__}: {first_line(error)}). "
                "Without a connection, download the file elsewhere and pass checkpoint_path='weights.safetensors'; or "
                "pass pretrained=False for random weights."
            ) from error
        given = ", ".join(f"{option}={value!r}" for option, value in options.items() if option != "num_classes")
        raise ConfigurationError(
            f"timm could not build {name!r} ({type(refused).__name__}: {first_line(refused)}). Options: {given}. Leave out "
            "the one that it names (backbone_options=, drop_path_rate=, image_size=, in_chans=), or choose another model."
        ) from refused


def _refusal(timm: Any, name: str, options: Mapping[str, Any]) -> Exception | None:
    """Return why the model cannot be built without weights either; ``None`` if it can."""
    try:
        timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        return error
    return None
