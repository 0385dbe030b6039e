"""Loading a file of weights into the backbone."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.libraries import need
from ...shared.looking import first_line
from ..errors import CheckpointError, CheckpointNotFoundError
from .probing import calls_noted, published_config, published_names

#: Of names behind wrappers for several devices and compiled code.
_WRAPPERS = re.compile(r"^(_orig_mod\.)?(module\.)?(_orig_mod\.)?")
#: Of names in a saved multi-task model.
_OF_BACKBONE = "backbone.model."


def load_backbone(model: nn.Module, path: str | os.PathLike[str], in_chans: int) -> None:
    """Load a timm checkpoint (``.safetensors``, ``.pth``, ...) into a timm model without classifier.

    As timm does for pretrained weights: names of other formats are translated, position embeddings resized, the first
    convolution adapted to the number of channels; weights of a classifier, and of the heads of a multi-task model, are left
    out.
    """
    timm = need("timm")
    file = Path(path)
    if not file.is_file():
        raise CheckpointNotFoundError(
            f"there is no file {str(file)!r}. Pass checkpoint_path= with the path of a .safetensors or .pth file."
        )
    try:
        state = _state_in(file)
    except Exception as error:  # whatever a reader makes of it
        raise CheckpointError(
            f"{str(file)!r} could not be read as weights ({type(error).__name__}: {first_line(error)}). Expected a "
            ".safetensors file, or a .pth file of tensors: torch.save(model.state_dict(), path)."
        ) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{str(file)!r} holds no tensors but {list(state)[:4]}. Expected a state_dict: torch.save(model.state_dict(), "
            "path)."
        )
    if any(name.startswith(_OF_BACKBONE) for name in tensors):  # a whole multi-task model
        tensors = {
            name.removeprefix(_OF_BACKBONE): value for name, value in tensors.items() if name.startswith(_OF_BACKBONE)
        }
    own = model.state_dict()
    as_it_is = all(name in tensors and tensors[name].shape == value.shape for name, value in own.items())
    translate = None if as_it_is else getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    config = {**published_config(model), "state_dict": tensors, "source": "", "custom_load": False}
    options = {"num_classes": 0, "in_chans": in_chans, "filter_fn": translate, "strict": False}
    try:
        with calls_noted(model, "load_state_dict") as calls:
            timm.models.load_pretrained(model, config, **options)
    except Exception as error:
        raise _of_another(model, file, first_line(error)) from error
    _, _, result = calls[-1]
    missing, unexpected = result.missing_keys, _unexpected(model, result.unexpected_keys)
    if missing or unexpected:
        found = [f"{len(missing)} tensors are missing ({', '.join(missing[:3])})"] if missing else []
        found += [f"{len(unexpected)} have no place ({', '.join(unexpected[:3])})"] if unexpected else []
        raise _of_another(model, file, "; ".join(found))


def _state_in(file: Path) -> dict[str, Any]:
    """Read a file as timm does: the averaged weights of a training checkpoint, if it has some. No code of it ever runs.

    Not by timm, some versions of which unpickle whatever is there.
    """
    if file.suffix == ".safetensors":
        found: Any = need("safetensors.torch").load_file(str(file))
    else:
        allowing: Any = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
        with allowing([argparse.Namespace]):  # the options of a training, beside its weights
            found = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    return {_WRAPPERS.sub("", name): value for name, value in found.items()}


def _unexpected(model: nn.Module, names: list[str]) -> list[str]:
    """Return the names that point into the backbone; those of classifiers and of auxiliary heads do not."""
    classifiers = published_names(model, "classifier")
    children = {name for name, child in model.named_children() if any(True for _ in child.parameters())}
    return [
        name
        for name in names
        if name.partition(".")[0] in children and not any(name.startswith(f"{part}.") for part in classifiers)
    ]


def _of_another(model: nn.Module, file: Path, reason: str) -> CheckpointError:
    architecture = published_config(model).get("architecture", type(model).__name__)
    return CheckpointError(
        f"{str(file)!r} is no checkpoint of {architecture!r}: {reason}. Pass the name of the model that it was saved from, "
        "with the same backbone_options=."
    )
