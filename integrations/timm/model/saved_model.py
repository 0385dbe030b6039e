"""The folder of a saved multi-task model: ``model.safetensors`` and ``config.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....errors import ConfigurationError, SaliencyRegError
from ....torch_tools import whole_number
from ...shared.libraries import need
from ...shared.looking import first_line
from ..errors import CheckpointError, CheckpointNotFoundError
from .head_config import HeadConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT = "saliency_reg.integrations.timm"
#: Sides of images, and other numbers of a configuration, up to which they are not compared with the weights.
_LARGEST_SIDE, _NOT_COMPARED = 4096, 512
#: Of the file format, raised when older code could not read it.
_VERSION = 1


def save_model(
    model: nn.Module, description: Mapping[str, Any], heads: Mapping[str, HeadConfig], folder: str | os.PathLike[str]
) -> None:
    """Write both files, each at once or not at all."""
    safetensors = need("safetensors.torch")
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "timm": need("timm").__version__,
        "torch": str(torch.__version__),
        **description,
        "dtype": str(_dtype_of(model)).removeprefix("torch."),
        "heads": [{"task": task, **dataclasses.asdict(config)} for task, config in heads.items()],
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the options of this model cannot be written as JSON ({first_line(error)}). Give names in place of objects: "
            "backbone_options={'act_layer': 'silu'}, or save model.state_dict() yourself."
        ) from error
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with _replacing(target / WEIGHTS) as temporary:
        try:
            safetensors.save_model(model, str(temporary))
        except Exception as error:  # a SafetensorError, which is no class of its own in all versions
            raise CheckpointError(
                f"{str(target / WEIGHTS)!r} could not be written ({first_line(error)}). Make room, or save to "
                "another folder."
            ) from error
    with _replacing(target / CONFIG) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, HeadConfig]]:
    """Return arguments that build the model again, its number format as ``"dtype"``, and the configurations of its heads."""
    path = _existing(folder, CONFIG)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no JSON ({first_line(error)}). Save the model again with model.save(folder)."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is not the configuration of a TimmMultiTaskModel. Expected a folder that model.save(folder) has "
            "written; for a timm checkpoint use TimmMultiTaskModel(name, heads, checkpoint_path=...)."
        )
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{str(path)!r} has version {content.get('version')!r} of the format, expected {_VERSION}. Update saliency-reg."
        )
    try:
        size = content["image_size"]
        as_they_are = ("name", "in_chans", "drop_rate", "drop_path_rate", "backbone_options")
        description = {name: content[name] for name in as_they_are}
        description["image_size"] = None if size is None else tuple(size)
        whole_number("in_chans", description["in_chans"], least=1)
        description["dtype"] = _dtype_named(content["dtype"])
        description["pools_apart"] = bool(content.get("pools_apart", False))
        heads = {}
        for entry in content["heads"]:
            options = {name: value for name, value in entry.items() if name != "task"}
            heads[entry["task"]] = HeadConfig(**options)
        if len(heads) < len(content["heads"]):
            raise ValueError("a task occurs twice")
        _check_sizes({**description, "dtype": None, "heads": content["heads"]}, _existing(folder, WEIGHTS))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SaliencyRegError) as error:
        raise CheckpointError(
            f"{str(path)!r} lacks an entry or has a wrong one ({type(error).__name__}: {first_line(error)}). Save the model "
            "again with model.save(folder)."
        ) from error
    return description, heads


def _check_sizes(description: Mapping[str, Any], weights: Path) -> None:
    """Refuse numbers that no model with these weights has: it would be built for ever, or not fit into the memory."""
    try:
        with need("safetensors").safe_open(str(weights), framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except Exception as error:  # a SafetensorError, which is no class of its own in all versions
        raise _unreadable(weights, error) from error
    found = max([len(shapes), *(side for shape in shapes for side in shape)])
    for name, value in description.items():
        most = max(found, _LARGEST_SIDE if name == "image_size" else _NOT_COMPARED)
        if (largest := max(_numbers_in(value), default=0)) > most:
            raise ValueError(f"{name} has {largest:g}, more than any size in {weights.name}, at most {most}")


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _numbers_in(one)
    elif isinstance(value, (int, float)):
        yield abs(value)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _dtype_named(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"dtype is {name!r}, expected a floating-point one")
    return found


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the weights into a model that was built as the saved one."""
    path = _existing(folder, WEIGHTS)
    try:
        missing, unexpected = need("safetensors.torch").load_model(model, str(path), strict=False)
    except RuntimeError as error:
        raise _of_another(path, first_line(error)) from error
    except Exception as error:  # a SafetensorError, which is no class of its own in all versions
        raise _unreadable(path, error) from error
    if missing or unexpected:
        raise _of_another(path, f"missing {sorted(missing)[:3]}, without a place {sorted(unexpected)[:3]}")


def _existing(folder: str | os.PathLike[str], name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        there = sorted(entry.name for entry in Path(folder).iterdir()) if Path(folder).is_dir() else None
        found = "there is no such folder" if there is None else f"the folder holds {there[:6]}"
        raise CheckpointNotFoundError(
            f"{str(path)!r} is missing ({found}). Pass the folder that model.save(folder) has written, with {CONFIG} and "
            f"{WEIGHTS}."
        )
    return path


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} could not be read ({type(error).__name__}: {first_line(error)}). The file is not whole: save or "
        "copy it again."
    )


def _of_another(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} holds the weights of another model than {CONFIG} describes: {reason}. Keep both files of one "
        "model.save(folder) together."
    )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path``, which takes its place at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors lets nobody else read it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
