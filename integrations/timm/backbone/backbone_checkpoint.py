"""Loading a file of weights into the backbone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...shared.libraries import need
from ...shared.looking import first_line
from ..errors import CheckpointError, CheckpointNotFoundError

#: Of names in a saved multi-task model.
_OF_BACKBONE = "backbone.model."


def load_backbone(model: nn.Module, path: str | os.PathLike[str], in_chans: int) -> None:
    """Load a timm checkpoint (``.safetensors``, ``.pth``, ...) into a timm model without classifier.

    As timm does for pretrained weights: names of other formats are translated, position embeddings resized, the first
    convolution adapted to the number of channels; weights of a classifier, and of the heads of a multi-task model, are left
    out.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: it is no checkpoint, or that of another architecture.
    """
    timm = need("timm")
    file = Path(path)
    if not file.is_file():
        raise CheckpointNotFoundError(
            f"there is no file {str(file)!r}. Pass checkpoint_path= with the path of a .safetensors or .pth file."
        )
    try:
        state: dict[str, Any] = timm.models.load_state_dict(str(file))
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
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    config.update(state_dict=tensors, source="", custom_load=False)
    results: list[Any] = []
    note: Any = model.register_load_state_dict_post_hook
    handle = note(lambda _, keys: results.append(keys))
    try:
        timm.models.load_pretrained(model, config, num_classes=0, in_chans=in_chans, filter_fn=translate, strict=False)
    except Exception as error:
        raise _of_another(model, file, first_line(error)) from error
    finally:
        handle.remove()
    missing = list(results[-1].missing_keys)
    unexpected = _unexpected(model, list(results[-1].unexpected_keys), config.get("classifier"))
    if missing or unexpected:
        found = [f"{len(missing)} tensors are missing ({', '.join(missing[:3])})"] if missing else []
        found += [f"{len(unexpected)} have no place ({', '.join(unexpected[:3])})"] if unexpected else []
        raise _of_another(model, file, "; ".join(found))


def _unexpected(model: nn.Module, names: list[str], classifier: Any) -> list[str]:
    """Names that point into the backbone; those of classifiers and of auxiliary heads do not."""
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    children = {name for name, child in model.named_children() if any(True for _ in child.parameters())}
    return [
        name
        for name in names
        if name.partition(".")[0] in children and not any(name.startswith(f"{part}.") for part in classifiers)
    ]


def _of_another(model: nn.Module, file: Path, reason: str) -> CheckpointError:
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture", type(model).__name__)
    return CheckpointError(
        f"{str(file)!r} is no checkpoint of {architecture!r}: {reason}. Pass the name of the model that it was saved from, "
        "with the same backbone_options=."
    )
