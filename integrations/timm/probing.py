"""Running a model once to look at it, without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["blank_images", "parameters_behind", "undisturbed"]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; after it, modes and random numbers are as before.

    In eval mode nothing updates statistics, and dropout and stochastic depth draw nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def blank_images(model: nn.Module, channels: int, image_size: tuple[int, int], batch_size: int = 1) -> Tensor:
    """``[B, channels, height, width]`` zeros in the model's number format, on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch_size, channels, *image_size, dtype=like.dtype, device=like.device)


def parameters_behind(outputs: Sequence[Any]) -> set[int]:
    """Ids of the leaves that tensors were computed from."""
    waiting = [tensor.grad_fn for tensor in outputs if isinstance(tensor, Tensor) and tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return found
